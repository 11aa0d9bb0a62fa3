"""Building the demo pair in a folder: base/, instruct/, tasks.jsonl and its study file."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from evomerge.demo.model import make_model, make_tokenizer
from evomerge.demo.skills import ExampleSampler, make_tasks
from evomerge.demo.training import BASE, SIBLING_STAGES, train
from evomerge.errors import OutputError
from evomerge.files import replace_file
from evomerge.study.shipped import shipped_study

VERSION = 1  # a pair of another version is rebuilt
PARTS = ("base", "instruct", "tasks.jsonl")
STUDY = "study.yaml"
MARKER = "demo.json"  # written last: a folder that holds it holds a finished pair
# The trained bits depend on it; two threads gain little here and lose a lot on a busy machine.
THREADS = 1


def build_demo(out: Path, seed: int = 0, progress: Callable[[str], None] | None = None) -> Path:
    """Train the pair and write base/, instruct/, tasks.jsonl and study.yaml to `out`.

    Takes a minute and a quarter on one free CPU core; the same seed on the same machine gives the
    same bits. A finished pair with this seed is left unchanged, and so is its study file.
    `progress` receives lines of text.
    Raises OutputError: `out` holds something else, or cannot be written.
    """
    out = Path(out)
    mark = {"version": VERSION, "seed": seed}
    found = _marker(out)
    if out.exists() and found is None and not _is_empty_folder(out):
        raise OutputError(
            "is not a demo pair, and would be overwritten",
            where=out,
            remedy="Name a new or empty folder.",
        )
    try:
        if found not in (None, mark):
            _check_own(out)
        if found != mark:
            _build(out, mark, progress or (lambda line: None))
        _write_study(out)
    except OSError as error:
        raise OutputError(
            f"the demo pair could not be written: {error.strerror or error}",
            where=out,
            remedy="Check the free space and the permissions.",
        ) from error
    return out


def _build(out: Path, mark: dict[str, int], progress: Callable[[str], None]) -> None:
    """Build in a folder next to `out`, and rename it at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_pair(draft, mark["seed"], progress)
        (draft / MARKER).write_text(json.dumps(mark) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp makes it private
        if (out / STUDY).exists():  # it may have been changed
            shutil.copyfile(out / STUDY, draft / STUDY)
        if out.exists():
            shutil.rmtree(out)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # after a success it is gone already


def _check_own(out: Path) -> None:
    """Raise OutputError where a pair that is rebuilt lies beside files that are not its own."""
    others = {entry.name for entry in out.iterdir()} - {*PARTS, STUDY, MARKER}
    if others:
        raise OutputError(
            "holds more than a demo pair, and would be replaced",
            where=out,
            found=sorted(others),
            remedy="Name a new or empty folder.",
        )


def _write_study(out: Path) -> None:
    """Write search_spaces/demo.yaml with paths from here, unless a study file is there."""
    file = out / STUDY
    if file.exists():
        return
    lines = shipped_study("demo.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("# yaml-language-server")]
    replace_file(file, lambda path: path.write_text("".join(kept).replace("../demo/", "")))


def _write_pair(folder: Path, seed: int, progress: Callable[[str], None]) -> None:
    tasks = make_tasks(seed)
    lines = [json.dumps(task, ensure_ascii=False) for task in tasks]
    (folder / "tasks.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    examples = ExampleSampler(frozenset(str(task["input"]).partition(":")[2] for task in tasks))
    tokenizer = make_tokenizer()
    with _settings(), torch.enable_grad():
        model = make_model(seed)
        train(model, BASE, examples.base, seed, progress)
        # The sibling starts from the released weights, that is, from the rounded ones: the layers
        # it does not train stay equal to the base's.
        model.bfloat16().save_pretrained(folder / "base")
        torch.nn.Module.to(model, torch.float32)
        draws = (examples.new_skills, examples.brevity)
        for stage, draw in zip(SIBLING_STAGES, draws, strict=True):
            train(model, stage, draw, seed, progress)
        model.bfloat16().save_pretrained(folder / "instruct")
    for name in ("base", "instruct"):
        tokenizer.save_pretrained(folder / name)


@contextmanager
def _settings() -> Iterator[None]:
    """Set the number of threads and hide transformers' progress bars; both are restored."""
    # Any: its functions have no annotations
    bars: Any = transformers_logging
    threads, shown = torch.get_num_threads(), bars.is_progress_bar_enabled()
    torch.set_num_threads(THREADS)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if shown:
            bars.enable_progress_bar()


def _marker(out: Path) -> dict[str, int] | None:
    """What the marker of a finished pair holds, if there is one."""
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
