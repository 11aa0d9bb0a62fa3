"""The transformers engine against plain generate, and the answer cache."""

import pytest
import torch
from conftest import make_tokenizer
from transformers import AutoModelForCausalLM

from evomerge.answering.answer_all import answer_all
from evomerge.answering.cache import AnswerCache, cache_scope
from evomerge.answering.engine import Answer, EngineSpec
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.pace import Pace
from evomerge.answering.prompts import make_prompter
from evomerge.errors import EngineError, InputError, ModelError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import task_arithmetic_recipe
from evomerge.study import (
    EngineSection,
    GenerationSection,
    GenomeSection,
    PromptSection,
    SearchSection,
    Study,
    TaskSource,
)

PROMPTS = ["あ\n", "いうえおか\n", "", "12345:\n", "くけこ\n", "😀あ\n"]


def make_engine(pair, batch_size=4, **generation):
    settings = GenerationSection(**({"max_new_tokens": 8} | generation))
    folders = open_model(str(pair / "base")), [open_model(str(pair / "instruct"))]
    return TransformersEngine(
        EngineSpec(*folders, EngineSection(batch_size=batch_size), settings, "float32")
    )


def recipe_of(pair, weight=0.7):
    return task_arithmetic_recipe(
        str(pair / "base"), [str(pair / "instruct")], [(0, 4)], [[weight]], dtype="float32"
    )


def answers_of(engine, prompts):
    answers = {}
    for batch in engine.batches(prompts):
        answers |= dict(zip(batch, engine.answer([prompts[i] for i in batch]), strict=True))
    return [answers[i] for i in range(len(prompts))]


