"""Files that are nearly right: never a traceback, always one line and a proper exit code.

Each example changes a good file in some places and runs the command that reads it. A few always
run; `make test-fuzz COUNT=2000 SEED=1` runs that many for each file, with other changes.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import warnings

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge.cli import main
from evomerge.knowledge.starter import starter
from evomerge.knowledge.write_base import write_knowledge

COUNT = int(os.environ.get("EVOMERGE_FUZZ", "0"))
SECONDS = 20  # of CPU time that a command may take
FUZZ = settings(
    max_examples=COUNT or 10,
    derandomize=not COUNT,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# what the texts of all formats may be changed to
WORDS = (
    "null true false yes 0 1 -1 2 1.5 1e300 1e-20 .nan .inf NaN Infinity 99999999999999999999 0x1f "
    "2026-13-45 2026-01-01 [] {} [[]] {a:1} [1,2] [null] '' ~ ~nouser ../x /dev/null a/b x+y *a &a "
    "<<: ? : - , [ ] { } ( ) # | > @ ` % ! !!python !!set !!binary ' \\ \\ud800 \\u0000 ${HOME} "
    "${ ${NONE} {input} あ 🙂 =1+1 union base auto float64 ties slerp layers weight value"
)
ODD = ("\n", "\t", " ", '"', '""', "\x00", "\x1b[2J", "\r\n", "\ufeff", "\u2028", "9" * 400)
PIECES = st.sampled_from([*WORDS.split(), *ODD, "[" * 200])
KEYS = ("search.seed", "genome.models", "study", "tasks", "judge", "a.b.c", "")
EDIT = st.tuples(
    st.sampled_from(["insert", "replace", "delete", "double", "swap", "cut", "token"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.one_of(PIECES, st.text(max_size=6), st.integers().map(str)),
)


def edited(content, edits):
    """The bytes of a file after edits of (kind, place, length, new text)."""
    for kind, place, length, new in edits:
        at = int(place * len(content))
        end = at + 1 + int(length * length * min(60, len(content)))
        piece = new.encode("utf-8", "surrogatepass")
        if kind == "token":  # a whole word or number, so that the format stays whole
            at, end = token_at(content, at)
            content = content[:at] + piece + content[end:]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "replace":
            content = content[:at] + piece + content[end:]
        elif kind == "delete":
            content = content[:at] + content[end:]
        elif kind == "double":
            content = content[:end] + content[at:]
        elif kind == "swap":
            content = content[:at] + content[end : 2 * end - at] + content[at:end]
        else:
            content = content[:at]
    return content


def token_at(content, at):
    """(start, end) of the word or number at a place."""
    inside = bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)) + b"._"
    start = at
    while start > 0 and content[start - 1] in inside:
        start -= 1
    end = at
    while end < len(content) and content[end] in inside:
        end += 1
    return start, end


# in an error line, of what Python calls not printable: spaces, and what joins letters and emoji
ALLOWED = "\t\u200c\u200d\xa0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class TooSlow(BaseException):
    pass


def run(argv):
    """(exit code, lines on stderr) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = main(argv)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return code, err.getvalue().splitlines(), out.getvalue()


def check(argv, out=None):
    code, lines, printed = run(argv)
    assert code in (0, 1, 2, 3), code
    assert not any("Traceback" in line for line in lines)
    if code and not printed:
        assert lines[-1].startswith("evomerge: ") or argv[:2] == ["knowledge", "check"]
        assert sum(line.startswith("evomerge: ") for line in lines) == 1 or argv[0] == "knowledge"
        assert all(c.isprintable() or c in ALLOWED for c in lines[-1])
        assert len(lines[-1]) < 2000
    if out is not None and out.is_dir():
        assert code == 0
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def room(pair, tmp_path_factory):
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_models(folder, pair)
    write_texts(folder)
    for name, sibling, more in (
        ("recipe", "instruct", {}),
        ("sharded", "shards", {}),
        ("adapted", "base+" + str(folder / "lora"), {}),
        ("united", "instruct", {"tokenizer_source": "union"}),
    ):
        write_recipe(folder, name, str(folder / sibling), more)
    return folder


def write_models(folder, pair):
    """Base and sibling, the sibling in two shards, and a LoRA of the base."""
    for name in ("base", "instruct"):
        shutil.copytree(pair / name, folder / name)
    shutil.copytree(pair / "instruct", folder / "shards")
    tensors = load_file(folder / "shards" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / "shards" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "lora").mkdir()
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config, indent=1))
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    save_file(lora, folder / "lora" / "adapter_model.safetensors", {"format": "pt"})


