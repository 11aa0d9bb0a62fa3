"""The runner to take along: its merge, classes, prompts and answers are evomerge's, and it needs no evomerge."""

import ast
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from merging_tools import SLICES, make_family, random_recipe, same_bits
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evomerge.answering.hf import TransformersEngine
from evomerge.answering.prompts import make_prompter
from evomerge.errors import InputError, KnowledgeError
from evomerge.inference import run_inference
from evomerge.knowledge.parts import Document, Example, Knowledge, KnowledgeClass
from evomerge.knowledge.retrieve import Chooser
from evomerge.knowledge.starter import starter
from evomerge.merging.folder import open_model
from evomerge.recipe import Recipe
from evomerge.runner import mergeable, write_runner
from evomerge.search.session import Finished
from evomerge.study import EngineSection, GenerationSection, GenomeSection, PromptSection, SearchSection, Study, TaskSource
from evomerge.tasks import load_tasks

ROOT = Path(__file__).resolve().parents[1]
ANSWER = ROOT / "evomerge" / "templates" / "runner" / "answer.py"
ALLOWED = {"torch", "transformers", "sklearn", "yaml", "numpy", "safetensors", "huggingface_hub", *sys.stdlib_module_names}
TEXT = "".join(map(chr, range(32, 127))) + "\nあいうえおかきくけこさしすせそ指示回答猫犬鳥魚色数。、"
VERDICT = {"n": 3, "metric": "correct", "candidates": {"winner": {"mean": 0.5, "stderr": 0.1, "truncated": 0.0}}, "paired": {}}
FORBID = """
import runpy, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "evomerge":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Forbid())
try:
    import evomerge
    raise SystemExit("evomerge can be imported")
except ModuleNotFoundError:
    pass
runpy.run_path(sys.argv[0] if sys.argv[0] != "-c" else sys.argv.pop(1), run_name="__main__")
"""


