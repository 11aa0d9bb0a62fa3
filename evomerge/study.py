"""The study file: YAML in, one validated, frozen object out.

Everything is checked here, once; a message names the key, the value found and the remedy. A mergekit-evolve
`genome:` section is read as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from evomerge.errors import InputError, StudyFileError

# Keys that a finished or running study may change: they say when to stop and how to reach the judge, not what is searched.
STOPPING_KEYS = (
    "search.trials",
    *(f"judge.{key}" for key in ("base_url", "concurrency", "requests_per_minute", "retries", "back_off", "timeout", "asks")),
    *(f"judge.{key}" for key in ("max_requests", "max_tokens", "max_cost", "input_price", "output_price")),
)
JUDGE_MODEL = "EVOMERGE_JUDGE_MODEL"  # the environment's name for `judge.model`
DENSE = ("ties", "dare_ties", "dare_linear")  # these keep a share of each difference: its density is searched too
MIXING = ("linear", "slerp")  # these mix models as they are: the base, if there is one, is a model like the others
LM_EVAL_KEYS = ("limit", "num_fewshot", "shuffle", "apply_chat_template", "fewshot_as_multiturn", "task_search_path")


@dataclass(frozen=True)
class GenomeSection:
    """What is merged and how: mergekit-evolve's keys."""

    models: tuple[str, ...]  # folders, hub names or MODEL+ADAPTER; with a base, its fine-tuned siblings
    base_model: str | None = None  # linear and slerp work without; there it is one more model to mix
    merge_method: Literal["task_arithmetic", "ties", "dare_ties", "dare_linear", "linear", "slerp"] = "task_arithmetic"
    layer_granularity: int = -1  # layers per slice; -1 or 0: one slice holds all
    normalize: bool | None = None  # divide by the sum of the weights; None: true for ties, dare_ties and linear
    allow_negative_weights: bool = False  # the default bounds become -2 to 2
    tokenizer_source: str | None = None  # whose tokens the merged model has: base, union or a model; None: the base's files
    smooth: bool = False  # weights are points of a line along the layers instead of steps
    filters: tuple[str, ...] | None = None  # parts of tensor names; each has numbers of its own, and so has the rest

    @property
    def all_models(self) -> tuple[str, ...]:
        """Every model to load; the first lends configuration and tokenizer."""
        return tuple(dict.fromkeys([*([self.base_model] if self.base_model is not None else []), *self.models]))


@dataclass(frozen=True)
class TaskSource:
    """One place that tasks come from: `file`, `dataset`, or `name` (an lm-eval task or group, as in mergekit-evolve)."""

    file: str | None = None  # .jsonl, .json, .csv, .xlsx or .parquet
    dataset: str | None = None  # a dataset on the hub
    split: str | None = None  # the dataset's split; "test" by default
    name: str | None = None
    metric: str = "acc,none"  # with name: lm-eval's "metric,filter"
    weight: float = 1.0  # with name: the score is sum(weight * metric) / sum(|weight|)


@dataclass(frozen=True)
class SplitSection:
    """Which tasks are kept for the verdict."""

    held_out: float = 0.5  # share of the tasks, in each kind
    seed: int = 0


@dataclass(frozen=True)
class PromptSection:
    """How a task becomes a prompt."""

    format: Literal["chat", "competition", "template"] = "chat"
    template: str | None = None  # with format template: a text that holds {input}
    system: str | None = None  # with format chat: the system turn
    too_long: Literal["refuse", "truncate"] = "refuse"  # what leaves no room for an answer; truncate: cut from the left, with a warning


