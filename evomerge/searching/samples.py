"""What the report shows of the held-out answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.searching.examine import Examined
from evomerge.tasks import Task

SAMPLE_CHARACTERS = 600  # of each text kept for the report


def samples(
    tasks: Sequence[Task], examined: Mapping[str, Examined], limit: int = 12
) -> list[dict[str, Any]]:
    """Held-out answers side by side, those first on which the candidates' grades differ most; long
    texts are cut.
    """

    def spread(i: int) -> float:
        grades = [e.grades[i].value for e in examined.values()]
        return max(grades) - min(grades)

    def text(value: str) -> str:
        return value if len(value) <= SAMPLE_CHARACTERS else value[:SAMPLE_CHARACTERS] + " …"

    order = sorted(range(len(tasks)), key=lambda i: (-spread(i), i))[:limit]
    return [
        {
            "task_id": tasks[i].task_id,
            "input": text(tasks[i].input),
            "reference": text(tasks[i].output),
            "answers": {
                name: {"text": text(e.answers[i].text), "grade": e.grades[i].value}
                for name, e in examined.items()
            },
        }
        for i in order
    ]
