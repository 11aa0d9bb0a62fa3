"""The learned judge: a ridge regression for each task, fitted on graded answers to that task.

ridge.py fits it. It knows the tasks that it was fitted on and no others, by their whole text;
another task is refused rather than guessed.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError, TaskError
from evomerge.files import replace_file
from evomerge.judging.grade import Grade
from evomerge.judging.learned import features
from evomerge.judging.learned.features import Float32s, Ints, in_english, look

if TYPE_CHECKING:
    from evomerge.answering.engine import Answer
    from evomerge.tasks import Task

FORMAT, FORMAT_VERSION = "evomerge-learned-judge", 2
CLIP = 3.0  # standard deviations: an unusual answer counts as no farther out than this


@dataclass(frozen=True)
class JudgeWeights:
    """The fitted numbers; T tasks, B buckets, M measures.

    The grade is bias[g, t] + grams[t] · x + measures[t] · z. x are the answer's n-grams times idf,
    at length 1; z its measures as standard scores within the task and the group g, which is 1 for
    answers in English where the task does not ask for that, else 0.
    """

    idf: Float32s  # [B]
    grams: Float32s  # [T, B]
    measures: Float32s  # [T, M]
    mean: Float32s  # [2, T, M]
    scale: Float32s  # [2, T, M]
    bias: Float32s  # [2, T]
    asks_english: NDArray[np.bool_]  # [T]

    def predict(self, t: int, x: tuple[Ints, Float32s], z: Float32s) -> float:
        """The grade, not yet limited to 1 to 5, of an answer to task number t.

        `x` are its n-grams (buckets, weights), `z` its measures [M].
        """
        buckets, values = x[0], x[1] * self.idf[x[0]]
        values /= max(1e-9, float(np.sqrt(values @ values)))
        g = int(in_english(z) and not self.asks_english[t])
        score = ((z - self.mean[g, t]) / self.scale[g, t]).clip(-CLIP, CLIP)
        return float(self.bias[g, t] + self.grams[t, buckets] @ values + self.measures[t] @ score)


@dataclass(frozen=True)
class Facts:
    """The facts about a judge that its file contains."""

    tasks: tuple[str, ...]  # keys by `task_key`, in the weights' order
    ids: tuple[str, ...]
    answers: tuple[int, ...]  # graded answers to each task
    judges: tuple[str, ...]
    models: tuple[str, ...]
    held_out: dict[str, Any] = field(default_factory=dict)


class LearnedJudge:
    """Grades 1 to 5 as its references would; `correct` is always None."""

    name = "learned"

    def __init__(self, file: str | Path) -> None:
        """Raises InputError for a file that is missing, damaged, or of another version."""
        self.file = Path(file)
        self.weights, self.facts, digest = _read(self.file)
        self.version = f"{features.VERSION}-{digest[:12]}"
        self._places = {key: i for i, key in enumerate(self.facts.tasks)}

    def check(self, tasks: Iterable[Task]) -> None:
        """Raise TaskError for the first task that it was not fitted on."""
        for task in tasks:
            self._place(task)

    def grade(self, task: Task, answer: Answer) -> Grade:
        """Grade one answer, 1.0 to 5.0. Raises TaskError for a task that it was not fitted on."""
        t = self._place(task)
        if not re.search(r"\w", answer.text):
            return Grade(1.0, None, "answer without a word")
        value = self.weights.predict(t, *look(task, answer))
        judges = ", ".join(self.facts.judges)
        why = f"predicted from {self.facts.answers[t]} answers to this task graded by {judges}"
        return Grade(round(min(5.0, max(1.0, value)), 4), None, why)

    def _place(self, task: Task) -> int:
        place = self._places.get(task_key(task))
        if place is not None:
            return place
        what = "the learned judge was not fitted on this task"
        if str(task.task_id) in self.facts.ids:
            what = "the learned judge was fitted on a different text of this task"
        raise TaskError(
            what,
            where=self.file,
            found=task.task_id,
            remedy="Fit it on graded answers to this task (evomerge judge fit), "
            "or use another judge.",
        )


def task_key(task: Task) -> str:
    """A key of a task by its input and how it is graded, whatever its id."""
    return sha256(json.dumps([task.input, task.output, task.eval_aspect]).encode()).hexdigest()[:16]


def save_judge(path: Path, weights: JudgeWeights, facts: Facts) -> None:
    """Write an .npz file of arrays and a JSON text, none of which is executed on loading.

    Raises OutputError.
    """
    # half precision holds steps of 1e-7 of it; ranks need no more
    scale = np.abs(weights.grams).max(1, keepdims=True).clip(min=1e-12)
    arrays = {
        "idf": weights.idf,
        "grams": (weights.grams / scale).astype(np.float16),
        "grams_scale": scale[:, 0],
        "measures": weights.measures,
        "mean": weights.mean,
        "scale": weights.scale,
        "bias": weights.bias,
        "asks_english": weights.asks_english,
    }
    tasks = [
        {"key": key, "task_id": task_id, "answers": n}
        for key, task_id, n in zip(facts.tasks, facts.ids, facts.answers, strict=True)
    ]
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "features": features.VERSION,
        "tasks": tasks,
        "judges": list(facts.judges),
        "models": list(facts.models),
        "held_out": facts.held_out,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about, ensure_ascii=False)), **arrays)
    replace_file(path, lambda p: p.write_bytes(buffer.getvalue()), make_folder=False)


def _read(path: Path) -> tuple[JudgeWeights, Facts, str]:
    """(weights, facts, the file's SHA-256). Raises InputError."""
    if not path.is_file():
        raise InputError(
            "no such learned judge file",
            where=path,
            remedy="Make one with evomerge judge fit.",
        )
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            _check_version(about, path)
            facts = _facts(about)
            weights = _weights(file, len(facts.tasks))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"is not a learned judge: {error}",
            where=path,
            remedy="Make one with evomerge judge fit.",
        ) from error
    return weights, facts, sha256(data).hexdigest()


