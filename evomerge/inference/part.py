"""OUT.part: the answers of a running inference; and files that appear whole or not at all.

Its first line says what the answers are made from. Then follows a line for each answer, or for
several that arrived together, and one whenever a lack of memory has forced smaller batches. An
incomplete last line, from a kill, is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evomerge.answering.engine import Answer
from evomerge.errors import InputError, OutputError
from evomerge.files import ExclusiveLock, LockHeld, replace_durably

# the header's keys in messages
CALLED = {"model": "model or settings", "batches": "batch size"}
CLASSES = ".classes.jsonl"  # the suffix of the file that says what each task's class was
FIRST = ""  # the round of each task's first answer


def written_files(out: Path) -> list[Path]:
    """Every file that an inference may write for the answers in `out`."""
    part = out.with_name(f"{out.name}.part")
    lock = part.with_name(f"{part.name}.lock")
    made = out.with_name(f"{out.name}.made")
    return [out, out.with_suffix(CLASSES), made, part, lock, lock.with_name(f"{lock.name}.pid")]


class Part:
    """OUT.part, open for appending.

    `rounds` holds round -> task index -> answer, without the number of its tokens; `limits` those
    that a lack of memory has forced on the engine.
    """

    def __init__(
        self, out: Path, header: Mapping[str, str], total: int, overwrite: bool = False
    ) -> None:
        """Open or continue the file; `total` is the number of tasks.

        Raises InputError: the file holds other answers, unless `overwrite` gives them up.
        OutputError: it cannot be written, or another run is writing it.
        """
        self.path = out.with_name(out.name + ".part")
        self.rounds: dict[str, dict[int, Answer]] = {FIRST: {}}
        self.limits: dict[str, int] = {}
        self.total = total
        try:
            if out.exists() and not out.is_file():
                raise OutputError(
                    "is not a regular file", where=out, remedy="Name a file for the answers."
                )
            out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self.error(error) from error
        try:
            self._resume(header, overwrite)
        except BaseException:
            os.close(self.fd)
            self._lock.release()
            raise

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self._lock.release()

    @property
    def answers(self) -> dict[int, Answer]:
        """The first answers."""
        return self.rounds[FIRST]

    def of(self, name: str) -> dict[int, Answer]:
        """The answers of a round, by task index."""
        return self.rounds.setdefault(name, {})

    def add(self, answers: Mapping[int, Answer], name: str = FIRST) -> None:
        """Append answers of a round; they are on the disk when this returns."""
        if not answers:
            return
        record: dict[str, Any] = {
            "batch": list(answers),
            "outputs": [answer.text for answer in answers.values()],
        }
        cut = []
        for i, answer in answers.items():
            if answer.truncated:
                cut.append(i)
        if cut:
            record["cut"] = cut
        thoughts, tokens = {}, {}
        for i, answer in answers.items():
            if answer.thoughts:
                thoughts[i] = answer.thoughts
            if answer.thought_tokens is not None:
                tokens[i] = [answer.tokens, answer.thought_tokens]
        if thoughts:
            record["thoughts"] = thoughts
        if tokens:
            record["tokens"] = tokens
        if name:
            record["round"] = name
        self._append(record)
        self.of(name).update(answers)

    def limit(self, limits: Mapping[str, int]) -> None:
        """Keep the engine's limits if they have changed."""
        if dict(limits) != self.limits:
            self.limits = dict(limits)
            self._append({"limits": self.limits})

    def error(self, error: OSError) -> OutputError:
        """The error to raise when the disk is full or writing is not permitted."""
        kept = ""
        if self.answers:
            kept = f"{len(self.answers)} of {self.total} answers are kept there. "
        return OutputError(
            f"answers cannot be written: {error.strerror or error}",
            where=self.path,
            remedy=f"{kept}Free some space or change the folder's permissions, "
            "and run the same command again.",
        )

    def _locked(self) -> ExclusiveLock:
        """The lock on the answers, which ends with the process. Raises OSError, OutputError."""
        try:
            return ExclusiveLock(self.path.with_name(f"{self.path.name}.lock"))
        except LockHeld as held:
            raise OutputError(
                "another run is writing these answers",
                where=self.path,
                found=held.holder or None,
                remedy="Wait for it, or name another --out.",
            ) from held

    def _resume(self, header: Mapping[str, str], overwrite: bool) -> None:
        with os.fdopen(os.dup(self.fd), "rb") as file:
            whole, newline, _torn = file.read().rpartition(b"\n")
        if not newline:
            self._begin(header)
            return
        numbered = enumerate(whole.split(b"\n"), start=1)
        lines = [_parse(line, self.path, number) for number, line in numbered]
        changed = []
        for key, value in header.items():
            if lines[0].get(key) != value:
                changed.append(key)
        if changed and overwrite:
            self._begin(header)
            return
        if changed:
            others = " and ".join(CALLED.get(key, key) for key in changed)
            raise InputError(
                f"the unfinished answers in this file differ from this run in {others}",
                where=self.path,
                remedy="Run the original command again, name another --out, or add --overwrite.",
            )
        for line in lines[1:]:
            if "limits" in line:
                self.limits = line["limits"]
                continue
            kept, cut = self.of(line.get("round", FIRST)), line.get("cut", [])
            thoughts, tokens = line.get("thoughts", {}), line.get("tokens", {})
            for i, text in zip(line["batch"], line["outputs"], strict=True):
                n, thinking = tokens.get(str(i), (0, None))  # JSON has no numbers as keys
                kept[i] = Answer(text, i in cut, n, thoughts.get(str(i), ""), thinking)
        self._truncate(len(whole) + 1)

    def _begin(self, header: Mapping[str, str]) -> None:
        self._truncate(0)
        self._append(header)

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self.fd, size)
            os.lseek(self.fd, size, os.SEEK_SET)
        except OSError as error:
            raise self.error(error) from error

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            _write(self.fd, _line(record))
        except OSError as error:
            raise self.error(error) from error


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, dict):
        is_header = number == 1 and "prompts" in value
        is_answers = number > 1 and {"batch", "outputs"} <= value.keys()
        if is_header or is_answers or (number > 1 and "limits" in value):
            return value
    raise InputError(
        "contains no readable unfinished answers",
        where=f"{path}, line {number}",
        remedy="Delete the file, or name another --out.",
    )


def replace(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file whole; it is on the disk before OUT.part goes. Raises OSError."""
    replace_durably(path, lambda file: file.write_bytes(b"".join(map(_line, rows))))


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.fsync(fd)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
