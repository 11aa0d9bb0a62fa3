"""The study file's sections, every key documented where it is defined."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.study.convert import build, plain

JUDGE_MODEL = "EVOMERGE_JUDGE_MODEL"  # the environment's name for `judge.model`
SUBSET = 16  # tasks of a first generation where `search.subset` says nothing
# these keep a share of each difference: its density is searched too
DENSE = ("ties", "dare_ties", "dare_linear")
# these mix models as they are: the base, if there is one, is a model like the others
MIXING = ("linear", "slerp")
LM_EVAL_KEYS = (
    "limit",
    "num_fewshot",
    "shuffle",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "task_search_path",
)


# What studies did before they named it.
BEFORE: dict[str, dict[str, Any]] = {
    "split": {"validation": 0.0},
    "search": {"ranking": "all", "lr_adapt": False},
}


@dataclass(frozen=True)
class GenomeSection:
    """What is merged and how: mergekit-evolve's keys."""

    # folders, hub names or MODEL+ADAPTER; with a base, its fine-tuned siblings
    models: tuple[str, ...]
    # linear and slerp work without; there it is one more model to mix
    base_model: str | None = None
    merge_method: Literal[
        "task_arithmetic", "ties", "dare_ties", "dare_linear", "linear", "slerp"
    ] = "task_arithmetic"
    layer_granularity: int = -1  # layers per slice; -1 or 0: one slice holds all
    # divide by the sum of the weights; None: true for ties, dare_ties and linear
    normalize: bool | None = None
    allow_negative_weights: bool = False  # the default bounds become -2 to 2
    # whose tokens the merged model has: base, union or a model; None: the base's files
    tokenizer_source: str | None = None
    smooth: bool = False  # weights are points of a line along the layers instead of steps
    # parts of tensor names; each has numbers of its own, and so has the rest
    filters: tuple[str, ...] | None = None

    @property
    def all_models(self) -> tuple[str, ...]:
        """Every model to load; the first lends configuration and tokenizer."""
        return tuple(
            dict.fromkeys(
                [*([self.base_model] if self.base_model is not None else []), *self.models]
            )
        )


@dataclass(frozen=True)
class TaskSource:
    """One place that tasks come from: `file`, `dataset`, or `name` (an lm-eval task or group, as in
    mergekit-evolve).
    """

    file: str | None = None  # .jsonl, .json, .csv, .xlsx or .parquet
    dataset: str | None = None  # a dataset on the hub
    split: str | None = None  # the dataset's split; "test" by default
    name: str | None = None
    metric: str = "acc,none"  # with name: lm-eval's "metric,filter"
    # with several sources: the score is sum(weight * mean of the source's tasks) / sum(|weight|)
    weight: float = 1.0


@dataclass(frozen=True)
class SplitSection:
    """Which tasks are kept for the verdict."""

    held_out: float = 0.5  # share of the tasks, in each kind
    # share of the other tasks that only the choice of the winner sees, in each kind
    validation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class PromptSection:
    """How a task becomes a prompt."""

    format: Literal["chat", "competition", "template"] = "chat"
    template: str | None = None  # with format template: a text that holds {input}
    system: str | None = None  # with format chat: the system turn
    # what leaves no room for an answer; truncate: cut from the left, with a warning
    too_long: Literal["refuse", "truncate"] = "refuse"
    # a knowledge base: a task's class gives system text, template, examples and generation settings
    knowledge: str | None = None
    # what finds examples: tfidf, bm25, embeddings:MODEL, or several joined by +
    retriever: str = "tfidf"
    # of tasks whose class is less sure than `threshold`; None: the best guess stands
    default_class: str | None = None
    threshold: float = 0.35


