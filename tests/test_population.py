"""Many candidates in one pass give what each merged model, built and loaded afresh, gives with `generate`."""

import pytest
import torch
from conftest import make_model, save
from merging_tools import SLICES, make_family, moved, random_recipe
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from evomerge.answering.decode import Rules
from evomerge.answering.population import PopulationModel
from evomerge.merging.folder import open_model
from evomerge.merging.live import LiveModel
from evomerge.merging.stream import merged_tensors, open_recipe
from evomerge.recipe import task_arithmetic_recipe

FP32, END = (torch.float32,) * 3, 2
PROMPTS = [[5, 9, 20, 7], [8], [11, 12, 13, 14, 15, 16, 17], [23, 6], [5, 9, 20, 8]]


def make_qwen(folder):
    """Qwen2, whose q, k and v have biases: none of them 0, and other ones in each model."""
    torch.manual_seed(0)
    like = make_model(0).config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    base = Qwen2ForCausalLM(
        Qwen2Config(**{key: getattr(like, key) for key in keys}, initializer_range=0.2, eos_token_id=END, pad_token_id=0)
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
    "attention_and_mlp_biases": lambda folder: make_family(folder, False, FP32, attention_bias=True, mlp_bias=True),
    "qwen2": make_qwen,
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    return FAMILIES[request.param](tmp_path)


def make_population(family, siblings=("one", "two"), dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype)
    live = LiveModel(model, open_model(str(family / "base")), [open_model(str(family / s)) for s in siblings])
    return model, live, PopulationModel(model, live)


def candidates(family, siblings, count, dtype="float32"):
    """Random weights by slice; the first is the base itself, and with two siblings the last has only one of them."""
    generator = torch.Generator().manual_seed(4)
    recipes = [random_recipe(family, siblings, generator, dtype=dtype) for _ in range(count - 1)]
    base = task_arithmetic_recipe(str(family / "base"), [str(family / s) for s in siblings], SLICES, [[0.0] * len(siblings)] * 3, dtype)
    return [base, *recipes[:-1], random_recipe(family, siblings[-1:], generator, dtype=dtype)]


def by_generate(family, recipe, dtype=torch.float32, max_new_tokens=16, **settings):
    """Each prompt alone through the merged model, without any of our loops."""
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype)
    model.load_state_dict(dict(merged_tensors(recipe, open_recipe(recipe))), strict=False)
    model.tie_weights()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **settings)
        found.append([token for token in out[0, len(prompt) :].tolist() if token != END])
    return found


def answer_all(population, recipes, rules):
    """[candidate][prompt] tokens, all rows in one batch."""
    pairs = [(c, p) for p in range(len(PROMPTS)) for c in range(len(recipes))]
    with population.of(recipes) as answer:
        outputs = answer([c for c, _ in pairs], [PROMPTS[p] for _, p in pairs], rules)
    found = dict(zip(pairs, outputs, strict=True))
    return [[found[c, p].tokens for p in range(len(PROMPTS))] for c in range(len(recipes))]


@pytest.mark.parametrize("siblings", [["one"], ["one", "two"]])
def test_the_tokens_of_every_merged_model(family, siblings):
    recipes = candidates(family, siblings, 5)
    _, _, population = make_population(family, siblings)
    answers = answer_all(population, recipes, Rules(16, frozenset([END])))
    wanted = [by_generate(family, recipe) for recipe in recipes]
    assert answers == wanted
    assert len({str(row) for row in wanted}) == 5  # the candidates do differ
    assert len({len(answer) for row in wanted for answer in row}) > 2  # rows did leave in between


def test_the_logits_of_a_merged_model_in_float64(tmp_path):
    """Closer than tokens can tell: another order of sums, and nothing else."""
    family = make_family(tmp_path, False, FP32, attention_bias=True)
    recipe = candidates(family, ["one", "two"], 3)[1]
    model, _, population = make_population(family)
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, out: seen.append(out[:, -1].clone()))
    with population.of([recipe]) as answer:
        answer([0], [PROMPTS[2]], Rules(1))
    hook.remove()
    exact = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float64)
    exact.load_state_dict({name: tensor.double() for name, tensor in merged_tensors(recipe, open_recipe(recipe))})
    wanted = exact(torch.tensor([PROMPTS[2]])).logits[0, -1]
    torch.testing.assert_close(seen[0][0].double(), wanted, rtol=1e-4, atol=1e-4)
