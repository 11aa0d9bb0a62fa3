"""Many candidates in one pass give what each merged model, built and loaded afresh, gives with
`generate`.
"""

import pytest
import torch
from conftest import make_model, save
from merging_tools import SLICES, differing, load_all, make_family, moved, random_recipe
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf import per_row as per_row_module
from evomerge.answering.hf.decode import decode
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.population import PopulationModel, is_faster, suits
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.errors import RecipeError
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import MergePlan, merged_tensors
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import EngineSection, GenerationSection

FP32, ENDS = (torch.float32,) * 3, [2, 5, 9, 14]
PROMPTS = [[5, 9, 20, 7], [8], [11, 12, 13, 14, 15, 16, 17]]


def make_qwen(folder):
    """Qwen2, whose q, k and v have biases: none of them 0, and other ones in each model."""
    torch.manual_seed(0)
    like = make_model(0).config
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    base = Qwen2ForCausalLM(
        Qwen2Config(
            **{key: getattr(like, key) for key in keys},
            initializer_range=0.2,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    for name, model in (("base", base), ("one", moved(base, 1, 0.1)), ("two", moved(base, 2, 0.1))):
        save(model, folder / name)
    return folder


FAMILIES = {
    "untied": lambda folder: make_family(folder, False, FP32),
    "tied": lambda folder: make_family(folder, True, FP32),
    "attention_and_mlp_biases": lambda folder: make_family(
        folder, False, FP32, attention_bias=True, mlp_bias=True
    ),
    "qwen2": make_qwen,
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return FAMILIES[request.param](tmp_path)


def make_population(family, siblings=("one", "two"), dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype)
    live = LiveModel(
        model, open_model(str(family / "base")), [open_model(str(family / s)) for s in siblings]
    )
    return model, live, PopulationModel(model, live)


def candidates(family, siblings, count, dtype="float32"):
    """Random weights by slice; the first is the base itself, and with two siblings the last has
    only one of them.
    """
    generator = torch.Generator().manual_seed(4)
    recipes = [random_recipe(family, siblings, generator, dtype=dtype) for _ in range(count - 1)]
    base = task_arithmetic_recipe(
        str(family / "base"),
        [str(family / s) for s in siblings],
        SLICES,
        [[0.0] * len(siblings)] * 3,
        dtype,
    )
    return [base, *recipes[:-1], random_recipe(family, siblings[-1:], generator, dtype=dtype)]


def by_generate(family, recipe, dtype=torch.float32, max_new_tokens=12):
    """Each prompt alone through the merged model, without any of our loops."""
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype)
    model.load_state_dict(dict(merged_tensors(recipe, open_recipe(recipe))), strict=False)
    model.tie_weights()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ENDS,
        )
        found.append([token for token in out[0, len(prompt) :].tolist() if token not in ENDS])
    return found


def answer_all(population, recipes, rules):
    """[candidate][prompt] tokens, all rows in one batch."""
    pairs = [(c, p) for p in range(len(PROMPTS)) for c in range(len(recipes))]
    with population.of(recipes) as answer:
        outputs = answer([c for c, _ in pairs], [PROMPTS[p] for _, p in pairs], rules)
    found = dict(zip(pairs, outputs, strict=True))
    return [[found[c, p].tokens for p in range(len(PROMPTS))] for c in range(len(recipes))]


@pytest.mark.parametrize("siblings", [["one"], ["one", "two"]])
def test_the_tokens_of_every_merged_model(family, siblings, monkeypatch):
    recipes = candidates(family, siblings, 4)
    _, _, population = make_population(family, siblings)
    answers = answer_all(population, recipes, SamplingParams(12, frozenset(ENDS)))
    wanted = [by_generate(family, recipe) for recipe in recipes]
    assert answers == wanted
    monkeypatch.setattr(per_row_module, "GROUPED", 1)  # every call of a linear layer merges
    assert answer_all(population, recipes, SamplingParams(12, frozenset(ENDS))) == wanted
    assert len({str(row) for row in wanted}) == 4  # the candidates do differ
    assert len({len(answer) for row in wanted for answer in row}) > 1  # rows did leave in between


def test_the_logits_of_a_merged_model_in_float64(tmp_path):
    """Closer than tokens can tell: another order of sums, and nothing else."""
    family = make_family(tmp_path, False, FP32, attention_bias=True)
    recipe = candidates(family, ["one", "two"], 3)[1]
    model, _, population = make_population(family)
    with population.of([recipe]) as answer:
        ours = last_logits(model, lambda: answer([0], [PROMPTS[2]], SamplingParams(1)))[0]
    exact = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float64)
    exact.load_state_dict(
        {name: tensor.double() for name, tensor in merged_tensors(recipe, open_recipe(recipe))}
    )
    wanted = exact(torch.tensor([PROMPTS[2]])).logits[0, -1]
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def recipe_of(family, **changes):
    """A recipe that suits, and what is changed in it."""
    data = task_arithmetic_recipe(
        str(family / "base"), [str(family / "one")], SLICES, [[0.3], [0.6], [1.2]], "float32"
    ).to_dict()
    return Recipe.from_dict({**data, **changes})