def save_tokenizer(folder):
    """One token a character; chat turns are marked by tokens."""
    special = ["<pad>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*special, "<unk>", *TEXT])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return len(vocab)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """base/, one/ and two/, the last in shards, in fp32 with big steps between tokens, so that no answer hangs on the last bit."""
    folder = tmp_path_factory.mktemp("family")
    size = save_tokenizer(folder / "base")
    config = {"vocab_size": size, "max_position_embeddings": 400, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    make_family(folder, dtypes=(torch.float32,) * 3, **config)
    for name in ("base", "one", "two"):
        save_tokenizer(folder / name)
    two = AutoModelForCausalLM.from_pretrained(folder / "two", dtype=torch.float32)
    (folder / "two" / "model.safetensors").unlink()
    two.save_pretrained(folder / "two", max_shard_size="100KB")
    assert len(list((folder / "two").glob("*.safetensors"))) > 1
    return folder


def task_file(folder, count=20):
    rows = [
        {"task_id": f"t{i}", "input": "猫犬鳥魚"[i % 4] + "の" * (i % 3) + TEXT[95 + i % 15 :][: 3 + i % 5] + "。"} for i in range(count)
    ]
    rows[-1]["input"] += " {input} {examples} }}{{ {% raw %} <|assistant|>x</s>"
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def a_base():
    """Three classes: turns, {examples} with {documents}, and a sampled-free one with other settings; one injects."""
    classes = (
        KnowledgeClass("動物", "あなたは犬。<|system|>", "問: {input}", repetition_penalty=1.3, max_new_tokens=9),
        KnowledgeClass("色", "", "{examples}\n{documents}\n指示: {input}", shots=2, quotes=1, temperature=0.0),
        KnowledgeClass("数", " ", "{input}", shots=0),
    )
    words = {"動物": "猫犬鳥", "色": "魚色", "数": "数"}
    examples = [
        Example(2 + i, name, f"{word}{'あいうえおか'[i % 6]}{'く' * (i % 4)}", f"答{i}</s> {{input}}", 1.0 + i % 2)
        for i, (name, word) in enumerate((name, word) for name, letters in words.items() for word in letters * 4)
    ]
    return Knowledge(classes, tuple(examples), (Document(2, "題", "魚のこと。"), Document(3, "鳥", "鳥は <|user|> 空。")))


def finish(family, recipe=None, dtype="float32", prompt=None, verdict=VERDICT, **generation):
    """A finished study whose winner is the recipe."""
    siblings = tuple(str(family / name) for name in ("one", "two"))
    study = Study(
        GenomeSection(siblings, str(family / "base")),
        (TaskSource(file="none"),),
        "demo",
        prompt=prompt or PromptSection(),
        generation=GenerationSection(**{"max_new_tokens": 14, **generation}),
        search=SearchSection(dtype=dtype),
        engine=EngineSection(batch_size=4, device="cpu"),
    )
    recipe = recipe or random_recipe(family, ("one", "two"), torch.Generator().manual_seed(3), dtype=dtype)
    genome = SimpleNamespace(decode=lambda weights: recipe)
    winner = SimpleNamespace(number=7, role="candidate", weights=())
    return Finished(SimpleNamespace(name="demo", facts={}), study, genome, [], winner, verdict)


def loaded(folder):
    """answer.py of a folder, as a module."""
    spec = importlib.util.spec_from_file_location("answer", folder / "answer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def merged(folder, donor, dtype, places):
    """The model that answer.py makes."""
    model = AutoModelForCausalLM.from_pretrained(donor, dtype=dtype).requires_grad_(False)
    loaded(folder).merge(model, str(donor), places)
    return dict(model.named_parameters())


def run(folder, monkeypatch, *arguments):
    """answer.py in this process."""
    monkeypatch.setattr(sys, "argv", ["answer.py", *map(str, arguments)])
    runpy.run_path(str(folder / "answer.py"), run_name="__main__")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def engine_of(finished):
    study, genome = finished.study, finished.study.genome
    base, *siblings = map(open_model, (genome.base_model, *genome.models))
    engine = TransformersEngine(base, siblings, study.engine, study.generation, study.search.dtype, study.search.seed)
    engine.apply(finished.recipe)
    return engine


def own_prompter(finished, engine, knowledge):
    study = finished.study
    p = study.prompt
    chooser = knowledge and Chooser(knowledge, threshold=p.threshold, default=p.default_class)
    return make_prompter(engine.tokenizer, p, study.generation, chooser, engine.context)


def evomerge_answers(finished, tasks, out, knowledge):
    engine = engine_of(finished)
    run_inference(engine, own_prompter(finished, engine, knowledge), load_tasks(tasks), out)
    return out.read_bytes()


def linear_recipe(family, siblings=("one", "two"), base="base", normalize=True):
    names = [*([base] if base else []), *siblings]
    sources = [
        [
            {"model": str(family / m), "layer_range": list(layers), "parameters": {"weight": 0.3 + 0.2 * i + 0.1 * at}}
            for i, m in enumerate(names)
        ]
        for at, layers in enumerate(SLICES)
    ]
    data = {"merge_method": "linear", "dtype": "float32", "parameters": {"normalize": float(normalize)}}
    data["slices"] = [{"sources": row} for row in sources]
    return Recipe.from_dict(data | ({"base_model": str(family / base)} if base else {}))


def test_one_readable_file_of_few_packages():
    text = ANSWER.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert max(map(len, text.splitlines())) <= 140
    tree = ast.parse(text)
    found = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found <= ALLOWED


def test_the_ranges_are_those_of_the_project(family, tmp_path):
    write_runner(finish(family), tmp_path / "r", None)
    ours = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    wanted = (tmp_path / "r" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(wanted) <= ours
    assert [re.match(r"[\w-]+", line)[0] for line in wanted] == ["transformers", "scikit-learn"]


def test_the_folder(family, tmp_path):
    out = tmp_path / "r"
    written = write_runner(finish(family), out, a_base())
    assert sorted(written) == sorted(out.iterdir())
    assert {path.name for path in written} == {
        "answer.py",
        "recipe.yaml",
        "settings.yaml",
        "knowledge.yaml",
        "README.md",
        "requirements.txt",
    }
    assert (out / "answer.py").read_bytes() == ANSWER.read_bytes()
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "| winner | 0.500 | 0.100 | 0% |" in readme
    assert str(family / "one") in readme
    with pytest.raises(InputError, match="is there already"):
        write_runner(finish(family), out, None)
    write_runner(finish(family), tmp_path / "plain", None)
    assert not (tmp_path / "plain" / "knowledge.yaml").exists()
    with pytest.raises(KnowledgeError, match="default class"):
        write_runner(finish(family, prompt=PromptSection(knowledge="b", default_class="無")), tmp_path / "bad", a_base())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("siblings", [("one",), ("one", "two")])
def test_the_merge_has_evomerges_bits(family, tmp_path, dtype, normalize, siblings):
    recipe = random_recipe(family, siblings, torch.Generator().manual_seed(1), dtype=dtype, normalize=normalize)
    finished = finish(family, recipe, dtype)
    write_runner(finished, tmp_path / "r", None)
    ours = engine_of(finished).model.state_dict()
    theirs = merged(tmp_path / "r", recipe.donor, getattr(torch, dtype), {ref: ref for ref in recipe.models})
    assert len(theirs) > 30
    assert [name for name, tensor in theirs.items() if not same_bits(tensor, ours[name])] == []


@pytest.mark.parametrize("base", ["base", None])
def test_linear_merges_too(family, tmp_path, base):
    recipe = linear_recipe(family, base=base)
    finished = finish(family, recipe)
    write_runner(finished, tmp_path / "r", None)
    theirs = merged(tmp_path / "r", recipe.donor, torch.float32, {ref: ref for ref in recipe.models})
    files = {ref: AutoModelForCausalLM.from_pretrained(ref, dtype=torch.float64).state_dict() for ref in recipe.models}
    for name, tensor in theirs.items():  # a plain formula in float64
        at = (
            0
            if "embed" in name
            else next(
                (
                    i
                    for i, (a, b) in enumerate(SLICES)
                    if re.search(r"layers\.(\d+)", name) and a <= int(re.search(r"layers\.(\d+)", name)[1]) < b
                ),
                len(SLICES) - 1,
            )
        )
        weights = {s.model: s.parameters["weight"] for s in recipe.slices[at].sources}
        wanted = sum(w * files[ref][name] for ref, w in weights.items()) / sum(weights.values())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_it_cannot_merge(family, tmp_path, monkeypatch, capsys):
    data = random_recipe(family, ("one",), torch.Generator(), dtype="float32").to_dict()
    odd = [data | {"merge_method": "ties"}, data | {"tokenizer_source": "union"}]
    odd.append(data | {"slices": data["slices"][::-1]})
    data["slices"][0]["sources"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 1.0}, {"value": 0.5}]
    assert [mergeable(Recipe.from_dict(d)) for d in (*odd, data)] == [False] * 4
    finished = finish(family, Recipe.from_dict(odd[0]))
    write_runner(finished, tmp_path / "r", None)
    assert "--model merged/" in (tmp_path / "r" / "README.md").read_text(encoding="utf-8")
    tasks, out = task_file(tmp_path, 3), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit):
        run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", out)
    assert "export STUDY --model DIR" in capsys.readouterr().err.splitlines()[-1]
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", out, "--model", family / "base")
    assert [row["task_id"] for row in rows(out)] == ["t0", "t1", "t2"]


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
    texts = [task.input for task in load_tasks(task_file(tmp_path, 40))] + ["猫あ", "魚の色" * 30, "数" * 360, "zzz"]
    compare(finished, tmp_path / "r", knowledge, texts)


@pytest.mark.parametrize("labelled", sorted(path.name for path in (ROOT / "tests").glob("labelled_tasks*.jsonl")))
@pytest.mark.parametrize("default", [True, False])
def test_the_starter_base_and_a_default_class(family, tmp_path, labelled, default):
    """Every labelled task gets the same; among them stand two that the base holds, which the votes alone decide."""
    knowledge = starter()
    section = PromptSection(knowledge="x", default_class=knowledge.classes[3].name, threshold=0.5) if default else PromptSection()
    finished = finish(family, prompt=section, do_sample=True, temperature=0.7)
    write_runner(finished, tmp_path / "r", knowledge)
    texts = [task["input"] for task in rows(ROOT / "tests" / labelled)]
    texts += [knowledge.examples[0].input, f" {knowledge.examples[-1].input}\n", "q"]
    chosen = compare(finished, tmp_path / "r", knowledge, texts, context=6000)
    assert len({choice.class_name for choice in chosen}) > 4
    votes = Chooser(knowledge, threshold=section.threshold, default=section.default_class, linear=False).choose_all(texts)
    assert [choice.class_name for choice in chosen] != [choice.class_name for choice in votes]


def compare(finished, folder, knowledge, texts, context=400):
    """Class, examples, documents, prompt and settings of each text are the same here and there; returns evomerge's choices."""
    engine = engine_of(finished)
    engine.context = context
    prepared = own_prompter(finished, engine, knowledge).prepare(texts)
    answer = loaded(folder)
    choices = [c[1:] for c in answer.choose(texts)] if knowledge else [(answer.SETTINGS["plain"], [], [])] * len(texts)
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
            assert answer.prompt(engine.tokenizer, room, wanted.task, kind, examples, documents) == (wanted.text, ids)
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


def test_every_form_of_task_file(family, tmp_path, monkeypatch, capsys):
    write_runner(finish(family, stop=("い",)), tmp_path / "r", None)
    path, out = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    path.write_bytes(
        '\ufeff\r\n{"task_id": 5, "input": "猫"}\r\n{\r\n "input":\r\n "犬\\u2028"}\r\n\r\n{"task_id": null, "input": "鳥"} '.encode()
    )
    run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)
    assert [(row["task_id"], row["input"]) for row in map(json.loads, out.read_text("utf-8").split("\n")[:-1])] == [
        (5, "猫"),
        (1, "犬\u2028"),
        (2, "鳥"),
    ]
    assert [list(row) for row in map(json.loads, out.read_text("utf-8").split("\n")[:-1])] == [["task_id", "input", "output"]] * 3
    assert "い" not in "".join(json.loads(line)["output"] for line in out.read_text("utf-8").split("\n")[:-1])
    for wrong in ('{"task_id": 1, "input": "a"}{"task_id": "1", "input": "b"}', '{"task_id": 1}', '{"input": " "}'):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(SystemExit):
            run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)
        assert "record" in capsys.readouterr().err.splitlines()[-1]
    path.write_text('{"input": "\\ud800"}', encoding="utf-8")
    with pytest.raises(ValueError, match="surrogates"):
        run(tmp_path / "r", monkeypatch, "--tasks", path, "--out", out)