def test_in_place_answers_are_those_of_a_fresh_load_one_prompt_at_a_time(pair, tmp_path):
    engine = make_engine(pair)
    engine.apply(recipe_of(pair, 1.3))
    engine.apply(recipe_of(pair))
    build_model(recipe_of(pair), tmp_path / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = make_tokenizer()
    prompts = [p for p in PROMPTS if p]
    for prompt, answer in zip(prompts, answers_of(engine, prompts), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        wanted = fresh.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        cut = 2 not in wanted
        assert answer == Answer(
            tokenizer.decode(wanted, skip_special_tokens=True),
            cut,
            len(wanted) if cut else wanted.index(2),
        )


def test_empty_prompts_and_emoji_are_answered(pair):
    assert len(answers_of(make_engine(pair), PROMPTS)) == len(PROMPTS)


def test_batches_hold_every_prompt_once_longest_first(pair):
    batches = make_engine(pair).batches(PROMPTS)
    assert sorted(i for batch in batches for i in batch) == list(range(len(PROMPTS)))
    assert max(map(len, batches)) == 4
    lengths = [len(PROMPTS[i]) for batch in batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_sampling_is_seeded_by_study_and_prompt(pair):
    engine = make_engine(pair, do_sample=True, temperature=1.5)
    first = engine.answer(PROMPTS[:2])
    torch.manual_seed(99)
    assert engine.answer(PROMPTS[:2]) == first


def test_a_prompt_beyond_the_context_is_refused(pair):
    with pytest.raises(EngineError, match="context of 64"):
        make_engine(pair).answer(["あ" * 60])


def test_prompts(pair):
    tokenizer = make_tokenizer()
    assert make_prompter(tokenizer, PromptSection()).render("{input}") == "{input}\n"
    assert make_prompter(tokenizer, PromptSection(system="こ")).render("あ") == "こ\nあ\n"
    assert (
        make_prompter(tokenizer, PromptSection(format="competition")).render("問い {x}")
        == "### 指示\n問い {x}\n### 回答\n"
    )
    assert (
        make_prompter(tokenizer, PromptSection(format="template", template="Q: {input} A:")).render(
            "{input}"
        )
        == "Q: {input} A:"
    )
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        make_prompter(tokenizer, PromptSection())


def test_a_model_without_tokenizer_is_named(pair, tmp_path):
    import shutil

    shutil.copytree(pair / "base", tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        TransformersEngine(
            EngineSpec(
                open_model(str(tmp_path / "bare")),
                [],
                EngineSection(),
                GenerationSection(),
                "bfloat16",
            )
        )


class Counting:
    """An engine that upper-cases, two prompts a batch, and counts."""

    def __init__(self):
        self.answered, self.limits = 0, {}

    def apply(self, recipe): ...

    def batches(self, prompts, settings=None):
        return [list(range(i, min(i + 2, len(prompts)))) for i in range(0, len(prompts), 2)]

    def answer(self, prompts, settings=None, on_answer=None, deadline=None):
        self.answered += len(prompts)
        return [Answer(p.upper(), False, len(p)) for p in prompts]


def test_nothing_is_paid_for_twice_and_merging_only_when_needed(tmp_path):
    engine, merges = Counting(), []
    prompts = ["a", "b", "c", "d", "e"]

    def run(recipe):
        cache = AnswerCache(tmp_path / "a.sqlite", "scope")
        return answer_all(
            engine,
            cache,
            recipe=recipe,
            prompts=prompts,
            apply=lambda: merges.append(recipe),
            pace=Pace(len(prompts)),
        )

    assert [a.text for a in run("r1")] == ["A", "B", "C", "D", "E"]
    assert run("r1") == run("r1")
    assert (engine.answered, merges) == (5, ["r1"])
    run("r2")
    assert (engine.answered, merges) == (10, ["r1", "r2"])
    cache = AnswerCache(tmp_path / "a.sqlite", "other settings")
    assert cache.get(cache.key("r1", prompts[:2])) is None


def test_limits_are_remembered_before_the_answers_under_them_are_kept(tmp_path):
    class Shrinking(Counting):
        def answer(self, prompts, settings=None, on_answer=None, deadline=None):
            if self.answered == 2:
                self.limits["batch_tokens"] = 7
            return super().answer(prompts)

    engine, cache, remembered = Shrinking(), AnswerCache(tmp_path / "a.sqlite", "scope"), []

    def remember(limits):
        remembered.append((dict(limits), cache.get(cache.key("r", ["c", "d"]))))

    answer_all(
        engine,
        cache,
        recipe="r",
        prompts=["a", "b", "c", "d", "e"],
        apply=lambda: None,
        pace=Pace(5),
        remember=remember,
    )
    assert remembered == [({"batch_tokens": 7}, None)]


def test_modes_share_no_answers(tmp_path):
    cache = AnswerCache(tmp_path / "a.sqlite", "scope")
    cache.put(cache.key("r", ["あ\ud800"]), [Answer("\ufffd", True, 3)])
    assert cache.get(cache.key("r", ["あ\ud800"])) == [Answer("\ufffd", True, 3)]
    assert cache.get(cache.key("r", ["あ\ud800"], mode="one pass")) is None


def test_keys_are_those_of_stored_caches(tmp_path):
    """Literal values of version 0.1: whoever changes one pays for every stored answer again."""
    cache = AnswerCache(tmp_path / "a.sqlite", "scope")
    assert cache.key("r", ["あ", "b\ud83d"]) == (
        "6e7c2694e9a680c65a8409fc8f94cffcf11c7f4abc6255e7c53f85a6886e6f90"
    )
    assert cache.key("r", ["あ"], "population", [GenerationSection(max_new_tokens=3)]) == (
        "75468ee4d7207fb12cbde52bfd51c5059038d9d8fbb0009d6311eafbf097b60d"
    )
    engine = EngineSection(batch_size=3, residency="disk", batch_tokens=9, device="cpu")
    genome, tasks = GenomeSection(models=("b",), base_model="a"), (TaskSource(file="x.jsonl"),)
    study = Study(genome=genome, tasks=tasks, study="s", engine=engine)
    scope = cache_scope(study, {"a": "1", "b": {"x": 2}})
    assert scope == "75c8a38e87c1d078da0bfa1f9c03e1996bf142863afa13864ce40543f5ef8e1c"
    other_batches = study.replace(engine=EngineSection(device="cpu"))
    assert cache_scope(other_batches, {"a": "1", "b": {"x": 2}}) == scope


def test_what_an_engine_can_do_is_an_object_that_it_has(pair):
    engine = make_engine(pair)
    assert None not in (engine.batched_candidates, engine.gradient, engine.likelihood)
    spec = EngineSpec(
        open_model(str(pair / "base")), [], EngineSection(), GenerationSection(), "float32"
    )
    alone = TransformersEngine(spec)
    assert (alone.batched_candidates, alone.gradient) == (None, None)
    (found,) = alone.likelihood([("あ", "い")])
    assert found < 0
    assert alone.likelihood.count_tokens([("あ", "いう"), ("い", "")]) == [2, 0]


def test_a_spec_is_a_studys_engine(pair):
    genome, tasks = GenomeSection(models=("b",), base_model="a"), (TaskSource(file="x.jsonl"),)
    search = SearchSection(dtype="float32", seed=7)
    study = Study(genome=genome, tasks=tasks, study="s", search=search)
    base = open_model(str(pair / "base"))
    spec = EngineSpec.of_study(study, base, [])
    wanted = EngineSpec(base, [], study.engine, study.generation, "float32", 7, "refuse")
    assert spec == wanted


def test_pace_tells_speed_and_time_left_of_what_is_answered_here():
    now, lines = [0.0], []
    pace = Pace(10, lines.append, lambda: now[0])
    pace.found(4)
    assert pace.rate is None
    pace.begin()
    now[0] = 2.0
    pace.watch(1, 100)
    now[0] = 2.1
    pace.watch(2, 104)  # too soon to be told
    now[0] = 4.0
    pace.end(4, 200)
    pace.begin()
    pace.end(2, 0)
    assert lines == [
        "answered 4/10",
        "answered 5/10  50 tokens/s  ETA 10 s",
        "answered 8/10  50 tokens/s  ETA 2 s",
        "answered 10/10  50 tokens/s",
    ]
    assert pace.rate == 50.0
