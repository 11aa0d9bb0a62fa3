"""Gradient steps without references: the divergence against its formula and finite differences,
who teaches a task, and a search that was killed between the steps.
"""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from merging_tools import make_family
from transformers import AutoModelForCausalLM

import evomerge
from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf import teaching
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.gradient import GradientModel
from evomerge.answering.hf.teaching import divergences, next_tokens
from evomerge.console import Console
from evomerge.errors import StudyFileError
from evomerge.genome.genome import Genome
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.searching.ledger import Ledger
from evomerge.searching.records.trial_record import TaskGrade, read_trial
from evomerge.searching.starting.lessons import better_parents
from evomerge.searching.starting.warm_start import check_demanded_start, climbed_by_default
from evomerge.study import EngineSection, GenerationSection
from evomerge.study.reading import study_from_mapping
from evomerge.tasks import Task

PREFIX = [5, 9, 20, 7, 6, 6, 8, 12, 4]  # long enough to be shared
PAIRS = [
    ([*PREFIX, 8], [9, 10, 2]),
    ([*PREFIX, 11, 12, 13], [14, 2]),
    (PREFIX[:4], [4, 5, 6, 7, 2]),
]


def logprobs(model, prompt, answer):
    """log P of every token at each of the answer's places, (n, vocabulary), in float64."""
    row = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model.double()(row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)


def formula(teacher, model, kept):
    """KL(teacher || model) of each pair, where all but a teacher's likeliest tokens are one."""
    values = []
    for prompt, answer in PAIRS:
        p = logprobs(teacher, prompt, answer).exp()
        q = logprobs(model, prompt, answer).exp()
        order = p.argsort(dim=-1, descending=True)
        p, q = p.gather(1, order), q.gather(1, order)
        if kept < p.shape[1]:
            p = torch.cat([p[:, :kept], p[:, kept:].sum(dim=1, keepdim=True)], dim=1)
            q = torch.cat([q[:, :kept], q[:, kept:].sum(dim=1, keepdim=True)], dim=1)
        values.append((p * (p / q).log()).sum(dim=1).mean().item())
    return values


@pytest.mark.parametrize("kept", [3, 10_000])
def test_divergence_is_the_formula(monkeypatch, kept):
    monkeypatch.setattr(teaching, "KEPT", kept)
    teacher, model = make_model(3).float().eval(), make_model(4).float().eval()
    lessons = next_tokens(teacher, PAIRS)
    with torch.no_grad():
        found = divergences(model, PAIRS, lessons).tolist()
        own = divergences(teacher, PAIRS, lessons).tolist()
    assert found == pytest.approx(formula(teacher, model, kept), rel=1e-4)
    assert own == pytest.approx([0, 0, 0], abs=1e-6)


def make_genome(family, siblings=("one", "two"), dtype="float32"):
    names = tuple(str(family / name) for name in siblings)
    slices = tuple((i, i + 1) for i in range(4))
    return Genome("task_arithmetic", str(family / "base"), names, dtype=dtype, slices=slices)


def test_its_gradient_is_the_finite_differences(tmp_path):
    genome = make_genome(make_family(tmp_path, True, (torch.float32,) * 3))
    base = open_model(genome.base_model)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    live = LiveModel(model, base, [open_model(ref) for ref in genome.models], 0)
    gradient = GradientModel(model, live, genome)
    live.apply(genome.decode(genome.parent(1)))
    lessons = next_tokens(model, PAIRS)
    vector = (2 * np.random.default_rng(0).random(genome.dimensions)).tolist()
    found = gradient(PAIRS, vector, 40, lessons)
    assert found.mean < 0
    h, differences = 5e-3, []
    for j in range(genome.dimensions):
        up, down = ([x + sign * h * (i == j) for i, x in enumerate(vector)] for sign in (1, -1))
        above, below = (gradient(PAIRS, x, 40, lessons).mean for x in (up, down))
        differences.append((above - below) / (2 * h))
    assert np.linalg.norm(np.array(found.gradient) - differences) < 0.02 * np.linalg.norm(
        differences
    )
    at = gradient(PAIRS, genome.parent(1), 40, lessons)
    assert at.mean == pytest.approx(0, abs=1e-6)
    assert np.abs(at.gradient).max() < 1e-3 * np.abs(found.gradient).max(), "nothing is nearer"


def test_a_teacher_is_the_parent_as_it_is_on_disk(pair):
    models = [open_model(str(pair / name)) for name in ("base", "instruct")]
    section = EngineSection(batch_size=8, threads=1)
    spec = EngineSpec(
        models[0], models[1:], section, GenerationSection(max_new_tokens=12), "float32"
    )
    engine, genome = TransformersEngine(spec), make_genome(pair, ("instruct",))
    texts = [("あ1\n", "いう"), ("い\n", "ううう"), ("3\n", "4")]
    found = engine.gradient.teachers(genome.decode(genome.parent(0)), texts)
    alone = AutoModelForCausalLM.from_pretrained(pair / "instruct", dtype=torch.float32).eval()
    tokens = [engine.gradient.pair(*text) for text in texts]
    for teacher, (prompt, answer) in zip(found, tokens, strict=True):
        wanted = logprobs(alone, prompt, answer)
        assert torch.allclose(
            teacher.logprobs.double(), wanted.gather(1, teacher.tokens.long()), atol=2e-4
        )
        assert len(teacher.tokens) == len(answer)
    straight = engine.gradient(genome, [0.5] * 4, texts, found)
    engine.limits["gradient_tokens"] = 8
    assert engine.gradient(genome, [0.5] * 4, texts, found).values == pytest.approx(
        straight.values, rel=1e-3
    )


