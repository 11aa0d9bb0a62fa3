"""What a study file must hold beyond each key's type: ranges, and which keys go together."""

from __future__ import annotations

import re
from pathlib import Path

from evomerge.console import seconds
from evomerge.errors import StudyFileError
from evomerge.study.sections import DENSE, MIXING, JudgeSection, ObjectiveSection, Study


def check_study_file(study: Study, where: str) -> None:
    """Rules that need more than one key, or a range."""
    (low, high), (sparse, dense) = study.bounds, study.density_bounds
    s, g, e = study.search, study.generation, study.engine
    rules: list[tuple[bool, str, object, str]] = [
        (
            re.fullmatch(r"[\w.-]+", study.study) is not None,
            "study",
            study.study,
            "Use letters, digits, dots, dashes.",
        ),
        (
            bool(study.genome.models),
            "genome.models",
            study.genome.models,
            "Name at least one fine-tuned sibling.",
        ),
        (bool(study.tasks), "tasks", study.tasks, "Name at least one task file or dataset."),
        (
            study.genome.layer_granularity >= -1,
            "genome.layer_granularity",
            study.genome.layer_granularity,
            "Use 1 or more layers, or -1.",
        ),
        (
            0 <= study.split.validation < 1,
            "split.validation",
            study.split.validation,
            "A share of the search tasks, such as 0.2; 0: none.",
        ),
        (
            0 < study.split.held_out < 1,
            "split.held_out",
            study.split.held_out,
            "Use a share between 0 and 1, such as 0.5.",
        ),
        (low < high, "search.bounds", study.search.bounds, "Write [lowest, highest]."),
        (
            low <= s.start <= high,
            "search.start",
            s.start,
            f"It must lie within the bounds {low} to {high}.",
        ),
        (
            0 < sparse < dense <= 1,
            "search.density_bounds",
            s.density_bounds,
            "Write [lowest, highest], above 0 and at most 1.",
        ),
        (
            sparse <= study.start_density <= dense,
            "search.start_density",
            s.start_density,
            f"It must lie within the bounds {sparse} to {dense}.",
        ),
        (s.trials >= 1, "search.trials", s.trials, "At least 1."),
        (
            s.population is None or s.population >= 4,
            "search.population",
            s.population,
            "CMA-ES needs at least 4.",
        ),
        (s.sigma > 0, "search.sigma", s.sigma, "A step size above 0."),
        (g.max_new_tokens >= 1, "generation.max_new_tokens", g.max_new_tokens, "At least 1."),
        (
            g.repetition_penalty > 0,
            "generation.repetition_penalty",
            g.repetition_penalty,
            "Above 0; 1.0 switches it off.",
        ),
        (
            g.temperature > 0,
            "generation.temperature",
            g.temperature,
            "Above 0; do_sample: false is greedy.",
        ),
        (0 < g.top_p <= 1, "generation.top_p", g.top_p, "Above 0, at most 1."),
        (study.engine.batch_size >= 1, "engine.batch_size", study.engine.batch_size, "At least 1."),
        (
            e.batch_tokens is None or e.batch_tokens >= 1,
            "engine.batch_tokens",
            e.batch_tokens,
            "At least 1; leave it out for no limit.",
        ),
        (all(g.stop), "generation.stop", g.stop, "An empty text would end every answer."),
        (
            e.vllm.tensor_parallel_size >= 1,
            "engine.vllm.tensor_parallel_size",
            e.vllm.tensor_parallel_size,
            "At least 1.",
        ),
        (
            e.vllm.gpu_memory_utilization is None or 0 < e.vllm.gpu_memory_utilization <= 1,
            "engine.vllm.gpu_memory_utilization",
            e.vllm.gpu_memory_utilization,
            "A share above 0, at most 1.",
        ),
        (
            study.engine.threads is None or study.engine.threads >= 1,
            "engine.threads",
            study.engine.threads,
            "At least 1.",
        ),
        (
            (study.prompt.format == "template") == (study.prompt.template is not None),
            "prompt.template",
            study.prompt.template,
            "It goes with `format: template`, and only with it.",
        ),
        (
            study.prompt.template is None or "{input}" in study.prompt.template,
            "prompt.template",
            study.prompt.template,
            "It must hold {input}.",
        ),
        (
            0 <= study.prompt.threshold <= 1,
            "prompt.threshold",
            study.prompt.threshold,
            "A share from 0 to 1, such as 0.35.",
        ),
        (
            study.prompt.default_class is None or study.prompt.knowledge is not None,
            "prompt.default_class",
            study.prompt.default_class,
            "It is a class of prompt.knowledge: name that too.",
        ),
    ]
    rules += _search_rules(study)
    for i, source in enumerate(study.tasks):
        places = [
            place for place in (source.file, source.dataset, source.name) if place is not None
        ]
        rules.append(
            (
                len(places) == 1,
                f"tasks[{i}]",
                source,
                "Name one of `file`, `dataset` or (an lm-eval task) `name`.",
            )
        )
    for good, key, value, remedy in rules:
        if not good:
            raise StudyFileError(
                f"`{key}` is out of range", where=where, found=value, remedy=remedy
            )


