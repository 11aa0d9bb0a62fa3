"""Building to disk: bad input and full disks leave nothing, kills leave nothing that looks
finished, mergekit gets what is its own.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from merging_tools import differing, load_all, make_family
from safetensors.torch import load_file, save_file

from evomerge.cli import main
from evomerge.console import Console, byte_progress, parse_size, size
from evomerge.errors import InputError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints import shards
from evomerge.merging.open_recipe import open_recipe
from evomerge.merging.stream import CHUNK, merged_tensors
from evomerge.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
MERGEKIT_PYTHON = os.environ.get("EVOMERGE_MERGEKIT_PYTHON")


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path)


def recipe(family, names=("one",), method="task_arithmetic", **settings):
    """A `models:` recipe, a base among them."""
    parameters = {"weight": 0.4} | settings.pop("each", {})
    models = [{"model": str(family / name), "parameters": parameters} for name in names]
    return {
        "base_model": str(family / "base"),
        "merge_method": method,
        "dtype": "bfloat16",
        "models": models,
    } | settings


def write(family, data):
    (family / "r.yml").write_text(yaml.safe_dump(data))
    return str(family / "r.yml")


def run(*args, **settings):
    """The command line in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *settings.pop("path", [])])}
    python = settings.pop("python", sys.executable)
    return subprocess.run(
        [python, "-m", "evomerge", *args],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        **settings,
    )