def parent(score, **grades):
    """A trial whose tasks have (correct, grade)."""
    known = {task: TaskGrade(correct, False, grade) for task, (correct, grade) in grades.items()}
    made = read_trial(0, "complete", score, {}, (), {"role": "parent"})
    return replace(made, grades=known)


def test_the_better_answer_teaches_and_what_is_smooth_breaks_ties():
    tasks = [Task(name, "") for name in "abcde"]
    base = parent(2.0, a=(True, 2.0), b=(False, 3.0), c=(False, 1.0), d=(False, 1.0), e=(None, 4.0))
    one = parent(3.0, a=(False, 5.0), b=(False, 2.0), c=(False, 1.0), d=(True, 2.0), e=(None, 3.0))
    two = parent(3.0, a=(False, 5.0), b=(False, 2.0), c=(False, 1.0), d=(True, 2.0), e=(None, 2.0))
    assert better_parents(tasks, [base, one, two], "correct") == [0, 0, 2, 2, 0]
    better = replace(one, score=3.5)
    assert better_parents(tasks, [base, better, two], "correct") == [0, 0, 1, 1, 0]
    assert better_parents(tasks, [base, better, two], "grade") == [1, 0, 1, 1, 0]


@pytest.fixture
def untold(pair, tmp_path):
    """The pair's study with tasks that have no references."""
    place = shutil.copytree(pair, tmp_path / "place")
    tasks = [json.loads(line) for line in Path(place, "tasks.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: task[key] for key in ("task_id", "input")}) for task in tasks]
    Path(place, "tasks.jsonl").write_text("\n".join(lines))
    return place


def searched(place, name, **changes):
    said = StringIO()
    settings = {"warm_start": "auto", "warm_start_steps": 4, "trials": 4} | changes
    found = evomerge.search(
        place / "study.yaml",
        storage=place / f"{name}.db",
        results=place,
        console=Console(said),
        overrides={f"search.{key}": value for key, value in settings.items()},
    )
    return found, found.snapshot.ledger.facts, said.getvalue()


def test_a_search_without_references_begins_where_the_parents_lead(untold, monkeypatch):
    found, facts, said = searched(untold, "straight")
    assert "4 gradient steps on the divergence from each task's better parent" in said
    first = next(r for r in found.records if r.role == "candidate")
    assert first.vector == facts.start.mean
    remember = Ledger.remember

    def killed(self, key, value):
        remember(self, key, value)
        if key == "warm_start" and len(value) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "remember", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            searched(untold, "killed")
    monkeypatch.setattr(Ledger, "remember", remember)
    _, again, _ = searched(untold, "killed")
    assert [replace(step, seconds=0) for step in again.warm_start] == [
        replace(step, seconds=0) for step in facts.warm_start
    ]
    assert again.start == facts.start


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"engine": {"kind": "vllm"}}, "needs an engine with gradients .*kind: vllm"),
        ({"engine": {"quantization": "4bit"}}, "a 4-bit model has no gradient .*quantization"),
        ({"method": "ties"}, "requires task_arithmetic without normalize"),
    ],
)
def test_where_there_can_be_no_steps_it_is_said_in_a_line(pair, changes, line):
    data = {
        "genome": {"base_model": "base", "models": ["instruct"]},
        "tasks": [{"file": "tasks.jsonl"}],
        "search": {"warm_start": "parents"},
        "engine": changes.get("engine", {}),
    }
    genome = make_genome(pair, ("instruct",))
    check_demanded_start(
        study_from_mapping(data | {"engine": {}}, Path(".")), genome, [Task(0, "")]
    )
    genome = replace(genome, method=changes.get("method", genome.method))
    with pytest.raises(StudyFileError, match=f"search.warm_start: {line}") as caught:
        check_demanded_start(study_from_mapping(data, Path(".")), genome, [Task(0, "あ")])
    assert "\n" not in str(caught.value)


def test_by_default_parents_teach_several_siblings_and_references_a_single_one(pair):
    told = [Task(i, "あ", "い") for i in range(4)]
    single, several = (make_genome(pair, names) for names in (("instruct",), ("instruct", "other")))
    assert climbed_by_default(single, told) == "likelihood"
    assert climbed_by_default(single, [*told[:1], *(Task(i, "あ") for i in range(3))]) == "parents"
    assert climbed_by_default(several, told) == "parents"