def _search_rules(study: Study) -> list[tuple[bool, str, object, str]]:
    """(holds, key, value, remedy) for what a search does with its answers, and for when it ends."""
    s, o = study.search, study.objective
    limits = {key: getattr(s, key) for key in ("max_cost", "min_sigma", "patience")}
    nothing = next((key for key, value in limits.items() if value is not None and value <= 0), None)
    plain = s.ranking == "all" and not study.split.validation
    first = len(s.recipes) + len(s.vectors)
    return [
        (s.subset is None or s.subset >= 2, "search.subset", s.subset, "At least 2 tasks."),
        (
            s.subset is None or s.ranking != "all",
            "search.subset",
            s.subset,
            "It goes with `ranking: subset` or `race`.",
        ),
        (
            0 < s.race_error < 1,
            "search.race_error",
            s.race_error,
            "A share between 0 and 1, such as 0.05.",
        ),
        (s.finalists >= 1, "search.finalists", s.finalists, "At least 1."),
        (s.warm_start_steps >= 1, "search.warm_start_steps", s.warm_start_steps, "At least 1."),
        (
            s.time_limit is None or seconds(s.time_limit) is not None,
            "search.time_limit",
            s.time_limit,
            "Write 90s, 55m, 8h or 2d.",
        ),
        (
            nothing is None,
            f"search.{nothing}",
            limits.get(nothing or ""),
            "Above 0; leave it out for no limit.",
        ),
        (
            s.max_cost is None
            or s.hourly_price + study.judge.input_price + study.judge.output_price > 0,
            "search.max_cost",
            s.max_cost,
            "Set search.hourly_price, or the judge's prices.",
        ),
        (
            s.source_study is None
            or (
                re.fullmatch(r"[\w.-]+", s.source_study) is not None
                and s.source_study != study.study
            ),
            "search.source_study",
            s.source_study,
            "Name another study.",
        ),
        (s.hourly_price >= 0, "search.hourly_price", s.hourly_price, "At least 0."),
        (
            s.source_study is None or s.warm_start is None,
            "search.source_study",
            s.source_study,
            "It and `warm_start` both set the start.",
        ),
        (
            (s.warm_start is None and s.source_study is None) or not study.random_init,
            "random_init",
            True,
            "The start comes from `search.warm_start` or `source_study`: remove it.",
        ),
        (
            first == 0 or s.population is None or first <= s.population,
            "search.population",
            s.population,
            f"It must hold the {first} first candidates.",
        ),
        (
            s.ranking != "race" or not study.engine.population,
            "engine.population",
            True,
            "A race answers one by one: remove it.",
        ),
        (
            s.ranking != "race" or study.judge.kind != "cascade",
            "search.ranking",
            s.ranking,
            "With the cascade judge use subset or all.",
        ),
        (any((o.grade, o.length, o.likelihood)), "objective", o, "Give one part a weight."),
        (
            any(source.weight for source in study.tasks) or not study.tasks,
            "tasks[0].weight",
            0.0,
            "Give one source a weight.",
        ),
        (
            not o.likelihood or study.engine.kind == "transformers",
            "objective.likelihood",
            o.likelihood,
            "It needs engine.kind transformers.",
        ),
        (
            not study.lm_eval or (plain and s.warm_start is None and o == ObjectiveSection()),
            "search.ranking"
            if s.ranking != "all"
            else "split.validation"
            if not plain
            else "search.warm_start",
            s.ranking if s.ranking != "all" else study.split.validation or s.warm_start,
            "lm-eval's metrics are over all documents: remove it.",
        ),
    ]


def check_genome(study: Study, where: str) -> None:
    """Genomes that no recipe can express, or that hold a number which changes nothing."""
    genome, search = study.genome, study.search
    method, filters = genome.merge_method, genome.filters or ()
    deltas, base = method not in MIXING, genome.base_model
    twice = [model for model in genome.models if genome.models.count(model) > 1]
    shadowed = [
        f
        for i, f in enumerate(filters)
        if f in ("", "*") or any(earlier in f for earlier in filters[:i])
    ]
    rules: list[tuple[bool, str, object, str]] = [
        (
            deltas and base is None,
            "`genome.base_model` is missing",
            None,
            f"{method} needs the model that the siblings come from.",
        ),
        (bool(twice), "`genome.models` names a model twice", next(iter(twice), None), "Keep one."),
        (
            deltas and base in genome.models,
            "`genome.models` holds the base, whose weight changes nothing",
            base,
            "Remove it there.",
        ),
        (
            len(genome.all_models) < 2,
            f"{method} needs two models at least",
            genome.models,
            "Add one to genome.models, or a base_model.",
        ),
        (
            method == "slerp" and genome.smooth,
            "slerp cannot be smooth",
            None,
            "Remove `genome.smooth`.",
        ),
        (
            method == "slerp" and bool(filters),
            "slerp takes no filters",
            filters,
            "Remove `genome.filters`.",
        ),
        (
            method == "slerp" and search.bounds is not None,
            "slerp has no weights",
            search.bounds,
            "Remove `search.bounds`.",
        ),
        (
            method == "slerp" and genome.tokenizer_source == "union" and len(genome.all_models) > 2,
            "slerp mixes other models in each candidate, and their union of tokens would change with them",
            genome.tokenizer_source,
            "Set `genome.tokenizer_source` to base, or name one model.",
        ),
        (
            bool(shadowed),
            "`genome.filters` holds one that decides nothing",
            next(iter(shadowed), None),
            "An earlier filter matches all that it does.",
        ),
        (
            method not in DENSE and search.density_bounds is not None,
            f"{method} has no densities",
            None,
            "Remove `search.density_bounds`.",
        ),
        (
            method not in DENSE and search.start_density is not None,
            f"{method} has no densities",
            None,
            "Remove `search.start_density`.",
        ),
    ]
    for wrong, what, found, remedy in rules:
        if wrong:
            raise StudyFileError(what, where=where, found=found, remedy=remedy)


