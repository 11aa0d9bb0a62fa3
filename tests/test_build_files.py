"""What a built folder holds beside its weights, and that it is whole and on the disk, or absent."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from merging_tools import make_family
from process_tools import ended, fork
from transformers import AutoTokenizer, GenerationConfig

from evomerge.api import public
from evomerge.errors import InputError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints import shards
from evomerge.recipe import Recipe

SPECIAL = {"eos_token_id": [2, 5], "pad_token_id": 0, "bos_token_id": 1, "temperature": 0.6}


@pytest.fixture
def family(tmp_path):
    """The base with everything that a model folder may hold."""
    family = make_family(tmp_path)
    for name in ("base", "one"):
        folder = family / name
        (folder / "generation_config.json").write_text(json.dumps(SPECIAL))
        (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
        for file in ("added_tokens.json", "vocab.json"):
            (folder / file).write_text("{}")
        for file in ("tokenizer.model", "merges.txt", "spiece.model", "tokenizer_extra.txt"):
            (folder / file).write_text(name)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
        (folder / "notes.txt").write_text("not copied")
    return family


def recipe(family, **top):
    models = [{"model": str(family / "one"), "parameters": {"weight": 0.4}}]
    data = {"merge_method": "task_arithmetic", "base_model": str(family / "base")}
    return Recipe.from_dict(data | {"models": models, "dtype": "bfloat16"} | top)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("source", ["base", "union", "one"])
def test_a_tokenizer_source_loses_no_file(family, source):
    """Without the key the donor's are copied; with it as well, where transformers writes none."""
    plain = build_model(recipe(family), family / "plain")
    assert files(plain) >= files(family / "base") - {"notes.txt"}
    named = str(family / source) if source == "one" else source
    out = build_model(recipe(family, tokenizer_source=named), family / "out")
    assert files(out) == files(plain)
    owner = "one" if source == "one" else "base"
    assert (out / "tokenizer.model").read_text() == owner
    kept = ("generation_config.json", "additional_chat_templates/tools.jinja")
    assert all((out / name).read_bytes() == (plain / name).read_bytes() for name in kept)


def test_code_that_auto_map_names_is_copied_and_not_run(family):
    """config.json keeps the key, without which nobody could load the output."""
    for name in ("base", "one"):
        folder = family / name
        (folder / "modeling_x.py").write_text("from .layers_x import X\n")
        (folder / "layers_x.py").write_text(f"raise SystemExit('{name} was run')\n")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
        (folder / "config.json").write_text(json.dumps(config))
    out = build_model(recipe(family), family / "out")
    for name in ("modeling_x.py", "layers_x.py"):
        assert (out / name).read_text() == (family / "base" / name).read_text()


def test_a_tokenizer_s_code_comes_with_it_and_other_code_stays(family):
    for name in ("base", "one"):
        (family / name / f"tokenization_{name}.py").write_text("raise SystemExit('was run')\n")
    assert "tokenization_base.py" not in files(build_model(recipe(family), family / "plain"))
    path = family / "base/tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}
    path.write_text(json.dumps(settings))
    found = files(build_model(recipe(family), family / "out"))
    assert "tokenization_base.py" in found
    assert "tokenization_one.py" not in found


@pytest.mark.parametrize(
    "name", ["tekken.json", "tiktoken.model", "sentencepiece.bpe.model", "qwen.tiktoken"]
)
def test_a_tokenizer_of_one_file_is_copied(family, name):
    for file in (family / "base").glob("*token*"):
        file.unlink()
    (family / "base" / name).write_text("ranks")
    out = build_model(recipe(family), family / "out")
    assert (out / name).read_text() == "ranks"


