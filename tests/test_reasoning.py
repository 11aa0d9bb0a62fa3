"""Models that think before they answer: where the answer begins, and who sees the thoughts."""

import json
import sys
import time

import pytest
from conftest import CHARACTERS, make_model
from hypothesis import given
from hypothesis import strategies as st
from reasoning_tools import BEGUN, HARMONY, PLAIN, thinker
from runner_tools import PROGRAM

import evomerge
from evomerge.answering.cache import AnswerCache
from evomerge.answering.engine import Answer, EngineSpec
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.reasoning import THINK, find_marks
from evomerge.answering.reply_reader import ReplyReader
from evomerge.answering.thoughts import Marks, SplitReply, bare_thoughts, split_reply
from evomerge.cli import main
from evomerge.genome.genome import make_genome
from evomerge.inference.part import Part
from evomerge.inference.selfcheck import faults
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.reporting.export import verdict_markdown
from evomerge.searching.final_test import make_verdict
from evomerge.searching.records.trial_record import TaskGrade
from evomerge.searching.records.verdict_record import Verdict
from evomerge.study import (
    EngineSection,
    GenerationSection,
    read_study,
)

sys.path.insert(0, str(PROGRAM[1].parent))
import answer_tools


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "answer", "is_open"),
    [
        ("<think>\nhm\n</think>\n\n42", False, "<think>\nhm\n</think>\n\n", "42", False),
        ("\n<think>hm</think>42", False, "\n<think>hm</think>", "42", False),
        ("hm\n</think>\n\n42", True, "hm\n</think>\n\n", "42", False),
        ("hm</think>42", False, "hm</think>", "42", False),
        ("<think>hm", False, "<think>hm", "", True),
        ("hm", True, "hm", "", True),
        ("", True, "", "", True),
        ("<think></think>", False, "<think></think>", "", False),
        ("42", False, "", "42", False),
        (" 42 ", False, "", " 42 ", False),
        ("Write <think> here", False, "", "Write <think> here", False),
        ("Use <think> and </think>.", False, "", "Use <think> and </think>.", False),
        ("<think>a</think>b</think>", False, "<think>a</think>", "b</think>", False),
        ("<think>a</think>b <think> c", False, "<think>a</think>", "b <think> c", False),
    ],
)
def test_where_the_answer_begins(text, opened, thoughts, answer, is_open):
    assert split_reply(text, THINK, opened) == SplitReply(thoughts, answer, is_open)


@pytest.mark.parametrize(
    ("text", "opened", "thoughts", "answer", "later"),
    [
        # blocks in a row, also after one that the prompt has begun
        ("<think>a</think>\n<think>b</think>answer", False, "a\n\nb", "answer", ""),
        ("<think>a</think><think>b</think>\n\nanswer", False, "a\n\nb", "answer", ""),
        ("a</think>\n<think>b</think>answer", True, "a\n\nb", "answer", ""),
        ("a</think>\n<think>b</think>answer", False, "a\n\nb", "answer", ""),
        # within the answer
        ("x\n<think>a</think>\ny", False, "", "x\ny", "a"),
        ("<think>a</think>x\n<think>\nb\n</think>\n\ny", False, "a", "x\ny", "b"),
        ("x\n<think>a</think> <think>b</think>", False, "", "x\n", "a\n\nb"),
        ("<think>a</think>x\n <think>cut off", False, "a", "x\n ", "cut off"),
        # nested
        ("<think>a<think>b</think>c</think>x", False, "a<think>b</think>c", "x", ""),
        ("a<think>b</think>c</think>x", True, "a<think>b</think>c", "x", ""),
        ("<think>a<think>b</think>x", False, "a<think>b", "x", ""),
        ("<think>a<think>b</think>x", True, "a<think>b", "x", ""),
        ("<think>a <think>?</think>x\n<think>b</think>y", False, "a <think>?", "x\ny", "b"),
        # named in the answer
        ("<think>a</think>Use <think> and </think>.", False, "a", "Use <think> and </think>.", ""),
    ],
)
def test_blocks_of_thoughts(text, opened, thoughts, answer, later):
    reply = split_reply(text, THINK, opened)
    assert not reply.is_open
    assert bare_thoughts(reply.thoughts, THINK) == thoughts
    assert reply.answer == answer
    assert bare_thoughts(reply.later, THINK) == later
    assert sorted(reply.thoughts + reply.answer + reply.later) == sorted(text)