def gradient(family, **changes):
    models = [{"model": str(family / "one"), "parameters": {"weight": [0.2, 0.9]}}]
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "models": models,
        "dtype": "float32",
    }
    return Recipe.from_dict({**data, **changes})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("plain"), False, FP32)


def test_which_recipes_suit(plain):
    one = [{"model": str(plain / "one"), "parameters": {"weight": 1.0, "density": 0.5}}]
    middle = task_arithmetic_recipe(
        str(plain / "base"), [str(plain / "one")], [(1, 2), (2, 4)], [[1.0], [0.5]], "float32"
    )
    good = {
        "slices": recipe_of(plain),
        "gradient": gradient(plain),
        "explicit": gradient(
            plain, parameters={"normalize": 0.0, "lambda": "1", "int8_mask": True}
        ),
    }
    bad = {
        "normalised": recipe_of(plain, parameters={"normalize": True}),
        "normalised by a filter": gradient(
            plain, parameters={"normalize": [{"filter": "mlp", "value": 1}, {"value": 0}]}
        ),
        "scaled": gradient(plain, parameters={"lambda": 0.5}),
        "scaled by a gradient": gradient(plain, parameters={"lambda": [1.0, 0.9]}),
        "rounded in between": recipe_of(plain, dtype="float32", out_dtype="bfloat16"),
        "other tokens": recipe_of(plain, tokenizer_source="union"),
        "ties": gradient(plain, merge_method="ties", models=one),
        "dare": gradient(plain, merge_method="dare_linear", models=one),
        "linear": gradient(plain, merge_method="linear", models=one),
        "layers moved": middle,
    }
    assert [name for name, recipe in good.items() if not suits(recipe)] == []
    assert [name for name, recipe in bad.items() if suits(recipe)] == []
    _, _, population = make_population(plain, ["one"])
    assert population.suits(list(good.values()))
    assert not any(population.suits([recipe]) for recipe in bad.values())


def test_what_only_the_models_tell(plain):
    """Another dtype than the live model's, fewer layers than it has, inputs that wait on disk, an
    unknown module.
    """
    model, live, population = make_population(plain, ["one"])
    few = task_arithmetic_recipe(
        str(plain / "base"), [str(plain / "one")], [(0, 1), (1, 3)], [[1.0], [0.5]], "float32"
    )
    for recipe in (recipe_of(plain, dtype="bfloat16"), few):
        assert suits(recipe)
        assert not population.suits([recipe])
    with (
        pytest.raises(RecipeError, match="this recipe cannot share a forward pass"),
        population.of([recipe_of(plain), few]),
    ):
        pass
    norm = model.model.norm
    model.model.norm = torch.nn.LayerNorm(32)
    assert not population.suits([recipe_of(plain)])
    model.model.norm = norm
    assert population.suits([recipe_of(plain)])
    live.resident.retreat()
    assert not population.suits([recipe_of(plain)])


def test_afterwards_the_live_model_is_what_it_was(plain):
    """Its weights are never touched, and its forwards come back even after an error."""
    model, live, population = make_population(plain, ["one"])
    first, second = recipe_of(plain), gradient(plain)
    live.apply(first)
    weights, before = (
        {n: p.clone() for n, p in model.named_parameters()},
        decode(model, PROMPTS, SamplingParams(8)),
    )
    mine = torch.nn.Linear.forward.__get__(model.lm_head)
    model.lm_head.forward = mine

    def interrupted():
        with population.of([second]) as answer:
            answer([0], PROMPTS[:1], SamplingParams(2))
            assert "forward" in model.model.layers[0].mlp.up_proj.__dict__
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == [
        "lm_head"
    ]
    assert model.lm_head.forward is mine
    assert not differing(weights, dict(model.named_parameters()))
    assert decode(model, PROMPTS, SamplingParams(8)) == before
    live.apply(second)
    assert not differing(
        {n: p.detach() for n, p in model.named_parameters()},
        dict(merged_tensors(second, open_recipe(second))),
    )


