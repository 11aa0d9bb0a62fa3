"""Models with different tokens through real mergekit: the same bits for every token, the same
tokenizer.

All recipes go through one process, whose start would else be most of the time. mergekit numbers a
union's new tokens in an order that changes from run to run, so rows are compared by token.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from merging_tools import load_all, same_bits
from transformers import AutoTokenizer
from vocabulary_tools import (
    ROWS,
    adding,
    byte_pairs,
    linear,
    save_biased,
    save_with,
    section,
    task_arithmetic,
    word_level,
)

from evomerge.cli import main
from evomerge.errors import RecipeError
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.vocabulary.alignment import make_vocabulary

SCRIPT = shutil.which("mergekit-yaml")
PYTHON = os.environ.get("EVOMERGE_MERGEKIT_PYTHON") or (
    SCRIPT and str(Path(SCRIPT).resolve().parent / "python")
)
pytestmark = pytest.mark.skipif(
    not PYTHON,
    reason=(
        "mergekit is not here: install mergekit==0.1.5 elsewhere and set EVOMERGE_MERGEKIT_PYTHON"
    ),
)

MERGE_ALL = """
import json, pathlib, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, recipe in json.loads(pathlib.Path("recipes.json").read_text()).items():
    try:
        config, options = MergeConfiguration.model_validate(recipe), MergeOptions(quiet=True)
        run_merge(config, name, options, yaml.safe_dump(recipe))
    except Exception as error:
        pathlib.Path(name + ".error").write_text(repr(error))
"""

SETTINGS = {
    "<new>": {"source": {"kind": "zero"}},
    "<copy>": {"source": {"kind": "model_token", "model": "./one", "token": "abc"}},
    "<id>": {"source": {"kind": "model_token", "model": "./base", "token_id": 3}},
    "zz": {"source": "./two"},
    "a": {"source": "./one", "force": True},
    "b": {"source": {"kind": "zero"}, "force": True},
    "c": {"source": {"kind": "zero"}},  # every model has it: nothing changes
    "d": {},
}
# name: (models in the order of the sources, the recipe's `tokenizer`, its dtype)
CASES = {
    "union": (["base", "one", "two"], section(), "bfloat16"),
    "union_base_last": (["two", "one", "base"], section(), "float32"),
    "union_dtypes": (["base", "one32"], section(), "float32"),
    "union_padded": (["one", "base", "two"], section(pad=16), "bfloat16"),
    "union_of_many": (["four", "three", "base", "one", "two"], section(), "bfloat16"),
    "union_tied": (["tied", "tied_one"], section(), "bfloat16"),
    "union_cut": (["cut", "one"], section(), "bfloat16"),
    "base": (["base", "one", "two"], section("base"), "bfloat16"),
    "base_padding_rows": (["roomy", "one"], section("base"), "bfloat16"),
    "base_tied_padded": (["tied", "tied_one"], section("base", pad=64), "bfloat16"),
    "base_cut": (["cut", "one"], section("base"), "bfloat16"),
    "base_new_token_in_padding": (
        ["roomy", "one"],
        section("base", {"<new>": {"source": "./roomy"}}),
        "bfloat16",
    ),
    "model": (["base", "one", "two"], section("./one"), "bfloat16"),
    "foreign_model": (["base", "one"], section("./two"), "bfloat16"),
    "tokens": (["one", "base", "two"], section(tokens=SETTINGS), "bfloat16"),
    "tokens_padded": (["one", "two", "base"], section("./two", SETTINGS, 8), "float32"),
    "no_tokenizer": (["base", "bare"], section(), "bfloat16"),
    "union_biased": (["phi", "phi_one", "phi_two"], section(), "bfloat16"),
    "biased_padded": (["phi", "phi_one"], section("./phi_one", pad=8), "float32"),
    "no_base": (["one", "two"], section(), "bfloat16"),
    "slice_base": (["two", "base", "one"], section(), "bfloat16"),
}
FAILING = {
    "new_token_without_row": (
        ["base", "one"],
        section("base", {"<new>": {"source": "./one"}}),
        "bfloat16",
    ),
    "model_past_its_rows": (["base", "short"], section("./short"), "bfloat16"),
    "short_is_no_bpe": (["short", "base"], section("base"), "bfloat16"),
    "donor_lacks_it": (
        ["base", "one"],
        section(tokens={"zz": {"source": "./one"}, "abc": {"source": "./base"}}),
        "bfloat16",
    ),
    "row_too_far": (
        ["base", "one"],
        section(
            tokens={"q": {"source": {"kind": "model_token", "model": "./one", "token_id": 999}}}
        ),
        "float32",
    ),
    "force_alone": (["base", "one"], section(tokens={"a": {"force": True}}), "bfloat16"),
}
WEIGHTS = {"base": 0.4, "one": 0.7, "two": -0.3}


def weight(ref):
    return WEIGHTS.get(ref, 0.6)


def base_of(name, models):
    """The recipe's."""
    return None if name == "no_base" else "base" if "base" in models else models[0]


