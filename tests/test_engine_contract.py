"""The transformers engine keeps the contract, and what only it promises: its loop, its batches, its
memory.
"""

import random
import time
from dataclasses import replace

import pytest
import torch
from conftest import make_tokenizer
from engine_contract import NEW, PROMPTS, RECIPES, Contract, answers_of, family, recipe  # noqa: F401  # a fixture
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import evomerge.answering.hf.engine
from evomerge.answering.encode import Encoder
from evomerge.answering.engine import Answer, EngineSpec
from evomerge.answering.hf.batching import pack, pad_rows, shrink_to_fit
from evomerge.answering.hf.decode import Hooks, decode, shared_prefix
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.hf.kv_cache import filled
from evomerge.answering.hf.sampling import SamplingParams
from evomerge.errors import EngineError
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.study import EngineSection, GenerationSection


def make_engine(
    family,
    siblings=(),
    *,
    model="base",
    dtype="float32",
    seed=0,
    too_long="refuse",
    engine=None,
    **generation,
):
    folders = open_model(str(family / model)), [open_model(str(family / name)) for name in siblings]
    section = EngineSection(**({"batch_size": 4, "device": "cpu"} | (engine or {})))
    return TransformersEngine(
        EngineSpec(*folders, section, GenerationSection(**generation), dtype, seed, too_long)
    )


class TestTransformers(Contract):
    def make(self, family, siblings=("one", "two"), **settings):
        return make_engine(family, siblings, **settings)


def plain(model, prompts, rules, pad=0):
    """transformers' `generate`, one prompt at a time: the reference. Returns (tokens, ended) of
    each.
    """
    config = GenerationConfig(
        max_new_tokens=rules.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(rules.ends) or None,
        pad_token_id=pad,
        repetition_penalty=rules.repetition_penalty,
    )
    found = []
    for prompt in prompts:
        row = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)[
            0, len(prompt) :
        ].tolist()
        end = next((i for i, token in enumerate(row) if token in rules.ends), None)
        found.append((row[:end], end is not None))
    return found


SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def small_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def small_mistral():
    """With a window shorter than the prompts."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)).eval()


def some_prompts(rng, prefix, count=13):
    start = [rng.randrange(90) for _ in range(prefix)]
    return [
        start + [rng.randrange(90) for _ in range(rng.choice([1, 2, 5, 9, 20]))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("prefix", [0, 3, 30])
@pytest.mark.parametrize("make", [small_llama, small_mistral])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_loop_chooses_what_generate_chooses(make, prefix, penalty):
    """Rows end at different tokens, several at a time; tokens 0 to 9 end an answer."""
    model, rng = make(), random.Random(prefix)
    prompts = some_prompts(rng, prefix)
    rules = SamplingParams(24, frozenset(range(10)), repetition_penalty=penalty)
    wanted = plain(model, prompts, rules)
    assert len({len(tokens) for tokens, _ in wanted}) > 4, "rows that end together show little"
    assert [(output.tokens, output.ended) for output in decode(model, prompts, rules)] == wanted


def test_rows_leave_and_columns_of_padding_with_them():
    model, rng = small_llama(), random.Random(1)
    prompts = [[rng.randrange(10, 90) for _ in range(n)] for n in (30, 20, 5, 5)]
    widths, rows = [], []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["attention_mask"].shape)),
        with_kwargs=True,
    )

    def stopped(prompt, tokens):
        return len(tokens) == (2, 4, 9, 6)[prompt]

    outputs = decode(
        model,
        prompts,
        SamplingParams(12),
        hooks=Hooks(is_complete=stopped, on_rows=lambda order: rows.append(list(order))),
    )
    assert [len(output.tokens) for output in outputs] == [2, 4, 9, 6]
    assert all(output.ended for output in outputs)
    assert rows == [[0, 1, 2, 3], [3, 1, 2], [3, 2], [2]]
    assert widths[:3] == [(4, 30), (4, 31), (3, 22)]  # ten columns went with the longest prompt
    assert widths[-1] == (1, 5 + 8)


def test_a_shared_prefix_is_computed_once():
    model, rng = small_llama(), random.Random(2)
    prompts, seen = some_prompts(rng, 40), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decode(model, prompts, SamplingParams(2))
    assert seen[0] == (1, 40)
    assert seen[1] == (13, max(map(len, prompts)) - 40)
    assert shared_prefix(prompts) == 40
    assert shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix([[1, 2, 3]] * 2) == 2


def test_filled_moves_rows_from_the_end():
    assert filled([0, 2, 5, 7]) == [0, 5, 2, 7]
    assert filled([3]) == [3]
    rng = random.Random(0)
    for _ in range(100):
        keep = sorted(rng.sample(range(20), rng.randint(1, 20)))
        order = filled(keep)
        assert sorted(order) == keep
        assert sum(row != at for at, row in enumerate(order)) == sum(
            row >= len(keep) for row in keep
        )


def test_draws_follow_the_distribution_that_transformers_processors_leave():
    """Frequencies of 4000 first tokens, each from a seed of its own, against softmax after
    temperature and top_p.
    """
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

    model, prompt, n = small_llama(), [3, 14, 15], 4000
    outputs = decode(
        model,
        [prompt] * n,
        SamplingParams(1, do_sample=True, temperature=3.0, top_p=0.8),
        list(range(n)),
    )
    counts = (
        torch.bincount(torch.tensor([output.tokens[0] for output in outputs]), minlength=90) / n
    )
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[:, -1]
    ids = torch.tensor([prompt])
    wanted = TopPLogitsWarper(0.8)(ids, TemperatureLogitsWarper(3.0)(ids, logits)).softmax(-1)[0]
    assert (counts[wanted == 0] == 0).all()
    assert (wanted > 0).sum() > 10
    spread = (wanted * (1 - wanted) / n).sqrt()
    assert ((counts - wanted).abs() <= 5 * spread).all()


def test_several_end_tokens_and_pads_that_are_ends(family):
    """A penalty must not meet the padding: where the pad token is the end token, a padded row would
    never end.
    """
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
    prompts = Encoder(make_tokenizer(), None, NEW)(PROMPTS)
    rules = SamplingParams(NEW, frozenset({2, 7, 9}), repetition_penalty=1.5)
    assert [(o.tokens, o.ended) for o in decode(model, prompts, rules)] == plain(
        model, prompts, rules, pad=2
    )


def test_batches_keep_to_rows_and_tokens():
    lengths = [3, 9, 1, 9, 5, 5, 2]
    assert pack(lengths, 10, 3) == [[1, 3, 4], [5, 0, 6], [2]]
    assert pack(lengths, 10, 32, tokens=40) == [[1, 3], [4, 5], [0, 6, 2]]
    assert pack(lengths, 10, 2, tokens=1) == [[1], [3], [4], [5], [0], [6], [2]]
    assert pack([], 10, 2) == []


class Shortage:
    """Stands in for `decode` on a device whose memory holds so many tokens."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        self.most, self.error, self.rows = most, error, []

    def __call__(self, model, rows, rules, *others):
        if len(rows) * (max(map(len, rows)) + rules[0].max_new_tokens) > self.most:
            raise self.error(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
            )
        self.rows.append(len(rows))
        return decode(model, rows, rules, *others)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_what_is_tried(family, monkeypatch, caplog, error):
    engine = make_engine(family, ("one", "two"), max_new_tokens=NEW, engine={"batch_size": 8})
    prompts = ["あいうえお", "かきくけ", "こあい", "うえ", "お", "か", "き", "くけこ"]
    wanted, batches = answers_of(engine, prompts), engine.batches(prompts)
    assert engine.limits == {}
    shortage = Shortage(45, error)
    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", shortage)
    assert engine.answer(prompts) == wanted
    assert engine.limits == {"batch_tokens": 30}  # 8 x 15, halved twice
    assert shortage.rows == [2, 2, 2, 2]
    assert caplog.text.count("out of memory") == 2
    assert engine.batches(prompts) == batches, (
        "what shares a batch must not depend on memory: answers are kept by batch"
    )
    resumed, again = (
        make_engine(family, ("one", "two"), max_new_tokens=NEW, engine={"batch_size": 8}),
        Shortage(45),
    )
    resumed.limits.update(engine.limits)
    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", again)
    assert resumed.answer(prompts) == wanted
    assert again.rows == [2, 2, 2, 2]


def test_out_of_memory_with_one_prompt_is_one_line(family, monkeypatch):
    engine = make_engine(family, max_new_tokens=NEW)
    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", Shortage(5))
    with pytest.raises(
        EngineError, match="out of memory with a single prompt of 3 tokens"
    ) as caught:
        engine.answer(["あいう", "か"])
    assert "\n" not in str(caught.value)


