"""An exported recipe through real mergekit: the same bits.

mergekit lives in an environment of its own; EVOMERGE_MERGEKIT names its `mergekit-yaml`, else the PATH is searched.
"""

import os
import shutil
import subprocess

import pytest
import torch
from conftest import make_model, save
from safetensors.torch import load_file
from test_merging import SLICES, moved

from evomerge.merging.build import build_model
from evomerge.recipe import task_arithmetic_recipe

MERGEKIT = os.environ.get("EVOMERGE_MERGEKIT") or shutil.which("mergekit-yaml")


@pytest.mark.skipif(MERGEKIT is None, reason="mergekit is not here: install mergekit==0.1.5 elsewhere and set EVOMERGE_MERGEKIT")
@pytest.mark.parametrize(("tied", "siblings"), [(False, ["one"]), (True, ["one"]), (False, ["one", "two"])])
def test_mergekit_gives_the_same_bits(tmp_path, tied, siblings):
    base = make_model(0, tie_word_embeddings=tied)
    save(base, tmp_path / "base")
    for i, name in enumerate(siblings):
        save(moved(base, i + 1, 0.1), tmp_path / name)
    rows = [[0.31 + 0.2 * i - 0.5 * m for m in range(len(siblings))] for i in range(len(SLICES))]
    recipe = task_arithmetic_recipe(str(tmp_path / "base"), [str(tmp_path / s) for s in siblings], SLICES, rows)
    (tmp_path / "best.yaml").write_text(recipe.to_yaml())
    subprocess.run([str(MERGEKIT), str(tmp_path / "best.yaml"), str(tmp_path / "theirs")], check=True, capture_output=True)
    build_model(recipe, tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert sum(int((ours[n] != theirs[n]).sum()) for n in ours) == 0
    assert all(ours[n].dtype == theirs[n].dtype == torch.bfloat16 for n in ours)