def slice_base_of(name, models):
    return "one" if name == "slice_base" else base_of(name, models)


def recipe(name, models, asked, dtype):
    """task_arithmetic, or linear where there is no base."""
    data = {"merge_method": "task_arithmetic", "base_model": f"./{base_of(name, models)}"}
    if base_of(name, models) is None:
        data = {"merge_method": "linear"}
    if asked.tokens or asked.pad_to_multiple_of:
        data["tokenizer"] = {
            "source": asked.source,
            "tokens": asked.tokens,
            "pad_to_multiple_of": asked.pad_to_multiple_of,
        }
    else:
        data["tokenizer_source"] = asked.source
    sources = [
        {"model": f"./{ref}", "layer_range": [0, 1], "parameters": {"weight": weight(ref)}}
        for ref in models
    ]
    slice_base = {"base_model": "./one"} if name == "slice_base" else {}
    return data | {"dtype": dtype, "slices": [slice_base | {"sources": sources}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models, and mergekit's output (or error) of every case."""
    folder = tmp_path_factory.mktemp("vocabularies")
    pairs = [("a", "b"), ("d", "e")]
    base = adding(byte_pairs(pairs), ["<x>"], ["<s>"])
    one = adding(
        word_level(["q", "h", "g", "abc", "d", "c", "b", "a", "r", "<x>"]),
        ["ab", "<y>"],
        ["<z>", "<s>"],
    )
    two = adding(
        word_level(["zz", "d", "c", "r", "q", "b", "a", "abc", "de", "e", "zzz"]),
        ["<y>"],
        ["<s>", "w"],
    )
    save_with(base, folder / "base", 0)
    save_with(base, folder / "roomy", 1, rows=len(base) + 5)
    save_with(one, folder / "one", 2)
    save_with(one, folder / "one32", 2, dtype=torch.float32)
    save_with(two, folder / "two", 3, rows=len(two) + 3)
    save_with(two, folder / "three", 9, rows=len(two))
    save_with(one, folder / "four", 10)
    save_with(base, folder / "tied", 4, tied=True)
    save_with(one, folder / "tied_one", 5, tied=True)
    save_with(base, folder / "cut", 6, rows=len(base) - 1)
    save_with(two, folder / "short", 7, rows=len(two) - 2)
    save_with(None, folder / "bare", 8, rows=len(base))
    for seed, (name, tokenizer) in enumerate({"phi": base, "phi_one": one, "phi_two": two}.items()):
        save_biased(tokenizer, folder / name, seed)
    recipes = {f"out/{name}": recipe(name, *case) for name, case in (CASES | FAILING).items()}
    (folder / "out").mkdir()
    (folder / "recipes.json").write_text(json.dumps(recipes))
    done = subprocess.run(
        [PYTHON, "-c", MERGE_ALL], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def aligned(name, models, asked, dtype, opened):
    """Our vocabulary, and every aligned tensor by name and model."""
    vocabulary = make_vocabulary(
        asked, None if name == "no_base" else f"./{base_of(name, models)}", opened
    )
    names = [n for n in ROWS if n in opened[f"./{models[0]}"].keys]
    base = slice_base_of(name, models)
    inputs = {
        n: {
            f"./{ref}": opened[f"./{ref}"].get_tensor(n).to(getattr(torch, dtype)) for ref in models
        }
        for n in names
    }
    return vocabulary, {
        n: vocabulary.align(tensors, base and f"./{base}") for n, tensors in inputs.items()
    }


def open_all(name, models, folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = base_of(name, models) or models[0]
    return {
        f"./{ref}": open_model(f"./{ref}")
        for ref in [base, *(ref for ref in models if ref != base)]
    }


def merge(name, models, rows):
    base = slice_base_of(name, models)
    if base is None:
        return linear([rows[f"./{ref}"] for ref in models], [weight(ref) for ref in models])
    siblings = [ref for ref in models if ref != base]
    return task_arithmetic(
        rows[f"./{base}"], [rows[f"./{ref}"] for ref in siblings], [weight(ref) for ref in siblings]
    )


@pytest.mark.parametrize("name", CASES)
def test_every_token_s_row(folder, monkeypatch, name):
    models, asked, dtype = CASES[name]
    assert not (folder / f"out/{name}.error").exists(), (folder / f"out/{name}.error").read_text()
    vocabulary, tensors = aligned(
        name, models, asked, dtype, open_all(name, models, folder, monkeypatch)
    )
    theirs, their_tensors = (
        AutoTokenizer.from_pretrained(folder / "out" / name),
        load_all(folder / "out" / name),
    )
    vocab = theirs.get_vocab()
    assert vocab.keys() == set(vocabulary.tokens)
    if asked.source != "union":
        assert vocab == vocabulary.tokenizer.get_vocab()
    order = torch.tensor([vocab[token] for token in vocabulary.tokens])
    assert (
        vocabulary.size
        == json.loads((folder / "out" / name / "config.json").read_text())["vocab_size"]
    )
    assert tensors.keys() == {n for n in ROWS if n in their_tensors}
    for tensor, rows in tensors.items():
        ours, wanted = merge(name, models, rows), their_tensors[tensor]
        assert len(ours) == len(wanted) == vocabulary.size
        assert same_bits(ours[: len(order)], wanted[order]), tensor
        padding = ours[len(order) :], wanted[len(order) :]
        if asked.source == "union":  # a mean over rows in another order
            assert torch.allclose(*(p.float() for p in padding), atol=1e-2)
        else:
            assert same_bits(*padding)


# without a base, mergekit's first model changes from run to run
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"no_base"}))
def test_the_saved_tokenizer(folder, monkeypatch, tmp_path, name):
    models, asked, _ = CASES[name]
    vocabulary = make_vocabulary(
        asked,
        next(iter(open_all(name, models, folder, monkeypatch))),
        open_all(name, models, folder, monkeypatch),
    )
    vocabulary.save(tmp_path)
    ours, theirs = (
        AutoTokenizer.from_pretrained(path) for path in (tmp_path, folder / "out" / name)
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        p.name for p in (folder / "out" / name).glob("*token*")
    }
    settings = [
        {str(t): repr(t) for t in tokenizer.added_tokens_decoder.values()}
        for tokenizer in (ours, theirs)
    ]
    assert settings[0] == settings[1]
    text = "abc abde <x>q <z> zz w <s> <y>a <new>"
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.special_tokens_map == theirs.special_tokens_map == {"unk_token": "<unk>"}


@pytest.mark.parametrize("name", FAILING)
def test_where_mergekit_crashes_we_say_why(folder, monkeypatch, name):
    models, asked, dtype = FAILING[name]
    assert (folder / f"out/{name}.error").exists()
    with pytest.raises(RecipeError) as caught:
        aligned(name, models, asked, dtype, open_all(name, models, folder, monkeypatch))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_merge(folder, monkeypatch, tmp_path, name):
    """The command line: every tensor, the configuration and the files."""
    monkeypatch.chdir(folder)
    Path("recipe.yml").write_text(yaml.safe_dump(recipe(name, *CASES[name])))
    assert main(["merge", "recipe.yml", str(tmp_path / "out")]) == 0
    ours, theirs = load_all(tmp_path / "out"), load_all(folder / "out" / name)
    vocabs = [
        AutoTokenizer.from_pretrained(side).get_vocab()
        for side in (tmp_path / "out", folder / "out" / name)
    ]
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        orders = [
            torch.tensor([vocab[token] for token in vocabs[0]]) if tensor in ROWS else slice(None)
            for vocab in vocabs
        ]
        assert same_bits(ours[tensor][orders[0]], theirs[tensor][orders[1]]), tensor
        assert ours[tensor].shape == theirs[tensor].shape
    if name == "no_base":  # whose configuration is copied changes from run to run
        return
    configs = [
        json.loads((side / "config.json").read_text())
        for side in (tmp_path / "out", folder / "out" / name)
    ]
    # mergekit keeps the ids of the base's tokenizer; here they follow their tokens, without which
    # no answer would end
    before = AutoTokenizer.from_pretrained(folder / base_of(name, CASES[name][0]))
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    for key in ("bos_token_id", "eos_token_id"):
        moved, kept = (config.pop(key) for config in configs)
        assert after.convert_ids_to_tokens(moved) == before.convert_ids_to_tokens(kept)
    assert configs[0] == configs[1]
    # mergekit loses generation_config.json with a tokenizer_source, and with it other end tokens
    kept = {"generation_config.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} - kept == {
        p.name for p in (folder / "out" / name).iterdir()
    } - kept


@pytest.mark.parametrize("name", FAILING)
def test_a_merge_that_cannot_be_leaves_nothing(folder, monkeypatch, tmp_path, capsys, name):
    monkeypatch.chdir(folder)
    Path("recipe.yml").write_text(yaml.safe_dump(recipe(name, *FAILING[name])))
    assert main(["merge", "recipe.yml", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if "note: ignored, as in mergekit" not in line]) == 1
    assert not list(tmp_path.iterdir())
