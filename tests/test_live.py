"""The live model: after any recipes, from wherever its inputs wait, it is a fresh merge of the last
one.
"""

import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from merging_tools import SLICES, differing, load_all, make_family, random_recipe
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import EngineError, ModelError, RecipeError
from evomerge.merging import placement as resident
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.merging.methods import fused
from evomerge.merging.methods.deltas import add_weighted_into
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import merged_tensors
from evomerge.recipe import METHODS, Recipe, task_arithmetic_recipe

RESIDENCIES = ("device", "host", "disk")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def family(request, tmp_path):
    """base, one, two: a base and two siblings."""
    return make_family(tmp_path, request.param)


def make_live(family, siblings=("one", "two"), dtype=torch.bfloat16, **settings):
    """The base as a live model, and what merges it."""
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=dtype)
    return model, LiveModel(
        model,
        open_model(str(family / "base")),
        [open_model(str(family / s)) for s in siblings],
        **settings,
    )


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fresh(recipe, seed=0):
    """The merge without a live model."""
    return dict(merged_tensors(recipe, open_recipe(recipe), seed))


def test_no_drift_in_a_thousand_recipes(family, tmp_path):
    """Equal in every bit to a model that is built from the last recipe and loaded."""
    generator = torch.Generator().manual_seed(3)
    model, live = make_live(family)
    for i in range(1000):
        siblings = (["one"], ["two"], ["one", "two"])[i % 3]
        recipe = random_recipe(family, siblings, generator, normalize=i % 7 == 0)
        live.apply(recipe)
    build_model(recipe, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert not differing(weights_of(model), weights_of(loaded))


def models_recipe(family, weights, **top):
    models = [
        {"model": str(family / name), "parameters": {"weight": w}} for name, w in weights.items()
    ]
    return Recipe.from_dict(
        {"merge_method": "task_arithmetic", "base_model": str(family / "base"), "models": models}
        | top
    )


@pytest.mark.parametrize("live_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_the_live_model_takes_every_kind_of_recipe(tmp_path, live_dtype, residency):
    """Each from the untouched base, whatever came before: equal to a fresh merge that is loaded in
    the same dtype.
    """
    family = make_family(tmp_path, dtypes=(torch.bfloat16, torch.float32, torch.bfloat16))
    model, live = make_live(family, dtype=live_dtype, residency=residency)
    recipes = [
        models_recipe(family, {"one": [0, 0.5, 1]}, dtype="bfloat16"),
        models_recipe(
            family,
            {"two": 0.7, "one": [{"filter": "mlp", "value": 1}, {"value": "0.1"}]},
            dtype="float32",
        ),
        models_recipe(family, {"one": 0.3}, dtype="float32", out_dtype="float16"),
        models_recipe(family, {"one": 0.3, "two": 0.4}),
        models_recipe(family, {"two": 0.0}, dtype="bfloat16", parameters={"lambda": -1.0}),
        models_recipe(family, {"base": 1.0}, dtype="bfloat16"),
        models_recipe(family, {"two": -1}, dtype="bfloat16"),
        random_recipe(family, ["two"], torch.Generator().manual_seed(0)),
    ]
    for i, recipe in enumerate(recipes):
        live.apply(recipe)
        build_model(recipe, tmp_path / f"out{i}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{i}", dtype=live_dtype)
        assert not differing(weights_of(model), weights_of(loaded)), i


def method_recipe(family, method, **top):
    """A recipe of that method that uses all it has: two siblings where it takes two, gradients,
    densities.
    """
    traits, numbers = METHODS[method], {"epsilon": 0.02, "gamma": [0.05, 0.1]}
    one = {"model": str(family / "one"), "parameters": {"weight": [0.2, 0.9], "density": 0.6}}
    two = {"model": str(family / "two"), "parameters": {"weight": -0.4, "density": [0.3, 0.9]}}
    base = {"model": str(family / "base"), "parameters": {"weight": 0.5}}
    for source in (one, two):
        for key in traits.own.keys() & numbers.keys():
            source["parameters"][key] = numbers[key]
    models = [one] if traits.siblings[1] == 1 else [one, two]
    data = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "passthrough":
        data |= {"models": [*models, base], "base_model": str(family / "base")}
    shared = {"t": [0.1, 0.8], "scale": [0.5, 1.5], "select_topk": 0.4, "r": 0.3, "max_iter": 5}
    parameters = {key: shared[key] for key in traits.own.keys() & shared.keys()}
    return Recipe.from_dict(data | {"parameters": parameters} | top)


@pytest.mark.parametrize("method", [*METHODS])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_every_method_from_everywhere(tmp_path, method, residency):
    """In between stands another method, which keeps weights where this one keeps deltas, or the
    other way round.
    """
    family = make_family(tmp_path)
    model, live = make_live(family, residency=residency, random_seed=7)
    recipe = method_recipe(family, method)
    live.apply(recipe)
    live.apply(method_recipe(family, "linear" if method != "linear" else "ties"))
    live.apply(recipe)
    wanted = {name: tensor.to(torch.bfloat16) for name, tensor in fresh(recipe, seed=7).items()}
    assert not differing(weights_of(model), wanted)


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp", "multislerp"])
def test_a_slice_s_own_base_is_the_base_there(tmp_path, method):
    """Deltas are kept from the loaded base, and others are not."""
    family = make_family(tmp_path)
    model, live = make_live(family)
    sources = [
        {"model": str(family / ref), "layer_range": [0, 4], "parameters": {"weight": 0.3}}
        for ref in ("base", "one", "two")
    ]
    if method == "slerp":
        sources.pop()
    piece = {"sources": sources, "base_model": str(family / "one"), "parameters": {"t": 0.4}}
    recipe = Recipe.from_dict(
        {"merge_method": method, "base_model": str(family / "base"), "dtype": "bfloat16"}
        | {"slices": [piece]}
    )
    live.apply(recipe)
    assert not differing(weights_of(model), fresh(recipe))


def test_dare_drops_the_same_numbers_whatever_changed_before(tmp_path):
    """Only some layers are merged again, and mergekit's one stream of random numbers has to be
    entered in the middle.
    """
    family = make_family(tmp_path, layers=12)
    model, live = make_live(family, ["one"])
    for layer, density in ((2, 0.5), (11, 0.9), (0, 1.0), (5, 0.2)):
        sources = [
            [
                {
                    "model": str(family / "one"),
                    "layer_range": [i, i + 1],
                    "parameters": {"weight": 1, "density": density if i == layer else 0.7},
                }
            ]
            for i in range(12)
        ]
        pieces = [
            {"sources": [*s, {"model": str(family / "base"), "layer_range": s[0]["layer_range"]}]}
            for s in sources
        ]
        data = {
            "merge_method": "dare_linear",
            "base_model": str(family / "base"),
            "dtype": "bfloat16",
            "slices": pieces,
        }
        live.apply(Recipe.from_dict(data))
        assert not differing(weights_of(model), fresh(Recipe.from_dict(data))), layer


def test_slices_that_did_not_change_are_skipped(family, monkeypatch):
    model, live = make_live(family, ["one"])
    rows = [[0.1], [0.2], [0.3]]
    live.apply(task_arithmetic_recipe(str(family / "base"), [str(family / "one")], SLICES, rows))
    written = []
    monkeypatch.setattr(LiveModel, "_write", lambda self, name, plan, inputs: written.append(name))
    live.apply(
        task_arithmetic_recipe(
            str(family / "base"), [str(family / "one")], SLICES, [[0.1], [0.7], [0.3]]
        )
    )
    layers = {int(name.split(".")[2]) for name in written}
    assert layers == {1, 2}  # the second slice's
    assert len(written) == sum(
        ".layers.1." in n or ".layers.2." in n for n, _ in model.named_parameters()
    )


def test_a_candidate_that_was_interrupted_leaves_no_trace(family, monkeypatch):
    """An interrupt in the middle of one tensor, after it was half written."""
    model, live = make_live(family, ["one"])
    first, second = (
        random_recipe(family, ["one"], torch.Generator().manual_seed(i)) for i in (1, 2)
    )
    live.apply(first)
    before, count = weights_of(model), itertools.count()

    def interrupted(out, base, delta, weight):
        out.fill_(float("nan"))
        if next(count) == 5:
            raise KeyboardInterrupt
        add_weighted_into(out, base, delta, weight)

    kernel = fused.kernel
    monkeypatch.setattr(fused, "kernel", lambda *_: interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.apply(second)
    monkeypatch.setattr(fused, "kernel", kernel)
    live.apply(first)
    assert not differing(before, weights_of(model))


def test_memory_decides_where_the_models_wait(family, monkeypatch, caplog):
    """The free memory takes some layers and not others; what is chosen stands in the log."""
    caplog.set_level(logging.INFO)
    _, roomy = make_live(family)
    assert set(roomy.resident.places.values()) == {"device"}
    size = sum(roomy.resident._size(name) for name in roomy.names)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 0.5 * size / resident.SHARE)
    model, tight = make_live(family)
    assert set(tight.resident.places.values()) == {"device", "disk"}
    kept = sum(
        tight.resident._size(name)
        for name, place in tight.resident.places.items()
        if place == "device"
    )
    assert 0.3 * size < kept <= 0.5 * size
    assert "device" in caplog.messages[-1]
    assert "disk" in caplog.messages[-1]
    recipe = random_recipe(family, ["one", "two"], torch.Generator().manual_seed(5))
    tight.apply(recipe)
    assert not differing(weights_of(model), fresh(recipe))


def test_a_gpu_s_tensors_wait_on_the_host_when_the_gpu_is_full(monkeypatch):
    """The choice alone: a device of its own beside the host, and room for half of the tensors on
    each.
    """
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    slots = {
        f"model.layers.{i}.w": resident.LiveParameter(gpu, torch.bfloat16, 1000) for i in range(10)
    }
    free = {gpu: 5 * 4000 / resident.SHARE, cpu: 3 * 4000 / resident.SHARE}
    monkeypatch.setattr(resident, "free_bytes", lambda device: free[device])
    nowhere = SimpleNamespace()
    store = resident.Resident(nowhere, [nowhere], slots)
    assert list(store.places.values()) == ["device"] * 5 + ["host"] * 3 + ["disk"] * 2
    store.retreat()
    assert list(store.places.values()) == ["host"] * 8 + ["disk"] * 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_falls_back_and_says_so(family, monkeypatch, caplog, error):
    """The third tensor that would be kept does not fit any more."""
    model, live = make_live(family)
    load, count = resident.load_finite, itertools.count()

    def full(folder, name, dtype, device="cpu"):
        if next(count) == 7 and live.resident.places[name] == "device":
            raise error
        return load(folder, name, dtype, device)

    monkeypatch.setattr(resident, "load_finite", full)
    recipe = random_recipe(family, ["one", "two"], torch.Generator().manual_seed(5))
    live.apply(recipe)
    assert not differing(weights_of(model), fresh(recipe))
    assert set(live.resident.places.values()) == {"disk"}
    assert [r.levelname for r in caplog.records if "out of memory" in r.message] == ["WARNING"]


def test_out_of_memory_with_nothing_left_to_give_up(family, monkeypatch):
    _, live = make_live(family, residency="disk")

    def full(*_args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(resident, "load_finite", full)
    with pytest.raises(EngineError, match="out of memory"):
        live.apply(random_recipe(family, ["one"], torch.Generator().manual_seed(5)))


def test_an_adapter_and_its_base_are_two_models(family):
    """`one+lora` beside `one`: the same folder, other weights (test_lora.py tests them)."""
    adapter = family / "lora"
    adapter.mkdir()
    names = [
        n.removesuffix(".weight")
        for n in load_all(family / "one")
        if n.endswith("mlp.up_proj.weight")
    ]
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["up_proj"],
        "base_model_name_or_path": "one",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {n: load_all(family / "one")[f"{n}.weight"].shape for n in names}
    tensors = {
        f"base_model.model.{n}.lora_A.weight": torch.randn(2, shape[1])
        for n, shape in shapes.items()
    }
    tensors |= {
        f"base_model.model.{n}.lora_B.weight": torch.randn(shape[0], 2)
        for n, shape in shapes.items()
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    both = [open_model(str(family / "one")), open_model(f"{family}/one+{adapter}")]
    live = LiveModel(model, open_model(str(family / "base")), both)
    for ref in (str(family / "one"), f"{family}/one+{adapter}", str(family / "one")):
        recipe = task_arithmetic_recipe(str(family / "base"), [ref], [(0, 4)], [[0.5]])
        live.apply(recipe)
        assert not differing(weights_of(model), fresh(recipe)), ref


def untying_adapter(folder, shape):
    """A LoRA that replaces embeddings and head of a tied base by two tensors."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": []}
    settings["modules_to_save"] = ["embed_tokens", "lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"base_model.model.{name}.weight": torch.randn(shape, generator=generator)
        for name in ("model.embed_tokens", "lm_head")
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "linear"])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_live_model_is_untied_where_the_merged_one_is(tmp_path, method, residency):
    """Weights and answers are those of a fresh load, whether the last recipe unties the head or
    keeps it; embeddings and head are weighted apart, as first and last slice are.
    """
    family = make_family(tmp_path, tied=True)
    shape = load_all(family / "base")["model.embed_tokens.weight"].shape
    untied = f"{family}/base+{untying_adapter(family / 'lora', shape)}"
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    siblings = [open_model(untied), open_model(str(family / "one"))]
    live = LiveModel(model, open_model(str(family / "base")), siblings, residency=residency)
    one, ids = str(family / "one"), torch.arange(20)[None]
    for i, weights in enumerate(
        [{untied: [0.2, 0.9]}, {one: [0.3, 0.8]}, {untied: 0.5, one: [0.1, 0.4]}, {one: 1.0}]
    ):
        data = method_recipe(family, method).to_dict()
        data["models"] = [
            {"model": ref, "parameters": {"weight": weight, "density": 0.7}}
            for ref, weight in weights.items()
        ] + [{"model": str(family / "base"), "parameters": {"weight": 0.5}}]
        recipe = Recipe.from_dict({k: v for k, v in data.items() if k != "slices"})
        live.apply(recipe)
        out = build_model(recipe, tmp_path / f"out{i}")
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
        assert loaded.config.tie_word_embeddings is (untied not in weights)
        assert not differing(model.state_dict(), loaded.state_dict())
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_tokenizer_that_leaves_the_rows_in_place(family, source):
    model, live = make_live(family, ["one"])
    plain = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    live.apply(Recipe.from_dict(plain.to_dict() | {"tokenizer_source": source}))
    assert not differing(weights_of(model), fresh(plain))


def test_a_recipe_of_other_models_is_refused(family):
    _, live = make_live(family, ["one"])
    with pytest.raises(ModelError, match="not loaded"):
        live.apply(models_recipe(family, {"two": 1.0}, dtype="bfloat16"))


@pytest.mark.parametrize("slices", [[(0, 2), (3, 4)], [(0, 2), (1, 4)], [(0, 3)]])
def test_a_live_model_keeps_its_layers_in_place(family, slices):
    """Slices that leave out or repeat layers make another model: one to build, not one to apply."""
    _, live = make_live(family, ["one"])
    recipe = task_arithmetic_recipe(
        str(family / "base"), [str(family / "one")], slices, [[1.0]] * len(slices)
    )
    with pytest.raises(RecipeError, match="move layers"):
        live.apply(recipe)
    names = dict(merged_tensors(recipe, open_recipe(recipe)))
    assert sum("input_layernorm" in name for name in names) == sum(
        end - start for start, end in slices
    )


def test_the_compiled_kernel_gives_the_plain_one_s_bits(monkeypatch):
    """Where this machine can compile; a model below WORTH_IT never waits for it."""
    cpu = torch.device("cpu")
    assert fused.kernel(cpu, torch.bfloat16, fused.WORTH_IT - 1) is add_weighted_into
    kernel = fused.kernel(cpu, torch.bfloat16, fused.WORTH_IT)
    if kernel is add_weighted_into:
        pytest.skip("this machine has no compiler")
    generator = torch.Generator().manual_seed(0)
    for shape in [(1,), (7,), (64, 33), (1000, 129)]:
        base, delta = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        base.view(-1)[::5] = 0.0
        delta.view(-1)[::3] *= 1e-3
        delta.view(-1)[::4] = -0.0
        for weight in (0.0, -0.7, 1.0, 1.9):
            out = torch.empty_like(base)
            kernel(out, base, delta, weight)
            wanted = base + delta * torch.tensor(weight, dtype=torch.bfloat16)
            assert not differing({"": out}, {"": wanted})


def test_without_a_compiler_the_plain_kernel_is_used(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_args, **_kwargs: broken)
    fused._compiled.cache_clear()
    try:
        assert (
            fused.kernel(torch.device("cpu"), torch.bfloat16, fused.WORTH_IT) is add_weighted_into
        )
    finally:
        fused._compiled.cache_clear()
