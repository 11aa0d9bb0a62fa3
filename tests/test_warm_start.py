"""The references' likelihood and its gradient by the genome's numbers, against autograd and finite
differences; the walk.
"""

import copy
import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from merging_tools import differing, make_family
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import evomerge
from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf import gradient as gradient_module
from evomerge.answering.hf import references as references_module
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.gradient import MICRO_TOKENS, GradientModel, TransformersGradient, inner
from evomerge.answering.hf.references import batches, likelihoods, make_pair
from evomerge.answering.prompts import Prompter
from evomerge.console import Console
from evomerge.errors import EngineError, StudyFileError
from evomerge.genome.genome import Genome
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.searching.records.study_facts import GradientStep
from evomerge.searching.starting import walk
from evomerge.searching.starting.walk import adam_trajectory, minibatch_indices, step_scales
from evomerge.searching.starting.warm_start import check_warm_start, find_warm_start, warm_start
from evomerge.study import EngineSection, GenerationSection, PromptSection
from evomerge.study.reading import study_from_mapping
from evomerge.tasks import Task

PREFIX = [5, 9, 20, 7, 6, 6, 8, 12, 4]  # long enough to be shared
PAIRS = [
    ([*PREFIX, 8], [9, 10, 2]),
    ([*PREFIX, 11, 12, 13], [14, 2]),
    (PREFIX[:4], [4, 5, 6, 7, 2]),
    ([*PREFIX, 3, 3], [2]),
]
FP32 = (torch.float32,) * 3
GENOMES = {
    "slices": {},
    "filters": {"filters": ("self_attn", "mlp.up")},
    "smooth": {"smooth": True, "slices": ((0, 2), (2, 4))},
    "smooth_filters": {"smooth": True, "filters": ("mlp",)},
    "tokenizer": {"tokenizer_source": "base"},
}


def likelihoods_of(model, pairs, micro_tokens=MICRO_TOKENS):
    """`likelihoods` of many pairs in batches, without a gradient."""
    values = [0.0] * len(pairs)
    with torch.inference_mode():
        for batch in batches(pairs, micro_tokens):
            for i, value in zip(
                batch, likelihoods(model, [pairs[i] for i in batch]).tolist(), strict=True
            ):
                values[i] = value
    return values


def make_genome(family, siblings=("one", "two"), dtype="float32", **settings):
    given = {"slices": tuple((i, i + 1) for i in range(4))} | settings
    return Genome(
        "task_arithmetic",
        str(family / "base"),
        tuple(str(family / s) for s in siblings),
        dtype=dtype,
        **given,
    )


def make_live(family, siblings=("one", "two"), dtype=torch.float32, residency="auto"):
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype).eval()
    return model, LiveModel(
        model,
        open_model(str(family / "base")),
        [open_model(str(family / s)) for s in siblings],
        0,
        residency,
    )


def some_vector(genome, seed=0):
    return (2 * np.random.default_rng(seed).random(genome.dimensions)).tolist()


def autograd(genome, model, vector):
    """(mean, gradient) with the numbers as leaves: the merge by mergekit's rules written out, one
    row at a time.
    """
    tensors = [
        dict(AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float64).named_parameters())
        for ref in (genome.base_model, *genome.models)
    ]
    base, *others = [{name: p.detach() for name, p in ts.items()} for ts in tensors]
    x = torch.tensor(vector, dtype=torch.float64, requires_grad=True)
    shape = (len(genome.slices), len(others), len(genome.filters) + 1)
    groups, n = x.reshape(shape), genome.slices[-1][1]

    def weight(name, m):
        layer = int(name.split(".")[2]) if ".layers." in name else None
        f = next((i for i, text in enumerate(genome.filters) if text in name), len(genome.filters))
        if genome.smooth:
            at = 0.0 if layer is None else layer / (n - 1) * (shape[0] - 1)
            low = min(int(at), shape[0] - 2)
            return (1 - (at - low)) * groups[low, m, f] + (at - low) * groups[low + 1, m, f]
        last = name.startswith(("model.norm", "lm_head"))
        at = (
            (-1 if last else 0)
            if layer is None
            else next(i for i, (start, end) in enumerate(genome.slices) if start <= layer < end)
        )
        return groups[at, m, f]

    merged = {
        name: b + sum(weight(name, m) * (o[name] - b) for m, o in enumerate(others))
        for name, b in base.items()
    }
    wide = copy.deepcopy(model).double()
    values = []
    for prompt, reference in PAIRS:
        row = torch.tensor([prompt + reference])
        logits = functional_call(
            wide, merged, (row,), {"use_cache": False}, tie_weights=True
        ).logits[0, len(prompt) - 1 : -1]
        values.append(-F.cross_entropy(logits, row[0, len(prompt) :]))
    mean = torch.stack(values).mean()
    mean.backward()
    return [v.item() for v in values], x.grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", GENOMES)
