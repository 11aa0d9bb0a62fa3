"""A chat template that raises is one line that names it, wherever it is filled in."""
# ruff: noqa: F401, F811  # family is a fixture

import json
import shutil

import pytest
from runner_tools import family, save_tokenizer
from transformers import AutoTokenizer

from evomerge.answering.prompts import make_prompter
from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.judging.local import as_prompt
from evomerge.knowledge.records import Example, Knowledge, KnowledgeClass
from evomerge.knowledge.write_base import write_knowledge
from evomerge.study import PromptSection

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
RAISING = {
    "raise_exception": ("{{ raise_exception('no such\nmodel') }}", "no such model"),
    "a syntax error": ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
    "an unknown tag": ("{% frob %}", "frob"),
    "an undefined name": ("{{ nothing.here }}", "'nothing' is undefined"),
    "an undefined filter": ("{{ messages | frob }}", "frob"),
    "a wrong type": ("{{ 1 + messages[0].content }}", "unsupported operand"),
    "a division": ("{{ 1 // 0 }}", "division"),
    "a wrong key": ("{{ messages[9]['content'] ~ messages[9].content.strip() }}", "no element 9"),
    "no safe access": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a huge range": ("{% for i in range(10**9) %}{% endfor %}", "ange"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize("system", [None, "短く。"])
@pytest.mark.parametrize("name", RAISING)
def test_a_template_that_raises_is_one_line_that_names_it(tokenizer, name, system):
    tokenizer.chat_template, words = RAISING[name]
    with pytest.raises(ModelError) as caught:
        make_prompter(tokenizer, PromptSection(system=system)).render("課題")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"the chat template of {tokenizer.name_or_path}: cannot be filled in")
    assert words in line
    assert "chat_template.jinja" in line


@pytest.mark.parametrize("name", RAISING)
def test_the_local_judges_template_too(tokenizer, name):
    tokenizer.chat_template, words = RAISING[name]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ModelError, match="does not take the rubric") as caught:
        as_prompt(tokenizer, messages, "judge")
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_any_error_about_the_system_turn_puts_its_text_above(tokenizer):
    """Templates refuse it by raise_exception, or by assuming that the first turn is the user's."""
    for refusal in (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}",
        "{% if messages[0].role != 'user' %}{{ 1 // 0 }}{% endif %}",
    ):
        tokenizer.chat_template = refusal + TURNS
        prompter = make_prompter(tokenizer, PromptSection(system="短く。"))
        assert prompter.render("課題") == "<|user|>短く。\n\n課題</s>"


ONLY_ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + TURNS
)


@pytest.fixture
def study(family, tmp_path):
    """A study of the family, whose base is a copy that a test may change."""
    shutil.copytree(family / "base", tmp_path / "base")
    rows = [{"task_id": i, "input": f"猫{i}", "output": "犬"} for i in range(6)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        f"genome: {{base_model: {tmp_path}/base, models: [{family}/one]}}\n"
        f"tasks: [{{file: {tmp_path}/tasks.jsonl}}]\nstudy: s\n"
        "generation: {max_new_tokens: 8}\nengine: {device: cpu}\n"
    )
    (tmp_path / "study.yaml").write_text(text)
    return tmp_path


def set_template(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["raise_exception", "a syntax error", "an undefined name"])
def test_check_infer_and_search_say_it(study, capsys, name):
    template, words = RAISING[name]
    assert main(["check", str(study / "study.yaml")]) == 0
    capsys.readouterr()
    set_template(study / "base", template)
    assert main(["check", str(study / "study.yaml")]) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert f"the chat template of {study}/base" in line
    assert words in line
    tasks, out = str(study / "tasks.jsonl"), str(study / "a.jsonl")
    assert main(["infer", "--model", str(study / "base"), "--tasks", tasks, "--out", out]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    where = ["--storage", f"sqlite:///{study}/s.db", "--results", str(study / "results")]
    assert main(["search", str(study / "study.yaml"), *where]) == 2
    assert f"the chat template of {study}/base" in capsys.readouterr().err.splitlines()[-1]


def test_check_renders_a_prompt_of_each_class(study, capsys):
    """The plain prompt is one turn; a class with examples has several, which this template
    refuses.
    """
    set_template(study / "base", ONLY_ONE_TURN)
    plain = KnowledgeClass("数", "", "{input}", shots=0)
    shown = KnowledgeClass("かな", "", "{input}", shots=1)
    examples = (Example(2, "数", "1", "2"), Example(3, "かな", "あ", "い"))
    for name, classes, code in (("good", (plain,), 0), ("bad", (plain, shown), 2)):
        base = Knowledge(classes, examples[: len(classes)])
        write_knowledge(base, study / f"{name}.yaml")
        setting = f"prompt.knowledge={study}/{name}.yaml"
        assert main(["check", str(study / "study.yaml"), "--set", setting]) == code
        assert ("one turn only" in capsys.readouterr().out) == bool(code)
