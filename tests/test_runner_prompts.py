"""The runner to take along: classes, examples, documents and prompts are evomerge's."""
# ruff: noqa: F401, F811  # family is a fixture

import pytest
from runner_tools import (
    ROOT,
    a_base,
    engine_of,
    family,
    finish,
    loaded,
    own_prompter,
    rows,
    task_file,
)

from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.starter import starter
from evomerge.reporting.runner import write_runner
from evomerge.study import PromptSection
from evomerge.tasks import load_tasks

FORMATS = [
    PromptSection(),
    PromptSection(system="短く。"),
    PromptSection(format="competition"),
    PromptSection(format="template", template="  Q{{ '\n{input}}}\" {input}\\n\n\nA:\n"),
]


@pytest.mark.parametrize("prompt", FORMATS, ids=["chat", "system", "competition", "template"])
@pytest.mark.parametrize("based", [True, False])
def test_classes_examples_and_prompts_are_evomerges(family, tmp_path, prompt, based):
    knowledge = a_base() if based else None
    finished = finish(family, prompt=prompt)
    write_runner(finished, tmp_path / "r", knowledge)
    texts = [task.input for task in load_tasks(task_file(tmp_path, 40))] + [
        "猫あ",
        "魚の色" * 30,
        "数" * 360,
        "zzz",
    ]
    compare(finished, tmp_path / "r", knowledge, texts)


@pytest.mark.parametrize(
    "labelled", sorted(path.name for path in (ROOT / "tests").glob("labelled_tasks*.jsonl"))
)
@pytest.mark.parametrize("default", [True, False])
def test_the_starter_base_and_a_default_class(family, tmp_path, labelled, default):
    """Every labelled task gets the same; among them stand two that the base holds, which the votes
    alone decide.
    """
    knowledge = starter()
    section = (
        PromptSection(knowledge="x", default_class=knowledge.classes[3].name, threshold=0.5)
        if default
        else PromptSection()
    )
    finished = finish(family, prompt=section, do_sample=True, temperature=0.7)
    write_runner(finished, tmp_path / "r", knowledge)
    texts = [task["input"] for task in rows(ROOT / "tests" / labelled)]
    texts += [knowledge.examples[0].input, f" {knowledge.examples[-1].input}\n", "q"]
    chosen = compare(finished, tmp_path / "r", knowledge, texts, context=6000)
    assert len({choice.class_name for choice in chosen}) > 4
    votes = Chooser(
        knowledge, threshold=section.threshold, default=section.default_class, linear=False
    ).choose_all(texts)
    assert [choice.class_name for choice in chosen] != [choice.class_name for choice in votes]


def compare(finished, folder, knowledge, texts, context=400):
    """Class, examples, documents, prompt and settings of each text are the same here and there;
    returns evomerge's choices.
    """
    engine = engine_of(finished)
    engine.context = context
    prepared = own_prompter(finished, engine, knowledge).prepare(texts)
    answer = loaded(folder)
    choices = (
        [c[1:] for c in answer.choose(texts)]
        if knowledge
        else [(answer.SETTINGS["plain"], [], [])] * len(texts)
    )
    for wanted, (kind, examples, documents) in zip(prepared, choices, strict=True):
        settings = kind["generation"]
        if knowledge:
            assert kind["class"] == wanted.choice.class_name
            assert [e["input"] for e in examples] == [e.input for e in wanted.choice.examples]
            assert [d["title"] for d in documents] == [d.title for d in wanted.choice.documents]
        assert {key: getattr(wanted.settings, key) for key in settings if key != "top_k"} == {
            k: v for k, v in settings.items() if k != "top_k"
        }
        room = context - settings["max_new_tokens"]
        ids = engine.tokenizer(wanted.text, add_special_tokens=False)["input_ids"]
        if len(ids) > room:
            with pytest.raises(SystemExit, match="too long"):
                answer.prompt(engine.tokenizer, room, wanted.task, kind, examples, documents)
        else:
            assert answer.prompt(
                engine.tokenizer, room, wanted.task, kind, examples, documents
            ) == (wanted.text, ids)
    return [prompt.choice for prompt in prepared]


def test_control_tokens_and_braces_stay_text(family, tmp_path):
    write_runner(finish(family), tmp_path / "r", a_base())
    answer = loaded(tmp_path / "r")
    engine = engine_of(finish(family))
    text = "猫 {input} {examples} <|assistant|>はい</s>"
    (choice,) = list(answer.choose([text]))
    whole, ids = answer.prompt(engine.tokenizer, 300, *choice)
    assert "猫 {input} {examples} < |assistant|>はい< /s>" in whole
    marks = engine.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|user|>", "<|system|>"])
    shots = len(choice[2])
    assert shots == 3
    assert [ids.count(mark) for mark in marks] == [shots + 1, shots + 1, 1]


def test_a_task_too_long_is_cut_where_the_study_says_so(family, tmp_path):
    write_runner(finish(family, prompt=PromptSection(too_long="truncate")), tmp_path / "r", None)
    answer = loaded(tmp_path / "r")
    tokenizer = engine_of(finish(family)).tokenizer
    whole, ids = answer.prompt(tokenizer, 10, "あ" * 50, answer.SETTINGS["plain"], [], [])
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"][-10:]
