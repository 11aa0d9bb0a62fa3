"""The wheel holds search_spaces/ inside the package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

STUDY_FILES = Path(__file__).parent / "search_spaces"


class BuildWithStudyFiles(build_py):
    """Copies the study files next to the modules; an editable install finds them in the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "evomerge", "search_spaces")
            shutil.copytree(STUDY_FILES, target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithStudyFiles})