def last_logits(model, run):
    """The logits (rows, vocabulary) of the last forward pass in `run`."""
    seen = []
    hook = model.lm_head.register_forward_hook(
        lambda _module, _inputs, out: seen.append(out[:, -1].detach().double())
    )
    run()
    hook.remove()
    return seen[-1]


def test_bf16_is_as_near_to_the_exact_merge_as_the_merged_model(tmp_path):
    """The tokens differ, for both round, each elsewhere: so both are held against float64 without
    any rounding of weights.
    """
    family = make_family(tmp_path)
    recipes = candidates(family, ["one"], 8, "bfloat16")
    model, live, population = make_population(family, ["one"], torch.bfloat16)
    with population.of(recipes) as answer:
        ours = last_logits(
            model, lambda: answer(list(range(8)), [PROMPTS[2]] * 8, SamplingParams(1))
        )
    base, one = (
        {n: p.double() for n, p in load_all(family / name).items()} for name in ("base", "one")
    )
    exact = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float64)
    errors = []
    for recipe, row in zip(recipes, ours, strict=True):
        hows = MergePlan(recipe, open_recipe(recipe)).tensors
        exact.load_state_dict({n: base[n] + hows[n].weights[0] * (one[n] - base[n]) for n in base})
        wanted = last_logits(exact, lambda: exact(torch.tensor([PROMPTS[2]])))[0]
        live.apply(recipe)
        theirs = last_logits(model, lambda: decode(model, [PROMPTS[2]], SamplingParams(1)))[0]
        errors.append([(logits - wanted).square().mean() for logits in (row, theirs)])
    ours_off, theirs_off = torch.tensor(errors).mean(0).sqrt().tolist()
    assert 0 < ours_off < 1.3 * theirs_off


def make_engine(plain, **settings):
    generation = GenerationSection(max_new_tokens=10, stop=("3",))
    folders = open_model(str(plain / "base")), [open_model(str(plain / s)) for s in ("one", "two")]
    section = EngineSection(device="cpu", **settings)
    return TransformersEngine(EngineSpec(*folders, section, generation, "float32"))


def test_the_engine_answers_as_it_does_candidate_after_candidate(plain, monkeypatch):
    """Text, stop strings, cut-off answers, prompts from one token on; with room for all rows and
    for few; out of memory once.
    """
    recipes, prompts = candidates(plain, ["one", "two"], 3), ["あい:", "0123456789う", "え"]
    engine = make_engine(plain, batch_size=2)
    wanted = []
    for recipe in recipes:
        engine.apply(recipe)
        wanted.append([engine.answer([prompt])[0] for prompt in prompts])
    assert {answer.truncated for row in wanted for answer in row} == {True, False}
    assert engine.batched_candidates.suits(recipes)
    assert engine.batched_candidates(recipes, prompts) == wanted
    assert make_engine(plain, batch_tokens=44).batched_candidates(recipes, prompts) == wanted
    sizes = []

    def small(model, rows, *args, **kwargs):
        sizes.append(len(rows))
        if len(rows) > 4:
            raise torch.OutOfMemoryError
        return decode(model, rows, *args, **kwargs)

    monkeypatch.setattr("evomerge.answering.hf.population.decode", small)
    assert engine.batched_candidates(recipes, prompts) == wanted
    assert sizes[0] == 6
    assert sum(size for size in sizes if size <= 4) == 9
    assert engine.limits


def test_no_candidate_and_no_prompt(plain):
    engine = make_engine(plain)
    assert engine.batched_candidates([], ["あ"]) == []
    assert engine.batched_candidates([recipe_of(plain)], []) == [[]]


def test_it_is_chosen_only_where_it_was_measured():
    assert is_faster(12, 2, 20_000_000, "cpu")
    assert not is_faster(12, 24, 20_000_000, "cpu")
    assert not is_faster(2, 2, 20_000_000, "cpu")
    assert not is_faster(12, 2, 7_000_000_000, "cpu")
    assert not is_faster(12, 2, 20_000_000, "cuda")