@pytest.mark.parametrize("text", ["<think>a</think>\n<think>b", "<think>a<think>b", "<think>\n"])
def test_blocks_that_do_not_end_leave_no_answer(text):
    assert split_reply(text, THINK) == SplitReply(text, "", is_open=True)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<", "think>"])).map("".join)
    | st.text(),
    st.booleans(),
)
def test_thoughts_and_answer_are_the_whole_reply(text, opened):
    reply = split_reply(text, THINK, opened)
    if not reply.later:
        assert reply.thoughts + reply.answer == text
    assert sorted(reply.thoughts + reply.answer + reply.later) == sorted(text)
    assert not (reply.is_open and (reply.answer or reply.later))
    bare_thoughts(reply.thoughts + reply.later, THINK)


def test_a_reply_of_megabytes_is_split_at_once():
    began = time.perf_counter()
    blocks = "<think></think>\n" * 10**5
    for text in ("<think>" * 10**6, "<think" * 10**6, " " * 10**7, "</think" * 10**6, blocks):
        split_reply(text, THINK)
        split_reply(text, THINK, True)
    assert time.perf_counter() - began < 5


def test_auto_finds_tokens_and_templates_that_have_both_marks():
    assert find_marks("auto", thinker()) == THINK
    assert find_marks("auto", thinker(PLAIN)) == THINK
    assert find_marks("auto", thinker("</think>" + BEGUN, more=())) == THINK
    assert find_marks("auto", thinker(BEGUN, more=())) is None
    assert find_marks("auto", thinker(PLAIN, more=())) is None
    assert find_marks("auto", thinker(HARMONY.start + HARMONY.end, more=())) == HARMONY
    assert find_marks(None, thinker()) is None
    section = GenerationSection(reasoning={"start": "[A]", "end": "[B]"}).reasoning
    assert find_marks(section, thinker(PLAIN, more=())) == Marks("[A]", "[B]")


def read(tokenizer, text, ended=True, prompt="あ\n", stops=(), wanted="auto"):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ReplyReader(tokenizer, wanted)(prompt, tokens, ended, stops)


def test_replies_are_read_with_their_tokens():
    assert read(thinker(), "<think>いう</think>\nえお") == Answer(
        "えお", False, 7, "<think>いう</think>\n", 4
    )
    assert read(thinker(BEGUN), "いう</think>えお", prompt="あ\n<think>\n") == Answer(
        "えお", False, 5, "いう</think>", 3
    )
    assert read(thinker(), "えお") == Answer("えお", False, 2, "", 0)
    assert read(thinker(), "<think>いう", ended=False) == Answer("", True, 3, "<think>いう", 3)
    assert read(thinker(), "<think>いう") == Answer("", False, 3, "<think>いう", 3)
    assert read(thinker(), "<think>い</think>えおか", stops=("お",)).text == "え"
    assert read(thinker(), "<think>い</think>え", wanted=None).thought_tokens is None


def test_tokens_of_all_blocks_are_counted():
    assert read(thinker(), "<think>い</think>\n<think>う</think>えお") == Answer(
        "えお", False, 9, "<think>い</think>\n<think>う</think>", 7
    )
    found = read(thinker(), "<think>い</think>え\n<think>うう</think>お")
    assert found == Answer("え\nお", False, 10, "<think>い</think><think>うう</think>", 7)
    assert faults(found, "1+1は？") == ()


def test_marks_that_are_no_tokens_are_counted_too():
    wanted = GenerationSection(reasoning={"start": "12", "end": "34"}).reasoning
    found = read(thinker(PLAIN, more=()), "12いう34えお", wanted=wanted)
    assert found == Answer("えお", False, 8, "12いう34", 6)


def test_special_tokens_in_marks_are_kept_and_others_are_not():
    special = ("<|channel|>", "<|message|>", "<|end|>", "analysis", "final")
    tokenizer = thinker(HARMONY.start + HARMONY.end, more=(), special=special)
    text = "<|channel|>analysis<|message|>い<|end|><|channel|>final<|message|>う"
    assert read(tokenizer, text) == Answer(
        "う", False, 9, "<|channel|>analysis<|message|>い<|channel|>final<|message|>", 8
    )


