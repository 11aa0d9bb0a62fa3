"""Merge methods in files of a user's own: `merge_method: path/to/file.py:function`."""

import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from merging_tools import differing, load_all, make_family
from transformers import AutoModelForCausalLM

import evomerge
from evomerge import once
from evomerge.cli import main
from evomerge.console import Console
from evomerge.errors import InputError, RecipeError, StudyError
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.merging.methods import registry
from evomerge.recipe import METHODS, OWN, Recipe, read_recipe
from evomerge.reporting.card import model_card

DOCS = Path(__file__).parents[1] / "docs/METHODS.md"


def documented():
    """The complete method that the docs show."""
    page = DOCS.read_text(encoding="utf-8")
    (text,) = re.findall(r"```python\n# clipped\.py\n(.*?)```", page, re.S)
    return text


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in list(OWN):
        del OWN[name], METHODS[name]


@pytest.fixture
def family(tmp_path):
    (tmp_path / "clipped.py").write_text(documented())
    return make_family(tmp_path)


def configuration(family, method="clipped.py:clipped", **parameters):
    models = []
    for name, weight in (("one", 0.5), ("two", 1.0)):
        models.append({"model": str(family / name), "parameters": {"weight": weight}})
    data = {"merge_method": method, "base_model": str(family / "base"), "models": models}
    return data | {"dtype": "bfloat16", "parameters": parameters}


def write(family, **changes):
    path = family / "recipe.yml"
    path.write_text(yaml.safe_dump(configuration(family) | changes))
    return path


def test_the_documented_one_on_disk_and_live(family, tmp_path):
    assert len(documented().splitlines()) <= 20
    recipe = read_recipe(write(family, parameters={"limit": 0.05}))
    merged = load_all(build_model(recipe, tmp_path / "out", write_card=model_card))
    base, one, two = (load_all(family / name) for name in ("base", "one", "two"))
    for name, tensor in merged.items():
        b = base[name]
        total = (one[name] - b).float() * 0.5 + (two[name] - b).float()
        assert torch.equal(tensor, (b.float() + total.clamp(-0.05, 0.05)).to(b.dtype)), name
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.bfloat16)
    live = LiveModel(
        model,
        open_model(str(family / "base")),
        [open_model(str(family / name)) for name in ("one", "two")],
    )
    live.apply(recipe)
    assert not differing({name: p.detach() for name, p in model.named_parameters()}, merged)
    assert "only evomerge merges" in (tmp_path / "out/README.md").read_text()
    assert not (family / "__pycache__").exists()


def test_the_command_takes_it_from_the_recipe_s_folder(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    assert main(["merge", str(write(family)), str(tmp_path / "out")]) == 0


def test_a_changed_file_is_another_merge(family):
    first = read_recipe(write(family))
    same = first.digest()
    (family / "clipped.py").write_text(documented() + "\n# changed\n")
    second = read_recipe(write(family))
    assert second.merge_method == first.merge_method
    assert second.digest() != same
    elsewhere = family / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "clipped.py").write_text(documented())
    moved = Recipe.from_dict(configuration(family), folder=elsewhere)
    assert moved.digest() == same


