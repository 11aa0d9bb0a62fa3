"""Merging against the formula and a fresh load, and every way a model or recipe can be wrong."""

import copy
import json
import resource
import subprocess
import sys

import pytest
import torch
from conftest import make_model, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.merging.build import build_model, parse_size
from evomerge.merging.layout import Layout, check_fit, open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, model_card, read_recipe, task_arithmetic_recipe

SLICES = [(0, 1), (1, 3), (3, 4)]


def moved(model, seed, scale):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return other


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def family(request, tmp_path):
    """base, one, two: a base and two siblings."""
    base = make_model(0, tie_word_embeddings=request.param)
    save(base, tmp_path / "base")
    save(moved(base, 1, 0.1), tmp_path / "one")
    save(moved(base, 2, 0.1), tmp_path / "two")
    return tmp_path


def random_recipe(family, siblings, generator, normalize=False):
    rows = (2 * torch.rand(len(SLICES), len(siblings), generator=generator, dtype=torch.float64)).tolist()
    return task_arithmetic_recipe(str(family / "base"), [str(family / s) for s in siblings], SLICES, rows, normalize=normalize)


@pytest.mark.parametrize("siblings", [["one"], ["one", "two"]])
def test_after_many_recipes_the_live_model_is_a_fresh_merge_of_the_last(family, tmp_path, siblings):
    generator = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    live = LiveModel(model, open_model(str(family / "base")), [open_model(str(family / s)) for s in siblings])
    for i in range(60):
        recipe = random_recipe(family, siblings, generator, normalize=i % 3 == 0)
        live.apply(recipe)
    build_model(recipe, tmp_path / "out")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for (name, p), (_, q) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_streaming_from_disk_gives_the_same_live_weights(family):
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(4))
    folders = open_model(str(family / "base")), [open_model(str(family / "one"))]
    models = [AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16) for _ in range(2)]
    kept, streamed = (LiveModel(m, *folders) for m in models)
    streamed.resident = False
    kept.apply(recipe)
    streamed.apply(recipe)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_first_slice_rules_the_embedding_and_the_last_the_head(family):
    rows = [[0.0], [0.5], [1.0]]
    recipe = task_arithmetic_recipe(str(family / "base"), [str(family / "one")], SLICES, rows)
    layout = Layout(recipe, 4)
    weights = {
        n: layout.weights(n)[0][1]
        for n in ("model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    }
    assert list(weights.values()) == [0.0, 0.5, 1.0, 1.0]


def test_a_recipe_survives_writing_and_reading(tmp_path):
    weights = [[0.1 + 0.2], [1e-17], [-1 / 3]]
    recipe = task_arithmetic_recipe("owner/base", ["owner/instruct"], SLICES, weights)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "r.yaml")
    assert again.to_dict() == recipe.to_dict()
    assert list(recipe.to_dict()) == ["base_model", "dtype", "merge_method", "parameters", "slices"]
    card = model_card(recipe, "mine")
    for part in (
        "base_model:\n- owner/base\n- owner/instruct\n",
        "tags:\n- mergekit\n- merge\n",
        "### Merge Method",
        "### Models Merged",
        "```yaml\n",
    ):
        assert part in card


def test_a_digest_sees_the_rounded_weight(tmp_path):
    def digest(w):
        return task_arithmetic_recipe("b", ["s"], [(0, 4)], [[w]]).digest()

    assert digest(0.5) == digest(0.5 + 1e-6)
    assert torch.tensor(0.5, dtype=torch.bfloat16) == torch.tensor(0.5 + 1e-6, dtype=torch.bfloat16)
    assert digest(0.5) != digest(0.51)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "ties"}, ["merge_method", "ties"]),
        ({"slices": None}, ["exactly one"]),
        ({"dtype": "int8"}, ["dtype", "int8"]),
        ({"tokenizer_source": "union"}, ["tokenizer_source"]),
        ({"parameters": {"weight": float("nan")}}, ["weight", "not finite"]),
        ({"parameters": {"lambda": float("inf")}}, ["lambda", "not finite"]),
        ({"parameters": {"densty": 1}}, ["densty"]),
        ({"base_model": None}, ["base_model"]),
        ({"modules": {}}, ["modules"]),
    ],
)
def test_bad_recipes(change, words):
    good = task_arithmetic_recipe("b", ["s"], [(0, 4)], [[1.0]]).to_dict()
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(good | change)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("slices", "word"),
    [([(0, 2), (3, 4)], "gap"), ([(0, 2), (1, 4)], "gap or overlaps"), ([(0, 5)], "passes"), ([(0, 3)], "end at layer 3")],
)
def test_layer_ranges_cover_the_model(slices, word):
    with pytest.raises(RecipeError, match=word):
        Layout(task_arithmetic_recipe("b", ["s"], slices, [[1.0]] * len(slices)), 4)


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_models_that_do_not_fit_are_named(family):
    base = open_model(str(family / "base"))
    for key, value in {"num_hidden_layers": 5, "vocab_size": 9, "hidden_size": 64}.items():
        save(make_model(1), family / "other")
        edit_config(family / "other", **{key: value})
        with pytest.raises(ModelError, match=key):
            check_fit(base, [open_model(str(family / "other"))])
    edit_config(family / "one", tie_word_embeddings=not base.config["tie_word_embeddings"])
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        check_fit(base, [open_model(str(family / "one"))])
    tensors = load_file(family / "two/model.safetensors")
    save_file({n: t[:-1] if n == "model.norm.weight" else t for n, t in tensors.items()}, family / "two/model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(31,\)"):
        check_fit(base, [open_model(str(family / "two"))])
    save_file({n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}, family / "two/model.safetensors")
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        check_fit(base, [open_model(str(family / "two"))])


def test_damaged_missing_and_pickled_weights(family):
    weights = family / "one/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="damaged"):
        open_model(str(family / "one"))
    weights.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        open_model(str(family / "one"))
    torch.save({}, family / "one/pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        open_model(str(family / "one"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (family / "one/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="a shard is missing"):
        open_model(str(family / "one"))
    with pytest.raises(ModelError, match="no model folder"):
        open_model(str(family / "nowhere"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(family, tmp_path, bad):
    tensors = load_file(family / "one/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = bad
    save_file(tensors, family / "one/model.safetensors")
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build_model(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_leaves_nothing_behind(family, tmp_path):
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    code = "import sys; from evomerge.cli import main; sys.exit(main(sys.argv[1:]))"

    def no_space():  # a limit on file sizes is what a process without privileges can have of a full disk
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-c", code, "merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]
    out = subprocess.run(command, capture_output=True, text=True, preexec_fn=no_space, check=False)
    assert (out.returncode, out.stdout) == (1, "")
    assert "Free some space; nothing was left behind" in out.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_existing_folder_is_not_overwritten(family, tmp_path):
    with pytest.raises(InputError, match="already"):
        build_model(random_recipe(family, ["one"], torch.Generator().manual_seed(0)), family / "two")


def test_sizes():
    assert [parse_size(s) for s in ("20K", "5GB", "1.5M", 7)] == [20_000, 5_000_000_000, 1_500_000, 7]
    with pytest.raises(InputError, match="out-shard-size"):
        parse_size("many")