def test_a_model_that_does_not_think_is_left_alone():
    plain = thinker(PLAIN, more=())
    tokens = plain("あ<s>い う</s>", add_special_tokens=False)["input_ids"]
    text = plain.decode(tokens, skip_special_tokens=True)
    assert ReplyReader(plain, "auto")("あ", tokens, True, ()) == Answer(text, False, len(tokens))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base/ and sibling/ whose tokenizer knows the marks."""
    folder = tmp_path_factory.mktemp("thinkers")
    tokenizer = thinker(BEGUN + "{# </think> #}")
    for seed, name in enumerate(("base", "sibling")):
        model = make_model(seed, vocab_size=len(tokenizer), initializer_range=0.4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"task_id": i, "input": CHARACTERS[i % 10] * 2, "output": "1"} for i in range(12)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "tasks.jsonl").write_text(text, encoding="utf-8")
    (folder / "study.yaml").write_text(
        "genome: {base_model: ./base, models: [./sibling], merge_method: task_arithmetic, "
        "layer_granularity: 1}\ntasks: [{file: tasks.jsonl}]\n"
        "generation: {max_new_tokens: 12, reasoning: {start: <think>, end: う}}\n"
        "search: {trials: 4, population: 4, uniform: [0.5], warm_start: null}\n",
        encoding="utf-8",
    )
    return folder


def test_the_engine_reads_with_the_marks_in_every_path(folders):
    marks = {"start": "<think>", "end": "う"}  # untrained models write no </think>
    answers = {}
    for wanted in (None, marks):
        engine = TransformersEngine(
            EngineSpec(
                open_model(str(folders / "base")),
                [],
                EngineSection(device="cpu"),
                GenerationSection(max_new_tokens=24, reasoning=wanted),
                "float32",
            )
        )
        prompts = [f"{c}\n<think>\n" for c in CHARACTERS[:10]]
        answers[wanted is None] = engine.answer(prompts)
    for raw, found in zip(answers[True], answers[False], strict=True):
        assert found.whole == raw.text
        assert found.tokens == raw.tokens
        assert raw.thought_tokens is None
        if "う" in raw.text:
            assert found.text == raw.text.partition("う")[2].lstrip()
        else:
            assert (found.text, found.truncated) == ("", raw.truncated)


def test_a_search_records_thoughts_apart_and_shows_them(folders, tmp_path, capsys):
    study = evomerge.search(
        folders / "study.yaml", storage=tmp_path / "s.db", results=tmp_path / "results"
    )
    for record in study.records:
        assert record.thought_tokens == sum(g.thought_tokens for g in record.grades.values())
        assert record.tokens == record.thought_tokens + sum(
            g.tokens for g in record.grades.values()
        )
    capsys.readouterr()
    assert main(["show", "study", "--storage", f"sqlite:///{tmp_path}/s.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" think")
    assert max(map(len, lines[:7])) <= 80
    done = [record for record in study.records if record.state == "complete"]
    mean = sum(r.thought_tokens / r.n for r in done) / len(done)
    (line,) = [text for text in lines if text.startswith("tokens per answer")]
    assert f" {mean:,.0f} of thoughts" in line
    check_verdict_tokens(study, tmp_path / "results" / "study", " ".join(lines))
    out = tmp_path / "a.jsonl"
    found = evomerge.infer(
        folders / "tasks.jsonl", study="study", storage=tmp_path / "s.db", out=out
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["output"] for row in rows] == [answer.output for answer in found]
    for row, answer in zip(rows, found, strict=True):
        assert row["thoughts"] if not row["output"] else True
        assert "う" not in row.get("thoughts", "")
        assert row["thought_tokens"] + row["answer_tokens"] <= 12
        assert (answer.thought_tokens, answer.answer_tokens) == (
            row["thought_tokens"],
            row["answer_tokens"],
        )
    grade = ["judge", "grade", "--tasks", str(folders / "tasks.jsonl"), "--answers", str(out)]
    capsys.readouterr()
    assert main([*grade, "--judge", "rules"]) == 0
    said = capsys.readouterr()
    graded = [json.loads(line) for line in said.out.splitlines()]
    assert [line["thought_tokens"] for line in graded] == [row["thought_tokens"] for row in rows]
    assert [line["answer_tokens"] for line in graded] == [row["answer_tokens"] for row in rows]
    mean = sum(row["thought_tokens"] for row in rows) / len(rows)
    assert f"tokens per answer: {mean:,.0f} of thoughts" in said.err
    again = evomerge.infer(
        folders / "tasks.jsonl", study="study", storage=tmp_path / "s.db", out=out
    )
    assert not again.made


def check_verdict_tokens(study, results, shown):
    """The verdict's tokens per answer: in what it stores, on the page, in the card, in `show`."""
    verdict = json.loads((results / "verdict.json").read_text(encoding="utf-8"))
    said = []
    for name, c in study.verdict.candidates.items():
        assert 0 < c.thought_tokens <= 12 - c.answer_tokens
        assert verdict["candidates"][name]["thought_tokens"] == c.thought_tokens
        said.append(f"{c.thought_tokens:,.0f} and {c.answer_tokens:,.0f}")
    assert f"winner {said[0]}" in shown
    page = (results / "report.html").read_text(encoding="utf-8")
    card = verdict_markdown(study.verdict, study.winner, study.notes)
    for text in said:
        assert text in page
        assert text in card