def _check_version(about: dict[str, Any], path: Path) -> None:
    version = (about["format"], about["version"], about["features"])
    if version != (FORMAT, FORMAT_VERSION, features.VERSION):
        raise InputError(
            "was fitted by a different version",
            where=path,
            found="/".join(map(str, version)),
            remedy=f"Fit it again: this is {FORMAT}/{FORMAT_VERSION}/{features.VERSION}.",
        )


def _facts(about: dict[str, Any]) -> Facts:
    keys, ids, answers = [], [], []
    for task in about["tasks"]:
        keys.append(str(task["key"]))
        ids.append(str(task["task_id"]))
        answers.append(int(task["answers"]))
    return Facts(
        tuple(keys),
        tuple(ids),
        tuple(answers),
        tuple(about["judges"]),
        tuple(about["models"]),
        about["held_out"],
    )


def _weights(file: Mapping[str, NDArray[Any]], t: int) -> JudgeWeights:
    """The weights for t tasks. Raises ValueError for arrays of unexpected shapes."""
    b = 1 << features.BITS
    m = len(features.NAMES)
    shapes: dict[str, tuple[int, ...]] = {
        "idf": (b,),
        "grams": (t, b),
        "grams_scale": (t,),
        "measures": (t, m),
        "mean": (2, t, m),
        "scale": (2, t, m),
        "bias": (2, t),
        "asks_english": (t,),
    }
    arrays = {name: file[name] for name in shapes}
    if any(arrays[name].shape != shape for name, shape in shapes.items()):
        raise ValueError("the arrays have unexpected shapes")
    scale = arrays.pop("grams_scale")
    arrays["grams"] = arrays["grams"].astype(np.float32) * scale[:, None]
    return JudgeWeights(**arrays)