def write_texts(folder):
    """A study file, tasks, answers, knowledge bases and examples."""
    (folder / "study.yaml").write_text(
        "study: fuzz\n"
        "genome: {base_model: ./base, models: [./instruct], merge_method: ties, "
        "layer_granularity: 2, filters: [mlp]}\n"
        "tasks: [{file: tasks.jsonl}]\n"
        "split: {held_out: 0.5, validation: 0.2, seed: 1}\n"
        "prompt: {format: chat, too_long: truncate, system: '${HOME}', knowledge: knowledge.yaml}\n"
        "generation: {max_new_tokens: 12, temperature: 0.5, stop: [x]}\n"
        "judge: {kind: rules, metric: grade}\n"
        "search: {trials: 12, population: 4, uniform: [0.5], bounds: [0, 2], time_limit: 1h}\n"
        "engine: {batch_size: 8, threads: 1}\n"
    )
    rows = [{"task_id": i, "input": f"あ{i}", "output": "い", "eval_aspect": "-"} for i in range(6)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "tasks.jsonl").write_text(text, encoding="utf-8")
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    (folder / "tasks.csv").write_text(
        'task_id,input,output\n1,あ,い\n2,"a\nb",c\n', encoding="utf-8"
    )
    for name in ("knowledge.yaml", "knowledge.xlsx"):
        write_knowledge(starter(), folder / name, [])
    (folder / "examples.csv").write_text("class,input,output\na,b,c\nb,d,e\n")


def write_recipe(folder, name, sibling, more):
    """A recipe with slices, filters and a gradient; `more` are further keys."""
    weight = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    sources = [
        {"model": str(folder / "base"), "layer_range": [0, 4]},
        {"model": sibling, "layer_range": [0, 4], "parameters": {"weight": weight}},
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "dtype": "bfloat16",
        "parameters": {"normalize": False},
        "slices": [{"sources": sources}],
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


GRADE = ["judge", "grade", "--tasks", "tasks.jsonl", "--answers", "answers.jsonl", "--out", "G"]
TARGETS = {
    "study.yaml": ["check", "study.yaml"],
    "recipe.yaml": ["merge", "recipe.yaml", "OUT"],
    "tasks.jsonl": GRADE,
    "answers.jsonl": GRADE,
    "tasks.csv": ["knowledge", "from-tasks", "tasks.csv", "--out", "K.yaml"],
    "knowledge.yaml": ["knowledge", "check", "knowledge.yaml"],
    "knowledge.xlsx": ["knowledge", "check", "knowledge.xlsx"],
    "examples.csv": ["knowledge", "check", "examples.csv"],
    "instruct/config.json": ["merge", "recipe.yaml", "OUT"],
    "base/config.json": ["check", "study.yaml"],
    "shards/model.safetensors.index.json": ["merge", "sharded.yaml", "OUT"],
    "lora/adapter_config.json": ["merge", "adapted.yaml", "OUT"],
    "base/tokenizer_config.json": ["check", "study.yaml"],
    "instruct/tokenizer_config.json": ["merge", "united.yaml", "OUT"],
    "instruct/tokenizer.json": ["merge", "united.yaml", "OUT"],
    "base/generation_config.json": ["merge", "united.yaml", "OUT"],
    "instruct/model.safetensors": ["merge", "recipe.yaml", "OUT"],
}


@pytest.mark.parametrize("name", list(TARGETS))
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
@FUZZ
def test_a_file_that_is_nearly_right(room, name, edits):
    """Every other file is good."""
    path = room / name
    good = path.read_bytes()
    argv = list(TARGETS[name])
    for i, word in enumerate(argv):
        if (room / word).is_file() or word in ("OUT", "G", "K.yaml"):
            argv[i] = str(room / word)
    try:
        path.write_bytes(edited(good, edits))
        check(argv, room / "OUT")
    finally:
        path.write_bytes(good)
        for made in ("G", "K.yaml"):
            (room / made).unlink(missing_ok=True)


@given(
    key=st.one_of(PIECES, st.sampled_from(KEYS)),
    value=st.one_of(PIECES, st.text(max_size=20)),
)
@FUZZ
def test_a_setting_that_is_nearly_right(room, key, value):
    check(["check", str(room / "study.yaml"), f"--set={key}={value}"])


def test_the_files_are_good(room):
    for name, argv in TARGETS.items():
        whole = [str(room / word) if (room / word).is_file() else word for word in argv]
        whole = [str(room / word) if word in ("OUT", "G", "K.yaml") else word for word in whole]
        code, lines, printed = run(whole)
        assert code == 0, (name, lines, printed)
        shutil.rmtree(room / "OUT", ignore_errors=True)
        (room / "K.yaml").unlink(missing_ok=True)