def test_a_candidate_s_tokens_are_means_over_the_held_out_tasks():
    grades = {"a": (4, 6), "b": (1, 0), "c": (0, 12)}
    known = {
        key: TaskGrade(True, False, grade=3.0, tokens=answer, thought_tokens=thought)
        for key, (answer, thought) in grades.items()
    }
    plain = {key: TaskGrade(True, False, grade=3.0, tokens=4) for key in grades}
    verdict = make_verdict({"winner": known, "base": plain}, "grade")
    winner = verdict.candidates["winner"]
    assert (winner.thought_tokens, winner.answer_tokens) == (18 / 3, 5 / 3)
    assert verdict.candidates["base"].thought_tokens is None
    data = verdict.to_dict()
    assert data["candidates"]["base"].keys() == {"mean", "stderr", "truncated"}
    assert Verdict.from_dict(data) == verdict


@pytest.mark.parametrize("value", ["-1", "1.5", "true", '"9"'])
def test_bad_numbers_of_tokens_are_refused_in_a_line(folders, tmp_path, capsys, value):
    (tmp_path / "a.jsonl").write_text(f'{{"task_id": 0, "output": "1", "thought_tokens": {value}}}')
    options = ["--tasks", str(folders / "tasks.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    assert main(["judge", "grade", *options, "--judge", "rules"]) == 2
    said = capsys.readouterr().err.strip()
    assert "`thought_tokens`" in said
    assert "\n" not in said


def test_thoughts_are_kept_in_caches_and_parts(tmp_path):
    answers = [Answer("a", False, 5, "<think>b</think>", 4), Answer("c", True, 2)]
    cache = AnswerCache(tmp_path / "c.sqlite", "scope")
    cache.put("k", answers)
    assert cache.get("k") == answers
    (row,) = cache.db.execute("SELECT answers FROM batches").fetchone()
    assert json.loads(row)[1] == ["c", True, 2]  # as older versions write it
    cache.close()
    header = {"prompts": "p"}
    with Part(tmp_path / "out", header, 2) as part:
        part.add(dict(enumerate(answers)))
    with Part(tmp_path / "out", header, 2) as part:
        kept = list(part.answers.values())
    assert [answer.whole for answer in kept] == ["<think>b</think>a", "c"]
    assert [(a.answer_tokens, a.thought_tokens) for a in kept] == [(1, 4), (0, None)]


def test_grades_without_thoughts_are_stored_as_before():
    assert "thought_tokens" not in TaskGrade(True, False, grade=3.0, tokens=4).to_dict()
    known = TaskGrade(True, False, grade=3.0, tokens=4, thought_tokens=0)
    assert TaskGrade.from_dict(known.to_dict()) == known


def test_cut_thoughts_ask_for_more_room():
    assert faults(Answer("", True, 9, "<think>x", 9), "1+1は？") == ("empty", "cut")
    assert faults(Answer("", True, 9), "1+1は？") == ("empty",)


# the study file


# prompts


# servers


# the runner


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>い</think>\nえ", "あ\n"),
        ("い</think>え", "あ\n<think>\n"),
        ("い</think>え", "あ\n"),
        ("い", "あ\n<think>\n"),
        ("い<think>う</think>え", "あ\n"),
        ("<think>い</think>\n<think>う</think>え", "あ\n"),
        ("<think>い</think>え\n<think>う</think>お", "あ\n"),
        ("<think>い<think>う</think>え</think>お", "あ\n"),
        ("<think>い", "あ\n"),
        ("い", "あ\n"),
    ],
)
def test_the_runner_reads_replies_as_the_engine_does(text, prompt):
    tokenizer = thinker()
    own = read(tokenizer, text, prompt=prompt)
    marks = answer_tools.find_marks(tokenizer, [["[A]", "[B]"], ["<think>", "</think>"]], True)
    assert marks == ["<think>", "</think>"]
    tokens = tokenizer(text + "</s><pad>", add_special_tokens=False)["input_ids"]
    replied = answer_tools.replied(tokenizer, tokens, marks)
    assert answer_tools.split(replied, marks, prompt) == (
        bare_thoughts(own.thoughts, THINK),
        own.text,
    )
    plain = thinker(PLAIN, more=())
    assert answer_tools.find_marks(plain, [["<think>", "</think>"]], True) is None
    assert answer_tools.find_marks(plain, [["<think>", "</think>"]], False) is not None


