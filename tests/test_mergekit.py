"""Recipes through real mergekit: the same bits.

mergekit lives in an environment of its own: EVOMERGE_MERGEKIT_PYTHON names that environment's
Python, else `mergekit-yaml` is looked for on the PATH.
"""

import os
import shutil
import subprocess

import pytest
import torch
import yaml
from merging_tools import SLICES, differing, load_all, make_family

from evomerge.cli import main
from evomerge.merging.build import build_model
from evomerge.recipe import Recipe, read_recipe, task_arithmetic_recipe

PYTHON, SCRIPT = os.environ.get("EVOMERGE_MERGEKIT_PYTHON"), shutil.which("mergekit-yaml")
COMMAND = [PYTHON, "-m", "mergekit.scripts.run_yaml"] if PYTHON else [SCRIPT]
pytestmark = pytest.mark.skipif(
    COMMAND == [None],
    reason=(
        "mergekit is not here: install mergekit==0.1.5 elsewhere and set EVOMERGE_MERGEKIT_PYTHON"
    ),
)


def both(recipe, folder):
    """Our tensors and mergekit's."""
    (folder / "recipe.yml").write_text(recipe.to_yaml())
    done = subprocess.run(
        [*COMMAND, "recipe.yml", "theirs"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    build_model(recipe, folder / "ours")
    return load_all(folder / "ours"), load_all(folder / "theirs")


@pytest.mark.parametrize(
    ("tied", "siblings"), [(False, ["one"]), (True, ["one"]), (False, ["one", "two"])]
)
def test_an_exported_recipe(tmp_path, tied, siblings):
    make_family(tmp_path, tied)
    rows = [[0.31 + 0.2 * i - 0.5 * m for m in range(len(siblings))] for i in range(len(SLICES))]
    recipe = task_arithmetic_recipe(
        str(tmp_path / "base"), [str(tmp_path / s) for s in siblings], SLICES, rows
    )
    ours, theirs = both(recipe, tmp_path)
    assert not differing(ours, theirs)
    assert all(t.dtype == torch.bfloat16 for t in ours.values())
    files = [{p.name for p in (tmp_path / side).iterdir()} for side in ("ours", "theirs")]
    assert files[0] == files[1]


EVERYTHING = """
merge_method: task_arithmetic
base_model: {base}
out_dtype: float16
tokenizer_source: base
parameters:
  lambda: [0.8, "1.5"]
  normalize:
  - {{filter: mlp, value: [0, 1, true]}}
  - {{value: "no"}}
  weight: 0.25
models:
- model: {two}
  parameters:
    weight:
    - {{filter: self_attn, value: [-0.5, "1e-1", 2]}}
    - {{filter: layernorm, value: 1}}
- model: {base}
- model: {one}
  parameters: {{weight: ["0.1", 0.7]}}
"""


def test_everything_at_once(tmp_path):
    """Gradients, filters, strings, three levels of parameters, three dtypes on disk and none to
    work in.
    """
    make_family(tmp_path, dtypes=(torch.bfloat16, torch.float32, torch.float16))
    text = EVERYTHING.format(**{name: tmp_path / name for name in ("base", "one", "two")})
    assert not differing(*both(Recipe.from_dict(yaml.safe_load(text)), tmp_path))


def test_a_study_s_winner_as_it_is_exported(pair, tmp_path):
    storage, results = f"sqlite:///{tmp_path}/s.db", str(tmp_path / "results")
    assert (
        main(
            [
                "search",
                str(pair / "study.yaml"),
                "--storage",
                storage,
                "--results",
                results,
                "--trials",
                "4",
            ]
        )
        == 0
    )
    ours, theirs = both(read_recipe(tmp_path / "results/tiny/best.yaml"), tmp_path)
    assert not differing(ours, theirs)
