"""Whether the tasks can be asked, answered and graded: prompts, context, engine, judge."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from evomerge.merging.checkpoints.model_folder import ModelFolder
from evomerge.searching.answer_room import context_of
from evomerge.searching.preflight.findings import Findings
from evomerge.study import JudgeSection, Study
from evomerge.tasks import Split, Task


def check_prompts(findings: Findings, study: Study, base: ModelFolder, split: Split | None) -> None:
    """The tokenizer's chat template, the knowledge base, and whether every prompt has room."""
    from evomerge.answering.encode import Encoder
    from evomerge.answering.hf.loading import load_tokenizer
    from evomerge.answering.prompts import make_prompter
    from evomerge.knowledge.chooser import open_knowledge

    tokenizer = load_tokenizer(base, study.engine.trust_remote_code)
    if study.lm_eval:
        _check_lm_eval_template(findings, study, tokenizer.chat_template)
        _check_thoughts(findings, study, tokenizer)
        return
    make_prompter(tokenizer, study.prompt)
    chooser = None
    with findings.refusals("knowledge"):
        chooser = open_knowledge(study.prompt, lambda n: findings.add("unknown", "knowledge", n))
        if chooser is not None:
            found = chooser.knowledge
            text = f"{len(found.classes)} classes, {len(found.examples)} examples"
            findings.add("ok", "knowledge", text)
    make_prompter(tokenizer, study.prompt, chooser=chooser).try_each_kind()
    findings.add("ok", "tokenizer", f"prompts in format {study.prompt.format}")
    _check_thoughts(findings, study, tokenizer)
    context, most = context_of(study, base), study.generation.max_new_tokens
    if split is None:
        return
    with findings.refusals("context"):
        prompter = make_prompter(tokenizer, study.prompt, study.generation, chooser, context)
        encode = Encoder(tokenizer, context, most, study.prompt.too_long)
        longest = 0
        for part in (split.search, split.validation, split.held_out):
            prompts = prompter.prepare([task.input for task in part])
            new = [prompt.settings.max_new_tokens for prompt in prompts]
            rows = encode([prompt.text for prompt in prompts], new)
            longest = max(longest, *map(len, rows), 0)
        room = "of unknown length"
        if context is not None:
            room = f"of {context:,} tokens"
        text = f"the longest prompt has {longest:,} tokens, an answer at most {most:,}"
        findings.add("ok", "context", f"{text}, in a context {room}")


def _check_thoughts(findings: Findings, study: Study, tokenizer: Any) -> None:
    """Which variables the chat template does not read, and which marks thoughts have."""
    from evomerge.answering.chat_template import unread_variables
    from evomerge.answering.reasoning import find_marks

    for name in unread_variables(tokenizer, study.prompt.chat_template_kwargs):
        text = f"prompt.chat_template_kwargs: the chat template has no `{name}`, and ignores it"
        findings.add("low", "tokenizer", text)
    marks = find_marks(study.generation.reasoning, tokenizer)
    if marks is not None:
        findings.add("ok", "reasoning", f"thoughts are between {marks.start} and {marks.end}")


def _check_lm_eval_template(findings: Findings, study: Study, template: object) -> None:
    if not study.apply_chat_template:
        findings.add("ok", "tokenizer", "lm-eval's prompts, without the chat template")
    elif template:
        findings.add("ok", "tokenizer", "lm-eval's prompts, with the chat template")
    else:
        text = "it has no chat template; set `apply_chat_template: false`"
        findings.add("wrong", "tokenizer", text)


def check_engine(findings: Findings, study: Study) -> None:
    """The packages and the device that the engine needs."""
    engine, missing = study.engine, []
    if engine.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        missing.append("vllm")
    if engine.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        missing.append("4bit")
    for extra in missing:
        text = f"it needs a package that is missing. Run pip install 'evomerge[{extra}]'."
        findings.add("wrong", "engine", text)
    if engine.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            text = f"engine.device is {engine.device}, and there is no such device. Use auto."
            findings.add("wrong", "engine", text)


def check_judge(findings: Findings, study: Study, split: Split | None) -> None:
    """The judge, and whether it can tell the study's answers apart. Its server is asked once."""
    judge = study.judge
    if judge.kind == "lm-eval":
        findings.add("ok", "judge", "lm-eval's own metrics")
        return
    with findings.refusals("judge"):
        text = _opened(judge, () if split is None else _every(split))
        findings.add("ok", "judge", f"{text}, metric {judge.metric}{_closed(study, split)}")
    if split is not None and judge.kind == "rules":
        _check_rules(findings, study, split)


def _opened(judge: JudgeSection, tasks: Sequence[Task]) -> str:
    """Open what the judge needs, and describe it. Raises as a search does."""
    from evomerge.judging.factory import check_tasks

    described = f"{judge.kind}, offline"
    if judge.kind in ("learned", "cascade"):
        from evomerge.judging.learned.judge import LearnedJudge

        assert judge.file is not None
        check_tasks(LearnedJudge(judge.file), tasks)
        described += f", {judge.file}"
    if judge.kind == "local":
        from evomerge.merging.checkpoints.open_model import open_model

        open_model(judge.model or "")
        described += f", {judge.model}"
    if judge.kind in ("llm", "cascade"):
        described = _reached(judge)
    if judge.kind == "cascade":
        described += f"; {judge.file} first, wrong better halves at most {judge.error:g}"
    return described


def _reached(judge: JudgeSection) -> str:
    """Ask the judge's server for its models, and describe the judge. Raises as a search does."""
    from evomerge.judging.llm.budget import Budget
    from evomerge.judging.llm.judge_client import JudgeClient

    client = JudgeClient(judge, Budget(), lambda usage: None)
    client.client.close()
    limits = []
    for key in ("max_requests", "max_tokens", "max_cost"):
        value = getattr(judge, key)
        if value is not None:
            limits.append(f"{key} {value:g}")
    return (
        f"{client.model} at {client.url}, {judge.votes} vote(s) for an answer, "
        f"{judge.concurrency} concurrent requests, budget: {', '.join(limits) or 'none'}"
    )


def _closed(study: Study, split: Split | None) -> str:
    """How many tasks the rules call right or wrong; for the others they compare wording."""
    from evomerge.judging.rules.closed_tasks.grading import is_closed

    if split is None or study.judge.kind != "rules":
        return ""
    every = _every(split)
    closed = sum(1 for task in every if is_closed(task.output))
    return f", {closed} of {len(every)} tasks are closed (right or wrong)"


def _check_rules(findings: Findings, study: Study, split: Split) -> None:
    """Whether the rules can grade these tasks: closed ones, or those with a reference."""
    from evomerge.judging.rules.closed_tasks.grading import is_closed

    named = {"search": split.search, "validation": split.validation, "held-out": split.held_out}
    if study.judge.metric == "correct":
        for name, part in named.items():
            if part and not any(is_closed(task.output) for task in part):
                level = "low" if name == "validation" else "wrong"
                text = f"no {name} task is closed, so none can be right or wrong"
                findings.add(level, "judge", f"{text}. Set judge.metric: grade.")
        return
    every = _every(split)
    bare = sum(1 for task in every if not task.output.strip())
    if bare * 2 > len(every):
        findings.add(
            "low",
            "judge",
            f"{bare} of {len(every)} tasks have no reference (`output`): without one the rules see "
            "little more than an answer's form, so a verdict would mean nothing. Add references, "
            "or use judge.kind: llm.",
        )


def _every(split: Split) -> tuple[Task, ...]:
    return (*split.search, *split.validation, *split.held_out)