def test_gradient_is_autograds_with_the_numbers_as_leaves(tmp_path, kind, tied):
    genome = make_genome(make_family(tmp_path, tied, FP32), **GENOMES[kind])
    model, live = make_live(tmp_path)
    vector = some_vector(genome)
    found = GradientModel(model, live, genome)(PAIRS, vector, micro_tokens=40)
    values, gradient = autograd(genome, model, vector)
    assert found.values == pytest.approx(values, rel=1e-5)
    assert torch.linalg.norm(torch.tensor(found.gradient) - gradient) < 1e-5 * torch.linalg.norm(
        gradient
    )


@pytest.mark.parametrize("residency", ["device", "host", "disk"])
def test_gradient_is_the_finite_differences(tmp_path, residency):
    genome = make_genome(make_family(tmp_path, True, FP32))
    model, live = make_live(tmp_path, residency=residency)
    vector = some_vector(genome)
    found = np.array(GradientModel(model, live, genome)(PAIRS, vector).gradient)
    wide = copy.deepcopy(model).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def mean(x):
        """In float64, from base and deltas as the files have them."""
        live.apply(genome.decode(x))
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.data.copy_(q)
        return float(np.mean(likelihoods_of(wide, PAIRS)))

    h, differences = 2e-3, []
    for j in range(genome.dimensions):
        up, down = ([x + sign * h * (i == j) for i, x in enumerate(vector)] for sign in (1, -1))
        differences.append((mean(up) - mean(down)) / (2 * h))
    assert np.linalg.norm(found - differences) < 1e-3 * np.linalg.norm(differences)
    live.apply(genome.decode(vector))
    assert not differing(start, dict(model.named_parameters()))


def test_likelihoods_do_not_depend_on_batch_prefix_or_padding(tmp_path, monkeypatch):
    model = make_model(3).float().eval()
    together = likelihoods(model, PAIRS).tolist()
    alone = [likelihoods(model, [pair]).item() for pair in PAIRS]
    shared = likelihoods(model, [PAIRS[i] for i in (0, 1, 3)]).tolist()
    monkeypatch.setattr(references_module, "SHARED", 1000)
    apart = likelihoods(model, [PAIRS[i] for i in (0, 1, 3)]).tolist()
    assert together == pytest.approx(alone, abs=1e-5)
    assert shared == pytest.approx(apart, abs=1e-5)
    assert shared == pytest.approx([alone[i] for i in (0, 1, 3)], abs=1e-5)
    assert likelihoods_of(model, PAIRS, 20) == pytest.approx(alone, abs=1e-5)


def test_nothing_is_left_behind(tmp_path):
    family = make_family(tmp_path, True)
    genome = make_genome(family, ("one",), "bfloat16")
    model, live = make_live(family, ("one",), torch.bfloat16)
    other, wanted = make_live(family, ("one",), torch.bfloat16)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    gradient = GradientModel(model, live, genome)
    for seed in range(3):
        gradient(PAIRS, some_vector(genome, seed))
    recipe = genome.decode(some_vector(genome, 9))
    live.apply(recipe)
    wanted.apply(recipe)
    assert not differing(dict(model.named_parameters()), dict(other.named_parameters()))
    assert all(
        p.grad is None and p.grad_fn is None and not p._post_accumulate_grad_hooks
        for p in model.parameters()
    )
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_a_failure_leaves_nothing_behind(tmp_path):
    genome = make_genome(make_family(tmp_path, False, FP32))
    model, live = make_live(tmp_path)
    gradient = GradientModel(model, live, genome)
    with pytest.raises(IndexError):
        gradient([*PAIRS, ([99999], [1])], some_vector(genome), micro_tokens=20)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())


