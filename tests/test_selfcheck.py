"""Faults that anybody sees, with which settings to ask again, and the best of several answers."""

import json
from dataclasses import replace

import pytest

from evomerge.answering.engine import Answer
from evomerge.answering.prompts import Prompter
from evomerge.errors import TaskError
from evomerge.inference import run_inference
from evomerge.inference.best_of import BestOf, best_answer, mutual_grades, sample_settings
from evomerge.inference.selfcheck import (
    SelfCheck,
    asked_for,
    better,
    faults,
    retry_settings,
    retry_system,
)
from evomerge.judging.grade import Grade
from evomerge.judging.rules.judge import RulesJudge
from evomerge.study import GenerationSection, PromptSection
from evomerge.tasks import Task

JA, EN = (
    "日本の首都について、100字程度で説明してください。",
    "Explain in three sentences why the sky is blue.",
)
ENGLISH = (
    "The sky is blue because the molecules of the air scatter the short waves of sunlight far "
    "more than the long ones, "
    "so that blue light reaches the eye from every direction while the red passes straight through."
)
JAPANESE = (
    "空が青いのは、空気の分子が太陽の光のうち波長の短い青い光を強く散乱させるためです。"
    "そのため、どの方向からも青い光が目に届きます。"
)
CHINESE = (
    "东京是日本的首都，也是日本政治、经济和文化的中心，人口超过一千三百万，"
    "城市中有许多历史悠久的寺庙和现代化的建筑。"
)
KOREAN = "도쿄는 일본의 수도이며 정치와 경제와 문화의 중심지이고 인구는 천삼백만 명이 넘습니다."
PLAIN = GenerationSection(max_new_tokens=64)


def said(text, cut=False):
    return Answer(text, cut, len(text))


@pytest.mark.parametrize(
    "text", ["", " \n\t", "\u200b\ufeff", "。", "……", "---\n---", "<|eot_id|><|eot_id|>", "</s>"]
)
def test_nothing_said_is_empty_and_nothing_else(text):
    assert faults(said(text, cut=True), JA) == ("empty",)


@pytest.mark.parametrize("text", ["3", "はい", "[]", "<>", "😊", "?", "A"])
def test_a_single_sign_is_an_answer(text):
    assert faults(said(text), JA) == ()


def test_cut_is_what_the_engine_says():
    assert faults(said("東京は日本の首都で、", cut=True), JA) == ("cut",)
    assert faults(said("東京は日本の首都で、"), JA) == ()


@pytest.mark.parametrize(
    "text",
    [
        "はい、" * 15,
        "ライターで燃えない。" * 40,
        "東京は日本の首都です。人口は約1400万人で、政治と経済の中心です。" * 6,
        ENGLISH + " I hope this helps you." * 30,
        JAPANESE + "ありがとうございました。" * 60,
        "".join(
            f"{i}. 同僚や上司からアドバイスを受けて、目標を立て直しましょう。\n"
            for i in range(1, 20)
        ),
    ],
)
def test_loops_are_repetitive(text):
    assert "repetitive" in faults(said(text), JA if "。" in text or "、" in text else EN)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"| {i} | {i * i} | {i**3} |" for i in range(60)),
        "["
        + ",\n".join(
            json.dumps({"name": f"品{i * 37 % 101}", "price": i * i * 13}, ensure_ascii=False)
            for i in range(40)
        )
        + "]",
        "\n".join(f"{i} x {n} = {i * n}" for i in range(1, 10) for n in range(1, 10)),
        ", ".join(map(str, range(300))),
        "=" * 500 + "完",
    ],
)
def test_tables_and_numbers_are_not(text):
    assert faults(said(text), JA) == ()