def rename_tokens(folder, change):
    """Another vocabulary: what `change` makes of the token -> id of the tokenizer."""
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"] = change(state["model"]["vocab"])
    ids = state["model"]["vocab"]
    for token in state["added_tokens"]:
        token["id"] = ids[token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def reversed_ids(vocab):
    return {token: len(vocab) - 1 - number for token, number in vocab.items()}


def test_end_tokens_keep_their_meaning_where_ids_move(family):
    """The base's generation_config.json and config.json name its own ids."""
    rename_tokens(family / "one", reversed_ids)
    old = AutoTokenizer.from_pretrained(family / "base")
    wanted = old.convert_ids_to_tokens([2, 5])
    out = build_model(recipe(family, tokenizer_source=str(family / "one")), family / "out")
    new = AutoTokenizer.from_pretrained(out)
    settings = GenerationConfig.from_pretrained(out)
    assert settings.eos_token_id != [2, 5]
    assert new.convert_ids_to_tokens(settings.eos_token_id) == wanted
    assert new.convert_ids_to_tokens(settings.pad_token_id) == "<pad>"
    assert settings.temperature == 0.6
    config = json.loads((out / "config.json").read_text())
    assert new.convert_ids_to_tokens(config["eos_token_id"]) == "</s>"
    # files of the base's tokenizer would contradict it
    assert (out / "tokenizer.model").read_text() == "one"


def test_a_union_with_more_tokens_takes_no_file_of_a_smaller_tokenizer(family):
    def longer(vocab):
        return {k: v for k, v in vocab.items() if k != "9"} | {"new": vocab["9"]}

    rename_tokens(family / "one", longer)
    out = build_model(recipe(family, tokenizer_source="union"), family / "out")
    assert "tokenizer.model" not in files(out)
    assert json.loads((out / "generation_config.json").read_text()) == SPECIAL
    assert "additional_chat_templates/tools.jinja" in files(out)


# the operations by which something comes to the disk
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile")


def kill_at(n, counted=None):
    """End this process at its nth operation; `counted` gets the operations instead."""
    done = 0

    def step(name):
        nonlocal done
        done += 1
        if counted is not None:
            counted[name] += 1
        elif done == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        is_writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in EVENTS or is_writing:
            step(event)

    sys.addaudithook(hook)
    for name in ("pwrite", "fsync"):
        real = getattr(os, name)
        setattr(os, name, lambda *a, real=real, name=name: (step(name), real(*a))[1])


def merge(family):
    return public.merge(recipe(family), family / "out")


def test_a_kill_at_any_step_leaves_a_whole_folder_or_none(family, monkeypatch):
    """And the next run removes what it left. The card is part of the whole."""
    monkeypatch.setattr(shards, "THREADS", 1)
    wanted = files(merge(family))
    contents = {name: (family / "out" / name).read_bytes() for name in wanted}
    remove(family / "out")
    counts = family / "counts.json"

    def count():
        counted = Counter()
        kill_at(0, counted)
        merge(family)
        counts.write_text(json.dumps(counted))
        return 0

    assert ended(fork(count)) == 0
    operations = json.loads(counts.read_text())
    counts.unlink()
    remove(family / "out")
    before = set(family.iterdir())
    total = sum(operations.values())
    assert total > 60, operations
    whole = 0
    for n in range(1, total + 1):

        def work(n=n):
            kill_at(n)
            merge(family)
            return 0

        assert ended(fork(work)) in (-signal.SIGKILL, 0)
        if (family / "out").exists():
            whole += 1
            assert files(family / "out") == wanted, n
            with pytest.raises(InputError, match="already exists"):
                merge(family)
        else:
            merge(family)
        left = set(family.iterdir()) - before
        assert left == {family / "out"}, n
        for name in wanted:
            assert (family / "out" / name).read_bytes() == contents[name], (n, name)
        remove(family / "out")
    assert 0 < whole < total


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(family, monkeypatch):
    """Every file, every folder, and afterwards the folders that got a new name in them."""
    synced, renamed = {}, []
    real, rename = os.fsync, Path.rename

    def fsync(handle):
        synced[Path(os.readlink(f"/proc/self/fd/{handle}"))] = len(renamed)
        real(handle)

    def watched(path, target):
        renamed.append({p.relative_to(path) for p in [path, *path.rglob("*")]})
        whole = {path / name for name in renamed[-1]}
        assert whole <= synced.keys(), whole - synced.keys()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", watched)
    public.merge(recipe(family), family / "new/place/out")
    assert Path("README.md") in renamed[0]
    assert [synced[family / name] for name in ("new/place", "new", ".")] == [1, 1, 1]
