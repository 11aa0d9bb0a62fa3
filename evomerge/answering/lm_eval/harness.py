"""lm-eval around the engine's model: prompts built once, answered for every candidate.

The prompts are those that lm-eval itself builds; each candidate answers them through lm-eval's own
HFLM, and lm-eval's code computes the metrics.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from evomerge.answering.engine import Answer
from evomerge.answering.lm_eval.documents import LmEvalTasks, Outcome, digest, version
from evomerge.answering.lm_eval.objectives import line, quiet
from evomerge.answering.reply_reader import ReplyReader
from evomerge.errors import EngineError, TaskError
from evomerge.merging.device_memory import is_out_of_memory
from evomerge.tasks import Task

if TYPE_CHECKING:
    from evomerge.answering.cache import AnswerCache
    from evomerge.answering.engine import Engine

FEWSHOT_SEED = 1234  # lm-eval's default, so that the examples are those that it would draw


class LmEvalRunner:
    """Answers the documents of `lm_eval` with the engine's live model."""

    def __init__(self, lm_eval: LmEvalTasks, engine: Engine) -> None:
        """Build every prompt with the engine's tokenizer; `prompts` is a hash of them.

        Raises TaskError.
        """
        assert engine.likelihood is not None
        self.lm_eval, self.study = lm_eval, lm_eval.study
        self.warnings = list(lm_eval.warnings)
        self.marks: list[str] = []  # of thoughts
        chat = self.study.apply_chat_template
        if chat and not engine.tokenizer.chat_template:
            raise TaskError(
                "the base model's tokenizer has no chat template",
                where="apply_chat_template",
                found=chat,
                remedy="Set `apply_chat_template: false`.",
            )
        # leaf -> document -> lm-eval's instances, without responses
        self._requests: dict[str, dict[int, list[Any]]] = {}
        with quiet():
            self.lm = self._wrapped(engine)
            for name, leaf in lm_eval.leaves.items():
                self._requests[name] = self._built(name, leaf)
        too_long = 0
        for requests in self._requests.values():
            for own in requests.values():
                too_long += any(map(self._too_long, own))
        if too_long:
            self.warnings.append(
                f"{too_long} of {len(lm_eval.tasks)} documents are longer than the context; "
                "lm-eval truncates them on the left"
            )
        prints = [self._prints(name, ids) for name, ids in lm_eval.documents.items()]
        self.prompts = digest(prints)

    def _wrapped(self, engine: Engine) -> Any:
        """The engine's model as lm-eval's; one that thinks shows lm-eval its answers alone."""
        from lm_eval.models.huggingface import HFLM

        assert engine.likelihood is not None
        settings: dict[str, Any] = {
            "pretrained": engine.likelihood.model,
            "tokenizer": engine.tokenizer,
            "batch_size": self.study.engine.batch_size,
            "chat_template_args": dict(self.study.prompt.chat_template_kwargs),
        }
        if engine.marks is None:
            return HFLM(**settings)
        from evomerge.answering.lm_eval.thinking import thinking_lm

        self.marks = [engine.marks.start, engine.marks.end]
        read = ReplyReader(engine.tokenizer, self.study.generation.reasoning)
        return thinking_lm(read, engine.marks, **settings)

    def _built(self, name: str, leaf: Any) -> dict[int, list[Any]]:
        """A leaf's instances by document. Raises TaskError."""
        chat, numbers = self.study.apply_chat_template, self.lm_eval.documents[name]
        leaf.set_fewshot_seed(seed=FEWSHOT_SEED)
        try:
            leaf.build_all_requests(
                samples=numbers,
                apply_chat_template=chat,
                fewshot_as_multiturn=self.study.fewshot_as_multiturn,
                chat_template=self.lm.apply_chat_template if chat else None,
                tokenizer_name="",
            )
        except Exception as error:
            # templates of tasks and of tokenizers can raise anything
            raise TaskError(
                f"the prompts cannot be built: {line(error)}",
                where=f"task {name}",
                remedy="Fix the task.",
            ) from error
        requests: dict[int, list[Any]] = {}
        for instance in leaf.instances:
            requests.setdefault(numbers[instance.doc_id], []).append(instance)
        return requests

    def evaluate(
        self,
        recipe: str,
        tasks: Sequence[Task],
        cache: AnswerCache,
        apply: Callable[[], None],
        progress: Callable[[int], None],
    ) -> list[Outcome]:
        """Evaluate a recipe, given by its digest, on some documents. Raises EngineError.

        `apply` merges, and runs only when something is not in the cache. Each leaf's documents are
        cached as one, and share batches only with each other.
        """
        found: dict[str, Outcome] = {}
        applied = False
        for name in self.lm_eval.leaves:
            own = [task for task in tasks if task.kind == name]
            numbers = [self.lm_eval.numbers[task.key] for task in own]
            if not numbers:
                continue
            batches = f"batches of {self.study.engine.batch_size}"
            key = cache.key(recipe, [batches, *self.marks, *self._prints(name, numbers)])
            kept = cache.get(key)
            if kept is not None:
                outcomes = [_read(answer) for answer in kept]
            else:
                if not applied:
                    apply()
                    applied = True
                outcomes = self.run(name, numbers)
                cache.put(key, [_stored(outcome) for outcome in outcomes])
            for task, outcome in zip(own, outcomes, strict=True):
                found[task.key] = outcome
            progress(len(found))
        return [found[task.key] for task in tasks]

    def run(self, name: str, numbers: Sequence[int]) -> list[Outcome]:
        """One leaf's documents through the live model, and lm-eval's filters and metrics.

        Raises EngineError.
        """
        requests = {}
        for number in numbers:
            requests[number] = [_fresh(instance) for instance in self._requests[name][number]]
        wanted = self.lm_eval.metrics(name)
        try:
            with quiet(), self._seeded():
                self._answer(list(chain(*requests.values())))
                values = self._metrics(self.lm_eval.leaves[name], requests, wanted)
        except Exception as error:
            if is_out_of_memory(error):
                raise EngineError(
                    f"out of memory in task {name}",
                    where="engine.batch_size",
                    found=self.study.engine.batch_size,
                    remedy="Lower it.",
                ) from error
            # lm-eval asserts its own invariants and the user's settings alike
            raise EngineError(
                f"lm-eval failed: {line(error)}",
                where=f"task {name}",
                remedy="Fix the task or the model.",
            ) from error
        outcomes = []
        for number in numbers:
            for metric in wanted:
                value = values[number].get(metric)
                if value is None or not math.isfinite(value):
                    where = f"task {name}/{number}"
                    raise EngineError(f"{metric} has no finite value", where=where, found=value)
            answer = Answer(_response(requests[number]), False, 0)
            outcomes.append(Outcome(answer, values[number]))
        return outcomes

    def _answer(self, instances: Sequence[Any]) -> None:
        """Append lm-eval's responses to the instances, one kind of request after another."""
        by_kind: dict[str, list[Any]] = {}
        for instance in instances:
            copies = [instance] * (instance.repeats or 1)
            by_kind.setdefault(instance.request_type, []).extend(copies)
        for kind, repeated in by_kind.items():
            responses = getattr(self.lm, kind)(repeated, disable_tqdm=True)
            for instance, response in zip(repeated, responses, strict=True):
                instance.resps.append(response)

    def _metrics(
        self, leaf: Any, requests: Mapping[int, Sequence[Any]], wanted: set[str]
    ) -> dict[int, dict[str, float]]:
        """document -> "metric,filter" -> value, of the metrics that are needed."""
        leaf._instances = list(chain(*requests.values()))
        leaf.apply_filters()
        values: dict[int, dict[str, float]] = {}
        for number, own in requests.items():
            values[number] = {}
            for filter_name in own[0].filtered_resps:
                responses = [instance.filtered_resps[filter_name] for instance in own]
                for metric, value in leaf.process_results(own[0].doc, responses).items():
                    named = f"{metric},{filter_name}"
                    if named in wanted:
                        values[number][named] = float(value)
        return values

    def _prints(self, name: str, numbers: Sequence[int]) -> list[str]:
        """Everything that the outcomes of some documents depend on besides recipe and engine."""
        texts = []
        for number in numbers:
            own = self._requests[name][number]
            asked = [[i.request_type, i.arguments, i.repeats] for i in own]
            texts.append(digest([own[0].doc, asked]))
        metrics = sorted(self.lm_eval.metrics(name))
        return ["lm-eval", version(), name, self.lm_eval.configs[name], *metrics, *texts]

    def _too_long(self, instance: Any) -> bool:
        # the last token of a continuation is never an input
        text, room = str(instance.args[0]), int(self.lm.max_length) + 1
        if instance.request_type == "generate_until":
            new = int(instance.args[1].get("max_gen_toks", self.lm.max_gen_toks))
            room = int(self.lm.max_length) - new
        else:
            text += "".join(map(str, instance.args[1:2]))
        return len(self.lm.tok_encode(text)) > room

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Make every candidate sample alike; the caller's generators are not touched."""
        device = self.lm.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.study.search.seed)
            yield


def _stored(outcome: Outcome) -> Answer:
    """An outcome as the answer cache holds it."""
    text = json.dumps([outcome.answer.text, outcome.values])
    return replace(outcome.answer, text=text)


def _read(answer: Answer) -> Outcome:
    text, values = json.loads(answer.text)
    return Outcome(replace(answer, text=text), values)


def _fresh(instance: Any) -> Any:
    """A request without responses; its settings are a copy, because lm-eval may change them."""
    arguments = tuple(map(copy, instance.arguments))
    return replace(instance, arguments=arguments, resps=[], filtered_resps={})


def _response(own: Sequence[Any]) -> str:
    """The model's response: the text, or the continuation that it finds most likely."""
    responses = [instance.resps[0] for instance in own]
    if own[0].request_type != "loglikelihood":
        return str(responses[0])
    best = max(range(len(own)), key=lambda i: responses[i][0])
    return str(own[best].arguments[1]).strip()
