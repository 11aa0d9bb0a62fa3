"""lm-eval's tasks answered by the live model: the same documents and prompts for every candidate.

A document is a Task with the id "NAME/number". Prompts are built once, as lm-eval itself builds
them; each candidate answers them through lm-eval's own HFLM around the engine's model, and
lm-eval's code computes the metrics. What is optimised is the weighted mean of the tasks' metrics:
each document's value is scaled so that the plain mean of all of them is that
(`LmEvalTasks.scores`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from evomerge.answering.engine import Answer
from evomerge.answering.lm_eval.objectives import line, load_objectives, quiet
from evomerge.errors import EngineError, TaskError
from evomerge.tasks import Split, Task

if TYPE_CHECKING:
    from evomerge.answering.cache import AnswerCache
    from evomerge.answering.engine import Engine
    from evomerge.study import Study

FEWSHOT_SEED = 1234  # lm-eval's own default: the examples are those that it would draw


@dataclass(frozen=True)
class Outcome:
    """What one document gave: the response, and each "metric,filter" that some objective wants."""

    answer: Answer
    values: dict[str, float]


class LmEvalTasks:
    """The documents of a study's lm-eval tasks. `prepare` adds the prompts and the engine,
    `examine` answers.
    """

    def __init__(self, study: Study) -> None:
        """Raises InputError without lm-eval, TaskError for an unknown task, metric or dataset."""
        self.study = study
        self.leaves, self.objectives, self.warnings = load_objectives(study)
        self.documents = {name: self._chosen(name, leaf) for name, leaf in self.leaves.items()}
        self.configs = {name: _digest(leaf.dump_config()) for name, leaf in self.leaves.items()}
        self.tasks = tuple(
            self._task(name, leaf, i)
            for name, leaf in self.leaves.items()
            for i in self.documents[name]
        )
        # leaf -> document -> lm-eval's instances, without responses
        self._requests: dict[str, dict[int, list[Any]]] = {}

    def _chosen(self, name: str, leaf: Any) -> list[int]:
        """The first `limit` documents, or with `shuffle` some from anywhere; the same for every
        candidate.
        """
        n, limit = len(leaf.eval_docs), self.study.limit
        if limit is None or limit >= n:
            return list(range(n))
        if not self.study.shuffle:
            return list(range(limit))
        return sorted(random.Random(f"{self.study.split.seed}/{name}").sample(range(n), limit))

    def _task(self, name: str, leaf: Any, number: int) -> Task:
        document = leaf.eval_docs[number]
        text, target = leaf.doc_to_text(document), leaf.doc_to_target(document)
        shown = text if isinstance(text, str) and text.strip() else _json(document)
        rules = "; ".join(f"{o.weight:g} x {o.metric}" for o in self.objectives if name in o.leaves)
        aspect = f"{rules}; lm-eval {_version()}, task {self.configs[name]}, document {_digest(document)}"
        return Task(
            f"{name}/{number}",
            shown,
            target if isinstance(target, str) else _json(target),
            aspect,
            name,
        )

    def coefficients(self, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
        """leaf -> metric -> what a document's metric is multiplied by, so that the plain mean over
        `tasks` is the score

            sum_o weight_o m_o / sum_o |weight_o|,    m_o: objective o's metric over its documents
            among `tasks`.

        Raises TaskError when an objective has none among them.
        """
        counts = {name: sum(task.kind == name for task in tasks) for name in self.leaves}
        scale = len(tasks) / sum(abs(o.weight) for o in self.objectives)
        result: dict[str, dict[str, float]] = {name: {} for name in self.leaves}
        for o in self.objectives:
            pool = sum(counts[name] for name in o.leaves)
            empty = [name for name in o.leaves if not counts[name]]
            if pool == 0 or (empty and not o.pooled):
                raise TaskError(
                    "too few documents for both search and verdict",
                    where=f"task {o.name if pool == 0 else empty[0]}",
                    remedy="Raise `limit`, or bring split.held_out nearer to 0.5.",
                )
            for name in o.leaves:
                share = pool if o.pooled else counts[name] * len(o.leaves)
                if share:
                    result[name][o.metric] = (
                        result[name].get(o.metric, 0.0) + scale * o.weight / share
                    )
        return result

    def check_split(self, split: Split) -> None:
        """Raise TaskError when search or verdict lacks documents of some task."""
        for part in (split.search, split.held_out):
            self.coefficients(part)

    def scores(self, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> list[float]:
        """One value per document; their plain mean is the candidate's score."""
        by_leaf = self.coefficients(tasks)
        return [
            sum(factor * outcome.values[metric] for metric, factor in by_leaf[task.kind].items())
            for task, outcome in zip(tasks, outcomes, strict=True)
        ]

    def prepare(self, engine: Engine) -> str:
        """Build every prompt with the engine's tokenizer. Returns a hash of them; raises TaskError."""
        from lm_eval.models.huggingface import HFLM

        assert engine.likelihood is not None
        chat = self.study.apply_chat_template
        if chat and not engine.tokenizer.chat_template:
            raise TaskError(
                "the base model's tokenizer has no chat template",
                where="apply_chat_template",
                found=chat,
                remedy="Set `apply_chat_template: false`.",
            )
        with quiet():
            self.lm = HFLM(
                pretrained=engine.likelihood.model,
                tokenizer=engine.tokenizer,
                batch_size=self.study.engine.batch_size,
            )
            for name, leaf in self.leaves.items():
                leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
                try:
                    leaf.build_all_requests(
                        samples=self.documents[name],
                        apply_chat_template=chat,
                        fewshot_as_multiturn=self.study.fewshot_as_multiturn,
                        chat_template=self.lm.apply_chat_template if chat else None,
                        tokenizer_name="",
                    )
                except Exception as error:
                    # templates of tasks and of tokenizers raise what they like
                    raise TaskError(
                        f"the prompts cannot be built: {line(error)}",
                        where=f"task {name}",
                        remedy="Mend the task.",
                    ) from error
                requests: dict[int, list[Any]] = {}
                for instance in leaf.instances:
                    requests.setdefault(self.documents[name][instance.doc_id], []).append(instance)
                self._requests[name] = requests
        too_long = sum(
            any(map(self._too_long, own))
            for requests in self._requests.values()
            for own in requests.values()
        )
        if too_long:
            self.warnings.append(
                f"{too_long} of {len(self.tasks)} documents are longer than the context; lm-eval cuts them on the left"
            )
        return _digest([self._prints(name, ids) for name, ids in self.documents.items()])

    def examine(
        self,
        recipe: str,
        tasks: Sequence[Task],
        cache: AnswerCache,
        apply: Callable[[], None],
        progress: Callable[[int], None],
    ) -> list[Outcome]:
        """What a recipe (its digest) makes of some documents; `apply` merges, and runs only when
        something is not in the cache.

        Each leaf's documents are kept, or not, as one, and share batches with each other alone.
        Raises EngineError.
        """
        found: dict[str, Outcome] = {}
        applied = False
        for name in self.leaves:
            numbers = [
                int(str(task.task_id).rpartition("/")[2]) for task in tasks if task.kind == name
            ]
            if not numbers:
                continue
            key = cache.key(
                recipe, [f"batches of {self.study.engine.batch_size}", *self._prints(name, numbers)]
            )
            kept = cache.get(key)
            if kept is None:
                if not applied:
                    apply()
                    applied = True
                outcomes = self._run(name, numbers)
                cache.put(
                    key,
                    [
                        Answer(
                            json.dumps([o.answer.text, o.values]),
                            o.answer.truncated,
                            o.answer.tokens,
                        )
                        for o in outcomes
                    ],
                )
            else:
                texts = [json.loads(answer.text) for answer in kept]
                outcomes = [
                    Outcome(replace(a, text=text), values)
                    for a, (text, values) in zip(kept, texts, strict=True)
                ]
            found |= {
                f"{name}/{number}": outcome
                for number, outcome in zip(numbers, outcomes, strict=True)
            }
            progress(len(found))
        return [found[str(task.task_id)] for task in tasks]

    def _run(self, name: str, numbers: Sequence[int]) -> list[Outcome]:
        """One leaf's documents through the live model and lm-eval's filters and metrics."""
        leaf = self.leaves[name]
        requests = {
            number: [_fresh(instance) for instance in self._requests[name][number]]
            for number in numbers
        }
        instances = [instance for own in requests.values() for instance in own]
        wanted = {o.metric for o in self.objectives if name in o.leaves}
        values: dict[int, dict[str, float]] = {number: {} for number in numbers}
        try:
            with quiet(), self._seeded():
                for kind in dict.fromkeys(instance.request_type for instance in instances):
                    repeated = [
                        i
                        for i in instances
                        if i.request_type == kind
                        for _ in range(i.repeats or 1)
                    ]
                    for instance, response in zip(
                        repeated, getattr(self.lm, kind)(repeated, disable_tqdm=True), strict=True
                    ):
                        instance.resps.append(response)
                leaf._instances = instances
                leaf.apply_filters()
                for number, own in requests.items():
                    for filter_name in own[0].filtered_resps:
                        metrics = leaf.process_results(
                            own[0].doc, [instance.filtered_resps[filter_name] for instance in own]
                        )
                        named = {
                            f"{metric},{filter_name}": value for metric, value in metrics.items()
                        }
                        values[number] |= {
                            metric: float(named[metric]) for metric in wanted & named.keys()
                        }
        except torch.OutOfMemoryError as error:
            size = self.study.engine.batch_size
            raise EngineError(
                f"out of memory in task {name}",
                where="engine.batch_size",
                found=size,
                remedy="Lower it.",
            ) from error
        except Exception as error:
            # lm-eval asserts its own invariants and the user's settings alike
            raise EngineError(
                f"lm-eval failed: {line(error)}",
                where=f"task {name}",
                remedy="Mend the task or the model.",
            ) from error
        for number in numbers:
            for metric in wanted:
                if not math.isfinite(values[number].get(metric, math.nan)):
                    raise EngineError(
                        f"{metric} has no finite value",
                        where=f"task {name}/{number}",
                        found=values[number].get(metric),
                    )
        return [
            Outcome(Answer(_response(requests[number]), False, 0), values[number])
            for number in numbers
        ]

    def _prints(self, name: str, numbers: Sequence[int]) -> list[str]:
        """All that the outcomes of some documents depend on beside recipe and engine."""
        own = self._requests[name]
        texts = [
            _digest([own[n][0].doc, [[i.request_type, i.arguments, i.repeats] for i in own[n]]])
            for n in numbers
        ]
        return [
            "lm-eval",
            _version(),
            name,
            self.configs[name],
            *sorted({o.metric for o in self.objectives if name in o.leaves}),
            *texts,
        ]

    def _too_long(self, instance: Any) -> bool:
        # the last token of a continuation is never an input
        text, room = str(instance.args[0]), self.lm.max_length + 1
        if instance.request_type == "generate_until":
            room = self.lm.max_length - int(
                instance.args[1].get("max_gen_toks", self.lm.max_gen_toks)
            )
        else:
            text += "".join(map(str, instance.args[1:2]))
        return len(self.lm.tok_encode(text)) > room

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Tasks that sample draw the same for every candidate, and the caller's generators are left
        alone.
        """
        device = self.lm.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.study.search.seed)
            yield


def _fresh(instance: Any) -> Any:
    """A request without responses; its settings are a copy, for lm-eval may change them."""
    arguments = tuple(dict(a) if isinstance(a, dict) else a for a in instance.arguments)
    return replace(instance, arguments=arguments, resps=[], filtered_resps={})


def _response(own: Sequence[Any]) -> str:
    """What the model said: the text, or the continuation that it finds likeliest."""
    responses = [instance.resps[0] for instance in own]
    if own[0].request_type != "loglikelihood":
        return str(responses[0])
    best = max(range(len(own)), key=lambda i: responses[i][0])
    return str(own[best].arguments[1]).strip()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_text)


def _text(value: Any) -> str:
    # where a function lies in memory says nothing
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _version() -> str:
    import lm_eval

    return str(lm_eval.__version__)
