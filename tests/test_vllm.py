"""The vLLM engine against a fresh load of the merged folder. It needs an environment of its own:
`make test-vllm`.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, make_model, save
from engine_contract import Contract, contract_family

from evomerge.answering.engine import Answer, EngineSpec
from evomerge.answering.make_engine import make_engine
from evomerge.errors import EngineError, RecipeError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import Recipe, task_arithmetic_recipe
from evomerge.study import EngineSection, GenerationSection, VllmSection

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not INSTALLED, reason="vLLM is not installed here: run `make test-vllm`"
)
# heads of 32: the narrowest that a CPU's kernels take
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
SHAPE = WIDE | {"max_position_embeddings": 512}
LONG = CHARACTERS[:14] * 20  # 280 tokens: more than two blocks of the prefix cache
PROMPTS = ["あ\n", "いうえおか\n", "", "12345:\n", "くけこ\n", "😀あ\n", LONG, LONG + "1"]
# an LLM that is let go takes along what all LLMs of the process talk through
ALIVE: list[object] = []
SECTION = EngineSection(kind="vllm", vllm=VllmSection(enforce_eager=True))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """base/, one/ and two/; heads are wide enough for vLLM's kernels on a CPU."""
    folder = tmp_path_factory.mktemp("family")
    base = make_model(0, **SHAPE)
    save(base, folder / "base")
    for seed, name in ((1, "one"), (2, "two")):
        other = make_model(0, **SHAPE)
        with torch.no_grad():
            for p, q in zip(
                other.parameters(), make_model(seed, **SHAPE).parameters(), strict=True
            ):
                p.add_(0.5 * q)
        save(other, folder / name)
    return folder


def engine_of(
    family,
    siblings=("one", "two"),
    dtype="float32",
    section=SECTION,
    base="base",
    too_long="refuse",
    **generation,
):
    folders = open_model(str(family / base)), [open_model(str(family / name)) for name in siblings]
    settings = GenerationSection(**({"max_new_tokens": 12} | generation))
    engine = make_engine(EngineSpec(*folders, section, settings, dtype, 7, too_long))
    ALIVE.append(engine)
    return engine


@pytest.fixture(scope="module")
def engine(family):
    return engine_of(family)


def recipe_of(family, one, two, dtype="float32"):
    """Weights per layer of the siblings."""
    siblings = [str(family / "one"), str(family / "two")]
    return task_arithmetic_recipe(
        str(family / "base"),
        siblings,
        [(i, i + 1) for i in range(4)],
        [*zip(one, two, strict=True)],
        dtype=dtype,
    )


def dare(family, density):
    models = [
        {"model": str(family / name), "parameters": {"weight": 0.8, "density": density}}
        for name in ("one", "two")
    ]
    return Recipe.from_dict(
        {
            "merge_method": "dare_ties",
            "base_model": str(family / "base"),
            "dtype": "float32",
            "models": models,
        }
    )


def linear(family, one, two):
    """Weights per layer; a layer whose weights sum to 0 cannot be merged."""
    slices = [
        {
            "sources": [
                {
                    "model": str(family / n),
                    "layer_range": [i, i + 1],
                    "parameters": {"weight": w[i]},
                }
                for n, w in (("one", one), ("two", two))
            ]
        }
        for i in range(4)
    ]
    return Recipe.from_dict({"merge_method": "linear", "dtype": "float32", "slices": slices})


def fresh(folder, prompts, dtype="float32", new=12):
    """(tokens without the end token, whether it ended) of vLLM on the folder, as its documentation
    loads it.
    """
    from vllm import LLM, SamplingParams

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(str(folder), dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=1 << 28)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = [
        {"prompt_token_ids": tokenizer(p, add_special_tokens=False)["input_ids"] or [1]}
        for p in prompts
    ]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
    found = [
        (tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == 2, len(ids) - (ids[-1] == 2))
        for o in outputs
        for ids in [list(o.outputs[0].token_ids)]
    ]
    ALIVE.append(llm)
    return found


def plain(answers):
    return [(a.text, not a.truncated, a.tokens) for a in answers]


@needs_vllm
def test_each_recipe_answers_like_a_fresh_load_of_its_folder(family, engine, tmp_path):
    recipes = [
        recipe_of(family, [1.3] * 4, [0.2] * 4),
        recipe_of(family, [1.3, 1.3, 0.4, 1.3], [0.2] * 4),  # one layer changes
        dare(family, 0.6),
        recipe_of(family, [0.0] * 4, [0.0] * 4),  # the base
        recipe_of(family, [1.3] * 4, [0.2] * 4),  # the first again
    ]
    answers = []
    for recipe in recipes:
        engine.apply(recipe)
        answers.append(plain(engine.answer(PROMPTS)))
        assert plain(engine.answer(PROMPTS)) == answers[-1]
    assert answers[0] == answers[4]
    assert len({str(a) for a in answers}) == 4
    for i, recipe in enumerate(recipes[:4]):
        build_model(recipe, tmp_path / str(i), random_seed=7)
        assert answers[i] == fresh(tmp_path / str(i), PROMPTS), i


