"""The documentation says what the program says."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_page_is_the_help_of_every_command(monkeypatch):
    monkeypatch.delenv("EVOMERGE_STORAGE", raising=False)
    monkeypatch.delenv("EVOMERGE_RESULTS", raising=False)
    make_cli = load(DOCS / "make_cli.py")
    if sys.version_info[:2] != make_cli.PYTHON:
        pytest.skip("argparse lays its help out differently in this version of Python")
    assert (DOCS / "CLI.md").read_text(encoding="utf-8") == make_cli.cli_page(), "run `make docs`"


def test_the_study_file_page_describes_every_key():
    make_study_file = load(DOCS / "make_study_file.py")
    page = (DOCS / "STUDY_FILE.md").read_text(encoding="utf-8")
    assert page == make_study_file.study_file_page(), "run `make docs`"
    assert make_study_file.SCHEMA.read_text(encoding="utf-8") == make_study_file.schema_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_path_in_the_architecture_page_exists():
    text = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:/|\.py))`", text)
    places = [ROOT, ROOT / "evomerge", *(ROOT / "evomerge").glob("*/")]
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_every_function_in_the_life_of_a_candidate_exists():
    members, functions = set(), set()
    for path in (ROOT / "evomerge").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            functions.add(getattr(node, "name", None))
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef):
                    members.add(f"{node.name}.{member.name}")
    text = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8")
    life = text.split("## The life of a candidate")[1].split("## The packages")[0]
    named = re.findall(r"`([A-Z][A-Za-z]+)\.(\w+)`((?:, `\w+`)*)", life)
    assert len(named) > 15
    for name, member, others in named:
        for each in (member, *re.findall(r"\w+", others)):
            assert f"{name}.{each}" in members or each in functions, f"{name}.{each}"


def test_the_version_is_the_changelog_s_newest():
    from evomerge import __version__

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[?([0-9.]+)\]? - (\S+)$", changelog, re.M).groups()
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version == __version__
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation
