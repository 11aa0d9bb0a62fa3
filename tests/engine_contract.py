"""What every engine must do, as tests that take an engine factory.

A test file for one engine subclasses `Contract` in a class whose name begins with Test and says how
its engine is made:

    class TestTransformers(Contract): def make(self, family, siblings=("one", "two"), *,
        model="base", dtype="float32", seed=0, too_long="refuse", **generation):
            return TransformersEngine(…)

`generation` are keys of GenerationSection; `model` is the folder in `family` that stands for the
base, and without siblings it answers as it lies on disk. `exact_batches` and `exact_reload` say
what an engine promises; all else holds for every one.
"""

import gc
import time

import pytest
from conftest import make_model, make_tokenizer, save
from merging_tools import make_family
from tokenizers import decoders

from evomerge.answering.engine import Answer, Engine
from evomerge.errors import EngineError
from evomerge.merging.build import build_model
from evomerge.recipe import Recipe
from evomerge.study import GenerationSection

NEW = 10
PROMPTS = [
    "あ\n",
    "いうえおか\n",
    "",
    "12345:\n",
    "くけこ\n",
    "😀あ\n",
    "あいうえお" * 5,
    "\ud83d",
    "半分\udc00\n",
    "0\x00\x7f\n",
    "12345:6\n",
]
CONTEXT = 64
TIES = {"merge_method": "ties", "parameters": {"normalize": True}}


def recipe(family, weights, **top):
    """Every sibling with its weight (a number, or one for each end) and a density of 0.6."""
    models = [
        {"model": str(family / n), "parameters": {"weight": w, "density": 0.6}}
        for n, w in weights.items()
    ]
    data = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "dtype": "float32",
        "models": models,
    }
    return Recipe.from_dict(data | top)


RECIPES = {
    "task_arithmetic": ({"one": 0.7, "two": 0.4}, {}),
    "gradient": ({"one": [0.0, 1.3], "two": [1.0, -0.2]}, {}),
    "ties": ({"one": 1.1, "two": 0.6}, TIES),
    "base": ({"one": 0.0, "two": 0.0}, {}),
}


SETTINGS = [
    {"max_new_tokens": 3},
    {"max_new_tokens": NEW, "repetition_penalty": 1.6},
    {"max_new_tokens": 7, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 5},
    {"max_new_tokens": NEW, "stop": ("い", "お", "9")},
]


def answers_of(engine, prompts, settings=None):
    """All answers, in order, batch by batch as the engine wants them."""
    answers = {}
    for batch in engine.batches(prompts, settings):
        own = None if settings is None else [settings[i] for i in batch]
        answers |= dict(zip(batch, engine.answer([prompts[i] for i in batch], own), strict=True))
    assert sorted(answers) == list(range(len(prompts)))
    return [answers[i] for i in range(len(prompts))]


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    return contract_family(tmp_path_factory.mktemp("contract"))


def contract_family(folder, **shape):
    """base, one, two, in float32 with clear favourites among the tokens; mute ends every answer at
    once, endless none.
    """
    make_family(folder, initializer_range=0.4, max_position_embeddings=CONTEXT, **shape)
    for name, token in (("mute", 2), ("endless", 5)):
        model = make_model(3, initializer_range=0.02, max_position_embeddings=CONTEXT, **shape)
        model.model.embed_tokens.weight.data[:] = 1.0  # whatever is read, one direction comes out
        model.lm_head.weight.data[:] = 0.0
        model.lm_head.weight.data[token] = 1.0
        model.lm_head.weight.data[6] = 0.9  # う
        model.model.norm.weight.data[:] = 1.0
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.data[:] = 0.0
            layer.self_attn.o_proj.weight.data[:] = 0.0
        save(model, folder / name)
    tokenizer = make_tokenizer()
    # texts without spaces between the characters
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    for name in ("base", "one", "two", "mute", "endless"):
        tokenizer.save_pretrained(folder / name)
    return folder