@needs_vllm
def test_bfloat16_too(family, tmp_path):
    engine = engine_of(family, dtype="bfloat16")
    recipe = recipe_of(family, [0.7, 0.1, 1.5, 1.0], [0.3] * 4, "bfloat16")
    engine.apply(recipe_of(family, [1.0] * 4, [1.0] * 4, "bfloat16"))
    engine.apply(recipe)
    build_model(recipe, tmp_path / "built")
    assert plain(engine.answer(PROMPTS)) == fresh(tmp_path / "built", PROMPTS, "bfloat16")


@needs_vllm
def test_the_transformers_engine_gives_the_same_answers(family, engine):
    recipe = recipe_of(family, [0.5, 1.0, 0.2, 0.9], [0.3] * 4)
    other = engine_of(family, section=EngineSection(batch_size=1))
    for each in (engine, other):
        each.apply(recipe)
    assert engine.answer(PROMPTS) == [other.answer([prompt])[0] for prompt in PROMPTS]


@needs_vllm
def test_answers_depend_on_no_earlier_batch(family, engine):
    engine.apply(recipe_of(family, [0.5] * 4, [0.3] * 4))
    alone = engine.answer([LONG + "1"])
    engine.answer([LONG, LONG + "2"])
    assert engine.answer([LONG + "1"]) == alone


@needs_vllm
def test_a_sampled_answer_is_the_prompts_own(family):
    engine = engine_of(family, do_sample=True, temperature=1.5, top_p=0.9, repetition_penalty=1.1)
    engine.apply(recipe_of(family, [0.5] * 4, [0.3] * 4))
    prompts = PROMPTS[:4]
    first = engine.answer(prompts)
    torch.manual_seed(99)
    assert engine.answer(prompts) == first
    assert engine.answer(prompts[::-1])[::-1] == first
    assert len({a.text for a in engine.answer([f"{i}:\n" for i in range(8)])}) > 4


def generated(engine, prompts, sections):
    """(text, ended) by vLLM's own `LLM.generate`, with settings written out anew; the engine's seed
    is 7.
    """
    from vllm import SamplingParams

    digests = [
        hashlib.sha256(f"{7 if g.seed is None else g.seed}\0{p}".encode()).digest()
        for p, g in zip(prompts, sections, strict=True)
    ]
    settings = [
        SamplingParams(
            max_tokens=g.max_new_tokens,
            temperature=g.temperature if g.do_sample else 0.0,
            top_p=g.top_p if g.do_sample else 1.0,
            repetition_penalty=g.repetition_penalty,
            seed=int.from_bytes(digest[:4], "big"),
            stop=list(g.stop),
        )
        for g, digest in zip(sections, digests, strict=True)
    ]
    rows = [engine.tokenizer(p, add_special_tokens=False)["input_ids"] or [1] for p in prompts]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False
    )
    decode = engine.tokenizer.decode
    cut = [
        re.split(
            "|".join(g.stop) or "(?!)", decode(o.outputs[0].token_ids, skip_special_tokens=True)
        )
        for o, g in zip(outputs, sections, strict=True)
    ]
    return [
        (text[0], o.outputs[0].finish_reason == "stop")
        for text, o in zip(cut, outputs, strict=True)
    ]


@needs_vllm
def test_the_answers_are_those_of_vllms_own_generate(family, engine):
    """Greedy and drawn, more prompts than run at once, settings mixed; given out one by one all the
    same.
    """
    engine.apply(recipe_of(family, [0.5] * 4, [0.3] * 4))
    kinds = [
        GenerationSection(max_new_tokens=20),
        GenerationSection(max_new_tokens=5, repetition_penalty=1.3),
        GenerationSection(max_new_tokens=20, do_sample=True, temperature=1.3, top_p=0.9),
        GenerationSection(max_new_tokens=20, do_sample=True, temperature=0.8, seed=11),
        GenerationSection(max_new_tokens=20, stop=("う", "く")),
    ]
    prompts = [*PROMPTS, *(f"{i}:あ\n" for i in range(300))]
    sections = [kinds[i % len(kinds)] for i in range(len(prompts))]
    seen, watched = [], []
    engine.watch = lambda *at: watched.append(at)
    answers = engine.answer(prompts, sections, on_answer=lambda *of: seen.append(of))
    engine.watch = None
    assert [(a.text, not a.truncated) for a in answers] == generated(engine, prompts, sections)
    assert sorted(seen) == list(enumerate(answers))
    assert [place for place, _ in seen] != list(range(len(prompts))), (
        "the order in which they end is another"
    )
    assert watched == sorted(watched)
    assert 0 < watched[0][1] <= len(prompts)
    assert watched[-1][1] >= sum(a.tokens for a in answers)  # end tokens count here
    assert len({a.text for a in answers}) > 20