BAD = {
    "raises at import": ("1 / 0", "raises ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(3)", "raises SystemExit"),
    "no Python": ("def f(", "raises SyntaxError"),
    "no function": ("x = 1", "no function `f`"),
    "a number": ("f = 1", "is not a merge function"),
    "too few arguments": ("def f(base, others): ...", "2 arguments before"),
    "no annotation": ("def f(base, others, plan, generator, *, x=1.0): ...", "`x` is no parameter"),
    "a reserved name": (
        "def f(base, others, plan, generator, *, weight: float): ...",
        "`weight` is no parameter",
    ),
    "no range": (
        "from typing import Annotated\n"
        "def f(base, others, plan, generator, *, x: Annotated[float, (1, 0)] = 0.5): ...",
        "`x` has a range or default that is none",
    ),
    "a default outside": (
        "from typing import Annotated\n"
        "def f(base, others, plan, generator, *, x: Annotated[float, (0, 1)] = 2.0): ...",
        "default of its argument `x`",
    ),
    "unknown traits": (
        "def f(base, others, plan, generator): ...\nf.traits = {'wieghted': False}",
        "'wieghted'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said_in_a_line(family, capsys, case):
    text, words = BAD[case]
    (family / "m.py").write_text(text)
    assert main(["merge", str(write(family, merge_method="m.py:f")), str(family / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (family / "out").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('gone')", "f of m.py raises KeyError: 'gone'"),
        ("return base[:1]", "shape and dtype"),
        ("return base.double()", "shape and dtype (found: 'torch.float64"),
        ("return None", "shape and dtype (found: 'NoneType')"),
        ("return base / 0", "f of m.py gives NaN or infinite numbers"),
    ],
)
def test_what_is_wrong_with_a_result_is_said_with_method_and_tensor(family, capsys, body, words):
    (family / "m.py").write_text(f"def f(base, others, plan, generator):\n    {body}\n")
    assert main(["merge", str(write(family, merge_method="m.py:f")), str(family / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert re.match(r"evomerge: (model|lm_head)\.", line)
    assert not (family / "out").exists()


def test_a_missing_file_and_wrong_parameters(family):
    with pytest.raises(RecipeError, match=r"cannot be read \(found: 'none\.py\'\)"):
        Recipe.from_dict(configuration(family, "none.py:f"), folder=family)
    with pytest.raises(RecipeError, match="Did you mean `limit`"):
        Recipe.from_dict(configuration(family, limt=1.0), folder=family)
    with pytest.raises(RecipeError, match=r"`limit` is out of range \(found: 3.0\)"):
        Recipe.from_dict(configuration(family, limit=3.0), folder=family)


def install(folder, name, monkeypatch):
    """A package with the documented method as an entry point of this name."""
    package = folder / "site"
    info = package / "mine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[evomerge.methods]\n{name} = my_clipping:clipped\n")
    (package / "my_clipping.py").write_text(documented())
    monkeypatch.syspath_prepend(str(package))
    importlib.invalidate_caches()


def test_an_entry_point_with_a_built_in_name_is_not_used_and_it_is_said_once(
    family, tmp_path, monkeypatch, caplog
):
    once.said.clear()
    install(tmp_path, "linear", monkeypatch)
    models = [{"model": str(family / "base"), "parameters": {"weight": 1.0}}]
    for _ in range(2):
        Recipe.from_dict({"merge_method": "linear", "models": models, "dtype": "bfloat16"})
    (record,) = caplog.records
    assert "`merge_method: linear` is the built-in method" in record.getMessage()
    assert "linear = my_clipping:clipped of the package mine" in record.getMessage()
    once.said.clear()


def test_an_entry_point(family, tmp_path, monkeypatch):
    install(tmp_path, "my_clip", monkeypatch)
    recipe = Recipe.from_dict(configuration(family, "my_clip", limit=0.05))
    assert recipe.merge_method == "my_clip"
    assert not differing(
        load_all(build_model(recipe, tmp_path / "a")),
        load_all(
            build_model(
                Recipe.from_dict(configuration(family, limit=0.05), folder=family), tmp_path / "b"
            )
        ),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('gone')", "f of m.py raises KeyError: 'gone'"),
        ("return base.double()", "shape and dtype (found: 'torch.float64"),
        ("return base * float('nan')", "f of m.py gives NaN or infinite numbers"),
        ("return base @ base.T if base.ndim > 1 else base", "shape and dtype"),
        ("return base.new_zeros(base.shape[0], base.shape[1])", "f of m.py raises IndexError"),
        ("return base + sum(others) / len(others)", None),
    ],
)
def test_check_tries_its_code(pair, tmp_path, body, words):
    (tmp_path / "m.py").write_text(f"def f(base, others, plan, generator):\n    {body}\n")
    data = study_of(pair, "m.py:f")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    found = evomerge.check(tmp_path / "study.yaml")
    wrong = [f.text for f in found if f.level == "wrong"]
    if words is None:
        assert not wrong
        (tried,) = [f.text for f in found if f.subject == "method"]
        assert "norm" in tried  # the smallest of one axis, and of two
        assert "proj" in tried
        return
    (line,) = wrong
    assert words in line
    assert "\n" not in line
    assert re.match(r"(model|lm_head)\.", line)  # where


def search(pair, folder, **options):
    data = study_of(pair, "clipped.py:clipped")
    (folder / "study.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return evomerge.search(
        folder / "study.yaml",
        storage=folder / "s.db",
        results=folder / "results",
        console=Console(io.StringIO()),
        **options,
    )


def study_of(pair, method):
    """The pair's study with another method, from any folder."""
    data = yaml.safe_load((pair / "study.yaml").read_text(encoding="utf-8"))
    data["genome"]["merge_method"] = method
    for key in ("base_model", "models"):
        given = data["genome"][key]
        paths = [str((pair / ref).resolve()) for ref in ([given] if key == "base_model" else given)]
        data["genome"][key] = paths[0] if key == "base_model" else paths
    data["tasks"] = [{"file": str(pair / "tasks.jsonl")}]
    return data


def test_a_study_searches_its_numbers_and_notices_a_change(pair, tmp_path):
    (tmp_path / "clipped.py").write_text(documented())
    found = search(pair, tmp_path, trials=4)
    names = found.study.genome.merge_method
    assert names == f"{tmp_path.resolve()}/clipped.py:clipped"
    drawn = [record.vector for record in found.records if record.role == "candidate"]
    slices = len(drawn[0]) // 2
    assert all(0 <= number <= 1 for row in drawn for number in row[slices:])
    assert (tmp_path / "results").rglob("best.yaml")
    (best,) = (tmp_path / "results").rglob("best.yaml")
    if "passthrough" not in best.read_text():
        assert "# Only evomerge merges this" in best.read_text()
    (tmp_path / "clipped.py").write_text(documented() + "\n# changed\n")
    with pytest.raises(StudyError, match="the merge method's file"):
        search(pair, tmp_path, trials=8)


def test_a_study_bounds_the_numbers_of_an_own_method(pair, tmp_path):
    (tmp_path / "clipped.py").write_text(documented())
    bounds = {"search.parameter_bounds": {"limit": [0.2, 0.3]}}
    found = search(pair, tmp_path, trials=4, overrides=bounds)
    drawn = [record.vector for record in found.records if record.role == "candidate"]
    slices = len(drawn[0]) // 2
    assert all(0.2 <= number <= 0.3 for row in drawn for number in row[slices:])
    bounds = {"search.parameter_bounds": {"limit": [0, 2]}}
    with pytest.raises(InputError, match=r"`search.parameter_bounds.limit`.*from 0 to 1"):
        search(pair, tmp_path, trials=4, overrides=bounds)


def test_a_study_s_fault_is_said_in_a_line(pair, tmp_path):
    (tmp_path / "clipped.py").write_text("1 / 0")
    with pytest.raises(InputError, match=r"`genome.merge_method` is not a merge method.*ZeroDiv"):
        search(pair, tmp_path, trials=4)


def test_a_built_in_name_stays_built_in():
    assert registry.get_method("ties").merge.__module__ == "evomerge.merging.methods.deltas"


def test_a_method_file_works_in_a_process_that_has_merged_nothing_yet(tmp_path):
    """Recipes are read before the registry of functions is imported."""
    family = make_family(tmp_path)
    (tmp_path / "half.py").write_text(
        "def half(base, others, plan, generator):\n    return base + sum(others) / 2\n"
    )
    recipe = {
        "merge_method": f"{tmp_path}/half.py:half",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "one"), "parameters": {"weight": 1.0}}],
        "dtype": "bfloat16",
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "evomerge", "merge", "r.yml", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