@dataclass(frozen=True)
class GenerationSection:
    """How answers are generated; names and meanings as in transformers."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end an answer; they are no part of it


@dataclass(frozen=True)
class JudgeSection:
    """Who grades, and which of its figures is optimised."""

    # rules: offline; llm: a server; learned: `file`, of `evomerge judge fit`; local: `model` in process; lm-eval: set by its tasks
    kind: Literal["rules", "learned", "llm", "local", "lm-eval"] = "rules"
    metric: Literal["grade", "correct", "score"] = "grade"  # 1 to 5; the share of closed tasks that are right; lm-eval's weighted mean
    file: str | None = None  # with learned
    model: str | None = None  # llm: the server's name for it (None: $EVOMERGE_JUDGE_MODEL, or the only one there is); local: a model folder
    base_url: str | None = None  # with llm, any OpenAI-compatible server; None: $OPENAI_BASE_URL, or OpenAI. The key: $OPENAI_API_KEY
    template: str | None = None  # with llm: a prompt of your own with {input}, {answer} and, if wanted, {output} and {eval_aspect}
    votes: int = 1  # times an answer is graded; the grade is their median
    temperature: float = 0.0
    reply_tokens: int = 1024  # longest reply; a model that thinks first needs more
    concurrency: int = 16  # requests under way at once
    requests_per_minute: float | None = None
    max_requests: int | None = None  # the study's budget: when it is spent the run pauses, and goes on once it is raised
    max_tokens: int | None = None  # likewise, tokens of prompts and replies
    max_cost: float | None = None  # likewise, in the currency of the prices
    input_price: float = 0.0  # for a million tokens of prompts
    output_price: float = 0.0  # for a million tokens of replies
    retries: int = 6  # of a request after 408, 409, 429, 5xx, a time-out or a torn connection; then the run pauses
    back_off: float = 1.0  # seconds before the first retry, doubled each time up to 60; Retry-After goes before it
    timeout: float = 120.0  # seconds for one reply
    asks: int = 3  # times a reply is asked for before an answer counts as not graded, and the run pauses


@dataclass(frozen=True)
class SearchSection:
    """CMA-ES (Hansen 2016) over the weights."""

    trials: int = 96  # candidates; parents, uniform weights and the mean come on top
    population: int | None = None  # candidates per generation; None: 4 + floor(3 ln d)
    sigma: float = 0.25  # first step size, in units of the weight; other numbers take the same share of their range
    start: float = 1.0  # first mean, the same for every weight; slerp takes the same share of its range: the middle
    bounds: tuple[float, float] | None = None  # of the weight. None: 0 to 2, or -2 to 2 with allow_negative_weights
    start_density: float | None = None  # first mean of every density; None: 0.8
    density_bounds: tuple[float, float] | None = None  # within 0 (excluded) and 1; None: 0.1 to 1
    uniform: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25)  # one weight for all slices: what a search must beat
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the merge and of the live model
    seed: int = 0


@dataclass(frozen=True)
class VllmSection:
    """Arguments of vLLM's `LLM`, as there; None: vLLM's default."""

    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    enforce_eager: bool | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class EngineSection:
    """What answers."""

    kind: Literal["transformers", "vllm"] = "transformers"
    device: str = "auto"  # auto: cuda if there is one, else cpu
    device_map: str | None = None  # "auto" spreads one model over several GPUs (accelerate)
    batch_size: int = 32  # most prompts answered at once
    batch_tokens: int | None = None  # most tokens of a batch: prompts x (the longest + max_new_tokens); memory grows with it
    population: bool | None = None  # a generation's candidates answer in one pass; None: in float32, where it surely pays
    threads: int | None = None  # CPU threads; None: torch's choice. On a busy machine fewer can be much faster
    residency: Literal["auto", "device", "host", "disk"] = "auto"  # where base and siblings wait between candidates
    quantization: Literal["4bit", "4bit-double"] | None = None  # the live model in NF4 (bitsandbytes); merges stay in bf16
    trust_remote_code: bool = False
    vllm: VllmSection = field(default_factory=VllmSection)  # with kind vllm


@dataclass(frozen=True)
class Study:
    """One search, by name. `folder` is what the paths in the file were relative to."""

    genome: GenomeSection
    tasks: tuple[TaskSource, ...]
    study: str = ""  # the name; the file's stem by default
    split: SplitSection = field(default_factory=SplitSection)
    prompt: PromptSection = field(default_factory=PromptSection)
    generation: GenerationSection = field(default_factory=GenerationSection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    search: SearchSection = field(default_factory=SearchSection)
    engine: EngineSection = field(default_factory=EngineSection)
    # mergekit-evolve's other keys. All but random_init go with lm-eval tasks.
    limit: int | None = None  # documents of each task, search and held-out together; the same for every candidate
    num_fewshot: int | None = None  # examples in each prompt; None: the task's own number
    shuffle: bool = False  # with limit: documents from anywhere, drawn once by split.seed, instead of the first
    random_init: bool = False  # the first mean is drawn within the bounds, by search.seed
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True  # with the chat template: each example is a turn of its own
    task_search_path: tuple[str, ...] = ()  # folders with lm-eval tasks of your own: a text or a list

    @property
    def lm_eval(self) -> bool:
        """Whether the tasks are lm-eval's."""
        return any(source.name is not None for source in self.tasks)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest weight. For slerp, which has none, the range that `start` and `sigma` are shares of."""
        negative = self.genome.allow_negative_weights and self.genome.merge_method != "slerp"
        return self.search.bounds or ((-2.0, 2.0) if negative else (0.0, 2.0))

    @property
    def density_bounds(self) -> tuple[float, float]:
        """Lowest and highest density. Below 0.1 a random tenth is scaled up tenfold, which is noise."""
        return self.search.density_bounds or (0.1, 1.0)

    @property
    def start_density(self) -> float:
        """First mean of the densities: not 1, for half of the draws around a bound would fall outside and be drawn again."""
        low, high = self.density_bounds
        default = 0.8 if low < 0.8 < high else (low + high) / 2
        return default if self.search.start_density is None else self.search.start_density

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, every default written out: what the study remembers."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """The inverse of `to_dict`."""
        return typing.cast(Study, _build(cls, dict(data), "", "the stored study"))


def read_study(path: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Study:
    """Read, override, resolve and check a study file.

    `overrides` are "a.b=value" texts. Paths become absolute; `${NAME}` is taken from `environ`.
    Raises StudyFileError.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyFileError("no such study file", where=path, remedy="The files that ship lie in search_spaces/.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise StudyFileError(f"not valid YAML: {error}", where=path, remedy="Mend the line named.") from error
    except UnicodeDecodeError as error:
        raise StudyFileError("is not UTF-8", where=path, remedy="Save it as UTF-8.") from error
    if not isinstance(data, dict):
        raise StudyFileError("is not a mapping of keys", where=path, found=data, remedy="See search_spaces/demo.yaml.")
    for override in overrides:
        _override(data, override)
    data = _expand(data, environ, str(path), "")
    data.setdefault("study", path.stem)
    _read_mergekit_evolve(data, str(path))
    study = typing.cast(Study, _build(Study, data, "", str(path)))
    study = _resolve_paths(study, path.resolve().parent)
    _check(study, str(path))
    _check_genome(study, str(path))
    _check_lm_eval(study, str(path))
    check_judge(study.judge, str(path))
    return study


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two `to_dict`s, stopping keys left out."""
    with contextlib.suppress(StudyFileError):  # it may hold what this version does not know
        old = Study.from_dict(old).to_dict()  # keys that are younger than the study have their defaults
    a, b = _flatten(old), _flatten(new)
    return [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and key not in STOPPING_KEYS]


def _build(cls: type, data: Any, at: str, where: str) -> Any:
    if not isinstance(data, dict):
        raise StudyFileError(f"`{at}` is not a mapping", where=where, found=data, remedy="Write its keys on indented lines.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"Did you mean `{_join(at, near[0])}`?" if near else f"Known keys: {', '.join(known)}."
            raise StudyFileError(f"unknown key `{_join(at, str(key))}`", where=where, remedy=remedy)
    missing = [
        n for n, f in known.items() if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise StudyFileError(f"`{_join(at, missing[0])}` is missing", where=where, remedy="Add it; see search_spaces/demo.yaml.")
    return cls(**{key: _convert(hints[key], value, _join(at, key), where) for key, value in data.items()})


def _convert(hint: Any, value: Any, at: str, where: str) -> Any:
    def wrong(wanted: str) -> StudyFileError:
        return StudyFileError(f"`{at}` must be {wanted}", where=where, found=value, remedy="Change it, or leave it out for the default.")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, at, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, at, where)
    if origin is Literal:
        if value not in args:
            raise wrong(" or ".join(map(str, args)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong("a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise wrong(f"a list of {len(args)} values")
        return tuple(_convert(args[0], item, f"{at}[{i}]", where) for i, item in enumerate(value))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is str and isinstance(value, str | int):
        return str(value)
    raise wrong({bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}[hint])


def _check(study: Study, where: str) -> None:
    """Rules that need more than one key, or a range."""
    (low, high), (sparse, dense) = study.bounds, study.density_bounds
    s, g, e = study.search, study.generation, study.engine
    rules: list[tuple[bool, str, object, str]] = [
        (re.fullmatch(r"[\w.-]+", study.study) is not None, "study", study.study, "Use letters, digits, dots, dashes."),
        (bool(study.genome.models), "genome.models", study.genome.models, "Name at least one fine-tuned sibling."),
        (bool(study.tasks), "tasks", study.tasks, "Name at least one task file or dataset."),
        (study.genome.layer_granularity >= -1, "genome.layer_granularity", study.genome.layer_granularity, "Use 1 or more layers, or -1."),
        (0 < study.split.held_out < 1, "split.held_out", study.split.held_out, "Use a share between 0 and 1, such as 0.5."),
        (low < high, "search.bounds", study.search.bounds, "Write [lowest, highest]."),
        (low <= s.start <= high, "search.start", s.start, f"It must lie within the bounds {low} to {high}."),
        (0 < sparse < dense <= 1, "search.density_bounds", s.density_bounds, "Write [lowest, highest], above 0 and at most 1."),
        (
            sparse <= study.start_density <= dense,
            "search.start_density",
            s.start_density,
            f"It must lie within the bounds {sparse} to {dense}.",
        ),
        (s.trials >= 1, "search.trials", s.trials, "At least 1."),
        (s.population is None or s.population >= 4, "search.population", s.population, "CMA-ES needs at least 4."),
        (s.sigma > 0, "search.sigma", s.sigma, "A step size above 0."),
        (g.max_new_tokens >= 1, "generation.max_new_tokens", g.max_new_tokens, "At least 1."),
        (g.repetition_penalty > 0, "generation.repetition_penalty", g.repetition_penalty, "Above 0; 1.0 switches it off."),
        (g.temperature > 0, "generation.temperature", g.temperature, "Above 0; do_sample: false is greedy."),
        (0 < g.top_p <= 1, "generation.top_p", g.top_p, "Above 0, at most 1."),
        (study.engine.batch_size >= 1, "engine.batch_size", study.engine.batch_size, "At least 1."),
        (e.batch_tokens is None or e.batch_tokens >= 1, "engine.batch_tokens", e.batch_tokens, "At least 1; leave it out for no limit."),
        (all(g.stop), "generation.stop", g.stop, "An empty text would end every answer."),
        (e.vllm.tensor_parallel_size >= 1, "engine.vllm.tensor_parallel_size", e.vllm.tensor_parallel_size, "At least 1."),
        (
            e.vllm.gpu_memory_utilization is None or 0 < e.vllm.gpu_memory_utilization <= 1,
            "engine.vllm.gpu_memory_utilization",
            e.vllm.gpu_memory_utilization,
            "A share above 0, at most 1.",
        ),
        (study.engine.threads is None or study.engine.threads >= 1, "engine.threads", study.engine.threads, "At least 1."),
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
    ]
    for i, source in enumerate(study.tasks):
        places = [place for place in (source.file, source.dataset, source.name) if place is not None]
        rules.append((len(places) == 1, f"tasks[{i}]", source, "Name one of `file`, `dataset` or (an lm-eval task) `name`."))
    for good, key, value, remedy in rules:
        if not good:
            raise StudyFileError(f"`{key}` is out of range", where=where, found=value, remedy=remedy)


def _read_mergekit_evolve(data: dict[str, Any], where: str) -> None:
    """Task names and paths as plain texts become what we hold; keys that would change nothing are refused."""
    if isinstance(data.get("tasks"), list):
        data["tasks"] = [{"name": entry} if isinstance(entry, str) else entry for entry in data["tasks"]]
    if isinstance(data.get("task_search_path"), str):
        data["task_search_path"] = [data["task_search_path"]]
    sources = [entry for entry in data.get("tasks") or [] if isinstance(entry, dict)]
    if any("name" in entry for entry in sources):
        for key in ("judge", "prompt", "generation"):
            if key in data:
                raise StudyFileError(f"`{key}` changes nothing: lm-eval tasks bring their own", where=where, remedy="Remove it.")
        data["judge"] = {"kind": "lm-eval", "metric": "score"}
        return
    wrong = [key for key in LM_EVAL_KEYS if key in data]
    wrong += [f"tasks[{i}].{key}" for i, entry in enumerate(sources) for key in ("metric", "weight") if key in entry]
    judge = data["judge"] if isinstance(data.get("judge"), dict) else {}
    wrong += [f"judge.{key}" for key, value in judge.items() if value in ("lm-eval", "score")]
    if wrong:
        raise StudyFileError(f"`{wrong[0]}` goes with lm-eval tasks, and there are none", where=where, remedy="Remove it.")


def _check_lm_eval(study: Study, where: str) -> None:
    """What lm-eval tasks can be combined with."""
    if study.random_init and study.search.start != 1.0:
        raise StudyFileError("`random_init` draws the start", where=where, found=study.search.start, remedy="Remove `search.start`.")
    if not study.lm_eval:
        return
    e = study.engine
    named = [source.name is not None for source in study.tasks]
    rules: list[tuple[bool, str, object, str]] = [
        (all(named), "lm-eval tasks cannot share a study with files", None, "Their grades differ in scale: make two studies."),
        (e.kind == "transformers", "lm-eval tasks need engine.kind transformers", e.kind, "Change it."),
        (not e.population, "lm-eval tasks are answered candidate by candidate", "engine.population: true", "Remove it."),
        (study.limit is None or study.limit >= 2, "`limit` leaves nothing to hold out", study.limit, "At least 2."),
        (study.num_fewshot is None or study.num_fewshot >= 0, "`num_fewshot` is out of range", study.num_fewshot, "At least 0."),
        (any(source.weight for source in study.tasks), "every `weight` is 0", None, "Give one task a weight."),
    ]
    for good, what, found, remedy in rules:
        if not good:
            raise StudyFileError(what, where=where, found=found, remedy=remedy)
    for path in study.task_search_path:
        if not Path(path).is_dir():
            raise StudyFileError("no such folder", where=f"{where}: task_search_path", found=path, remedy="Name folders with task YAMLs.")


def check_judge(j: JudgeSection, where: str) -> None:
    """Which of the judge's keys go together, and their ranges. Raises StudyFileError."""
    limits = {key: getattr(j, key) for key in ("max_requests", "max_tokens", "max_cost", "requests_per_minute")}
    least = {"votes": 1, "reply_tokens": 1, "concurrency": 1, "asks": 1, "retries": 0, "back_off": 0, "temperature": 0, "input_price": 0}
    least["output_price"] = 0
    wrong = next((key for key, low in least.items() if getattr(j, key) < low), None)
    nothing = next((key for key, value in limits.items() if value is not None and value <= 0), None)
    missing = next((f"{{{key}}}" for key in ("input", "answer") if j.template is not None and f"{{{key}}}" not in j.template), None)
    rules: list[tuple[bool, str, object, str]] = [
        ((j.kind == "learned") == (j.file is not None), "file", j.file, "It goes with `kind: learned`, and only with it."),
        (wrong is None, wrong or "", getattr(j, wrong or "votes"), f"At least {least.get(wrong or '', 0)}."),
        (nothing is None, nothing or "", limits.get(nothing or ""), "Above 0; leave it out for no limit."),
        (j.concurrency <= 1024, "concurrency", j.concurrency, "At most 1024."),
        (j.timeout > 0, "timeout", j.timeout, "Seconds, above 0."),
        (missing is None, "template", j.template, f"It must hold {missing}."),
        (
            j.max_cost is None or j.input_price + j.output_price > 0,
            "max_cost",
            j.max_cost,
            "Set judge.input_price and judge.output_price, for a million tokens each.",
        ),
        (j.kind != "local" or j.model is not None, "model", j.model, "Name the model folder of the local judge."),
        (
            j.metric != "correct" or j.kind == "rules",
            "metric",
            j.metric,
            f"The {j.kind} judge gives grades; only rules say right or wrong. Use grade.",
        ),
    ]
    for good, key, value, remedy in rules:
        if not good:
            raise StudyFileError(f"`judge.{key}` is out of range", where=where, found=value, remedy=remedy)


def read_judge(settings: Mapping[str, Any], where: str) -> JudgeSection:
    """A judge's keys, outside a study, checked as in one. Raises StudyFileError."""
    section = typing.cast(JudgeSection, _build(JudgeSection, dict(settings), "judge", where))
    check_judge(section, where)
    return section


def _check_genome(study: Study, where: str) -> None:
    """Genomes that no recipe can express, or that hold a number which changes nothing."""
    genome, search = study.genome, study.search
    method, filters = genome.merge_method, genome.filters or ()
    deltas, base = method not in MIXING, genome.base_model
    twice = [model for model in genome.models if genome.models.count(model) > 1]
    shadowed = [f for i, f in enumerate(filters) if f in ("", "*") or any(earlier in f for earlier in filters[:i])]
    rules: list[tuple[bool, str, object, str]] = [
        (deltas and base is None, "`genome.base_model` is missing", None, f"{method} needs the model that the siblings come from."),
        (bool(twice), "`genome.models` names a model twice", next(iter(twice), None), "Keep one."),
        (deltas and base in genome.models, "`genome.models` holds the base, whose weight changes nothing", base, "Remove it there."),
        (len(genome.all_models) < 2, f"{method} needs two models at least", genome.models, "Add one to genome.models, or a base_model."),
        (method == "slerp" and genome.smooth, "slerp cannot be smooth", None, "Remove `genome.smooth`."),
        (method == "slerp" and bool(filters), "slerp takes no filters", filters, "Remove `genome.filters`."),
        (method == "slerp" and search.bounds is not None, "slerp has no weights", search.bounds, "Remove `search.bounds`."),
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
        (method not in DENSE and search.density_bounds is not None, f"{method} has no densities", None, "Remove `search.density_bounds`."),
        (method not in DENSE and search.start_density is not None, f"{method} has no densities", None, "Remove `search.start_density`."),
    ]
    for wrong, what, found, remedy in rules:
        if wrong:
            raise StudyFileError(what, where=where, found=found, remedy=remedy)


def _resolve_paths(study: Study, folder: Path) -> Study:
    def place(ref: str) -> str:
        looks_local = ref.startswith((".", "/", "~")) or (folder / ref).exists()
        return str((folder / Path(ref).expanduser()).resolve()) if looks_local else ref

    def model(ref: str) -> str:
        return place(ref) if (folder / ref).exists() else "+".join(map(place, ref.split("+")))  # MODEL+ADAPTER

    g = study.genome
    genome = dataclasses.replace(
        g,
        base_model=None if g.base_model is None else model(g.base_model),
        models=tuple(map(model, g.models)),
        tokenizer_source=g.tokenizer_source if g.tokenizer_source in (None, "base", "union") else model(g.tokenizer_source),
    )
    tasks = tuple(
        dataclasses.replace(source, file=str((folder / Path(source.file).expanduser()).resolve())) if source.file else source
        for source in study.tasks
    )
    folders = tuple(str((folder / Path(path).expanduser()).resolve()) for path in study.task_search_path)
    j = study.judge
    judge = dataclasses.replace(
        j,
        file=None if j.file is None else str((folder / Path(j.file).expanduser()).resolve()),
        model=place(j.model) if j.kind == "local" and j.model is not None else j.model,
    )
    return dataclasses.replace(study, genome=genome, tasks=tasks, task_search_path=folders, judge=judge)


def read_setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of --set, the value as YAML. Raises InputError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError("--set wants KEY=VALUE", found=text, remedy="For example --set search.trials=24.")
    return key, yaml.safe_load(value)


def _override(data: dict[str, Any], override: str) -> None:
    key, value = read_setting(override)
    *parents, last = key.split(".")
    target = data
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise InputError(f"--set: `{parent}` holds no keys", found=override, remedy="Name a key such as search.trials.")
    target[last] = value


def _expand(value: Any, environ: Mapping[str, str], where: str, at: str) -> Any:
    if isinstance(value, dict):
        return {k: _expand(v, environ, where, _join(at, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, environ, where, f"{at}[{i}]") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise StudyFileError(
                f"`{at}` uses ${{{match[1]}}}, which is not set", where=where, remedy=f"Set the environment variable {match[1]}."
            )
        return environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", lookup, value)


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _flatten(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flatten(item, _join(at, str(key))).items()}
    return {at: value}