@needs_vllm
def test_a_deadline_in_the_middle_leaves_vllm_as_it_was(family, engine, monkeypatch):
    """Some answers have ended, some are under way, some wait: more prompts than run at once."""
    engine.apply(recipe_of(family, [0.5] * 4, [0.3] * 4))
    prompts = [f"{i}:あ\n" for i in range(400)]
    sections = [GenerationSection(max_new_tokens=2 if i < 9 else 60) for i in range(400)]
    whole = engine.answer(prompts, sections)
    real, ahead, seen = time.monotonic, [0.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def watch(ended, tokens):
        ahead[0] = 1e6 if tokens > 1000 else 0.0

    engine.watch = watch
    answers = engine.answer(prompts, sections, seen.__setitem__, time.monotonic() + 1e5)
    engine.watch, ahead[0] = None, 0.0
    assert 9 <= len(seen) < 256
    assert all(answers[i] == answer == whole[i] for i, answer in seen.items())
    under_way = [i for i in range(400) if i not in seen and answers[i].tokens]
    assert len(under_way) > 100
    assert all(
        answers[i].truncated and 1 <= answers[i].tokens < whole[i].tokens + 1 for i in under_way
    )
    assert all(whole[i].text.startswith(answers[i].text.rstrip("\ufffd")) for i in under_way)
    assert sum(i not in seen and answers[i] == Answer("", True, 0) for i in range(400)) > 50
    assert engine.answer(prompts, sections) == whole


@needs_vllm
def test_stop_strings_end_an_answer_and_are_no_part_of_it(family, engine):
    recipe = recipe_of(family, [0.5] * 4, [0.3] * 4)
    engine.apply(recipe)
    whole = engine.answer(PROMPTS)
    stop = next(a.text[4:5] for a in whole if len(a.text) > 8)
    stopping = engine_of(family, stop=(stop, "no such text"))
    stopping.apply(recipe)
    for before, after in zip(whole, stopping.answer(PROMPTS), strict=True):
        at = before.text.find(stop)
        assert after.text == (before.text[:at] if at >= 0 else before.text)
        assert after.truncated == (before.truncated and at < 0)
        assert after.tokens <= before.tokens


@needs_vllm
def test_batches_hold_every_prompt_once_and_the_watch_sees_them_end(family, engine):
    assert [len(batch) for batch in engine.batches(["あ"] * 600)] == [256, 256, 88]
    assert sorted(i for batch in engine.batches(["あ"] * 600) for i in batch) == list(range(600))
    seen = []
    engine.watch = lambda ended, tokens: seen.append(ended)
    engine.answer(PROMPTS)
    engine.watch = None
    assert seen == sorted(seen)
    assert seen[-1] == len(PROMPTS)


@needs_vllm
def test_a_prompt_beyond_the_context_is_refused_or_cut_from_the_left(family, engine, caplog):
    long = "い" * 400 + LONG
    with pytest.raises(EngineError, match="context of 512"):
        engine.answer(["あ", long])
    assert len(engine.answer(["あ"])) == 1  # nothing of the refused batch is left in vLLM
    cutting = engine_of(family, too_long="truncate")
    recipe = recipe_of(family, [0.5] * 4, [0.3] * 4)
    for each in (engine, cutting):
        each.apply(recipe)
    assert cutting.answer([long]) == engine.answer([long[-500:]])
    assert "cut on the left" in caplog.text


@needs_vllm
def test_what_cannot_be_merged_leaves_the_engine_as_it_was(family, engine):
    good = recipe_of(family, [0.5] * 4, [0.3] * 4)
    engine.apply(good)
    before = engine.answer(PROMPTS)
    with pytest.raises(RecipeError, match="sum to 0"):
        # fails in the last layer
        engine.apply(linear(family, [0.9, 0.4, 0.9, 0.9], [0.3, 0.8, 0.3, -0.9]))
    assert engine.answer(PROMPTS) == before
    engine.apply(good)
    assert engine.answer(PROMPTS) == before


def environment(**more):
    """For processes of their own, which find what this one finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | more


TWO_WORKERS = """
import json, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_vllm import PROMPTS, engine_of, plain, recipe_of
from evomerge.study import EngineSection, VllmSection

if __name__ == "__main__":
    family = Path(sys.argv[1])
    vllm = VllmSection(enforce_eager=True, tensor_parallel_size=2)
    engine = engine_of(family, section=EngineSection(kind="vllm", vllm=vllm))
    found = []
    for weights in ([1.3] * 4, [0.5] * 4):
        engine.apply(recipe_of(family, weights, [0.3] * 4))
        found.append(plain(engine.answer(PROMPTS)))
    print(json.dumps(found))
"""


@needs_vllm
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_two_workers_take_the_weights_from_shared_memory(family, engine, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_WORKERS, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, script, family, os.path.dirname(__file__)],
        env=environment(VLLM_CPU_OMP_THREADS_BIND="nobind"),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    wanted = []
    for weights in ([1.3] * 4, [0.5] * 4):
        engine.apply(recipe_of(family, weights, [0.3] * 4))
        wanted.append([list(answer) for answer in plain(engine.answer(PROMPTS))])
    assert json.loads(found.stdout.splitlines()[-1]) == wanted
    assert found.stdout.count("\n") == 1  # stdout is for data


@needs_vllm
class TestVllm(Contract):
    """What every engine must do."""

    @pytest.fixture(scope="class")
    def family(self, tmp_path_factory):
        return contract_family(tmp_path_factory.mktemp("contract"), **WIDE)

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
    ):
        folders = (
            open_model(str(family / model)),
            [open_model(str(family / name)) for name in siblings],
        )
        settings = GenerationSection(**generation)
        engine = make_engine(EngineSpec(*folders, SECTION, settings, dtype, seed, too_long))
        ALIVE.append(engine)
        return engine


# last: a load that fails takes along what the other engines of this process talk through
@needs_vllm
def test_what_vllm_cannot_do_is_one_line(tmp_path):
    save(make_model(0), tmp_path / "narrow")  # heads of 8, for which the CPU has no kernel
    save(make_model(0, **SHAPE), tmp_path / "fine")
    for name, section in (
        ("narrow", SECTION),
        ("fine", EngineSection(kind="vllm", vllm=VllmSection(max_model_len=1 << 20))),
    ):
        with pytest.raises(EngineError, match="vLLM cannot load the model") as caught:
            engine_of(tmp_path, (), section=section, base=name)
        assert len(str(caught.value).splitlines()) == 1


DEMO = """
import sys
from pathlib import Path
from transformers import LlamaForCausalLM
from evomerge.demo import pair

narrow = pair.make_model

def wide(seed):
    config = narrow(seed).config
    config.num_attention_heads = config.num_key_value_heads = 3  # heads of 32 numbers
    config.head_dim = 32
    return LlamaForCausalLM(config)

pair.make_model = wide
pair.build_demo(Path(sys.argv[1]))
"""


@needs_vllm
def test_the_demo_study_runs_to_a_verdict(tmp_path):
    """The demo's model with three heads instead of four: vLLM has no kernel for heads of 24 numbers
    on a CPU.
    """
    subprocess.run([sys.executable, "-c", DEMO, tmp_path / "demo"], check=True, env=environment())
    (tmp_path / "spaces").mkdir()
    shutil.copy(Path(__file__).parents[1] / "search_spaces" / "demo.yaml", tmp_path / "spaces")
    sets = [
        "engine.kind=vllm",
        "engine.vllm={enforce_eager: true}",
        "search.trials=24",
        "search.uniform=[0.5]",
    ]
    command = [
        sys.executable,
        "-m",
        "evomerge",
        "search",
        "spaces/demo.yaml",
        *(part for s in sets for part in ("--set", s)),
    ]
    for _ in range(2):  # the second time there is nothing left to do
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment()
        )
        assert found.returncode == 0, found.stderr[-2000:]
    verdict = json.loads(
        (tmp_path / "results" / "demo" / "verdict.json").read_text(encoding="utf-8")
    )
    assert verdict["n"] == 120
    assert verdict["candidates"].keys() >= {"winner", "base", "instruct", "uniform"}


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed here")
def test_an_absent_vllm_names_the_extra(pair):
    base, section = open_model(str(pair / "base")), EngineSection(kind="vllm")
    spec = EngineSpec(base, [], section, GenerationSection(), "float32")
    with pytest.raises(EngineError, match=r"pip install 'evomerge\[vllm\]'"):
        make_engine(spec)


@pytest.mark.parametrize(
    "keys",
    [
        {"device": "cpu"},
        {"device_map": "auto"},
        {"quantization": "4bit"},
        {"batch_tokens": 9},
        {"population": True},
    ],
)
def test_what_only_transformers_honours_is_refused(pair, keys):
    section = EngineSection(kind="vllm", **keys)
    base = open_model(str(pair / "base"))
    spec = EngineSpec(base, [], section, GenerationSection(), "float32")
    with pytest.raises(
        EngineError, match=f"engine.{next(iter(keys))}: the vLLM engine does not support this key"
    ):
        make_engine(spec)