# searches and commands


def test_a_whole_generation_in_one_pass_is_read_alike(folders):
    models = [open_model(str(folders / name)) for name in ("base", "sibling")]
    generation = GenerationSection(max_new_tokens=24, reasoning={"start": "<think>", "end": "う"})
    section = EngineSection(device="cpu")
    engine = TransformersEngine(EngineSpec(models[0], models[1:], section, generation, "float32"))
    study = read_study(folders / "study.yaml", ["search.dtype=float32"])
    genome = make_genome(study, 4)
    recipes = [genome.decode([weight] * genome.dimensions) for weight in (0.25, 0.75)]
    prompts = [f"{c}\n<think>\n" for c in CHARACTERS[:6]]
    together = engine.batched_candidates(recipes, prompts)
    for recipe, found in zip(recipes, together, strict=True):
        engine.apply(recipe)
        assert engine.answer(prompts) == found
    assert any(answer.text for answers in together for answer in answers)


def test_thought_tokens_are_an_objective(folders, tmp_path):
    study = evomerge.search(
        folders / "study.yaml",
        storage=tmp_path / "s.db",
        results=tmp_path / "results",
        overrides={"objective.maximize": ["grade"], "objective.minimize": ["thought_tokens"]},
    )
    for record in study.records:
        if record.state == "complete":
            assert record.parts["thought_tokens"] >= 0
    assert study.verdict.front.minimize == ("thought_tokens",)


def test_check_names_a_variable_that_the_template_ignores(folders):
    found = evomerge.check(
        folders / "study.yaml", overrides={"prompt.chat_template_kwargs": {"enable_thinkin": True}}
    )
    (line,) = [f for f in found if f.level == "low" and f.subject == "tokenizer"]
    assert "`enable_thinkin`" in line.text
    assert "\n" not in line.text
    assert [f.text for f in found if f.subject == "reasoning"] == [
        "thoughts are between <think> and う"
    ]


@pytest.mark.parametrize(
    ("value", "word"), [("3", "mapping"), ("{tools: []}", "tools"), ("{a: [", "--set")]
)
def test_infer_refuses_bad_variables_in_one_line(folders, tmp_path, capsys, value, word):
    options = ["--tasks", str(folders / "tasks.jsonl"), "--out", str(tmp_path / "a.jsonl")]
    more = ["--model", str(folders / "base"), "--chat-template-kwargs", value]
    assert main(["infer", *options, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert word in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "answer"), [("<t>abc t>ans", "ans"), ("<t>abc", ""), ("  <t>a t> b", "b")]
)
def test_an_end_mark_that_is_a_part_of_the_start_mark(text, answer):
    reply = split_reply(text, Marks("<t>", "t>"))
    assert (reply.answer, reply.thoughts + reply.answer) == (answer, text)
