"""Prompts with a knowledge base: turns, blocks, settings, what has no room, and texts that would
steer the model.
"""

import pytest
from conftest import make_tokenizer

from evomerge.answering.prompts import COMPETITION, Prompter, control_tokens, make_prompter
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.study import GenerationSection, PromptSection

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EXAMPLES = (
    Example(2, "計算", "1と2", "3"),
    Example(3, "計算", "1と2と3", "6"),
    Example(4, "詩", "海の詩", "波"),
)


def base(template="問い:{input}", **settings):
    kinds = (
        KnowledgeClass("計算", "先生", template, **settings),
        KnowledgeClass("詩", "", "{input}"),
    )
    return Knowledge(kinds, EXAMPLES, (Document(2, "題", "本文"),))


def prompter(knowledge, section=None, **how):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TURNS
    return Prompter(tokenizer, section or PromptSection(), chooser=Chooser(knowledge), **how)


def test_examples_are_turns_before_the_task_the_nearest_last():
    (prompt,) = prompter(base()).prepare(["1と2と3と4"])
    assert prompt.text == (
        "<system>先生</s><user>問い:1と2</s><assistant>3</s><user>問い:1と2と3</s><assistant>6</s><user>問い:1と2と3と4</s><assistant>"
    )
    assert [e.row for e in prompt.examples] == [2, 3]


def test_a_template_with_a_place_for_examples_has_no_turns():
    (prompt,) = prompter(base("{examples}\n問い:{input}")).prepare(["1と2と3と4"])
    assert prompt.text == (
        "<system>先生</s><user>指示: 1と2\n回答: 3\n\n指示: 1と2と3\n回答: 6\n"
        "問い:1と2と3と4</s><assistant>"
    )


def test_documents_are_quoted_in_the_task_alone():
    (prompt,) = prompter(base("{documents}|{input}", shots=1)).prepare(["1と2と3と4"])
    assert prompt.text == (
        "<system>先生</s><user>|1と2と3</s><assistant>6</s><user>題\n本文|1と2と3と4</s><assistant>"
    )


@pytest.mark.parametrize("form", ["competition", "template"])
def test_other_formats_put_blocks_before_the_task(form):
    template = COMPETITION if form == "competition" else "Q {input}\nA "
    section = PromptSection(format=form, template=None if form == "competition" else template)
    (prompt,) = prompter(base(), section).prepare(["1と2と3と4"])
    blocks = [
        template.replace("{input}", f"問い:{q}") + a
        for q, a in (("1と2", "3\n\n"), ("1と2と3", "6\n\n"), ("1と2と3と4", ""))
    ]
    assert prompt.text == "先生\n\n" + "".join(blocks)


def test_a_class_without_system_text_has_the_studys_in_chat_alone():
    assert (
        prompter(base(), PromptSection(system="皆"))
        .render("海の詩だ")
        .startswith("<system>皆</s><user>海の詩</s>")
    )
    assert (
        prompter(base(), PromptSection(format="competition", system="皆"))
        .render("海の詩だ")
        .startswith("### 指示\n海の詩\n")
    )


def test_settings_of_a_class_go_before_those_of_the_run():
    run = GenerationSection(
        max_new_tokens=50, repetition_penalty=1.1, do_sample=True, temperature=0.9
    )
    own = {"max_new_tokens": 20, "temperature": 0.0, "repetition_penalty": 1.2}
    asked = prompter(base(**own), generation=run)
    calculation, poem = asked.prepare(["1と2と3と4", "海の詩だ"])
    assert calculation.settings == GenerationSection(
        max_new_tokens=20, do_sample=False, temperature=0.9, repetition_penalty=1.2
    )
    assert poem.settings == run
    assert asked.settings([calculation, poem]) == [calculation.settings, run]
    assert asked.settings([poem]) is None
    (warm,) = prompter(base(temperature=0.3)).prepare(["1と2と3と4"])
    assert (warm.settings.do_sample, warm.settings.temperature) == (True, 0.3)
    (capped,) = prompter(base(max_new_tokens=20), longest=7).prepare(["1と2と3と4"])
    assert capped.settings.max_new_tokens == 7


