"""`chat_template:` of a recipe: whose template the merged model has, on disk and in memory."""

import json

import pytest
from conftest import make_model, make_tokenizer
from merging_tools import differing, load_all
from transformers import AutoTokenizer

import evomerge
from evomerge.inference.opening import open_merged
from evomerge.merging.build import build_model
from evomerge.merging.vocabulary.chat_templates import BUILT_IN
from evomerge.recipe import Recipe
from evomerge.recipe.mergekit_keys import CHAT_TEMPLATES

TALK = [
    {"role": "system", "content": " s "},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b "},
    {"role": "user", "content": "c"},
]
# what mergekit 0.1.5's templates of these names make of TALK, blanks included
PROMPTS = {
    "alpaca": "s\n\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nc### Response:\n",
    "chatml": "<|im_start|>system\n s <|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    "<|im_start|>assistant\nb <|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "    [|system|] s \n        [|endofturn|]\n\n    [|user|]a\n        \n\n"
    "    [|assistant|]b \n        [|endofturn|]\n\n    [|user|]c\n        \n\n"
    "    [|assistant|]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST]  s \n\na [/INST] b </s> [INST] c [/INST]",
}
OWN = "{% for m in messages %}<{{ m.content }}>\n{% endfor %}"


def save(folder, template, seed=0):
    make_model(seed, layers=1).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def family(tmp_path):
    """base/ and three siblings; two share a template, apart from the blanks around it."""
    for seed, (name, template) in enumerate(
        {"base": "A {{ x }}", "one": "B {{ x }}", "two": "\nB {{ x }} ", "bare": None}.items()
    ):
        save(tmp_path / name, template, seed)
    return tmp_path


def recipe(family, names=("one", "two"), **more):
    models = [
        {"model": str(family / name), "parameters": {"weight": 0.25 + i / 4}}
        for i, name in enumerate(names)
    ]
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base"), "models": models}
    return Recipe.from_dict(data | {"dtype": "bfloat16"} | more)


def template_of(folder):
    return AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("more", [{}, {"tokenizer_source": "base"}], ids=["files", "tokenizer"])
def test_auto_is_the_commonest_and_the_tensors_stay(family, more):
    plain = build_model(recipe(family, **more), family / "plain")
    out = build_model(recipe(family, chat_template="auto", **more), family / "out")
    assert template_of(plain) == "A {{ x }}"
    assert template_of(out) == "B {{ x }}"
    assert not differing(load_all(plain), load_all(out))
    files = [{path.name for path in folder.iterdir()} for folder in (plain, out)]
    assert files[0] == files[1]


def test_auto_among_equals_is_the_base_s_and_models_without_one_do_not_count(family):
    auto = {"chat_template": "auto"}
    assert template_of(build_model(recipe(family, ["one"], **auto), family / "a")) == "A {{ x }}"
    out = build_model(recipe(family, ["bare", "one"], **auto), family / "b")
    assert template_of(out) == "A {{ x }}"
    for name in ("base", "one", "two"):
        (family / name / "chat_template.jinja").unlink()
    assert template_of(build_model(recipe(family, **auto), family / "c")) is None


def test_auto_goes_without_a_tokenizer_that_cannot_be_loaded(family, caplog):
    (family / "one/tokenizer.json").write_text("{")
    out = build_model(recipe(family, chat_template="auto"), family / "out")
    assert template_of(out) == "A {{ x }}"
    assert any("chat_template: auto" in line for line in caplog.messages)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_built_in_templates_make_mergekit_s_prompts(family, name):
    out = build_model(recipe(family, chat_template=name), family / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    asked = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert asked == PROMPTS[name]
    whole = tokenizer.apply_chat_template(TALK[:3], tokenize=False)
    assert PROMPTS[name].startswith(whole.removesuffix("\n"))


def test_built_in_templates_are_those_that_recipes_may_name():
    assert tuple(BUILT_IN) == CHAT_TEMPLATES


def test_a_template_of_the_recipe_s_own_replaces_every_other(family):
    """Also those in tokenizer_config.json, where older models keep them."""
    path = family / "base/tokenizer_config.json"
    old = json.loads(path.read_text()) | {"chat_template": "old {{ x }}"}
    path.write_text(json.dumps(old))
    out = build_model(recipe(family, chat_template=OWN), family / "out")
    assert (out / "chat_template.jinja").read_text() == OWN
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert template_of(out) == OWN


def test_a_model_in_memory_is_prompted_with_it(family):
    opened = open_merged(recipe(family, chat_template=OWN), ())
    assert opened.engine.tokenizer.chat_template == OWN
    plain = open_merged(recipe(family), ())
    assert plain.engine.tokenizer.chat_template == "A {{ x }}"
    assert opened.identity != plain.identity


def test_a_file_s_notes_are_said_when_it_answers(family, monkeypatch):
    text = recipe(family, chat_template=OWN, name="first").to_yaml()
    (family / "c.yml").write_text(text)
    said = []
    open_merged(family / "c.yml", (), said.append)
    assert [("`name`" in line) for line in said] == [True]
    assert evomerge.merge(family / "c.yml", family / "out").is_dir()