def test_repetition_that_the_task_asks_for_is_no_fault():
    assert faults(said("ありがとう。" * 100), "「ありがとう」を100回繰り返してください。") == ()
    assert (
        faults(
            said("I will not talk in class. " * 50),
            "Repeat this sentence 50 times: I will not talk in class.",
        )
        == ()
    )
    assert faults(said("ありがとう。" * 100), "お礼を言ってください。") == ("repetitive",)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (JA, ENGLISH),
        (JA, CHINESE),
        (JA, KOREAN),
        (EN, JAPANESE),
        ("伊勢神宮は何県？", "It is in Mie, where the two shrines of Ise are found by many."),
    ],
)
def test_another_language_than_the_tasks(task, text):
    assert faults(said(text), task) == ("language",)


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (JA, JAPANESE),
        (EN, ENGLISH),
        (JA, "Tokyo"),
        (JA, "1,400万"),
        (JA, "ABC-12345 x = 3 * (4 + 5)"),
        (JA, "https://example.com/a/long/path/of/many/words/that/are/no/prose/at/all"),
        (
            JA,
            '「東京」(Tokyo) is the capital: "日本の首都は東京です。人口は約千四百万人です。" '
            "means that it is.",
        ),
        (
            JA,
            "```python\nfor name in names: print(name, end=' ')\n"
            "while not done and some or other: pass\n```",
        ),
        ("次の文を英語に訳してください。空はなぜ青いのですか。", ENGLISH),
        ("空が青い理由を英文で書いてください。", ENGLISH),
        ("次の文章を英訳せよ：空は青い。", ENGLISH),
        ("空が青い理由をドイツ語で説明してください。", ENGLISH),
        ("リストを並べ替えるPythonの関数を書いて", ENGLISH),
        ("次の英文の要点は何ですか。" + ENGLISH, ENGLISH),
        # as much English as Japanese: nobody knows what is wanted
        ("次の文を要約してください。\n" + ENGLISH, ENGLISH),
        ("Translate into the language of Tokyo: the sky is blue", JAPANESE),
        ("What is the Japanese word for sky?", JAPANESE),
        ("「空」 means what? Explain the word in a sentence.", JAPANESE),
        ("1 + 1 = ?", JAPANESE),
        ("", ENGLISH),
    ],
)
def test_no_fault_of_language(task, text):
    assert faults(said(text), task) == ()


def test_odd_texts_do_no_harm():
    for text in ("\ud800" * 50, "a" * 200_000, "\x00\x01", "🏳️‍🌈" * 30, "٣" * 40):
        assert isinstance(faults(said(text), JA), tuple)
        assert isinstance(faults(said("はい"), text), tuple)


def test_settings_of_the_next_attempt():
    first = retry_settings(("empty",), PLAIN, 1)
    assert (first.do_sample, first.temperature, first.max_new_tokens, first.repetition_penalty) == (
        True,
        0.7,
        64,
        1.0,
    )
    assert retry_settings(("cut",), PLAIN, 1) == PLAIN.replace(max_new_tokens=128, seed=first.seed)
    assert retry_settings(("cut",), PLAIN, 2).max_new_tokens == 256
    loop = retry_settings(("cut", "repetitive"), PLAIN, 1)
    assert (loop.max_new_tokens, loop.repetition_penalty, loop.do_sample) == (64, 1.1, False)
    assert [retry_settings(("repetitive",), PLAIN, k).repetition_penalty for k in (2, 3, 4, 9)] == [
        1.2,
        1.3,
        1.3,
        1.3,
    ]
    assert retry_settings(("repetitive",), PLAIN, 2).do_sample
    assert (
        retry_settings(("repetitive",), PLAIN.replace(repetition_penalty=0.9), 1).repetition_penalty
        == 1.1
    )
    # never lowered
    assert (
        retry_settings(("repetitive",), PLAIN.replace(repetition_penalty=1.5), 1).repetition_penalty
        == 1.5
    )
    assert retry_settings(("language",), PLAIN, 1).do_sample
    warm = PLAIN.replace(do_sample=True, temperature=0.2, seed=5)
    again = [retry_settings(("empty",), warm, k) for k in (1, 2)]
    assert [s.temperature for s in again] == [0.2, 0.2]
    assert len({5, *(s.seed for s in again)}) == 3


