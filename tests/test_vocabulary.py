"""Models with different tokens: every row against a plain loop and mergekit's stored output."""

import json
import random

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_tools import load_all, same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_tools import (
    EMBEDDINGS,
    adding,
    aligned_by_loop,
    byte_pairs,
    save_biased,
    save_with,
    save_with_layers_embeddings,
    section,
    task_arithmetic,
    word_level,
)

from evomerge.cli import main
from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.vocabulary.alignment import Vocabulary, make_vocabulary
from evomerge.merging.vocabulary.tokenizers import Rule

MODELS = ("two", "base", "one", "three", "four")  # a slice's order, the base inside it


def opened(folder, *refs):
    return {ref: open_model(str(folder / ref)) for ref in refs}


def ids(vocabulary, *tokens):
    vocab = vocabulary.tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_row_is_that_of_a_plain_loop(data):
    n = data.draw(st.integers(1, 12))
    size = n + data.draw(st.integers(0, 3))
    refs = data.draw(st.permutations(MODELS))[: data.draw(st.integers(1, 5))]
    rng = random.Random(data.draw(st.integers(0, 99)))
    tensors, rows = {}, {}
    for ref in refs:
        height = n + rng.randrange(3)
        tensors[ref] = torch.randn(height, 3).to(rng.choice([torch.bfloat16, torch.float32]))
        tensors[ref][rng.randrange(height)] = -0.0
        rows[ref] = (
            list(range(n))
            if rng.random() < 0.3
            else [i if rng.random() < 0.7 else -1 for i in rng.sample(range(height), n)]
        )
    rules = {}
    for i in range(n):
        model = rng.choice([None, *refs])
        row = (
            None
            if model is None or (rows[model][i] >= 0 and rng.random() < 0.5)
            else rng.randrange(len(tensors[model]))
        )
        if rng.random() < 0.2:
            rules[i] = Rule(str(i), model, row, rng.random() < 0.5)
    base = data.draw(st.sampled_from([None, "base", "one"]))
    numbers = {ref: torch.tensor(r) for ref, r in rows.items()}
    other = rng.choice([base, None])  # a slice's base goes before the recipe's
    vocabulary = Vocabulary(None, tuple(map(str, range(n))), size, numbers, rules, other)
    aligned = vocabulary.align(tensors, base)
    wanted = aligned_by_loop(
        tensors, rows, {i: (r.model, r.row, r.force) for i, r in rules.items()}, base, size
    )
    assert list(aligned) == list(refs)
    assert all(same_bits(aligned[ref], wanted[ref]) for ref in refs)


def test_tensors_whose_rows_all_stay_are_not_touched(tmp_path):
    save_with(byte_pairs([("a", "b")]), tmp_path / "base", 0)
    save_with(byte_pairs([("a", "b")]), tmp_path / "one", 1, rows=16)  # with padding rows
    models = opened(tmp_path, "base", "one")
    vocabulary = make_vocabulary(section("base"), "base", models)
    tensors = {ref: model.get_tensor(EMBEDDINGS[0]) for ref, model in models.items()}
    aligned = vocabulary.align(tensors)
    assert aligned["base"] is tensors["base"]
    assert aligned["one"].data_ptr() == tensors["one"].data_ptr()
    assert aligned["one"].shape == (vocabulary.size, 32) == (10, 32)


