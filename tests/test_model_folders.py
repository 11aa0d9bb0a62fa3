"""Model folders as people have them: whatever transformers loads is read, and nothing is read or
copied that is not the model's.
"""

import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import differing, load_all, make_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.fingerprint import fingerprint
from evomerge.merging.checkpoints.model_folder import num_layers
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import merged_tensors
from evomerge.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def family(tmp_path):
    """Untied models, each in one file."""
    return make_family(tmp_path)


def recipe(family, **top):
    models = [{"model": str(family / "one"), "parameters": {"weight": 0.4}}]
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base")}
    return Recipe.from_dict(data | {"models": models, "dtype": "bfloat16"} | top)


def shard(folder, keep=False):
    """Two shards and their index in the place of (or beside) the single file."""
    tensors = load_file(folder / SINGLE)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        part = {n: t for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    if not keep:
        (folder / SINGLE).unlink()
    return weight_map


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def loaded(folder):
    """What transformers loads, by names of parameters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return {name: p.detach() for name, p in model.named_parameters()}


def opened(folder):
    model = open_model(str(folder))
    return {name: model.get_tensor(name) for name in model.keys}


def stale(family):
    """A model that was saved again, beside the shards of the one before."""
    shard(family / "two", keep=True)
    shutil.copy(family / "one" / SINGLE, family / "two" / SINGLE)


def stale_without_shards(family):
    write_index(family / "two", {"model.norm.weight": "model-00001-of-00007.safetensors"})


def elsewhere(family):
    """Every tensor is in the other shard."""
    weight_map = shard(family / "two")
    files = sorted(set(weight_map.values()))
    write_index(family / "two", {n: files[1 - files.index(f)] for n, f in weight_map.items()})


def unlisted(family):
    """The index names each shard, but not each tensor."""
    weight_map = shard(family / "two")
    write_index(family / "two", dict(list(weight_map.items())[:2]))


@pytest.mark.parametrize("make", [stale, stale_without_shards, elsewhere, unlisted])
def test_an_index_that_is_wrong_is_read_as_transformers_reads_it(family, make):
    make(family)
    assert not differing(opened(family / "two"), loaded(family / "two"))


def test_an_index_that_lists_a_tied_head_of_another_name(tmp_path):
    """As models that read images store it; of one that is not tied it is missed."""
    architectures.make("gemma3", tmp_path)
    weight_map = shard(tmp_path / "one")
    head = "language_model.lm_head.weight"
    write_index(tmp_path / "one", weight_map | {head: min(weight_map.values())})
    model = open_model(str(tmp_path / "one"))
    assert model.keys == weight_map.keys()
    assert model.head == head
    config = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=f"the index lists {head}, which no shard holds"):
        open_model(str(tmp_path / "one"))


@pytest.mark.parametrize("key", [True, None])
def test_an_index_that_lists_a_tied_head(tmp_path, key):
    family = make_family(tmp_path, tied=True)
    weight_map = shard(family / "one")
    write_index(family / "one", weight_map | {"lm_head.weight": min(weight_map.values())})
    if key is None:  # as configurations of families that are tied by default
        config = json.loads((family / "one/config.json").read_text())
        del config["tie_word_embeddings"]
        (family / "one/config.json").write_text(json.dumps(config))
    model = open_model(str(family / "one"))
    assert "lm_head.weight" not in model.keys
    assert torch.equal(
        model.get_tensor("lm_head.weight"), model.get_tensor("model.embed_tokens.weight")
    )
    assert "lm_head.weight" not in load_all(build_model(recipe(family), tmp_path / "out"))


def test_an_index_that_lists_what_no_shard_holds(family):
    weight_map = shard(family / "one")
    shards = min(weight_map.values())
    for name in ("model.layers.3.mlp.extra.weight", "lm_head.weight"):
        tensors = load_all(family / "one")
        tensors.pop(name, None)
        save_file(tensors, family / "one" / shards)
        write_index(family / "one", {**dict.fromkeys(tensors, shards), name: shards})
        with pytest.raises(ModelError, match=f"the index lists {name}, which no shard holds"):
            open_model(str(family / "one"))
        shard_again = load_file(family / "one" / shards)
        assert name not in shard_again


def test_shards_without_an_index_name_it(family, capsys):
    shard(family / "one")
    (family / "one" / INDEX).unlink()
    (family / "r.yml").write_text(recipe(family).to_yaml())
    assert main(["merge", str(family / "r.yml"), str(family / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the folder has shards, but no {INDEX}" in line
    assert str(family / "one") in line


@pytest.mark.parametrize(
    "name",
    ["../two/model.safetensors", "/etc/passwd", "sub/../../two/model.safetensors", "out/w"],
)
def test_an_index_leads_nowhere_else(family, name):
    """`out` is a folder within that is a link to another one."""
    shard(family / "one")
    shutil.copy(family / "two" / SINGLE, family / "w")
    (family / "one/out").symlink_to(family)
    write_index(family / "one", {"model.norm.weight": name})
    with pytest.raises(ModelError, match="names a shard outside of the model's folder"):
        open_model(str(family / "one"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\udcff"]
    + [json.dumps({"weight_map": {"a": name}}) for name in ("x" * 300, "a\0b", "", "nothing")],
    ids=range(11),
)
def test_an_index_that_is_damaged_is_one_line(family, content):
    shard(family / "one")
    (family / "one" / INDEX).write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError) as error:
        open_model(str(family / "one"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_shard_in_a_folder_within(family):
    weight_map = shard(family / "one")
    (family / "one/parts").mkdir()
    for file in set(weight_map.values()):
        (family / "one" / file).rename(family / "one/parts" / file)
    write_index(family / "one", {name: f"parts/{file}" for name, file in weight_map.items()})
    assert not differing(opened(family / "one"), loaded(family / "one"))


def as_hub_cache(folder, cache):
    """The folder as huggingface_hub keeps it: links from a snapshot to blobs beside it."""
    blobs, snapshot = cache / "blobs", cache / "snapshots/abc"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        blobs.mkdir(parents=True, exist_ok=True)
        blob = blobs / f"{len(list(blobs.iterdir())):040x}"
        path.rename(blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(folder)
    folder.symlink_to(snapshot)


@pytest.mark.parametrize("source", [None, "base"])
def test_the_hub_s_cache_is_links(family, source):
    """Shards, tokenizer, and templates in a folder of their own."""
    (family / "base/additional_chat_templates").mkdir()
    (family / "base/additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    (family / "base/vocab.bpe").write_text("x")
    top = {} if source is None else {"tokenizer_source": source}
    build_model(recipe(family, **top), family / "plain")
    for name in ("base", "one"):
        shard(family / name)
        as_hub_cache(family / name, family / f"hub/models--a--{name}")
    build_model(recipe(family, **top), family / "out")
    assert not differing(load_all(family / "out"), load_all(family / "plain"))
    names = {path.relative_to(family / "out") for path in (family / "out").rglob("*")}
    assert names == {path.relative_to(family / "plain") for path in (family / "plain").rglob("*")}
    assert not any(path.is_symlink() for path in (family / "out").rglob("*"))


def test_a_folder_of_links_to_another_copy(family):
    """Under the names that the files have there: as people make them with ln -s."""
    (family / "links").mkdir()
    for path in (family / "base").iterdir():
        (family / "links" / path.name).symlink_to(path)
    data = recipe(family).to_dict() | {"base_model": str(family / "links")}
    out = build_model(Recipe.from_dict(data), family / "out")
    assert (out / "tokenizer.json").read_bytes() == (family / "base/tokenizer.json").read_bytes()


LINKS = ["tokenizer_extra", "chat_template_2.jinja", "vocab.old", "tokenizers/inner"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("source", [None, "base"])
def test_a_link_out_of_the_folder_is_not_followed(family, caplog, name, source):
    """`tokenizers` is a folder that is copied with all that it holds."""
    secret = family / "elsewhere" / name
    secret.parent.mkdir(parents=True)
    secret.write_text("hf_secret")
    link = family / "base" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    top = {} if source is None else {"tokenizer_source": source}
    out = build_model(recipe(family, **top), family / "out")
    assert not any(b"hf_secret" in p.read_bytes() for p in out.rglob("*") if p.is_file())
    assert any("not copied" in message and name in message for message in caplog.messages)


def test_a_link_to_a_folder_is_not_followed(family):
    (family / "elsewhere").mkdir()
    (family / "elsewhere/key").write_text("hf_secret")
    (family / "base/tokenizer_x").symlink_to(family / "elsewhere")
    out = build_model(recipe(family), family / "out")
    assert not (out / "tokenizer_x").exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("source", [None, "base"])
def test_a_tokenizer_that_is_a_link_to_something_else_is_refused(family, name, source):
    """With a tokenizer source, transformers would read it and write it again."""
    secret = family / "secret"
    secret.write_text('{"key": "hf_secret"}')
    (family / "base" / name).unlink(missing_ok=True)
    (family / "base" / name).symlink_to(secret)
    top = {} if source is None else {"tokenizer_source": source}
    with pytest.raises(ModelError, match="link to another file outside of the model's folder"):
        build_model(recipe(family, **top), family / "out")
    assert not (family / "out").exists()


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def listening(path):
    at = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have about 100 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(at)


@pytest.mark.parametrize("make", [pipe, device, listening])
@pytest.mark.parametrize(
    "name", ["config.json", SINGLE, INDEX, "tokenizer.json", "notes.json", "tokenizer_extra"]
)
def test_what_is_no_file_is_refused(family, make, name):
    """Before anything reads it, which would take for ever."""
    (family / "one" / name).unlink(missing_ok=True)
    make(family / "one" / name)
    with pytest.raises(ModelError, match="a named pipe, a device or a socket") as error:
        open_recipe(recipe(family))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_no_file_is_refused(family, name):
    (family / "lora").mkdir()
    os.mkfifo(family / "lora" / name)
    with pytest.raises(ModelError, match="a named pipe"):
        open_model(f"{family / 'one'}+{family / 'lora'}")


def test_a_link_that_leads_nowhere_is_no_file(family):
    """A study's fingerprint, and a merge."""
    for name in ("tokenizer_old", "old.json"):
        (family / "one" / name).symlink_to(family / "gone")
        (family / "base" / name).symlink_to(family / "gone")
    assert "old.json" not in fingerprint(family / "one")
    wanted = dict(merged_tensors(recipe(family), open_recipe(recipe(family))))
    assert not differing(load_all(build_model(recipe(family), family / "out")), wanted)


def in_pickle(folder):
    """The weights as older versions of transformers saved them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def in_shards_of_pickle(folder):
    in_pickle(folder)
    name = "pytorch_model-00001-of-00001.bin"
    (folder / "pytorch_model.bin").rename(folder / name)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("make", [in_pickle, in_shards_of_pickle])
def test_a_folder_with_pickled_weights_alone_is_refused_in_a_line(family, capsys, make):
    make(family / "one")
    (family / "r.yml").write_text(recipe(family).to_yaml())
    assert main(["merge", str(family / "r.yml"), str(family / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(r"one/pytorch_model\S*\.bin: the weights are pickled, .*save_pretrained", line)
    assert not (family / "out").exists()


def test_the_remedy_for_pickled_weights_works(family):
    wanted = load_all(build_model(recipe(family), family / "wanted"))
    in_pickle(family / "one")
    AutoModelForCausalLM.from_pretrained(family / "one", dtype="auto").save_pretrained(
        family / "one"
    )
    assert not differing(load_all(build_model(recipe(family), family / "out")), wanted)


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "MODEL.GGUF"])
def test_a_file_in_the_place_of_a_folder(family, name):
    (family / name).write_bytes(b"GGUF")
    words = "GGUF files are not read" if name == "MODEL.GGUF" else "is not a model folder"
    with pytest.raises(ModelError, match=rf"{name}: {words}"):
        open_model(str(family / name))


@pytest.mark.parametrize("key", ["n_layer", "n_layers", "num_layers", "decoder_layers"])
@pytest.mark.parametrize("within", [None, "text_config"])
def test_layers_are_counted_by_other_names_too(family, key, within):
    """And the configuration of another order of layers has the new number under that name."""

    for name in ("base", "one"):
        path = family / name / "config.json"
        config = json.loads(path.read_text())

        config[key] = config.pop("num_hidden_layers")
        if within is not None:
            config = {within: config, "architectures": config.pop("architectures")}
        path.write_text(json.dumps(config))
    pieces = [{"sources": [{"model": f"{family}/one", "layer_range": [0, 4]}]}] * 2
    stacked = Recipe.from_dict({"merge_method": "passthrough", "slices": pieces})
    assert num_layers(open_model(f"{family}/base").config) == 4
    out = build_model(recipe(family), family / "merged")
    assert load_all(out).keys() == load_all(family / "base").keys()
    out = build_model(stacked, family / "stacked")
    written = json.loads((out / "config.json").read_text())
    assert (written if within is None else written[within])[key] == 8
    assert num_layers(written) == 8