def test_only_for_the_kinds_of_faults_that_are_asked_for():
    assert asked_for(("cut", "language"), frozenset({"language", "empty"})) == ("language",)
    assert asked_for(("cut",), frozenset({"cut"})) == ("cut",)
    assert asked_for(("cut", "repetitive"), frozenset({"cut"})) == ()
    assert asked_for(("cut", "repetitive"), frozenset({"cut", "repetitive"})) == (
        "cut",
        "repetitive",
    )
    assert asked_for(("cut",), frozenset({"repetitive"})) == asked_for((), frozenset({"cut"})) == ()


def test_the_sentence_on_the_language():
    assert retry_system(("cut", "language"), JA) == "必ず日本語で回答してください。"
    assert retry_system(("language",), EN) == "Answer in English."
    assert retry_system(("empty",), JA) is None


def test_the_better_of_two():
    loop, cut, good, empty = (
        said("燃えない。" * 50),
        said(JAPANESE, cut=True),
        said(JAPANESE),
        said(""),
    )
    order = [good, cut, said(ENGLISH), loop, empty]
    for i, one in enumerate(order):
        for other in order[i + 1 :]:
            assert better(one, other, JA) is better(other, one, JA) is one
    assert better(good, said("東京です。"), JA) is good
    assert better(said("東京です。"), good, JA).text == "東京です。"


def test_samples_differ_in_their_seeds():
    first, *others = sample_settings(4, PLAIN)
    assert first == PLAIN
    assert {(s.do_sample, s.temperature, s.top_p, s.max_new_tokens) for s in others} == {
        (True, 0.7, 0.95, 64)
    }
    assert len({s.seed for s in others}) == 3
    own = PLAIN.replace(do_sample=True, temperature=1.2, top_p=0.5)
    assert [(s.temperature, s.top_p) for s in sample_settings(2, own)] == [(1.2, 0.5)] * 2
    assert sample_settings(1, PLAIN) == [PLAIN]


def test_the_answer_that_the_others_agree_with():
    task = Task(0, "What is the capital of Egypt?")
    answers = [said(text) for text in ("Lima", "Cairo", "Lagos", "Cairo")]
    rules = RulesJudge()
    expected = [
        sum(
            rules.grade(replace(task, output=b.text), a).value
            for j, b in enumerate(answers)
            if j != i
        )
        / 3
        for i, a in enumerate(answers)
    ]
    assert mutual_grades(task, answers) == pytest.approx(expected)
    assert best_answer(task, answers) == best_answer(task, answers, RulesJudge()) == 1
    assert best_answer(replace(task, output="Lima"), answers, RulesJudge()) == 0, (
        "rules with a reference heed it"
    )
    assert best_answer(replace(task, output="Lima"), answers) == 1, "agreement never does"


def test_faults_lose_before_any_judge_is_asked():
    class Longest:
        name, version = "longest", "1"

        def grade(self, task, answer):
            return Grade(len(answer.text), None, "")

    answers = [
        said(""),
        said("東京です。"),
        said("燃えない。" * 50),
        said("東京は日本の首都です。"),
    ]
    assert best_answer(Task(0, JA), answers, Longest()) == 3
    assert best_answer(Task(0, JA), [said(""), said("")], Longest()) == 0
    assert best_answer(Task(0, JA), [said("東京です。"), said("大阪です。")], Longest()) == 0, (
        "the first of equals"
    )


def test_a_judge_that_takes_all_at_once_and_one_that_refuses():
    class AtOnce:
        name, version = "at once", "1"

        def grade_all(self, tasks, answers):
            assert len(tasks) == len(answers) == 2
            return [Grade(float(i), None, "") for i in range(len(answers))]

    class Refuses:
        name, version = "refuses", "1"

        def grade(self, task, answer):
            raise TaskError("was not fitted on this task")

    two = [said("東京です。"), said("京都です。")]
    assert best_answer(Task(0, JA), two, AtOnce()) == 1
    with pytest.raises(TaskError):
        best_answer(Task(0, JA), two, Refuses())


