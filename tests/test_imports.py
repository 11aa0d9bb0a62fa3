"""Imports run one way, names are unique, files stay short, and what must stay light stays light."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "evomerge"
ORDER = [
    ["masking", "errors", "console", "once", "files", "finished", "outputs"],
    ["sqlite_file", "text", "yaml_json"],
    ["sheets"],
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
    ["api"],
    ["cli"],
    ["__main__"],
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MAY_IMPORT = {
    "transformers": ("answering", "merging", "demo"),
    "lm_eval": ("answering",),
    "optuna": ("searching", "reporting"),  # reporting: Optuna's plots
    "cmaes": ("searching",),
}
MANY_MEANINGS = {
    "__init__": "every folder has one",
    "judge": "each folder of judging/ holds the judge that it is named after",
    "engine": "each folder of answering/ holds the engine that it is named after",
    "loading": "each engine loads its model",
}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SHIPPED = ROOT / "reporting" / "templates"  # data: files that exports write
TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.rglob("*.py"))
    if SHIPPED not in path.parents
}


def imports(tree):
    """The modules that a file imports when it runs; a submodule by its own name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & TREES.keys() or {node.module}
        yield from imports(node)


IMPORTS = {name: set(imports(tree)) for name, tree in TREES.items()}
# the package itself is the public API: it imports from everywhere, inside functions
PAIRS = [(name, other) for name in IMPORTS if name != "evomerge" for other in IMPORTS[name]]


def room(name):
    return name.split(".")[1]


def test_imports_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, other in PAIRS
        if other.startswith("evomerge.") and RANK[room(other)] > RANK[room(name)]
    ]
    assert not wrong


def test_no_two_files_import_each_other_in_a_circle():
    graph = {name: IMPORTS[name] - {name, "evomerge"} for name in IMPORTS if name != "evomerge"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_heavy_libraries_stay_in_their_rooms():
    wrong = [
        f"{name} imports {other}"
        for name, other in PAIRS
        if room(name) not in MAY_IMPORT.get(other.split(".")[0], (room(name),))
    ]
    assert not wrong


def test_no_file_name_stands_for_two_things():
    places = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        if SHIPPED not in path.parents:
            places[path.stem].append(str(path.relative_to(ROOT)))
    twice = {stem: found for stem, found in places.items() if len(found) > 1}
    assert not {stem: found for stem, found in twice.items() if stem not in MANY_MEANINGS}
    assert twice.keys() == MANY_MEANINGS.keys(), "an exception that is no longer needed goes"


def test_no_class_name_stands_for_two_things():
    places = defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_file_is_longer_than_300_lines():
    long = {}
    for path in sorted(ROOT.rglob("*.py")):  # what exports write as well
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 300:
            long[str(path.relative_to(ROOT))] = lines
    assert not long


def test_no_function_is_longer_than_60_lines():
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long[f"{name}.{node.name}"] = lines
    assert not long


def test_light_modules_import_no_torch():
    light = "import sys, evomerge.cli, evomerge.recipe, evomerge.judging.rules.judge"
    code = f"{light}; sys.exit(bool({{'torch', 'optuna', 'pydantic'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