@dataclass(frozen=True)
class GenerationSection:
    """How answers are generated; names and meanings as in transformers."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end an answer; they are no part of it
    seed: int | None = None  # of the draws; None: search.seed


@dataclass(frozen=True)
class JudgeSection:
    """Who grades, and which of its figures is optimised."""

    # rules: offline; llm: a server; learned: `file`, of `evomerge judge fit`; cascade: learned
    # everywhere, llm where it decides who is in a generation's better half; local: `model` in
    # process; lm-eval: set by its tasks
    kind: Literal["rules", "learned", "llm", "cascade", "local", "lm-eval"] = "rules"
    # 1 to 5; the share of closed tasks that are right; lm-eval's weighted mean
    metric: Literal["grade", "correct", "score"] = "grade"
    file: str | None = None  # with learned and cascade
    # with cascade: how often a generation's better half may be another than the llm judge's
    error: float = 0.1
    # llm: the server's name for it (None: $EVOMERGE_JUDGE_MODEL, or the only one there is); local:
    # a model folder
    model: str | None = None
    # with llm, any OpenAI-compatible server; None: $OPENAI_BASE_URL, or OpenAI. The key:
    # $OPENAI_API_KEY
    base_url: str | None = None
    # for llm, cascade and local: a prompt of your own, {input}, {answer}; {output} and
    # {eval_aspect} if wanted
    template: str | None = None
    votes: int = 1  # times an answer is graded; the grade is their median
    temperature: float = 0.0
    reply_tokens: int = 1024  # longest reply; a model that thinks first needs more
    concurrency: int = 16  # requests under way at once
    requests_per_minute: float | None = None
    # the study's budget: when it is spent the run pauses, and goes on once it is raised
    max_requests: int | None = None
    max_tokens: int | None = None  # likewise, tokens of prompts and replies
    max_cost: float | None = None  # likewise, in the currency of the prices
    input_price: float = 0.0  # for a million tokens of prompts
    output_price: float = 0.0  # for a million tokens of replies
    # of a request after 408, 409, 429, 5xx, a time-out or a torn connection; then the run pauses
    retries: int = 6
    # seconds before the first retry, doubled each time up to 60; Retry-After goes before it
    back_off: float = 1.0
    timeout: float = 120.0  # seconds for one reply
    # times a reply is asked for before an answer counts as not graded, and the run pauses
    asks: int = 3


@dataclass(frozen=True)
class SearchSection:
    """CMA-ES (Hansen 2016) over the weights."""

    trials: int = 240  # candidates; parents, uniform weights and the mean come on top
    population: int | None = None  # candidates per generation; None: 4 + floor(3 ln d)
    # it answers every search task; its generation's; those until it is out
    ranking: Literal["all", "subset", "race"] = "subset"
    # tasks of the first generation; more as the step size shrinks. None: 16
    subset: int | None = None
    # with race: how often a generation may lose one that belongs to its better half
    race_error: float = 0.05
    finalists: int = 3  # trials that the validation tasks compare, beside the distribution's mean
    recipes: tuple[str, ...] = ()  # mergekit YAMLs that are the first candidates
    vectors: tuple[tuple[float, ...], ...] = ()  # likewise, as numbers of the genome
    # a finished study of the same genome and storage: its distribution is the first one
    source_study: str | None = None
    # gradient steps on the references' likelihood give the first distribution
    warm_start: Literal["likelihood"] | None = None
    warm_start_steps: int = 16
    lr_adapt: bool = True  # learning-rate adaptation for noise (Nomura et al. 2023)
    # 90s, 55m, 8h, 2d: no further candidate after it; then the mean and the verdict
    time_limit: str | None = None
    # likewise, in the currency of the judge's prices and of hourly_price
    max_cost: float | None = None
    hourly_price: float = 0.0  # of the machine
    min_sigma: float | None = None  # likewise, once the step size is smaller
    # likewise, after as many generations whose mean gained nothing beyond noise
    patience: int | None = None
    # first step size, in units of the weight; other numbers take the same share of their range
    sigma: float = 0.3
    # first mean, the same for every weight; slerp takes the same share of its range: the middle
    start: float = 1.0
    # of the weight. None: 0 to 2, or -2 to 2 with allow_negative_weights
    bounds: tuple[float, float] | None = None
    start_density: float | None = None  # first mean of every density; None: 0.8
    density_bounds: tuple[float, float] | None = None  # within 0 (excluded) and 1; None: 0.1 to 1
    # one weight for all slices: what a search must beat
    uniform: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25)
    # of the merge and of the live model
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    seed: int = 0


@dataclass(frozen=True)
class ObjectiveSection:
    """What is maximised: a weighted sum of an answer's parts, each of which is recorded for every
    trial.
    """

    grade: float = 1.0  # weight of judge.metric
    # weight of the answer's share of max_new_tokens, 0 to 1; below 0: shorter is better
    length: float = 0.0
    # weight of the reference's mean log-likelihood per token, in nats; for transformers
    likelihood: float = 0.0


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
    # most tokens of a batch: prompts x (the longest + max_new_tokens); memory grows with it
    batch_tokens: int | None = None
    # a generation's candidates answer in one pass; None: in float32, where it surely pays
    population: bool | None = None
    # CPU threads; None: torch's choice. On a busy machine fewer can be much faster
    threads: int | None = None
    # where base and siblings wait between candidates
    residency: Literal["auto", "device", "host", "disk"] = "auto"
    # the live model in NF4 (bitsandbytes); merges stay in bf16
    quantization: Literal["4bit", "4bit-double"] | None = None
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
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    search: SearchSection = field(default_factory=SearchSection)
    engine: EngineSection = field(default_factory=EngineSection)
    # mergekit-evolve's other keys. All but random_init go with lm-eval tasks.
    # documents of each task, search and held-out together; the same for every candidate
    limit: int | None = None
    num_fewshot: int | None = None  # examples in each prompt; None: the task's own number
    # with limit: documents from anywhere, drawn once by split.seed, instead of the first
    shuffle: bool = False
    random_init: bool = False  # the first mean is drawn within the bounds, by search.seed
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True  # with the chat template: each example is a turn of its own
    # folders with lm-eval tasks of your own: a text or a list
    task_search_path: tuple[str, ...] = ()

    @property
    def lm_eval(self) -> bool:
        """Whether the tasks are lm-eval's."""
        return any(source.name is not None for source in self.tasks)

    @property
    def metric(self) -> str:
        """What of a task's grades is optimised, and compared in the verdict."""
        weighted = not self.lm_eval and any(
            source.weight != self.tasks[0].weight for source in self.tasks
        )
        return (
            "objective" if weighted or self.objective != ObjectiveSection() else self.judge.metric
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest weight. For slerp, which has none, the range that `start` and `sigma`
        are shares of.
        """
        negative = self.genome.allow_negative_weights and self.genome.merge_method != "slerp"
        return self.search.bounds or ((-2.0, 2.0) if negative else (0.0, 2.0))

    @property
    def density_bounds(self) -> tuple[float, float]:
        """Lowest and highest density. Below 0.1 a random tenth is scaled up tenfold, which is
        noise.
        """
        return self.search.density_bounds or (0.1, 1.0)

    @property
    def start_density(self) -> float:
        """First mean of the densities: not 1, for half of the draws around a bound would fall
        outside and be drawn again.
        """
        low, high = self.density_bounds
        default = 0.8 if low < 0.8 < high else (low + high) / 2
        return default if self.search.start_density is None else self.search.start_density

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, every default written out: what the study remembers."""
        data: dict[str, Any] = plain(dataclasses.asdict(self))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """The inverse of `to_dict`. What a study of an older version does not name is as it was
        then.
        """
        whole = {
            **data,
            **{section: {**values, **data.get(section, {})} for section, values in BEFORE.items()},
        }
        return typing.cast(Study, build(cls, whole, "", "the stored study"))
