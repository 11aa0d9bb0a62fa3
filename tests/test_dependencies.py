"""Every package that evomerge imports is declared with a range, in the core or in an extra."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "evomerge"
# files that `export --runner` writes; they import what that machine has
SHIPPED = PACKAGE / "reporting" / "templates"
# declared without an import of ours
INDIRECT = {
    "accelerate": "transformers places a model on several devices with it",
    "mergekit": "runs as a process",
    "protobuf": "transformers reads tokenizer.model with it",
    "sentencepiece": "transformers reads tokenizer.model with it",
    "unidic-lite": "fugashi's dictionary",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = packages_distributions()


def requirements(lines):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


CORE = requirements(PROJECT["dependencies"])
EXTRAS = {name: requirements(lines) for name, lines in PROJECT["optional-dependencies"].items()}
# the other extras are for development and benchmarks
OPTIONAL = {n for extra in EXTRAS.keys() - {"dev", "real-pair"} for n in EXTRAS[extra]}


def imported(path):
    """(top-level module, not run on import) of every import of another package in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    for outer in ast.walk(tree):
        function = isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        if function or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)):
            inside |= {id(node) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "evomerge":
                yield top, id(node) in inside


def distributions(module):
    """The distributions that provide a module; one that is not installed is called like it."""
    return {canonicalize_name(name) for name in DISTRIBUTIONS.get(module, [module])}


@pytest.fixture(scope="module")
def every_import():
    """(file, module, not run on import) of the whole package."""
    return [
        (path.relative_to(ROOT), module, inside)
        for path in sorted(PACKAGE.rglob("*.py"))
        if SHIPPED not in path.parents
        for module, inside in imported(path)
    ]


def test_every_imported_package_is_declared(every_import):
    missing = [
        f"{path} imports {module}"
        for path, module, inside in every_import
        if not distributions(module) & (CORE.keys() | (OPTIONAL if inside else set()))
    ]
    assert not missing, "declare it in pyproject.toml; an extra's import stands in a function"


def test_every_declared_package_is_imported(every_import):
    used = set().union(*(distributions(module) for _, module, _ in every_import))
    assert not (CORE.keys() | OPTIONAL) - used - INDIRECT.keys()


def test_every_requirement_has_a_range():
    everything = [CORE, *EXTRAS.values()]
    assert not [str(r) for found in everything for r in found.values() if not r.specifier]


def test_the_pinned_versions_satisfy_the_ranges():
    pins = requirements(
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    wrong = [
        f"{name}: {pins[name]} is not in {requirement.specifier}"
        for found in [CORE, *EXTRAS.values()]
        for name, requirement in found.items()
        if name in pins
        and not requirement.specifier.contains(next(iter(pins[name].specifier)).version)
    ]
    assert not wrong
    assert not [name for name in CORE.keys() | EXTRAS["dev"].keys() if name not in pins]