def test_inner_is_the_sum_of_products(monkeypatch):
    monkeypatch.setattr(gradient_module, "PIECE", 7)
    a, b = (
        torch.randn(5, 9, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1)
    )
    assert inner(a, b) == pytest.approx((a.double() * b.double()).sum().item(), rel=1e-6)
    assert inner(a[:0], b[:0]) == 0.0


@pytest.fixture
def engine(pair):
    return make_engine(pair)


def make_engine(pair, dtype="float32", **settings):
    models = [open_model(str(pair / name)) for name in ("base", "instruct")]
    section = EngineSection(batch_size=8, threads=1)
    generation = GenerationSection(max_new_tokens=12, **settings)
    return TransformersEngine(EngineSpec(models[0], models[1:], section, generation, dtype))


def test_a_reference_is_cut_as_the_model_would_have_said_it(engine):
    tokens = dict(engine.tokenizer.get_vocab().items())
    assert engine.gradient.pair("あ1\n", "いう") == (
        [tokens[c] for c in "あ1\n"],
        [tokens["い"], tokens["う"], 2],
    )
    assert len(engine.gradient.pair("あ", "い" * 40)[1]) == 12  # no answer is longer


def test_a_space_in_front_is_no_part_of_the_reference():
    """As SentencePiece does: a text that stands alone begins with a space."""

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [0, *map(ord, text)]}

    class Encode:
        max_new_tokens = 9

        def __init__(self):
            self.tokenizer = tokenizer

        def __call__(self, prompts):
            return [[0, *map(ord, prompt)] for prompt in prompts]

    class Cut(Encode):
        def __call__(self, prompts):
            return [[98] for _ in prompts]

    assert make_pair(Encode(), "ab", "c", 2) == ([0, 97, 98], [99, 2])
    assert make_pair(Cut(), "ab", "c", None) == ([98], [0, 99])


def test_out_of_memory_halves_and_gives_the_same(engine, pair, monkeypatch):
    genome = make_genome(pair, ("instruct",))
    pairs = [("あ1\n", "いう"), ("い\n", "ううう"), ("3\n", "4")]
    wanted = engine.gradient(genome, [0.5] * 4, pairs)
    original, limit = gradient_module.likelihoods, 12
    engine.limits["gradient_tokens"] = 32

    def tight(model, rows):
        if len(rows) * max(len(p) + len(r) for p, r in rows) > limit:
            raise torch.OutOfMemoryError
        return original(model, rows)

    monkeypatch.setattr(gradient_module, "likelihoods", tight)
    found = engine.gradient(genome, [0.5] * 4, pairs)
    assert engine.limits["gradient_tokens"] == 16  # where two rows of six tokens are the most
    assert found.values == pytest.approx(wanted.values, rel=1e-5)
    assert found.gradient == pytest.approx(wanted.gradient, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"method": "ties"}, "ties"),
        ({"normalize": True}, "normalized"),
        ({"method": "slerp"}, "slerp"),
    ],
)
def test_other_methods_are_refused_in_a_line(pair, engine, change, word):
    genome = replace(make_genome(pair, ("instruct",)), **change)
    with pytest.raises(StudyFileError, match=f"search.warm_start: .*task_arithmetic.*{word}"):
        engine.gradient(genome, [0.5] * genome.dimensions, [("あ", "い")])


TASKS = [Task(i, "あいう"[i % 3] + str(i % 10), "かきく"[i % 3] + str(i % 7)) for i in range(21)]


def make_study(steps=6, seed=0):
    return SimpleNamespace(search=SimpleNamespace(warm_start_steps=steps, seed=seed))


def start(engine, pair, steps=6, done=(), record=lambda step: None, tasks=TASKS, **genome):
    made = make_genome(pair, ("instruct",), start=0.5, **genome)
    return made, warm_start(
        engine,
        made,
        tasks,
        Prompter(engine.tokenizer, PromptSection()),
        make_study(steps),
        done,
        record,
    )


def test_a_killed_warm_start_goes_on_as_if_it_had_not_been(pair):
    _, straight = start(make_engine(pair, "bfloat16"), pair)

    class Killed(BaseException):
        pass

    kept = []

    def record(step):
        kept.append(json.dumps(asdict(step)))
        if len(kept) in (2, 5):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            start(
                make_engine(pair, "bfloat16"),
                pair,
                done=[GradientStep.from_dict(json.loads(k)) for k in kept],
                record=record,
            )
    _, resumed = start(
        make_engine(pair, "bfloat16"),
        pair,
        done=[GradientStep.from_dict(json.loads(k)) for k in kept],
        record=record,
    )
    assert len(kept) == 6
    assert (resumed.mean, resumed.scales) == (straight.mean, straight.scales)
    assert [replace(s, seconds=0) for s in resumed.steps] == [
        replace(s, seconds=0) for s in straight.steps
    ]
    _, again = start(make_engine(pair, "bfloat16"), pair, done=resumed.steps, record=record)
    assert again == resumed
    assert len(kept) == 6


def test_the_likelihood_rises_and_the_numbers_stay_within_their_bounds(engine, pair):
    genome, found = start(engine, pair, steps=12, weight_bounds=(0.3, 0.9))
    pairs = [(Prompter(engine.tokenizer, PromptSection()).render(t.input), t.output) for t in TASKS]
    before, after = (engine.gradient(genome, v, pairs).mean for v in ([0.5] * 4, found.mean))
    assert after > before
    assert all(0.3 <= x <= 0.9 for step in found.steps for x in step.vector)
    assert all(0.3 <= x <= 0.9 for x in found.mean)
    assert found.seconds == pytest.approx(sum(s.seconds for s in found.steps), abs=1e-3)