class Contract:
    """The contract; `make` is the subclass's."""

    exact_batches = True  # in float32 a batch gives the answers of single prompts
    exact_reload = True  # weights in place give token for token what a fresh load gives

    def make(
        self,
        family,
        siblings=("one", "two"),
        *,
        model="base",
        dtype="float32",
        seed=0,
        too_long="refuse",
        **generation,
    ) -> Engine:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def live(self, family, request):
        """One engine for many tests: what one recipe leaves behind must not show in the next."""
        yield request.cls().make(family, max_new_tokens=NEW)
        gc.collect()

    @pytest.mark.parametrize("name", RECIPES)
    def test_weights_in_place_give_the_answers_of_a_fresh_load(self, live, family, tmp_path, name):
        weights, top = RECIPES[name]
        live.apply(recipe(family, {"one": 1.9, "two": 0.1}))
        before = answers_of(live, PROMPTS)
        live.apply(recipe(family, weights, **top))
        ours = answers_of(live, PROMPTS)
        build_model(recipe(family, weights, **top), tmp_path / "merged")
        fresh = self.make(tmp_path, (), model="merged", max_new_tokens=NEW)
        theirs = answers_of(fresh, PROMPTS)
        assert ours != before, "two recipes with the same answers show nothing"
        if self.exact_reload:
            assert ours == theirs
        else:
            assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.9 * len(PROMPTS)

    def test_the_same_candidate_twice_gives_the_same_answers(self, live, family):
        weights, top = RECIPES["task_arithmetic"]
        first, second = [], []
        for answers in (first, second):
            live.apply(recipe(family, weights, **top))
            answers += answers_of(live, PROMPTS)
            live.apply(recipe(family, *RECIPES["ties"][:1], **TIES))
            answers_of(live, PROMPTS)
        assert first == second

    def test_a_batch_gives_the_answers_of_single_prompts(self, live, family):
        if not self.exact_batches:
            pytest.skip(
                "this engine promises no equal answers: its documentation says how many are"
            )
        live.apply(recipe(family, RECIPES["task_arithmetic"][0]))
        assert answers_of(live, PROMPTS) == [
            answer for prompt in PROMPTS for answer in live.answer([prompt])
        ]

    def test_batches_are_a_function_of_the_prompts(self, live):
        batches = live.batches(PROMPTS)
        assert sorted(i for batch in batches for i in batch) == list(range(len(PROMPTS)))
        live.answer(PROMPTS[:1])
        assert live.batches(PROMPTS) == batches
        assert live.batches([]) == []

    def test_every_text_is_answered(self, live, family):
        live.apply(recipe(family, RECIPES["task_arithmetic"][0]))
        answers = answers_of(live, PROMPTS)
        assert all(isinstance(answer, Answer) and 0 <= answer.tokens <= NEW for answer in answers)
        assert all(answer.text.encode() or not answer.text for answer in answers), (
            "half a character is in an answer"
        )

    def test_cut_off_answers_are_marked_and_ended_ones_are_not(self, family):
        endless = self.make(family, (), model="endless", max_new_tokens=5)
        assert endless.answer(["あ\n", "いう\n"]) == [Answer("い" * 5, True, 5)] * 2
        del endless
        gc.collect()
        mute = self.make(family, (), model="mute", max_new_tokens=5)
        assert mute.answer(["あ\n", "いう\n"]) == [Answer("", False, 0)] * 2

    def test_stop_strings_end_an_answer_and_are_no_part_of_it(self, family):
        engine = self.make(family, (), model="endless", max_new_tokens=9, stop=("い" * 3, "う"))
        (answer,) = engine.answer(["あ\n"])
        assert (answer.text, answer.truncated) == ("", False)
        assert answer.tokens < 9, "the engine went on after the stop string"
        del engine
        gc.collect()
        whole = self.make(family, max_new_tokens=NEW)
        texts = [answer.text for answer in answers_of(whole, PROMPTS)]
        character = max(set("".join(texts)), key=lambda c: sum(c in text[1:] for text in texts))
        del whole
        gc.collect()
        stopping = self.make(family, max_new_tokens=NEW, stop=(character,))
        assert [answer.text for answer in answers_of(stopping, PROMPTS)] == [
            text.split(character)[0] for text in texts
        ]

    def test_a_prompt_beyond_the_context_is_refused_in_one_line(self, family):
        engine = self.make(family, max_new_tokens=NEW)
        with pytest.raises(EngineError, match=f"context of {CONTEXT}") as caught:
            answers_of(engine, ["あ\n", "い" * (CONTEXT - NEW + 1)])
        assert "\n" not in str(caught.value)
        assert answers_of(engine, ["い" * (CONTEXT - NEW)])

    def test_or_cut_from_the_left_with_a_warning(self, family, caplog):
        engine = self.make(family, max_new_tokens=NEW, too_long="truncate")
        text = "あいうえおかきくけこ" * 9
        (cut,) = answers_of(engine, [text])
        assert any("cut" in record.message for record in caplog.records)
        assert cut == answers_of(engine, [text[-(CONTEXT - NEW) :]])[0]

    def test_draws_come_from_the_seed_of_the_study(self, family):
        settings = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
        engine = self.make(family, **settings)
        first = answers_of(engine, PROMPTS)
        assert answers_of(engine, PROMPTS) == first
        if self.exact_batches:
            assert engine.answer(PROMPTS[1:2]) == first[1:2], "an answer depends on its neighbours"
        del engine
        gc.collect()
        assert answers_of(self.make(family, seed=1, **settings), PROMPTS) != first
        gc.collect()
        assert answers_of(self.make(family, **settings), PROMPTS) == first

    def test_repetitions_are_penalised(self, family):
        engine = self.make(family, (), model="endless", max_new_tokens=4, repetition_penalty=1.0)
        assert engine.answer(["あ\n"])[0].text == "いいいい"
        del engine
        gc.collect()
        penalised = self.make(family, (), model="endless", max_new_tokens=4, repetition_penalty=2.0)
        assert [answer.text for answer in penalised.answer(["あ\n", "う\n", "い\n"])] == [
            "いういい",
            "いいいい",
            "ういいい",
        ]

    def test_what_memory_allows_is_told(self, live):
        assert isinstance(live.limits, dict)
        assert live.tokenizer.pad_token_id == make_tokenizer().pad_token_id

    def test_each_prompt_has_its_own_settings(self, family):
        """Against engines that have them for all."""
        several = [SETTINGS[i % len(SETTINGS)] for i in range(len(PROMPTS))]
        engine = self.make(family, (), model="one", max_new_tokens=NEW)
        sections = [GenerationSection(**settings) for settings in several]
        ours = answers_of(engine, PROMPTS, sections)
        assert engine.batches(PROMPTS, sections) == engine.batches(PROMPTS, sections)
        assert answers_of(
            engine, PROMPTS, [GenerationSection(max_new_tokens=NEW)] * len(PROMPTS)
        ) == answers_of(engine, PROMPTS)
        del engine
        for settings in SETTINGS:
            gc.collect()
            alone = self.make(
                family,
                (),
                model="one",
                **{key: value for key, value in settings.items() if key != "seed"},
                seed=5,
            )
            mine = [i for i, other in enumerate(several) if other is settings]
            theirs = answers_of(alone, PROMPTS)
            assert not self.exact_batches or [ours[i] for i in mine] == [theirs[i] for i in mine], (
                settings
            )
            del alone

    def test_room_in_the_context_is_each_prompts_own(self, family):
        engine = self.make(family, (), model="one", max_new_tokens=NEW)
        assert engine.context == CONTEXT
        short, long = "あ\n", "い" * (CONTEXT - 3)
        sections = [
            GenerationSection(max_new_tokens=CONTEXT - 2),
            GenerationSection(max_new_tokens=3),
        ]
        answers = answers_of(engine, [short, long], sections)
        assert (answers[0].tokens <= CONTEXT - 2, answers[1].tokens <= 3) == (True, True)
        with pytest.raises(EngineError, match=f"max_new_tokens 4 exceed the context of {CONTEXT}"):
            answers_of(engine, [short, long], [sections[0], GenerationSection(max_new_tokens=4)])

    def test_an_answer_is_given_as_soon_as_it_has_ended(self, family):
        engine = self.make(family, (), model="endless", max_new_tokens=NEW)
        sections = [GenerationSection(max_new_tokens=n) for n in (6, 2, 4, 1)]
        prompts, seen = ["あ\n", "いう\n", "え\n", "お\n"], []
        answers = engine.answer(
            prompts, sections, on_answer=lambda place, answer: seen.append((place, answer))
        )
        assert answers == [Answer("い" * n, True, n) for n in (6, 2, 4, 1)]
        assert seen == [(place, answers[place]) for place in (3, 1, 2, 0)]

        class Enough(Exception):
            pass

        def first(place, answer):
            raise Enough

        with pytest.raises(Enough):
            engine.answer(prompts, sections, on_answer=first)
        assert engine.answer(prompts, sections) == answers, "what was under way is still there"

    def test_at_the_deadline_answers_end_with_what_they_have(self, family, monkeypatch):
        """The clock jumps when six tokens are there."""
        engine = self.make(family, (), model="endless", max_new_tokens=40)
        real, ahead, seen = time.monotonic, [0.0], []
        monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

        def watch(ended, tokens):
            ahead[0] = 1e5 if tokens >= 6 else 0.0

        prompts, sections = (
            ["あ\n", "いう\n", "え\n"],
            [GenerationSection(max_new_tokens=n) for n in (40, 1, 40)],
        )
        engine.watch = watch
        answers = engine.answer(
            prompts, sections, lambda place, answer: seen.append(place), time.monotonic() + 1e4
        )
        engine.watch = None
        assert seen == [1]
        assert answers[1] == Answer("い", True, 1)
        for answer in (answers[0], answers[2]):
            assert answer == Answer("い" * answer.tokens, True, answer.tokens)
            assert 2 <= answer.tokens <= 4
        assert engine.answer(prompts, sections) == [
            Answer("い" * n, True, n) for n in (40, 1, 40)
        ], "something is left under way"

    def test_after_the_deadline_nothing_is_begun(self, live):
        seen = []
        assert live.answer(
            PROMPTS, on_answer=lambda *of: seen.append(of), deadline=time.monotonic()
        ) == [Answer("", True, 0)] * len(PROMPTS)
        assert not seen
        assert live.answer(PROMPTS[:2], deadline=time.monotonic() + 1e4) == live.answer(PROMPTS[:2])