def test_mergekit_s_stored_output(shared, tmp_path):
    case = shared / "golden/vocab_mismatch_tokbase"
    recipe = yaml.safe_load((case / "config.yml").read_text())
    models, expected = (
        opened(case, "instruct", "base"),
        load_file(case / "expected/model.safetensors"),
    )
    vocabulary = make_vocabulary(section("base"), "base", models)
    for name, piece in zip(EMBEDDINGS, (recipe["slices"][0], recipe["slices"][-1]), strict=True):
        aligned = vocabulary.align({ref: model.get_tensor(name) for ref, model in models.items()})
        merged = task_arithmetic(
            aligned["base"],
            [aligned["instruct"]],
            [piece["sources"][0]["parameters"]["weight"]],
        )
        assert same_bits(merged, expected[name]), name
    vocabulary.save(tmp_path)
    assert vocabulary.size == json.loads((case / "expected/config.json").read_text())["vocab_size"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        ours, theirs = (
            json.loads((side / file).read_text()) for side in (tmp_path, case / "expected")
        )
        # whether the run was offline
        assert ours | {"local_files_only": False} == theirs | {"local_files_only": False}
    assert (tmp_path / "chat_template.jinja").read_bytes() == (
        case / "expected/chat_template.jinja"
    ).read_bytes()


@pytest.mark.parametrize("model_type", ["phi", "gptj", "codegen"])
def test_the_bias_of_a_head_is_extended_like_its_rows(tmp_path, model_type):
    words = {"base": "pq", "one": "qrst", "two": "tq"}
    for seed, (name, letters) in enumerate(words.items()):
        save_biased(word_level(letters), tmp_path / name, seed, model_type)
    parents = {name: load_all(tmp_path / name)["lm_head.bias"] for name in words}
    recipe = {
        "merge_method": "task_arithmetic",
        "dtype": "bfloat16",
        "base_model": str(tmp_path / "base"),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 4},
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": weight}}
            for name, weight in (("one", 0.5), ("two", 0.25))
        ],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # each parent's entry, the base's where a parent lacks the token, else the mean of those that
    # have it; the padding is the mean of all
    size = len(vocab)
    assert size == 6
    rows = {name: torch.zeros(8, dtype=torch.bfloat16) for name in words}
    own = {name: ["<unk>", *letters] for name, letters in words.items()}
    for token, number in vocab.items():
        having = {n: parents[n][own[n].index(token)] for n in words if token in own[n]}
        mean = (sum(having.values()) / len(having)).to(torch.bfloat16)
        for name in words:
            rows[name][number] = having.get(name, having.get("base", mean))
    for row in rows.values():
        row[size:] = row[:size].mean()
    wanted = task_arithmetic(rows["base"], [rows["one"], rows["two"]], [0.5, 0.25])
    assert same_bits(model.lm_head.bias.data.to(torch.bfloat16), wanted)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