def test_adam_is_torchs(pair):
    genome = make_genome(pair, ("instruct",), weight_bounds=(-9.0, 9.0))
    gradients = np.random.default_rng(0).normal(size=(7, genome.dimensions))
    x = torch.tensor([gene.start for gene in genome.genes], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([x], lr=walk.RATE, betas=walk.BETAS, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 1 - t / 10)
    for gradient in gradients:
        x.grad = torch.tensor(gradient)
        adam.step()
        schedule.step()
    assert np.allclose(
        adam_trajectory(genome, gradients.tolist(), 10)[-1], x.detach().numpy(), rtol=1e-10
    )


def test_every_task_comes_equally_often_and_a_step_is_its_numbers_alone():
    seen = [i for step in range(21) for i in minibatch_indices(3, step, 21, 16)]
    assert all(seen.count(i) == 16 for i in range(21))
    assert (
        minibatch_indices(3, 7, 21, 16)
        == minibatch_indices(3, 7, 21, 16)
        != minibatch_indices(4, 7, 21, 16)
    )
    assert sorted(minibatch_indices(0, 5, 4, 16)) == [0, 1, 2, 3]


def test_scales_are_wide_where_the_likelihood_is_flat():
    rng = np.random.default_rng(0)
    third = walk.NARROWED
    found = step_scales((rng.normal(size=(800, 4)) * [1, 2, 4, 2]).tolist()) / third
    assert found == pytest.approx([2, 1, 0.5, 1], rel=0.15)
    assert np.prod(found) == pytest.approx(1)
    cut = step_scales([[1.0, 1e6, 0.0, 1e-9]]) / third
    assert np.prod(cut) == pytest.approx(1)
    assert cut.max() <= 3.01
    assert cut.min() >= 1 / 3.01
    assert step_scales([[0.0, 0.0]]) / third == pytest.approx([1, 1])
    late = [[5.0, 1.0]] * 3 + [[1.0, 5.0]] * 4
    assert (
        step_scales(late).tolist() == step_scales(late[3:]).tolist()
    )  # the way there does not count


def wanted(pair, engine, /, tasks=TASKS, genome=None, **settings):
    """What the gradient steps of a study with these keys climb; `genome` has changes."""
    data = {
        "genome": {"base_model": "base", "models": ["instruct"]},
        "tasks": [{"file": "tasks.jsonl"}],
    }
    study = study_from_mapping(data | settings, Path("."))
    made = replace(make_genome(pair, ("instruct",)), **(genome or {}))
    problem = SimpleNamespace(study=study, genome=made, split=SimpleNamespace(search=tasks))
    found = find_warm_start(problem, engine, None, None)
    return None if found is None else found.kind


def test_by_default_it_is_taken_where_it_can_be(engine, pair):
    assert wanted(pair, engine) == "likelihood"
    open_tasks = [Task(100 + i, "あ") for i in range(21)]
    assert wanted(pair, engine, tasks=[*TASKS, *open_tasks]) == "likelihood"
    assert wanted(pair, engine, tasks=[*TASKS[:20], *open_tasks]) == "parents"
    assert wanted(pair, engine, search={"warm_start": "parents"}) == "parents"
    assert not wanted(pair, SimpleNamespace(gradient=None))
    assert not wanted(pair, engine, genome={"method": "slerp"})
    assert not wanted(pair, engine, genome={"normalize": True})
    assert not wanted(pair, engine, search={"warm_start": None})
    assert not wanted(pair, engine, search={"source_study": "other"})
    assert not wanted(pair, engine, random_init=True)
    assert not wanted(pair, engine, engine={"quantization": "4bit"})


def searched(pair, tmp_path, warm_start):
    said = StringIO()
    changes = {"warm_start": warm_start, "warm_start_steps": 3, "trials": 4}
    found = evomerge.search(
        pair / "study.yaml",
        storage=tmp_path / "s.db",
        results=tmp_path,
        console=Console(said),
        overrides={f"search.{key}": value for key, value in changes.items()},
    )
    return found, found.snapshot.ledger.facts, said.getvalue()


def test_a_search_begins_where_the_steps_lead(pair, tmp_path):
    found, facts, said = searched(pair, tmp_path, "auto")
    assert "3 gradient steps on the references' likelihood" in said
    assert [step.number for step in facts.warm_start] == [0, 1, 2]
    first = next(r for r in found.records if r.role == "candidate")
    assert first.vector == facts.start.mean


def test_check_says_what_a_study_that_has_begun_does(pair, tmp_path):
    def start_of(**where):
        changes = {"search.warm_start": "auto"}
        found = evomerge.check(pair / "study.yaml", overrides=changes, **where)
        return [finding.text for finding in found if finding.subject == "start"]

    searched(pair, tmp_path, None)
    assert start_of() == [
        "16 gradient steps on the references' likelihood, about as long as 768 answers"
    ]
    assert start_of(storage=tmp_path / "s.db") == [], "begun without, it goes on without"


@pytest.mark.parametrize("warm_start", ["auto", "likelihood"])
def test_without_memory_for_gradients_only_the_default_goes_on(
    pair, tmp_path, monkeypatch, warm_start
):
    def fail(*_):
        raise EngineError("out of memory with the gradient of a single task")

    monkeypatch.setattr(TransformersGradient, "__call__", fail)
    if warm_start == "likelihood":
        with pytest.raises(EngineError, match="out of memory"):
            searched(pair, tmp_path, warm_start)
        return
    found, facts, said = searched(pair, tmp_path, warm_start)
    assert "note: the search starts without gradient steps: out of memory" in said
    assert not facts.warm_start
    assert facts.start.mean == (1.0,) * 4
    assert found.verdict is not None


def test_without_references_or_gradients_it_is_refused(engine, pair):
    genome = make_genome(pair, ("instruct",))
    with pytest.raises(StudyFileError, match="no search task has a reference"):
        check_warm_start(genome, [Task(0, "あ")])
    with pytest.raises(StudyFileError, match=r"engine\.kind: transformers"):
        check_warm_start(genome, TASKS, SimpleNamespace(gradient=None))
    check_warm_start(genome, TASKS, engine)
    _, found = start(engine, pair, steps=2, tasks=[Task(99, "あ"), *TASKS[:3]])
    assert [step.tasks for step in found.steps] == [3, 3]
