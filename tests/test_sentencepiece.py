"""Tokenizers that are a tokenizer.model alone, as older Llama, Gemma and Mistral models are."""

import io
import json
import sys

import pytest
import sentencepiece
from conftest import make_model
from transformers import AutoTokenizer

from evomerge.answering.hf.loading import load_tokenizer
from evomerge.errors import ModelError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.vocabulary.tokenizers import read_tokenizer
from evomerge.recipe import Recipe

TEXTS = [f"the cat sat on the mat {i}" for i in range(99)] + [f"日本語の文{i}。" for i in range(99)]


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model's bytes."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=file,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.fixture
def family(tmp_path, spm):
    for seed, name in enumerate(("base", "one")):
        make_model(seed, layers=1, vocab_size=300).save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer.model").write_bytes(spm)
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False})
        )
    return tmp_path


def test_it_is_read_for_answers(family, spm):
    plain = sentencepiece.SentencePieceProcessor(model_proto=spm)
    tokenizer = load_tokenizer(open_model(str(family / "base")))
    for text in TEXTS[::20]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == plain.encode(text)


@pytest.mark.parametrize("source", [None, "base", "union"])
def test_it_is_merged(family, spm, source):
    models = [{"model": str(family / "one"), "parameters": {"weight": 0.4}}]
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base")}
    data |= {"models": models, "dtype": "bfloat16"} | (
        {"tokenizer_source": source} if source else {}
    )
    out = build_model(Recipe.from_dict(data), family / "out")
    assert (out / "tokenizer.model").read_bytes() == spm
    assert (out / "tokenizer.json").exists() is (source is not None)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (family / "base", out))
    assert [new(text)["input_ids"] for text in TEXTS] == [old(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("missing", [["sentencepiece"], ["google"], ["sentencepiece", "google"]])
def test_a_line_names_what_is_not_installed(family, monkeypatch, missing):
    """transformers itself asks for tiktoken then, which would not help."""

    def fails(*_args, **_settings):
        raise ImportError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, f"{module}.protobuf", raising=False)
    packages = [{"google": "protobuf"}.get(module, module) for module in missing]
    for load in (load_tokenizer, lambda model: read_tokenizer(model.path, "base")):
        with pytest.raises(ModelError) as error:
            load(open_model(str(family / "base")))
        assert f"transformers needs {' and '.join(packages)}" in str(error.value)
        assert str(error.value).endswith(f"Run pip install {' '.join(packages)}.")
