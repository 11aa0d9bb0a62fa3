"""Regular expressions of an adapter: Python's meaning, and never without an end."""

import re
import time

import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lora import Q, write_adapter

from evomerge.errors import ModelError
from evomerge.merging.adapters.timed_patterns import LONGEST, TimedPatterns, compiles
from evomerge.merging.checkpoints.open_model import open_model

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", ""]
# what people and libraries write into adapters
WRITTEN = [
    r".*\.(q|k|v|o)_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attn).*?(?:q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:up_proj|down_proj))",
    r"model\.layers\.(?:[0-9]|1[0-5])\..*_proj",
    r"layers\.(0|2)\.self_attn\.\w+",
    r"(?i:Q_PROJ)|lm_head$",
]
PIECES = st.sampled_from(
    ["q_proj", "mlp", "layers", ".", r"\.", "*", "+", "?", "|", "(", ")", "(?:", "(?!", "[0-9]",
     "[^.]", r"\d", r"\w", "^", "$", "{1,2}", r"\b", "0", "model", ".*", ".*?"]
)  # fmt: skip


@pytest.fixture
def patterns(tmp_path):
    return TimedPatterns(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("expression", WRITTEN)
@pytest.mark.parametrize("form", [r"(?:{})\Z", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."])
def test_what_is_written_means_the_same(patterns, expression, form):
    wrapped = form.replace("{}", expression)
    for name in NAMES:
        ours, theirs = patterns.match(wrapped, name), re.match(wrapped, name)
        assert (ours and ours.span()) == (theirs and theirs.span()), name


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_any_expression_means_the_same(expression):
    if not compiles(expression):
        return
    for name in NAMES:
        ours, theirs = TimedPatterns(".").match(expression, name), re.match(expression, name)
        assert (ours and ours.span()) == (theirs and theirs.span())


# never-ending with `re`, for a name of a module
ENDLESS = [
    r"(?:(?P<a>.)|(?P<b>.)|.)+(?P=a)(?P=b)[A-Z]",
    r"(?:(?:(?P<a>.)|(?P<b>.)|(?P<c>.)|.)+(?P=a)(?P=b)(?P=c)[A-Z])",
]
NONE = ["(", "x" * (LONGEST + 1), "(" * 5000 + ")" * 5000, "a{99999999999999999}", "(?P<a>)(?P<a>)"]
KEYS = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "rank_pattern": lambda p: {"rank_pattern": {p: 8}},
    "alpha_pattern": lambda p: {"alpha_pattern": {p: 8}},
    "layers_pattern": lambda p: {"layers_pattern": p, "layers_to_transform": [0]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(0, layers=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("expression", ENDLESS)
@pytest.mark.parametrize("key", KEYS)
def test_an_expression_without_an_end_is_one_line(tmp_path, base, monkeypatch, key, expression):
    """One and the same time for all names together, in which a thousand quick ones would fit."""
    monkeypatch.setattr("evomerge.merging.adapters.timed_patterns.AT_FIRST", 0.2)
    adapter = write_adapter(tmp_path / "adapter", **KEYS[key](expression))
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"takes more than 0.2 s .*Simplify it") as error:
        open_model(f"{base}+{adapter}")
    assert time.monotonic() - began < 2
    assert str(tmp_path / "adapter/adapter_config.json") in str(error.value)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("expression", NONE)
def test_what_is_no_expression_is_one_line(tmp_path, base, key, expression):
    adapter = write_adapter(tmp_path / "adapter", **KEYS[key](expression))
    with pytest.raises(ModelError, match=key):
        open_model(f"{base}+{adapter}")


def test_a_group_of_its_own_in_a_layers_pattern(tmp_path, base):
    """The layer's number is the last group there."""
    settings = {"layers_pattern": "(layers|h)", "layers_to_transform": [0]}
    model = open_model(f"{base}+{write_adapter(tmp_path / 'adapter', **settings)}")
    plain = open_model(str(base))
    for name, changed in ((Q, True), (Q.replace("layers.0", "layers.1"), False)):
        weight = f"{name}.weight"
        assert torch.equal(model.get_tensor(weight), plain.get_tensor(weight)) is not changed


def test_many_patterns_that_are_quick_are_no_attack(patterns):
    """As EVA writes them: one for each module."""
    for i in range(80):
        for j in range(80):
            patterns.match(rf"(.*\.)?(model\.layers\.{i}\.mlp)$", f"model.layers.{j}.mlp")