def test_work_is_tried_again_only_while_memory_runs_out():
    sizes, size = [], [8]

    def work():
        sizes.append(size[0])
        if size[0] > 2:
            raise torch.OutOfMemoryError
        return size[0]

    def shrink():
        size[0] //= 2

    assert shrink_to_fit(work, shrink) == 2
    assert sizes == [8, 4, 2]
    with pytest.raises(ZeroDivisionError):
        shrink_to_fit(lambda: 1 // 0, shrink)


def test_rows_are_padded_on_either_side():
    ids, mask = pad_rows([[5, 6, 7], [8]], 0, True, torch.device("cpu"))
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])
    ids, mask = pad_rows([[5, 6, 7], [8]], None, False, torch.device("cpu"))
    assert (ids.tolist(), mask.tolist()) == ([[5, 6, 7], [8, 8, 8]], [[1, 1, 1], [1, 0, 0]])


def test_other_errors_are_not_taken_for_it(family, monkeypatch):
    def broken(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        make_engine(family, max_new_tokens=NEW).answer(["あ"])


def test_caches_that_are_not_ours_fall_back_to_generate(family, monkeypatch):
    """Forced here; recurrent models take this way. A penalty is left out: there `generate` counts
    padding in.
    """
    stop = {"stop": ("う",)}
    engine = make_engine(family, ("one", "two"), max_new_tokens=NEW, **stop)
    engine.apply(recipe(family, RECIPES["task_arithmetic"][0]))
    wanted = answers_of(engine, PROMPTS)
    monkeypatch.setattr(evomerge.answering.hf.engine, "decodable", lambda model: False)
    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", None)
    assert answers_of(engine, PROMPTS) == wanted


class TestByGenerate:
    """What the contract says of settings and deadlines where `generate` answers: the rows of one
    kind of settings at once.
    """

    exact_batches = False  # a penalty counts the padding in
    test_settings = Contract.test_each_prompt_has_its_own_settings
    test_room = Contract.test_room_in_the_context_is_each_prompts_own

    @pytest.fixture(autouse=True)
    def forced(self, monkeypatch):
        monkeypatch.setattr(evomerge.answering.hf.engine, "decodable", lambda model: False)
        monkeypatch.setattr(evomerge.answering.hf.engine, "decode", None)

    def make(self, family, siblings=("one", "two"), **settings):
        return make_engine(family, siblings, **settings)

    def test_deadline(self, family, monkeypatch):
        """The clock goes on by one whenever it is read."""
        engine, clock, seen = (
            make_engine(family, model="endless", max_new_tokens=40),
            iter(range(10**6)),
            [],
        )
        monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
        sections = [GenerationSection(max_new_tokens=n) for n in (2, 40, 2, 39)]
        answers = engine.answer(
            ["あ", "い", "う", "え"], sections, lambda *of: seen.append(of), 30.0
        )
        assert seen == [(0, answers[0]), (2, answers[2])]
        assert answers[0] == answers[2] == Answer("いい", True, 2)
        assert answers[1] == Answer("い" * answers[1].tokens, True, answers[1].tokens)
        assert 2 < answers[1].tokens < 30
        assert answers[3] == Answer("", True, 0)


def test_what_was_told_before_memory_ran_out_is_not_answered_again(family, monkeypatch):
    """Finished rows are reported at once; when the batch then fails, only the others run again."""
    engine = make_engine(family, model="endless", max_new_tokens=9, engine={"batch_size": 8})
    prompts = ["あ", "い", "う", "え"]
    sections = [GenerationSection(max_new_tokens=n) for n in (9, 2, 9, 3)]
    wanted, asked, seen = engine.answer(prompts, sections), [], []

    def failing(model, rows, rules, seeds, hooks):
        asked.append([r.max_new_tokens for r in rules])
        if len(asked) == 1:
            with pytest.raises(Full):
                decode(model, rows, rules, seeds, replace(hooks, should_stop=full_after(3)))
            raise torch.OutOfMemoryError
        return decode(model, rows, rules, seeds, hooks)

    class Full(Exception):
        pass

    def full_after(steps):
        left = [steps]

        def over():
            left[0] -= 1
            if not left[0]:
                raise Full
            return False

        return over

    monkeypatch.setattr(evomerge.answering.hf.engine, "decode", failing)
    assert engine.answer(prompts, sections, on_answer=lambda *of: seen.append(of)) == wanted
    assert [sorted(part) for part in asked] == [[2, 3, 9, 9], [9, 9]]
    assert sorted(seen) == list(enumerate(wanted))
    assert engine.limits == {"batch_tokens": 20}  # 4 x 10, halved


def test_what_is_under_way_is_watched(family):
    engine = make_engine(family, model="endless", max_new_tokens=5)
    seen = []
    engine.watch = lambda *at: seen.append(at)
    engine.answer(["あ", "い", "う"])
    assert seen == [(0, 3), (0, 6), (0, 9), (0, 12), (3, 15)]
