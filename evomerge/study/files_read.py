"""The files and folders that a study reads."""

from __future__ import annotations

from evomerge.study.study_file import Study


def files_read(study: Study) -> list[str | None]:
    """Paths of tasks, models, recipes, knowledge base and judge; hub names are among them."""
    genome, judge = study.genome, study.judge
    places: list[str | None] = [*genome.all_models]
    if genome.tokenizer_source not in ("base", "union"):
        places.append(genome.tokenizer_source)
    for source in study.tasks:
        places += [source.file, source.dataset]
    places += [genome.merge_method.rpartition(":")[0] or None]  # a user's own
    places += [*study.search.recipes, study.prompt.knowledge, judge.file]
    if judge.kind == "local":
        places.append(judge.model)
    return places