def poison(family):
    tensors = load_file(family / "one/model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, family / "one/model.safetensors")
    return recipe(family), "model.layers.2.mlp.down_proj.weight contains NaN"


def lose(family):
    tensors = load_file(family / "one/model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, family / "one/model.safetensors")
    return recipe(family), "lacks model.norm.weight"


BAD = {
    "NaN": poison,
    "a missing tensor": lose,
    "density 0": lambda family: (recipe(family, method="ties", each={"density": 0}), "density"),
    "density 1.5": lambda family: (
        recipe(family, method="dare_ties", each={"density": 1.5}),
        "density",
    ),
    "density -0.1": lambda family: (
        recipe(family, method="dare_linear", each={"density": [0.5, -0.1]}),
        "density",
    ),
    "slerp of three": lambda family: (
        recipe(family, ("one", "two"), "slerp", parameters={"t": 0.5}),
        "exactly two",
    ),
    "a wrong size": lambda family: (recipe(family), "--out-shard-size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(family, capsys, case):
    data, said = BAD[case](family)
    path = write(family, data)
    before = sorted(family.iterdir())
    size = ["--out-shard-size", "many"] if case == "a wrong size" else []
    assert main(["merge", path, str(family / "new/place/out"), *size]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("evomerge: ")
    assert said in err
    assert sorted(family.iterdir()) == before  # the folders above it too


def test_too_little_space_is_said_before_anything_is_merged(family, capsys, monkeypatch):
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000_000, 5_000_000),
    )
    monkeypatch.setattr(shards, "write_shards", lambda *_: pytest.fail("began"))
    before = sorted([*family.iterdir(), Path(write(family, recipe(family)))])
    assert main(["merge", str(family / "r.yml"), str(family / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "needs 20.1 MB, but only 5.0 MB are free" in lines[0]
    assert sorted(family.iterdir()) == before


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_meanwhile(family, capsys, monkeypatch, failing):
    """A write may also take a part of what it was given."""
    before = sorted([*family.iterdir(), Path(write(family, recipe(family)))])
    written = 0
    real = os.pwrite

    def full(*args):
        nonlocal written
        if failing == "pwrite" and written < 20_000:
            written += (n := real(args[0], args[1][:1000], args[2]))
            return n
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    assert main(["merge", str(family / "r.yml"), str(family / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert sorted(family.iterdir()) == before


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_pieces_of_many_threads_are_the_whole(family, monkeypatch, threads, method):
    """Small pieces, three dtypes on disk and none to work in: the file holds what each tensor
    merged alone is.
    """
    family = make_family(family / "mixed", dtypes=(torch.bfloat16, torch.float32, torch.float16))
    data = recipe(family, ("one", "two"), method)
    del data["dtype"]
    if method == "linear":
        del data["base_model"]
    parsed = Recipe.from_dict(data)
    wanted = dict(merged_tensors(parsed, open_recipe(parsed)))
    monkeypatch.setattr(shards, "CHUNK", 100)
    real = os.pwrite
    # the system may write less than asked
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:33], at))
    torch.set_num_threads(threads)
    try:
        assert not differing(
            load_all(build_model(parsed, family / "out", shard_size="15K")), wanted
        )
        assert torch.get_num_threads() == threads  # the caller's setting is as it was
    finally:
        torch.set_num_threads(1)


def test_a_tensor_longer_than_a_piece(tmp_path):
    """At the real size of pieces, a last one that is not whole."""
    rows = CHUNK // 32 + 5
    make_family(tmp_path, vocab_size=rows)
    base, one = (
        load_file(tmp_path / name / "model.safetensors")["lm_head.weight"]
        for name in ("base", "one")
    )
    assert base.shape == (rows, 32)
    build_model(Recipe.from_dict(recipe(tmp_path, each={"weight": 0.3})), tmp_path / "out")
    weight = torch.tensor(0.3).bfloat16()
    assert torch.equal(load_all(tmp_path / "out")["lm_head.weight"], base + (one - base) * weight)


SLOW = """
import os, sys, time
real = os.pwrite
def pwrite(*args):
    time.sleep(0.2)
    return real(*args)
os.pwrite = pwrite
from evomerge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start_slow(family):
    """A build that takes its time, once it has begun to write."""
    command = [sys.executable, "-c", SLOW, "merge", str(family / "r.yml"), str(family / "out")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True
    )
    for _ in range(600):
        if any(path.stat().st_size > 5000 for path in family.glob(".out*/model/*.safetensors")):
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


def test_a_killed_build_leaves_nothing_that_looks_finished(family):
    write(family, recipe(family))
    process = start_slow(family)
    try:
        alive = list(family.glob(".out*"))
        # a living one is not in the way,
        assert build_model(Recipe.from_dict(recipe(family)), family / "out").is_dir()
        assert list(family.glob(".out*")) == alive  # nor taken for dead
        shutil.rmtree(family / "out")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (family / "out").exists()
    assert [path.name.startswith(".out.merging-") for path in family.glob(".out*")] == [True]
    (family / ".output.merging-x").mkdir()  # of another model
    build_model(Recipe.from_dict(recipe(family)), family / "out")
    assert [path.name for path in family.glob(".*")] == [".output.merging-x"]


def test_ctrl_c_leaves_nothing(family):
    write(family, recipe(family))
    process = start_slow(family)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert len(said.splitlines()) == 1
    assert not list(family.glob("*out*")) + list(family.glob(".out*"))


def test_a_build_imports_no_transformers(family):
    """It would take longer than merging a billion parameters."""
    code = (
        "import sys; from evomerge.cli import main; "
        "sys.exit(main(sys.argv[1:]) or 'transformers' in sys.modules)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "merge",
        write(family, recipe(family)),
        str(family / "out"),
    ]
    assert (
        subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        == 0
    )


FAKE = """
import json, pathlib, sys
config, out, *options = sys.argv[1:]
if "fail" in open(config).read():
    print("a warning", file=sys.stderr)
    sys.exit("ValueError: no such thing")
pathlib.Path(out).mkdir(parents=True)
pathlib.Path(out, "asked.json").write_text(json.dumps(options))
pathlib.Path(out, "README.md").write_text(pathlib.Path(out).name)
print("50%", file=sys.stderr)
"""


@pytest.fixture
def fake_mergekit(tmp_path):
    package = tmp_path / "fake/mergekit/scripts"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "run_yaml.py").write_text(FAKE)
    return str(tmp_path / "fake")


def test_other_methods_go_to_mergekit(family, fake_mergekit):
    path = write(family, recipe(family, method="of_tomorrow"))
    done = run(
        "merge",
        path,
        str(family / "out"),
        "--out-shard-size",
        "2GB",
        "--random-seed",
        "7",
        path=[fake_mergekit],
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert [("mergekit" in line, "of_tomorrow" in line) for line in done.stderr.splitlines()] == [
        (True, True),
        (False, False),
    ]
    assert json.loads((family / "out/asked.json").read_text()) == [
        "--out-shard-size",
        "2000000000",
        "--random-seed",
        "7",
    ]
    assert sorted(p.name for p in (family / "out").iterdir()) == ["README.md", "asked.json"]
    assert (family / "out/README.md").read_text() == "out"
    assert not list(family.glob(".out*"))


def test_what_mergekit_says_is_shown_when_it_fails(family, fake_mergekit):
    path = write(family, recipe(family, method="of_tomorrow") | {"parameters": {"note": "fail"}})
    done = run("merge", path, str(family / "out"), path=[fake_mergekit])
    assert done.returncode == 1
    assert "mergekit failed: ValueError: no such thing" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 2
    assert not list(family.glob("*out")) + list(family.glob(".out*"))


def test_other_methods_without_mergekit(family, capsys, monkeypatch):
    monkeypatch.setattr("evomerge.merging.mergekit.is_installed", lambda: False)
    assert (
        main(["merge", write(family, recipe(family, method="of_tomorrow")), str(family / "out")])
        == 2
    )
    assert "pip install 'evomerge[mergekit]'" in capsys.readouterr().err
    assert not (family / "out").exists()


@pytest.mark.skipif(
    not MERGEKIT_PYTHON, reason="EVOMERGE_MERGEKIT_PYTHON names no Python with mergekit"
)
def test_the_real_mergekit_beside_evomerge(family):
    path = write(family, recipe(family, ("one", "two"), "model_stock") | {"dtype": "float64"})
    done = run(
        "merge", path, str(family / "out"), "--out-shard-size", "20K", python=MERGEKIT_PYTHON
    )
    assert done.returncode == 0, done.stderr
    alone = [
        MERGEKIT_PYTHON,
        "-m",
        "mergekit.scripts.run_yaml",
        path,
        str(family / "alone/out"),
        "--out-shard-size",
        "20K",
    ]
    subprocess.run(alone, check=True, capture_output=True)
    ours, theirs = family / "out", family / "alone/out"
    assert len(list(ours.glob("model-*.safetensors"))) > 1
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    # in the card mergekit names the models in an order that changes from run to run
    for path in ours.iterdir():
        assert path.name == "README.md" or path.read_bytes() == (theirs / path.name).read_bytes(), (
            path.name
        )


def test_sizes_and_their_text():
    assert [parse_size(s) for s in ("5B", "20K", "1M", "5GB", "1.5 mb", "2GiB", 7)] == [
        5_000_000_000,
        20_000,
        1_000_000,
        5_000_000_000,
        1_500_000,
        2 * 1024**3,
        7,
    ]
    for wrong in ("0", "-1", "iB", "5X", "", "1e9"):
        with pytest.raises(InputError, match="--out-shard-size"):
            parse_size(wrong)
    assert [size(n) for n in (0, 999, 1000, 852_561_920, 26.4e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "852.6 MB",
        "26.4 GB",
        "5000.0 GB",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = Terminal()
    progress = byte_progress(Console(stream), "merging")
    now += 2
    progress(500_000_000, 2_000_000_000)
    assert (
        stream.getvalue()
        == "merging [######                  ]  25%  500.0 MB of 2.0 GB  250.0 MB/s  ETA 6 s"
    )
    progress(500_000_001, 2_000_000_000)  # too soon to be drawn
    assert stream.getvalue().count("ETA") == 1
    progress(2_000_000_000, 2_000_000_000)  # the end always is
    assert "100%" in stream.getvalue()
    plain = io.StringIO()
    progress = byte_progress(Console(plain), "merging")
    for _ in range(25):
        now += 1
        progress(int(now) * 1_000_000, 200_000_000)
    assert (
        plain.getvalue().splitlines()[0] == "merging  56%  112.0 MB of 200.0 MB  11.2 MB/s  ETA 8 s"
    )
    assert len(plain.getvalue().splitlines()) == 2
