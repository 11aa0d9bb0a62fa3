"""Merging against the formula and a fresh load, and every way a model or recipe can be wrong."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, save
from merging_tools import SLICES, differing, load_all, make_family, random_recipe
from safetensors.torch import load_file, save_file

from evomerge.errors import InputError, ModelError, OutputError, RecipeError
from evomerge.merging.build import build_model, parse_size
from evomerge.merging.checkpoints.compatibility import check_fit
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.layout import Layout
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import merged_tensors
from evomerge.recipe import Recipe, task_arithmetic_recipe


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def family(request, tmp_path):
    """base, one, two: a base and two siblings."""
    return make_family(tmp_path, request.param)


def nearest_bf16(x):
    """float32 -> bf16 as float32, ties to even, by the bits alone."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_the_formula_without_torch(family):
    """r(b + r(r(x - b) * r(w))) of Ilharco et al. with numpy and rounding by hand."""
    recipe = task_arithmetic_recipe(str(family / "base"), [str(family / "one")], [(0, 4)], [[0.3]])
    merged = dict(merged_tensors(recipe, open_recipe(recipe)))
    base, one = load_all(family / "base"), load_all(family / "one")
    for name, tensor in merged.items():
        b, x = base[name].float().numpy(), one[name].float().numpy()
        wanted = nearest_bf16(
            b + nearest_bf16(nearest_bf16(x - b) * nearest_bf16(np.array(0.3, dtype=np.float32)))
        )
        assert np.array_equal(tensor.float().numpy(), wanted), name
    assert len(merged) == len(base)


def test_the_first_slice_rules_the_embedding_and_the_last_the_head(family):
    rows = [[0.0], [0.5], [1.0]]
    recipe = task_arithmetic_recipe(str(family / "base"), [str(family / "one")], SLICES, rows)
    layout = Layout(recipe, 4)
    weights = {
        n: layout.plan(n).weights[0]
        for n in (
            "model.embed_tokens.weight",
            "model.layers.2.mlp.up_proj.weight",
            "model.norm.weight",
            "lm_head.weight",
        )
    }
    assert list(weights.values()) == [0.0, 0.5, 1.0, 1.0]


