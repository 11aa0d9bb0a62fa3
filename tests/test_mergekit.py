"""Recipes through real mergekit: the same bits.

mergekit lives in an environment of its own: EVOMERGE_MERGEKIT_PYTHON names that environment's
Python, else `mergekit-yaml` is looked for on the PATH.
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, save
from jinja2.exceptions import TemplateError
from merging_tools import SLICES, differing, load_all, make_family
from safetensors.torch import save_file
from transformers import AutoTokenizer

from evomerge.cli import main
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.recipe import Recipe, read_recipe, task_arithmetic_recipe
from evomerge.recipe.mergekit_keys import CHAT_TEMPLATES
from evomerge.reporting.card import model_card

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import architectures

PYTHON, SCRIPT = os.environ.get("EVOMERGE_MERGEKIT_PYTHON"), shutil.which("mergekit-yaml")
COMMAND = [PYTHON, "-m", "mergekit.scripts.run_yaml"] if PYTHON else [SCRIPT]
pytestmark = pytest.mark.skipif(
    COMMAND == [None],
    reason=(
        "mergekit is not here: install mergekit==0.1.5 elsewhere and set EVOMERGE_MERGEKIT_PYTHON"
    ),
)


def both(recipe, folder, *options):
    """Our tensors and mergekit's."""
    (folder / "recipe.yml").write_text(recipe.to_yaml())
    command = [*COMMAND, "recipe.yml", "theirs", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    build_model(recipe, folder / "ours", write_card=model_card)
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


READ_OVER = """
merge_method: task_arithmetic
base_model: {{model: {{path: {base}, revision: null}}}}
name: first
random_seed: 3
const_tag: &one {one}@main
dtype: torch.bfloat16
parameters: {{embed_slerp: true, t: 0.5}}
modules:
  default:
    parameters: {{weight: [{{filter: mlp, value: 0.25}}], normalize: false}}
    slices:
    - merge_method: linear
      residual_weight: 0.5
      sources:
      - {{model: *one, layer_range: ["0", 4.0], parameters: {{weight: 0.5, normalize: true}}, x: 1}}
      - {{model: {base}, layer_range: [0, 4], parameters: {{weight: 3.0}}}}
"""


def test_what_mergekit_reads_over(tmp_path):
    make_family(tmp_path)
    text = READ_OVER.format(**{name: tmp_path / name for name in ("base", "one")})
    recipe = Recipe.from_dict(yaml.safe_load(text))
    assert len(recipe.unread) == 10
    assert not differing(*both(recipe, tmp_path))


def test_slices_of_models_of_other_depths(tmp_path):
    for seed, (name, layers) in enumerate((("base", 4), ("deep", 6), ("flat", 2))):
        save(make_model(seed, layers=layers), tmp_path / name)
    pieces = []
    for start, (other, first) in ((0, ("deep", 4)), (2, ("flat", 0))):
        sources = []
        for name, at in (("base", start), (other, first)):
            source = {"model": str(tmp_path / name), "layer_range": [at, at + 2]}
            sources.append(source | {"parameters": {"weight": 0.3}})
        pieces.append({"sources": sources})
    data = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    recipe = Recipe.from_dict(data | {"dtype": "bfloat16", "slices": pieces})
    assert not differing(*both(recipe, tmp_path))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_built_in_chat_templates(tmp_path, name):
    """The same prompts as from mergekit's template of that name."""
    make_family(tmp_path)
    models = [{"model": str(tmp_path / "one"), "parameters": {"weight": 0.5}}]
    data = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    both(Recipe.from_dict(data | {"models": models, "chat_template": name}), tmp_path)
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / side) for side in ("ours", "theirs"))
    talks = [[{"role": "user", "content": " x "}]]
    for roles in (("system", "user", "assistant", "user"), ("user", "assistant", "user_context")):
        talks.append([{"role": role, "content": f" {role}\n"} for role in roles])
    for talk, more in itertools.product(talks, (False, True)):
        prompts = []
        for tokenizer in (ours, theirs):
            with contextlib.suppress(TemplateError):
                prompts.append(
                    tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=more)
                )
        assert len(prompts) != 1
        assert len(set(prompts)) <= 1


def name_as_on_the_hub(folder):
    """Gemma 3's vision tower; transformers 5 saves it without a part of its names."""
    tensors = {}
    for name, tensor in load_all(folder).items():
        if "vision_tower.head" not in name:
            tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties"])
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_a_text_decoder_in_slices_beside_modules_that_are_the_base_s(tmp_path, name, method):
    """The form in which models of several modules are exported."""
    architectures.make(name, tmp_path)
    if name == "gemma3":
        for model in ("base", "one"):
            name_as_on_the_hub(tmp_path / model)
    modules = open_model(str(tmp_path / "base")).architecture.modules
    data = architectures.recipe_of(tmp_path).to_dict() | {"merge_method": method}
    if method == "dare_ties":
        for piece in data["slices"]:
            piece["sources"][-1].setdefault("parameters", {})["density"] = 0.6
    recipe = Recipe.from_dict(data).in_modules(modules)
    ours, theirs = both(recipe, tmp_path, "--random-seed", "0")
    assert not differing(ours, theirs)
