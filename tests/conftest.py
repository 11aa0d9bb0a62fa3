"""A tiny random pair with a real tokenizer and tasks: enough for every path through a study, in
seconds.
"""

import gc
import json
import os
import signal
import threading
from pathlib import Path

gc.disable()  # until the tests are collected
# read when the libraries are imported, so before all that follows; subprocesses inherit them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from optuna.storages._rdb.storage import _VersionManager
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
# a run in the background ignores Ctrl-C, and so would the processes that the tests interrupt
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Leave what the libraries made out of every later search for garbage: a fifth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)  # a run of the tests is short, and full of small objects
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    """The collections that pytest makes at the end would go through everything five times."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def migrations_are_read_once():
    """Each new storage reads Optuna's migrations twice, which takes longer than a tiny study."""
    versions = _VersionManager.__new__(_VersionManager)
    versions.url = "sqlite://"
    scripts = versions._create_alembic_script()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_VersionManager, "_create_alembic_script", lambda self: scripts)
        yield


SHARED = Path(__file__).resolve().parents[2] / "shared"
# long references are open tasks, whose grades vary with every answer
PLACES = [(n % 7, n * n) for n in range(60)]
CHARACTERS = "あいうえおかきくけこ0123456789:\n"


def make_tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    return tokenizer


def make_model(seed, layers=4, **config):
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    settings |= {
        "vocab_size": 4 + len(CHARACTERS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **(settings | config))).to(
        torch.bfloat16
    )


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A folder with base/, instruct/, tasks.jsonl and study.yaml."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_model(0)
    save(base, folder / "base")
    other = make_model(1)
    with torch.no_grad():
        for p, q in zip(base.parameters(), other.parameters(), strict=True):
            p.add_(0.5 * q)
    save(base, folder / "instruct")
    kana = CHARACTERS[:10]
    rows = [
        {
            "task_id": i,
            "input": kana[i % 10] + kana[(3 * i) % 10],
            "output": "".join(kana[(a * i + b) % 10] for a, b in PLACES),
        }
        for i in range(40)
    ]
    (folder / "tasks.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    (folder / "study.yaml").write_text(
        "study: tiny\n"
        "genome: {base_model: ./base, models: [./instruct], merge_method: task_arithmetic, "
        "layer_granularity: 1}\n"
        "tasks: [{file: tasks.jsonl}]\n"
        "generation: {max_new_tokens: 12}\n"
        "judge: {metric: grade}\n"
        "search: {trials: 12, population: 4, uniform: [0.5], warm_start: null}\n"
        "engine: {batch_size: 32}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="session")
def shared():
    """The real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here: the real data lies beside the checkout")
    return SHARED