class Scripted:
    """Answers by a table of (prompt's task, settings) and logs what it was asked."""

    def __init__(self, table, context=None):
        self.table, self.context, self.limits, self.asked = table, context, {}, []
        self.tokenizer = lambda texts, add_special_tokens: {
            "input_ids": [list(text) for text in texts]
        }

    def batches(self, prompts, settings=None):
        return [list(range(len(prompts)))]

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        own = settings or [PLAIN] * len(prompts)
        self.asked += zip(prompts, own, strict=True)
        return [self.table(prompt, each) for prompt, each in zip(prompts, own, strict=True)]


class PlainPrompter(Prompter):
    """Without a tokenizer whose control tokens would be broken up."""

    def _plain(self, text):
        return text


def plain_prompter(context=None):
    return PlainPrompter(
        None, PromptSection(format="template", template="{input}"), PLAIN, context=context
    )


def outputs(path):
    return [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_asks_again_for_what_has_a_fault(tmp_path):
    tasks = (Task(0, JA), Task(1, "何か言ってください。"), Task(2, "名前は？"))

    def table(prompt, settings):
        if "首都" in prompt:
            return said(JAPANESE if "必ず日本語で" in prompt else ENGLISH)
        if "何か" in prompt:
            return said("はい。" if settings.do_sample else "")
        return said("太郎です。")

    engine = Scripted(table)
    done = run_inference(
        engine,
        plain_prompter(),
        tasks,
        tmp_path / "out.jsonl",
        refine=[SelfCheck(frozenset({"empty", "language"}))],
    )
    assert outputs(tmp_path / "out.jsonl") == [JAPANESE, "はい。", "太郎です。"]
    assert len(engine.asked) == 5
    assert done.told == (
        "self-check (empty, language): 2 of 3 answers had a fault, 0 still have one",
    )

    engine = Scripted(table)
    done = run_inference(
        engine,
        plain_prompter(),
        tasks,
        tmp_path / "out2.jsonl",
        refine=[SelfCheck(frozenset({"empty"}))],
    )
    assert outputs(tmp_path / "out2.jsonl") == [ENGLISH, "はい。", "太郎です。"]


@pytest.mark.parametrize(("context", "room"), [(None, 128), (1000, 128), (100, 90), (70, None)])
def test_a_longer_answer_stays_in_the_context(tmp_path, context, room):
    engine = Scripted(
        lambda prompt, settings: said("長い答え" * 2, cut=settings.max_new_tokens < 90), context
    )
    run_inference(
        engine,
        plain_prompter(),
        [Task(0, "あ" * 10)],
        tmp_path / "out.jsonl",
        refine=[SelfCheck(frozenset({"cut"}))],
    )
    assert [settings.max_new_tokens for _, settings in engine.asked[1:]] == ([room] if room else [])


def test_a_run_keeps_the_best_of_three(tmp_path):
    engine = Scripted(lambda prompt, settings: said("Lima" if settings.seed is None else "Cairo"))
    done = run_inference(
        engine,
        plain_prompter(),
        [Task(0, "Capital of Egypt?")],
        tmp_path / "out.jsonl",
        refine=[BestOf(3)],
    )
    assert outputs(tmp_path / "out.jsonl") == ["Cairo"]
    assert len({settings.seed for _, settings in engine.asked}) == 3
    assert done.told == ("best of 3 by agreement: replaced the first answer to 1 of 1 tasks",)


def test_a_judge_that_does_not_know_a_task_refuses_before_more_is_paid_for(tmp_path):
    class Knows:
        name, version = "knows", "1"

        def check(self, tasks):
            raise TaskError("was not fitted on this task")

    engine = Scripted(lambda prompt, settings: said("Cairo"))
    with pytest.raises(TaskError):
        run_inference(
            engine,
            plain_prompter(),
            [Task(0, "Capital of Egypt?")],
            tmp_path / "out.jsonl",
            refine=[BestOf(3, Knows())],
        )
    assert len(engine.asked) == 1