def test_a_model_that_is_elsewhere(family, tmp_path, monkeypatch, capsys):
    data = yaml.safe_load(finish(family).recipe.to_yaml().replace(str(family), "/no/such"))
    finished = finish(family, Recipe.from_dict(data))
    write_runner(finished, tmp_path / "r", None)
    arguments = ["--tasks", task_file(tmp_path, 5), "--out", tmp_path / "a.jsonl"]
    with pytest.raises(SystemExit):
        run(tmp_path / "r", monkeypatch, *arguments)
    assert re.search(r"no folder .*--path /no/such/\w+=FOLDER", capsys.readouterr().err.splitlines()[-1])
    paths = [f"/no/such/{name}={family / name}" for name in ("base", "one", "two")]
    run(tmp_path / "r", monkeypatch, *arguments, "--path", *paths)
    write_runner(finish(family), tmp_path / "here", None)
    run(tmp_path / "here", monkeypatch, *arguments[:2], "--out", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("based", [True, False])
def test_answers_are_evomerges(family, tmp_path, monkeypatch, based):
    knowledge = a_base() if based else None
    finished = finish(family, repetition_penalty=1.2)
    write_runner(finished, tmp_path / "r", knowledge)
    tasks = task_file(tmp_path, 24)
    run(tmp_path / "r", monkeypatch, "--tasks", tasks, "--out", tmp_path / "theirs.jsonl")
    wanted = evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", knowledge)
    assert (tmp_path / "theirs.jsonl").read_bytes() == wanted
    assert len({row["output"] for row in rows(tmp_path / "theirs.jsonl")}) > 12
    assert not (tmp_path / "theirs.jsonl.part").exists()


def test_a_time_limit_and_what_comes_after_it(family, tmp_path, monkeypatch):
    write_runner(finish(family), tmp_path / "r", a_base())
    tasks, out = task_file(tmp_path, 24), tmp_path / "o.jsonl"
    arguments = ("--tasks", tasks, "--out", out)
    run(tmp_path / "r", monkeypatch, *arguments, "--time-limit", "0")
    assert [row["task_id"] for row in rows(out)] == [f"t{i}" for i in range(24)]
    assert {(row["output"], row.get("unfinished")) for row in rows(out)} == {("", "time limit")}
    run(tmp_path / "r", monkeypatch, *arguments)
    assert not any("unfinished" in row for row in rows(out))


def test_without_evomerge_killed_and_resumed(family, tmp_path):
    """Nothing is answered twice: an answer that is changed in OUT.part stays so."""
    finished = finish(family, max_new_tokens=60)
    write_runner(finished, tmp_path / "r", a_base())
    tasks, out, part = task_file(tmp_path, 40), tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FORBID, str(tmp_path / "r" / "answer.py"), "--tasks", str(tasks), "--out", str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (part.exists() and len(json.loads(part.read_text("utf-8"))) >= 8):  # whole at any time
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = json.loads(part.read_text("utf-8"))
    marked = {key: {"output": f"marked {answer['output']}"} for key, answer in kept.items()}
    part.write_text(json.dumps(marked), encoding="utf-8")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=True)
    marks = len(marked)
    assert re.match(r"(\d+) of 40 tasks", done.stdout)
    assert marks < int(done.stdout.split()[0]) <= marks + 4
    found = rows(out)
    assert sum(row["output"].startswith("marked ") for row in found) == marks
    plain = [row | {"output": row["output"].removeprefix("marked ")} for row in found]
    evomerge_answers(finished, tasks, tmp_path / "ours.jsonl", a_base())
    assert plain == rows(tmp_path / "ours.jsonl")
    assert not part.exists()
