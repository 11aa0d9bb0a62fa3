"""The demo pair: what it holds, that it repeats, and that it leaves everything else alone."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge import demo
from evomerge.demo import pair as pair_module
from evomerge.demo import skills, training
from evomerge.errors import OutputError
from evomerge.study import read_study
from evomerge.tasks import load_tasks, split_tasks


@pytest.fixture(scope="module")
def quick() -> Iterator[pytest.MonkeyPatch]:
    """Three steps per stage: enough to move every weight that should move."""
    patch = pytest.MonkeyPatch()
    stages = tuple(replace(stage, steps=3) for stage in pair_module.SIBLING_STAGES)
    patch.setattr(pair_module, "BASE", replace(pair_module.BASE, steps=3))
    patch.setattr(pair_module, "SIBLING_STAGES", stages)
    patch.setattr(training, "BATCH", 8)
    yield patch
    patch.undo()


@pytest.fixture(scope="module")
def pair(quick: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.build_demo(tmp_path_factory.mktemp("demo") / "pair")


def test_a_pair_beside_other_files_is_not_rebuilt(pair: Path, tmp_path: Path) -> None:
    """Rebuilding replaces the folder: what is not the demo's own would be lost."""
    place = tmp_path / "pair"
    shutil.copytree(pair, place)
    (place / "answers.jsonl").write_text("mine")
    assert demo.build_demo(place) == place
    with pytest.raises(OutputError, match="holds more than a demo pair"):
        demo.build_demo(place, seed=1)
    assert (place / "answers.jsonl").read_text() == "mine"
    (place / "answers.jsonl").unlink()
    (place / "study.yaml").write_text("# mine")
    demo.build_demo(place, seed=1)
    assert (place / "study.yaml").read_text() == "# mine"


def test_the_folders_are_real_ones(pair: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "base")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "逆順:あいう"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "指示:逆順:あいう\n回答:"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(prompt)
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.unk_token_id not in ids
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "先頭:かき"}, {"role": "assistant", "content": "か"}],
        tokenize=False,
        add_generation_prompt=False,
    )
    assert tokenizer(whole, add_special_tokens=False)["input_ids"][-1] == tokenizer.eos_token_id
    for name in ("base", "instruct"):
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        assert model.dtype == torch.bfloat16
        assert model.config.num_hidden_layers == 8
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_sibling_differs_in_the_layers_and_nowhere_else(pair: Path) -> None:
    base, sibling = (load_file(pair / name / "model.safetensors") for name in ("base", "instruct"))
    assert base.keys() == sibling.keys()
    assert "lm_head.weight" not in base  # tied
    changed = {name for name in base if not torch.equal(base[name], sibling[name])}
    assert all(".layers." in name for name in changed)
    for layer in range(8):
        assert any(f".layers.{layer}." in name for name in changed)


def test_tasks_are_right_by_an_independent_reference(pair: Path) -> None:
    reference = {
        "逆順": lambda s: "".join(s[i] for i in range(len(s) - 1, -1, -1)),
        "複写": str,
        "最後": lambda s: s[len(s) - 1],
        "繰返": lambda s: f"{s}{s}",
        "整列": lambda s: "".join(digit * s.count(digit) for digit in "123456789"),
        "先頭": lambda s: s[:1],
    }
    tasks = load_tasks(pair / "tasks.jsonl")
    assert len(tasks) == 240
    assert len({task.input for task in tasks}) == 240
    for task in tasks:
        skill, _, text = task.input.partition(":")
        assert task.kind == skill
        assert task.output == reference[skill](text)
        assert task.eval_aspect
    split = split_tasks(tasks, 0.5, 0)
    assert len(split.search) == len(split.held_out) == 120


def test_strings_of_tasks_are_never_trained_on() -> None:
    alphabet = demo.SKILLS["先頭"].alphabet
    reserved = frozenset(
        a + b + c for a in alphabet for b in alphabet for c in alphabet if a != "あ"
    )
    examples = skills.ExampleSampler(reserved)
    rng = random.Random(0)
    drawn = [
        draw(rng)
        for draw in (examples.base, examples.new_skills, examples.brevity)
        for _ in range(200)
    ]
    texts = [
        "".join(prompt).removeprefix("指示:").split(":")[1].rstrip("\n=回答") for prompt, _ in drawn
    ]
    assert not reserved.intersection(texts)


def test_brevity_cuts_two_skills_to_one_character() -> None:
    examples, rng = skills.ExampleSampler(frozenset()), random.Random(0)
    for prompt, answer in (examples.brevity(rng) for _ in range(200)):
        _, skill, text = "".join(prompt).removesuffix("\n回答:").split(":")
        whole = demo.SKILLS[skill].apply(text)
        assert "".join(answer) == (whole[0] if skill in skills.CUT_SHORT else whole) + skills.EOS


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    pair: Path, quick: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    same, other = demo.build_demo(tmp_path / "same"), demo.build_demo(tmp_path / "other", seed=1)
    for name in ("base/model.safetensors", "instruct/model.safetensors", "tasks.jsonl"):
        assert (same / name).read_bytes() == (pair / name).read_bytes()
        assert (other / name).read_bytes() != (pair / name).read_bytes()


def test_global_settings_and_random_state_stay(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads, state, own = torch.get_num_threads(), torch.get_rng_state(), random.getstate()
    demo.build_demo(tmp_path / "pair")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == own


def test_a_finished_pair_is_left_alone_and_nothing_else_lies_about(pair: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pair.rglob("*")}
    lines: list[str] = []
    assert demo.build_demo(pair, progress=lines.append) == pair
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in pair.rglob("*")} == before
    assert [path.name for path in pair.parent.iterdir()] == [pair.name]


def test_an_older_pair_is_built_anew(quick: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    out.mkdir()
    (out / pair_module.MARKER).write_text(json.dumps({"version": 0, "seed": 0}))
    lines: list[str] = []
    demo.build_demo(out, progress=lines.append)
    assert any("step 3 of 3" in line for line in lines)
    assert (out / "base" / "model.safetensors").is_file()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a demo pair"):
        demo.build_demo(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failed_build_leaves_no_half_pair(
    quick: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        demo.build_demo(tmp_path / "pair")
    assert list(tmp_path.iterdir()) == []


def test_the_study_file_is_the_shipped_one_with_paths_from_here(pair: Path) -> None:
    study = read_study(pair / demo.STUDY)
    shipped = read_study(Path(__file__).parents[1] / "search_spaces" / "demo.yaml")
    assert study.genome.base_model == str(pair / "base")
    assert study.genome.models == (str(pair / "instruct"),)
    assert study.tasks[0].file == str(pair / "tasks.jsonl")
    assert study.search == shipped.search
    assert study.generation == shipped.generation


def test_a_changed_study_file_is_kept(pair: Path) -> None:
    file = pair / demo.STUDY
    before = file.read_text(encoding="utf-8")
    file.write_text(before + "# mine\n", encoding="utf-8")
    demo.build_demo(pair)
    assert file.read_text(encoding="utf-8") == before + "# mine\n"
    file.unlink()
    demo.build_demo(pair)
    assert file.read_text(encoding="utf-8") == before
