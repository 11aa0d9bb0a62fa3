"""Imports run one way, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "evomerge"
ORDER = [
    ["errors", "console", "files", "sqlite_file", "text"],
    ["task_files"],
    ["study", "recipe", "tasks"],
    ["genome"],
    ["merging"],
    ["knowledge"],
    ["answering"],
    ["judging"],
    ["searching"],
    ["inference"],
    ["reporting"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT = {
    "transformers": ("answering", "merging", "demo"),
    "lm_eval": ("answering",),
    "optuna": ("searching",),
    "cmaes": ("searching",),
}


def imports(path):
    """(module, only for type checking) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        n
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test)
        for n in ast.walk(b)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in typing_only
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node in typing_only) for alias in node.names)


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


SHIPPED = ROOT / "reporting" / "templates"  # data: files that exports write
FILES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py" and SHIPPED not in path.parents
]


def test_imports_run_one_way():
    wrong = []
    for path in FILES:
        for module, typing_only in imports(path):
            parts = module.split(".")
            if (
                parts[0] == "evomerge"
                and len(parts) > 1
                and not typing_only
                and RANK[parts[1]] > RANK[room(path)]
            ):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_heavy_libraries_stay_in_their_rooms():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module, typing_only in imports(path)
        if not typing_only and room(path) not in MAY_IMPORT.get(module.split(".")[0], (room(path),))
    ]
    assert not wrong


def test_light_modules_import_no_torch():
    light = "import sys, evomerge.cli, evomerge.recipe, evomerge.judging.rules.judge"
    code = f"{light}; sys.exit(bool({{'torch', 'optuna', 'pydantic'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
