"""Attention kernels that a configuration names are code of the hub: none is loaded unasked."""

import json
import sys
from types import ModuleType

import pytest
import torch
import transformers.modeling_utils
from conftest import make_model, save

from evomerge.answering.hf.likelihood import open_likelihood_engine
from evomerge.answering.hf.loading import load_model
from evomerge.answering.vllm.loading import load_llm
from evomerge.errors import ModelError
from evomerge.knowledge.retrieval.embeddings import EmbeddingRetriever
from evomerge.merging.checkpoints.hub_kernels import refuse_hub_kernels
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.checkpoints.size import count_parameters
from evomerge.study import EngineSection

HUB = "owner/kernel"
# every way in which transformers takes the name from a config.json
NAMED = {
    "plain": {"attn_implementation": HUB},
    "private": {"_attn_implementation": HUB},
    "of parts": {"attn_implementation": {"": HUB}},
    "with a revision": {"attn_implementation": f"{HUB}@main:function"},
    "paged": {"attn_implementation": f"paged|{HUB}"},
    "of the usual owner": {"attn_implementation": "kernels-community/flash-attn"},
}


@pytest.fixture
def asked(monkeypatch):
    """The kernels that transformers would download."""
    names = []
    monkeypatch.setattr(
        transformers.modeling_utils,
        "lazy_import_flash_attention",
        lambda name, allow_all_kernels=False: names.append((name, allow_all_kernels)),
    )
    return names


def write(folder, settings):
    save(make_model(0, layers=1), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def transformers_loads(folder):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("case", NAMED)
def test_transformers_would_load_it_and_no_engine_does(tmp_path, asked, case):
    folder = write(tmp_path, NAMED[case])
    # an older release needs the package that downloads for one of the cases
    assert transformers_loads(folder) == bool(asked), "otherwise this is no way in"
    asked.clear()
    model, engine = open_model(str(folder)), EngineSection(device="cpu")
    loads = {
        "transformers": lambda: load_model(model, engine, torch.bfloat16),
        "vllm": lambda: load_llm(model, engine, "bfloat16", 0),
        "the local judge": lambda: open_likelihood_engine(str(folder), engine),
    }
    for name, load in loads.items():
        with pytest.raises(ModelError, match="trust_remote_code: true") as error:
            load()
        assert str(folder / "config.json") in str(error.value), name
    assert count_parameters(model.config) > 0
    assert asked == []


def test_whoever_trusts_it_gets_it(tmp_path, asked):
    folder = write(tmp_path, NAMED["plain"])
    engine = EngineSection(device="cpu", trust_remote_code=True)
    load_model(open_model(str(folder)), engine, torch.bfloat16)
    assert set(asked) == {(HUB, True)}


@pytest.mark.parametrize("attention", ["sdpa", "eager", None])
def test_the_attention_of_transformers_itself_is_no_kernel(tmp_path, asked, attention):
    folder = write(tmp_path, {"attn_implementation": attention})
    model = load_model(open_model(str(folder)), EngineSection(device="cpu"), torch.bfloat16)
    assert model.config._attn_implementation == (attention or "sdpa")
    assert asked == []


def test_flash_attention_that_is_not_installed_comes_from_the_hub(tmp_path, monkeypatch):
    """Where the package `kernels` is, transformers takes a kernel in its place."""
    config = {"text_config": {"attn_implementation": "flash_attention_2"}}
    refuse_hub_kernels(config, tmp_path)
    kernels = ModuleType("kernels")
    kernels.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    with pytest.raises(ModelError, match="flash_attention_2"):
        refuse_hub_kernels(config, tmp_path)
    flash = ModuleType("flash_attn")
    flash.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    refuse_hub_kernels(config, tmp_path)


@pytest.mark.parametrize("case", NAMED)
def test_embeddings_take_the_default_attention(tmp_path, asked, case):
    library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    folder = write(tmp_path / "model", NAMED[case])
    del library
    retriever = EmbeddingRetriever(["あい", "うえ"], str(folder))
    assert retriever.similar(["あい"]).shape == (1, 2)
    assert asked == []
