"""The meaning of a study file with lm-eval tasks, as mergekit-evolve has them."""

from __future__ import annotations

from typing import Any

from evomerge.errors import StudyFileError

LM_EVAL_KEYS = (
    "limit",
    "num_fewshot",
    "shuffle",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "task_search_path",
)
# suffixes of files of tasks; no name of an lm-eval task ends so
TASK_FILES = (".jsonl", ".json", ".csv", ".tsv", ".xlsx", ".parquet")
# sections that lm-eval tasks decide, and the keys of them that they leave to the study
BROUGHT: dict[str, tuple[str, ...]] = {
    "judge": (),
    "prompt": ("chat_template_kwargs",),
    "generation": ("reasoning",),
    "objective": (),
}


def read_mergekit_evolve(data: dict[str, Any], where: str) -> None:
    """Fill in what lm-eval tasks decide; refuse keys that would change nothing.

    `data` is the content of the file. Raises StudyFileError.
    """
    tasks = data.get("tasks") if isinstance(data.get("tasks"), list) else []
    for i, entry in enumerate(tasks or []):
        if isinstance(entry, str) and entry.casefold().endswith(TASK_FILES):
            raise StudyFileError(
                f"`tasks[{i}]` is a plain name, which is an lm-eval task's",
                where=where,
                found=entry,
                remedy="Write {file: …} for a file of tasks.",
            )
    sources = [entry for entry in tasks or [] if isinstance(entry, dict)]
    if any(isinstance(entry, str) for entry in tasks or []) or any("name" in s for s in sources):
        _fill_in(data, where)
        return
    wrong = [key for key in LM_EVAL_KEYS if key in data]
    for i, source in enumerate(sources):
        if "metric" in source:
            wrong.append(f"tasks[{i}].metric")
    # with several, it is the weight of each
    if len(sources) == 1 and "weight" in sources[0]:
        wrong.append("tasks[0].weight")
    judge = data.get("judge")
    if isinstance(judge, dict):
        for key, value in judge.items():
            if value in ("lm-eval", "score"):
                wrong.append(f"judge.{key}")
    if wrong:
        raise StudyFileError(
            f"`{wrong[0]}` applies only to lm-eval tasks, and there are none",
            where=where,
            remedy="Remove it.",
        )


def _fill_in(data: dict[str, Any], where: str) -> None:
    for section, kept in BROUGHT.items():
        found = data.get(section)
        if isinstance(found, dict) and kept and set(found) <= set(kept):
            continue
        if section in data:
            raise StudyFileError(
                f"`{section}` has no effect: lm-eval tasks bring their own",
                where=where,
                found=next((key for key in found or () if key not in kept), None),
                remedy=f"Remove it, except {', '.join(kept)}." if kept else "Remove it.",
            )
    data["judge"] = {"kind": "lm-eval", "metric": "score"}
    # metrics are over all documents
    for section, key, value in (("search", "ranking", "all"), ("split", "validation", 0.0)):
        if isinstance(data.setdefault(section, {}), dict):
            data[section].setdefault(key, value)