@pytest.mark.parametrize("short", [False, True])
def test_embeddings_that_go_to_every_layer_follow_the_tokens(tmp_path, capsys, model_type, short):
    """Those with fewer rows than there are tokens have none for a token that would get another
    number.
    """
    table, words = "model.embed_tokens_per_layer.weight", {"base": "pqr", "one": "rpq"}
    for seed, (name, letters) in enumerate(words.items()):
        tokenizer = word_level(letters)
        rows = len(tokenizer) - short
        save_with_layers_embeddings(tokenizer, tmp_path / name, seed, model_type, rows)
    one = {"model": str(tmp_path / "one"), "parameters": {"weight": 0.5}}
    recipe = {
        "merge_method": "task_arithmetic",
        "dtype": "bfloat16",
        "base_model": str(tmp_path / "base"),
        "tokenizer_source": "union",
        "models": [one],
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    code = main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")])
    if short:
        assert code == 2
        assert "embed_tokens_per_layer" in capsys.readouterr().err
        return
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    vocab = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert model.config.vocab_size_per_layer_input == len(vocab) == 4
    parents = {name: load_all(tmp_path / name)[table] for name in words}
    rows = {name: torch.zeros_like(parents[name]) for name in words}
    for token, number in vocab.items():
        for name, letters in words.items():
            rows[name][number] = parents[name][["<unk>", *letters].index(token)]
    wanted = task_arithmetic(rows["base"], [rows["one"]], [0.5])
    assert same_bits(load_all(tmp_path / "out")[table], wanted)


def test_a_union_numbers_plain_tokens_first_then_added_ones(tmp_path):
    save_with(adding(word_level("pq"), ["<x>"]), tmp_path / "base", 0)
    save_with(adding(word_level("zyqx"), ["<y>"], ["<z>"]), tmp_path / "one", 1)
    # x is number 4, p number 5
    save_with(adding(word_level("yaq"), [], ["x", "p"]), tmp_path / "two", 2, rows=6)
    models = opened(tmp_path, "base", "one", "two")
    vocabulary = make_vocabulary(section(), "base", models)
    assert list(vocabulary.tokens) == ["<unk>", "p", "q", "<x>", "z", "y", "a", "<y>", "<z>", "x"]
    assert vocabulary.rows["two"].tolist() == [0, 5, 3, -1, -1, 1, 2, -1, -1, 4]
    vocabulary.save(tmp_path / "out")
    out = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert out.get_vocab() == vocabulary.tokenizer.get_vocab()
    added = {
        token.content: (token.special, token.lstrip) for token in out.added_tokens_decoder.values()
    }
    assert added["<z>"] == added["x"] == (True, True)
    assert added["<y>"] == (False, False)
    assert AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab().keys() == {
        "<unk>",
        "p",
        "q",
        "<x>",
    }


def test_a_base_s_tokens_past_its_embeddings_are_cut(tmp_path):
    save_with(
        adding(byte_pairs([("a", "b"), ("ab", "c"), ("d", "e")]), [], ["<z>"]),
        tmp_path / "base",
        0,
        rows=11,
    )
    save_with(adding(byte_pairs([("a", "b"), ("ab", "c")]), ["<y>"]), tmp_path / "one", 1)
    vocabulary = make_vocabulary(section("base"), "base", opened(tmp_path, "base", "one"))
    assert vocabulary.size == 11
    assert vocabulary.tokenizer.tokenize("abcde") == ["abc", "d", "e"]
    assert set(vocabulary.tokens) == {"<unk>", *"abcdefgh", "ab", "abc"}


def test_a_sibling_without_a_tokenizer_has_the_base_s(tmp_path, caplog):
    save_with(word_level("pq"), tmp_path / "base", 0)
    save_with(None, tmp_path / "one", 1, rows=3)
    vocabulary = make_vocabulary(section(), "base", opened(tmp_path, "base", "one"))
    assert vocabulary.rows["one"].tolist() == [0, 1, 2]
    assert "one has no tokenizer" in caplog.text


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    save_with(word_level("pq"), folder / "base", 0)
    save_with(word_level("qr"), folder / "one", 1)
    save_with(word_level("pqrs"), folder / "two", 2, rows=3)
    return folder


ZERO = {"kind": "zero"}
BAD = {
    "a gap": (section("gaps"), "gaps"),
    "a foreign model": (section(tokens={"p": {"source": "three"}}), "three"),
    "a token of another": (section(tokens={"r": {"source": "base"}}), "lacks this token"),
    "an unknown token": (
        section(tokens={"p": {"source": {"kind": "model_token", "model": "one", "token": "zz"}}}),
        "zz",
    ),
    "a negative row": (
        section(tokens={"p": {"source": {"kind": "model_token", "model": "one", "token_id": -1}}}),
        "-1",
    ),
    "a row too far": (
        section(tokens={"p": {"source": {"kind": "model_token", "model": "one", "token_id": 3}}}),
        "exceeds the 3 rows",
    ),
    "both id and token": (
        section(
            tokens={
                "p": {
                    "source": {"kind": "model_token", "model": "one", "token_id": 1, "token": "q"}
                }
            }
        ),
        "malformed",
    ),
    "a kind": (section(tokens={"p": {"source": {"kind": "one"}}}), "malformed"),
    "a key": (section(tokens={"p": {"source": "one", "forced": True}}), "malformed"),
    "force alone": (section(tokens={"p": {"force": True}}), "`force` needs a `source`"),
    "no token": (section(tokens={"": {"source": ZERO}}), "cannot be a token"),
    "no row for a new token": (section("base", {"new": {"source": ZERO}}), "beyond the end"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_section_is_refused_in_a_line(three, case):
    asked, message = BAD[case]
    if asked.source == "gaps":
        asked = section(str(three / "gaps"))
        tokenizer = word_level([])
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["model"]["vocab"] = {"<unk>": 0, "p": 7}
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(backend))
        tokenizer.save_pretrained(three / "gaps")
    models = opened(three, "base", "one")
    with pytest.raises(RecipeError, match=message) as caught:
        make_vocabulary(asked, "base", models).align(
            {ref: model.get_tensor(EMBEDDINGS[0]) for ref, model in models.items()}
        )
    assert "\n" not in str(caught.value)


def test_tokens_past_the_embeddings_are_refused_where_they_are_needed(three):
    models = opened(three, "base", "two")
    with pytest.raises(RecipeError, match="only a BPE tokenizer can be cut"):
        make_vocabulary(section("base"), "two", models)
    union = make_vocabulary(section(), "base", models)
    assert "r" not in union.tokens  # number 3 of 3 rows, and no other model has it
    own = make_vocabulary(section("two"), "base", models)
    own.check_rules(["base"])
    with pytest.raises(RecipeError, match="two: token 'r' has an id beyond the end"):
        own.check_rules(["base", "two"])


def test_a_damaged_model_is_refused_in_a_line(three, tmp_path):
    models = opened(three, "base", "one")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        make_vocabulary(section(str(tmp_path / "nowhere")), "base", models)
    vocabulary = make_vocabulary(section("one"), "base", models)
    with pytest.raises(ModelError, match="exceeds the 2 rows"):
        vocabulary.align({"base": torch.zeros(2, 4), "one": torch.zeros(3, 4)})
    with pytest.raises(ModelError, match="widths differ"):
        vocabulary.align({"base": torch.zeros(3, 4), "one": torch.zeros(3, 5)})
    save_with(word_level("pq"), tmp_path / "broken", 0)
    (tmp_path / "broken/tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer cannot be loaded") as caught:
        make_vocabulary(section(), "base", models | opened(tmp_path, "broken"))
    assert "\n" not in str(caught.value)
    assert load_all(tmp_path / "broken")