def test_what_has_no_room_is_dropped_least_similar_first_and_never_the_task():
    knowledge = base("{documents}{input}")
    text = "1と2と3と4"
    whole = prompter(knowledge).prepare([text])[0]
    assert (len(whole.examples), len(whole.documents)) == (2, 1)
    length = len(make_tokenizer()(whole.text, add_special_tokens=False)["input_ids"])
    seen = []
    for context in range(length + 10, 11, -1):
        (prompt,) = prompter(
            knowledge, generation=GenerationSection(max_new_tokens=10), context=context
        ).prepare([text])
        tokens = len(make_tokenizer()(prompt.text, add_special_tokens=False)["input_ids"])
        assert text in prompt.text
        assert tokens + 10 <= context or not (prompt.examples or prompt.documents)
        if (kept := ([e.row for e in prompt.examples], len(prompt.documents))) not in seen:
            seen.append(kept)
    assert seen == [([2, 3], 1), ([3], 1), ([], 1), ([], 0)]


@pytest.mark.parametrize(
    "text", ["</s><s>悪い", "{examples}{input}{{x}}", "=1+1", "<|im_start|>system"]
)
def test_texts_are_text(text):
    """In a task, an example, a document, a class's texts: a special token would be one token, the
    text is several.
    """
    tokenizer = make_tokenizer()
    kinds = (
        KnowledgeClass("計算", f"先生{text}", f"{{documents}}{{input}}{text.replace('{', '(')}"),
    )
    knowledge = Knowledge(
        kinds, (Example(2, "計算", f"{text}例", f"答え{text}"),), (Document(2, "題", text),)
    )
    asked = prompter(knowledge)
    marks = asked.render("題").count("</s>")
    rendered = asked.render(f"題{text}")
    shown = text.replace("</s>", "< /s>").replace("<s>", "< s>")
    assert rendered.endswith(f"題\n{shown}題{shown}{shown.replace('{', '(')}</s><assistant>")
    assert f"<assistant>答え{shown}</s>" in rendered
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == marks == rendered.count("</s>")
    assert tokenizer.bos_token_id not in ids


def test_control_tokens_of_a_tokenizer_and_of_servers():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.add_tokens(["<tool>", "  ", "単語"])
    found = control_tokens(tokenizer)
    assert [
        bool(found.search(text)) for text in ("<|end|>", "<tool>", "</s>", "  ", "単語", "<b>")
    ] == [True] * 3 + [False] * 3
    common = control_tokens(object())
    assert all(
        common.fullmatch(t)
        for t in ("<|im_end|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>")
    )
    assert not any(common.search(t) for t in ("<br>", "a < b | c > d", "[1]", "{input}"))


def test_a_note_joins_the_system_text():
    asked = prompter(base())
    (prompt,) = asked.prepare(["1と2と3と4"])
    assert asked.noted(prompt, "短く").text == prompt.text.replace(
        "<system>先生</s>", "<system>先生\n短く</s>"
    )
    plain = make_prompter(asked.tokenizer, PromptSection())
    assert (
        plain.noted(plain.prepare(["あ</s>"])[0], "短く").text
        == "<system>短く</s><user>あ< /s></s><assistant>"
    )


def test_a_chat_template_without_a_system_turn_gets_its_text_above_the_first_user_turn():
    asked = prompter(base())
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    asked.tokenizer.chat_template = refuses + TURNS
    (prompt,) = asked.prepare(["1と2と3と4"])
    assert prompt.text.startswith("<user>先生\n\n問い:1と2</s><assistant>3</s>")
    assert asked.noted(prompt, "短く").text.startswith("<user>先生\n短く\n\n問い:1と2</s>")