def test_a_slice_that_passes_the_end_is_refused():
    with pytest.raises(RecipeError, match="ends beyond the model"):
        Layout(task_arithmetic_recipe("b", ["s"], [(0, 5)], [[1.0]]), 4)


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
    if base.config["tie_word_embeddings"]:  # otherwise its head is stored, and merged
        edit_config(family / "one", tie_word_embeddings=False)
        with pytest.raises(ModelError, match=r"the files lack lm_head\.weight"):
            check_fit(base, [open_model(str(family / "one"))])
    tensors = load_file(family / "two/model.safetensors")
    save_file(
        {n: t[:-1] if n == "model.norm.weight" else t for n, t in tensors.items()},
        family / "two/model.safetensors",
    )
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(31,\)"):
        check_fit(base, [open_model(str(family / "two"))])
    save_file(
        {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"},
        family / "two/model.safetensors",
    )
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
    tensors = load_file(family / "two/model.safetensors")
    save_file({"a": torch.zeros(1)}, family / "two/part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (family / "two/model.safetensors.index.json").write_text(json.dumps(index))
    (family / "two/model.safetensors").unlink()  # which would come first
    with pytest.raises(ModelError, match=r"the index lists .*, which no shard holds"):
        check_fit(open_model(str(family / "base")), [open_model(str(family / "two"))])
    (family / "two/model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="index of shards"):
        open_model(str(family / "two"))
    with pytest.raises(ModelError, match="no such model folder"):
        open_model(str(family / "nowhere"))
    (family / "one/config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_model(str(family / "one"))


def test_gguf_files_are_named(family):
    with pytest.raises(ModelError, match="no such model folder"):
        open_model("~nobody-here/one.gguf")
    (family / "two/a.gguf").write_bytes(b"GGUF")
    (family / "two/b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"two/b\.gguf: GGUF"):
        open_model(str(family / "two/b.gguf"))
    file = family / "one/one-q4_k_m.gguf"
    file.write_bytes(b"GGUF")
    assert open_model(str(family / "one")).files  # the weights beside it are read
    (family / "one/model.safetensors").unlink()
    for without_config in (False, True):
        if without_config:
            (family / "one/config.json").unlink()
        for ref in (family / "one", file):
            with pytest.raises(ModelError, match=r"q4_k_m\.gguf: GGUF files are not read"):
                open_model(str(ref))


def test_older_folders_fit(family):
    """A file that still holds rotary constants; a configuration that leaves out the KV heads where
    they are the heads.
    """
    base, one = family / "base", family / "one"
    edit_config(base, num_key_value_heads=4)
    config = json.loads((one / "config.json").read_text())
    del config["num_key_value_heads"]
    (one / "config.json").write_text(json.dumps(config))
    tensors = load_file(one / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        one / "model.safetensors",
    )
    check_fit(open_model(str(base)), [open_model(str(one))])


def test_tensors_that_are_not_known_follow_the_first_slice(family):
    recipe = task_arithmetic_recipe("b", ["s"], [(0, 2), (2, 4)], [[1.0], [0.5]])
    layout = Layout(recipe, 4)
    for name in ("transformer.h.0.attn.weight", "model.final_layernorm.weight"):
        assert layout.position(name).piece is recipe.slices[0]
    with pytest.raises(ModelError, match=r"layers\.4"):
        layout.position("model.layers.4.mlp.up_proj.weight")


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


def test_a_disk_that_is_full_to_the_last_byte(family, tmp_path, monkeypatch):
    """Whichever file it is that does not fit any more, nothing is left behind."""
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    before = sorted(tmp_path.iterdir())
    for step in ("fsync", "copyfile", "rename"):
        with monkeypatch.context() as patch:

            def full(*_args, **_kwargs):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr({"fsync": os, "copyfile": shutil, "rename": Path}[step], step, full)
            with pytest.raises(OutputError, match="No space left on device"):
                build_model(recipe, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    assert build_model(recipe, tmp_path / "out").is_dir()


def test_shards_and_progress_add_up(family, tmp_path):
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    seen = []
    build_model(recipe, tmp_path / "whole", progress=lambda done, total: seen.append((done, total)))
    build_model(recipe, tmp_path / "parts", shard_size="10K")
    files = list((tmp_path / "parts").glob("model-*-of-*.safetensors"))
    assert len(files) > 1
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 10_000 for f in files)
    assert not differing(load_all(tmp_path / "whole"), load_all(tmp_path / "parts"))
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert seen[-1] == (index["metadata"]["total_size"],) * 2
    assert seen == sorted(seen)
    again = task_arithmetic_recipe(
        str(tmp_path / "parts"), [str(tmp_path / "whole")], [(0, 4)], [[0.5]]
    )
    assert not differing(
        dict(merged_tensors(again, open_recipe(again))), load_all(tmp_path / "whole")
    )


def test_tokens_that_mean_the_same_may_name_the_base_as_their_source(family, tmp_path):
    plain = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    recipe = Recipe.from_dict(plain.to_dict() | {"tokenizer_source": "base"})
    assert not differing(
        load_all(build_model(recipe, tmp_path / "out")),
        load_all(build_model(plain, tmp_path / "plain")),
    )
    path = family / "one/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["あ"], vocab["い"] = vocab["い"], vocab["あ"]
    path.write_text(json.dumps(tokenizer))
    moved = load_all(build_model(recipe, tmp_path / "again"))
    one = family / "one/model.safetensors"
    tensors = load_file(one)
    for name in [n for n in ("model.embed_tokens.weight", "lm_head.weight") if n in tensors]:
        rows = list(range(len(tensors[name])))
        i, j = vocab["あ"], vocab["い"]
        rows[i], rows[j] = j, i
        tensors[name] = tensors[name][rows].contiguous()
    save_file(tensors, one)
    assert not differing(moved, load_all(build_model(plain, tmp_path / "by_hand")))


def test_a_full_disk_leaves_nothing_behind(family, tmp_path):
    recipe = random_recipe(family, ["one"], torch.Generator().manual_seed(0))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    code = "import sys; from evomerge.cli import main; sys.exit(main(sys.argv[1:]))"

    # a limit on file sizes is what a process without privileges can have of a full disk
    def no_space():
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
        build_model(
            random_recipe(family, ["one"], torch.Generator().manual_seed(0)), family / "two"
        )


def test_sizes():
    assert [parse_size(s) for s in ("20K", "5GB", "1.5M", 7)] == [
        20_000,
        5_000_000_000,
        1_500_000,
        7,
    ]
    with pytest.raises(InputError, match="out-shard-size"):
        parse_size("many")
