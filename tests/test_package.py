"""What a built wheel holds."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist')"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, so that nothing is written beside them."""
    place = tmp_path_factory.mktemp("source")
    for name in ("evomerge", "search_spaces"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (place / "dist").glob("*.whl")
    return file


def test_the_wheel_holds_study_files_schema_pages_and_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for file in (ROOT / "search_spaces").iterdir():
        assert f"evomerge/search_spaces/{file.name}" in names
    for file in (ROOT / "evomerge").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_metadata_names_licence_authors_and_versions_of_python(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in metadata.get_all("Classifier")


def test_an_unpacked_wheel_finds_its_study_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from evomerge.study.shipped import shipped_study as s; print(s('demo.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == tmp_path / "evomerge" / "search_spaces" / "demo.yaml"
