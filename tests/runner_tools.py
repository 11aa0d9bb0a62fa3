"""What the tests of the runner share: a family with a tokenizer of turns, finished studies, and the
runner's own functions.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merging_tools import SLICES, make_family, random_recipe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from evomerge.answering import thoughts
from evomerge.answering.engine import EngineSpec
from evomerge.answering.hf.engine import TransformersEngine
from evomerge.answering.prompts import make_prompter
from evomerge.inference import run_inference
from evomerge.knowledge.chooser import Chooser
from evomerge.knowledge.records import Document, Example, Knowledge, KnowledgeClass
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import Recipe
from evomerge.searching.records.study_facts import StudyFacts
from evomerge.searching.records.verdict_record import HeldOutScore, Verdict
from evomerge.searching.snapshot import StudySnapshot
from evomerge.study import (
    EngineSection,
    GenerationSection,
    GenomeSection,
    PromptSection,
    SearchSection,
    Study,
    TaskSource,
)
from evomerge.tasks import load_tasks

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [
    ROOT / "evomerge" / "reporting" / "templates" / "runner" / name
    for name in ("answer.py", "answer_tools.py")
]
PROGRAM.append(Path(thoughts.__file__))
sys.modules["thoughts"] = thoughts  # beside answer_tools.py in a runner's folder
ALLOWED = {
    "torch",
    "transformers",
    "sklearn",
    "yaml",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "openpyxl",  # where tasks are an Excel file; without it, a line says so
    "answer_tools",
    "thoughts",
    *sys.stdlib_module_names,
}
TEXT = (
    "".join(map(chr, range(32, 127))) + "\nあいうえおかきくけこさしすせそ指示回答猫犬鳥魚色数。、"
)
VERDICT = Verdict("correct", 3, {"winner": HeldOutScore(0.5, 0.1, 0.0)}, {})
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
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return len(vocab)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """base/, one/ and two/, the last in shards, in fp32 with big steps between tokens, so that no
    answer hangs on the last bit.
    """
    folder = tmp_path_factory.mktemp("family")
    size = save_tokenizer(folder / "base")
    config = {
        "vocab_size": size,
        "max_position_embeddings": 400,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
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
        {
            "task_id": f"t{i}",
            "input": "猫犬鳥魚"[i % 4] + "の" * (i % 3) + TEXT[95 + i % 15 :][: 3 + i % 5] + "。",
        }
        for i in range(count)
    ]
    rows[-1]["input"] += " {input} {examples} }}{{ {% raw %} <|assistant|>x</s>"
    path = folder / "tasks.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def a_base():
    """Three classes: turns, {examples} with {documents}, and a sampled-free one with other
    settings; one injects.
    """
    classes = (
        KnowledgeClass(
            "動物",
            "あなたは犬。<|system|>",
            "問: {input}",
            repetition_penalty=1.3,
            max_new_tokens=9,
        ),
        KnowledgeClass(
            "色", "", "{examples}\n{documents}\n指示: {input}", shots=2, quotes=1, temperature=0.0
        ),
        KnowledgeClass("数", " ", "{input}", shots=0),
    )
    words = {"動物": "猫犬鳥", "色": "魚色", "数": "数"}
    examples = [
        Example(
            2 + i,
            name,
            f"{word}{'あいうえおか'[i % 6]}{'く' * (i % 4)}",
            f"答{i}</s> {{input}}",
            1.0 + i % 2,
        )
        for i, (name, word) in enumerate(
            (name, word) for name, letters in words.items() for word in letters * 4
        )
    ]
    return Knowledge(
        classes,
        tuple(examples),
        (Document(2, "題", "魚のこと。"), Document(3, "鳥", "鳥は <|user|> 空。")),
    )


def finish(family, recipe=None, dtype="float32", prompt=None, verdict=VERDICT, **generation):
    """A finished study whose winner is the recipe."""
    siblings = tuple(str(family / name) for name in ("one", "two"))
    study = Study(
        genome=GenomeSection(models=siblings, base_model=str(family / "base")),
        tasks=(TaskSource(file="none"),),
        study="demo",
        prompt=prompt or PromptSection(),
        generation=GenerationSection(**{"max_new_tokens": 14, **generation}),
        search=SearchSection(dtype=dtype),
        engine=EngineSection(batch_size=4, device="cpu"),
    )
    recipe = recipe or random_recipe(
        family, ("one", "two"), torch.Generator().manual_seed(3), dtype=dtype
    )
    genome = SimpleNamespace(decode=lambda vector: recipe)
    winner = SimpleNamespace(number=7, role="candidate", vector=())
    return StudySnapshot(
        SimpleNamespace(name="demo", facts=StudyFacts()), study, genome, [], winner, verdict
    )


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
    engine = TransformersEngine(EngineSpec.of_study(study, base, siblings))
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
            {
                "model": str(family / m),
                "layer_range": list(layers),
                "parameters": {"weight": 0.3 + 0.2 * i + 0.1 * at},
            }
            for i, m in enumerate(names)
        ]
        for at, layers in enumerate(SLICES)
    ]
    data = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"normalize": float(normalize)},
    }
    data["slices"] = [{"sources": row} for row in sources]
    return Recipe.from_dict(data | ({"base_model": str(family / base)} if base else {}))
