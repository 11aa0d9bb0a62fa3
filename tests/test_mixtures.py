"""Mixtures of experts whose files are not quite what they should be, or stored in another form."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging_tools import load_all
from safetensors.torch import save_file

from evomerge.cli import main
from evomerge.errors import ModelError
from evomerge.merging.build import build_model
from evomerge.recipe import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures

TYPES = ["mixtral", "qwen3_moe", "deepseek_v3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A mixture of each type, base and one."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name in TYPES:
        architectures.make(name, folder / name)
    return folder


@pytest.fixture
def mixture(made, tmp_path):
    """A copy of one, which a test may change."""

    def copy(name):
        shutil.copytree(made / name, tmp_path / name)
        return tmp_path / name

    return copy


def edit(folder, change):
    tensors = {name: tensor.contiguous() for name, tensor in change(load_all(folder)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


def recipes(folder):
    """In slices, and of whole models."""
    models = [
        {"model": f"{folder}/base"},
        {"model": f"{folder}/one", "parameters": {"weight": 0.7}},
    ]
    whole = {"merge_method": "task_arithmetic", "base_model": f"{folder}/base", "models": models}
    return architectures.recipe_of(folder), Recipe.from_dict({**whole, "dtype": "bfloat16"})


def experts_of(folder, layer=2):
    """The names of a layer's experts, expert by expert."""
    names = [n for n in load_all(folder) if f".{layer}." in n and ".experts." in n]
    return sorted(names)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("lacking", [("base",), ("one",), ("base", "one")])
@pytest.mark.parametrize("name", TYPES)
def test_an_expert_s_tensor_that_is_missing_is_named(mixture, tmp_path, name, lacking, whole):
    """Also where no model has it, and where it is the last expert's."""
    folder = mixture(name)
    lost = experts_of(folder / "base")[-1 if whole else 0]
    for model in lacking:
        edit(folder / model, without(lost))
    with pytest.raises(ModelError) as caught:
        build_model(recipes(folder)[whole], tmp_path / "out")
    line = str(caught.value)
    assert f"lacks {lost}" in line
    assert str(folder / lacking[0]) in line or f"the {lacking[0]} lacks" in line
    assert not (tmp_path / "out").exists()


def test_a_whole_expert_that_no_model_has_is_missed(mixture, tmp_path):
    folder = mixture("qwen3_moe")
    lost = [name for name in experts_of(folder / "base") if ".experts.3." in name]
    assert len(lost) == 3
    for model in ("base", "one"):
        edit(folder / model, without(*lost))
    with pytest.raises(ModelError, match=f"the file lacks {lost[0]}"):
        build_model(recipes(folder)[0], tmp_path / "out")


def test_more_experts_than_the_configuration_counts(mixture, tmp_path):
    folder = mixture("mixtral")
    for model in ("base", "one"):
        path = folder / model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_local_experts": 3}))
    with pytest.raises(ModelError, match=r"as config\.json asks for it, \(3, .*Correct config"):
        build_model(recipes(folder)[0], tmp_path / "out")


@pytest.mark.parametrize("whole", [False, True])
def test_a_router_of_another_shape_and_another_number_of_experts(mixture, tmp_path, whole):
    folder = mixture("deepseek_v3")
    router = "model.layers.2.mlp.gate.weight"
    edit(folder / "one", lambda tensors: tensors | {router: torch.zeros(3, 32).bfloat16()})
    with pytest.raises(ModelError, match=rf"one: does not fit the base: {router} is \(3, 32\)"):
        build_model(recipes(folder)[whole], tmp_path / "out")
    path = folder / "one/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_routed_experts": 3}))
    with pytest.raises(ModelError, match="`n_routed_experts` is 3, the base has 4"):
        build_model(recipes(folder)[whole], tmp_path / "out")


def stack(folder):
    """As `save_pretrained(…, save_original_format=False)` stores a model."""
    model = architectures.load(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder, save_original_format=False)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stacked", ["base", "one"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_stacked_experts_beside_single_ones_are_told_apart_and_the_remedy_works(
    mixture, capsys, name, stacked, whole
):
    folder = mixture(name)
    recipe = recipes(folder)[whole]
    (folder / "r.yml").write_text(recipe.to_yaml())
    wanted = architectures.load(build_model(recipe, folder / "wanted")).state_dict()
    stack(folder / stacked)
    capsys.readouterr()
    assert main(["merge", str(folder / "r.yml"), str(folder / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    forms = [r"one tensor \(\S+\.mlp\.experts\.\w+\)", r"several \(such as \S+\.experts\.0\.\S+\)"]
    if stacked == "base":
        forms.reverse()
    told = f"one: does not fit the base: it stores as {forms[0]} what the base stores as {forms[1]}"
    assert re.search(told, line)
    assert "save_pretrained(folder, save_original_format=False)" in line
    for model in ("base", "one"):
        stack(folder / model)
    ours = architectures.load(build_model(recipe, folder / "out")).state_dict()
    assert ours.keys() == wanted.keys()
    for tensor in ours:
        assert torch.equal(ours[tensor], wanted[tensor]), tensor