def check_lm_eval(study: Study, where: str) -> None:
    """What lm-eval tasks can be combined with."""
    if study.random_init and study.search.start != 1.0:
        raise StudyFileError(
            "`random_init` draws the start",
            where=where,
            found=study.search.start,
            remedy="Remove `search.start`.",
        )
    if not study.lm_eval:
        return
    e = study.engine
    named = [source.name is not None for source in study.tasks]
    rules: list[tuple[bool, str, object, str]] = [
        (
            all(named),
            "lm-eval tasks cannot share a study with files",
            None,
            "Their grades differ in scale: make two studies.",
        ),
        (
            e.kind == "transformers",
            "lm-eval tasks need engine.kind transformers",
            e.kind,
            "Change it.",
        ),
        (
            not e.population,
            "lm-eval tasks are answered candidate by candidate",
            "engine.population: true",
            "Remove it.",
        ),
        (
            study.limit is None or study.limit >= 2,
            "`limit` leaves nothing to hold out",
            study.limit,
            "At least 2.",
        ),
        (
            study.num_fewshot is None or study.num_fewshot >= 0,
            "`num_fewshot` is out of range",
            study.num_fewshot,
            "At least 0.",
        ),
        (
            any(source.weight for source in study.tasks),
            "every `weight` is 0",
            None,
            "Give one task a weight.",
        ),
    ]
    for good, what, found, remedy in rules:
        if not good:
            raise StudyFileError(what, where=where, found=found, remedy=remedy)
    for path in study.task_search_path:
        if not Path(path).is_dir():
            raise StudyFileError(
                "no such folder",
                where=f"{where}: task_search_path",
                found=path,
                remedy="Name folders with task YAMLs.",
            )


def check_judge(j: JudgeSection, where: str) -> None:
    """Which of the judge's keys go together, and their ranges. Raises StudyFileError."""
    limits = {
        key: getattr(j, key)
        for key in ("max_requests", "max_tokens", "max_cost", "requests_per_minute")
    }
    least = {
        "votes": 1,
        "reply_tokens": 1,
        "concurrency": 1,
        "asks": 1,
        "retries": 0,
        "back_off": 0,
        "temperature": 0,
        "input_price": 0,
    }
    least["output_price"] = 0
    wrong = next((key for key, low in least.items() if getattr(j, key) < low), None)
    nothing = next((key for key, value in limits.items() if value is not None and value <= 0), None)
    missing = next(
        (
            f"{{{key}}}"
            for key in ("input", "answer")
            if j.template is not None and f"{{{key}}}" not in j.template
        ),
        None,
    )
    rules: list[tuple[bool, str, object, str]] = [
        (
            (j.kind in ("learned", "cascade")) == (j.file is not None),
            "file",
            j.file,
            "It goes with `kind: learned` or `cascade`.",
        ),
        (0 < j.error < 1, "error", j.error, "A share between 0 and 1, such as 0.1."),
        (
            wrong is None,
            wrong or "",
            getattr(j, wrong or "votes"),
            f"At least {least.get(wrong or '', 0)}.",
        ),
        (
            nothing is None,
            nothing or "",
            limits.get(nothing or ""),
            "Above 0; leave it out for no limit.",
        ),
        (j.concurrency <= 1024, "concurrency", j.concurrency, "At most 1024."),
        (j.timeout > 0, "timeout", j.timeout, "Seconds, above 0."),
        (missing is None, "template", j.template, f"It must hold {missing}."),
        (
            j.max_cost is None or j.input_price + j.output_price > 0,
            "max_cost",
            j.max_cost,
            "Set judge.input_price and judge.output_price, for a million tokens each.",
        ),
        (
            j.kind != "local" or j.model is not None,
            "model",
            j.model,
            "Name the model folder of the local judge.",
        ),
        (
            j.metric != "correct" or j.kind == "rules",
            "metric",
            j.metric,
            f"The {j.kind} judge gives grades; only rules say right or wrong. Use grade.",
        ),
    ]
    for good, key, value, remedy in rules:
        if not good:
            raise StudyFileError(
                f"`judge.{key}` is out of range", where=where, found=value, remedy=remedy
            )
