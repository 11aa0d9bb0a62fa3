"""Every type of transformers, tiny and random: merged on disk, merged live, searched.

A row a type; the last line is one JSON object {"types", "build", "live", "search"}: numbers of
types. build: `evomerge merge`'s work, and every tensor by the formula b + w (s - b), each slice of
layers with a weight of its own. live: the live model's every tensor and its logits equal, bit for
bit, a fresh load of that folder. search: a study of four candidates runs to its verdict. Types that
transformers itself cannot make, run or load again are not counted; they are named at the end.
`--table FILE` writes docs/MODELS.md's table.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from transformers.models.auto import modeling_auto

from evomerge.cli import main as evomerge
from evomerge.merging.build import build_model
from evomerge.merging.checkpoints.open_model import open_model
from evomerge.merging.live import LiveModel
from evomerge.recipe import Recipe, task_arithmetic_recipe

WEIGHTS = (0.7, 1.2)


@dataclass
class Row:
    """What worked for one type."""

    name: str
    images: bool  # it has a vision tower
    made: bool = False
    passed: dict[str, bool] = field(default_factory=dict)
    class_name: str = ""
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types (all that write text)")
    parser.add_argument("--table", type=Path, help="write the table of docs/MODELS.md here")
    parser.add_argument(
        "--vllm-registry",
        type=Path,
        help="vLLM's model_executor/models/registry.py, for the table's column on vLLM",
    )
    parser.add_argument("--no-search", action="store_true", help="build and live merge only")
    parser.add_argument("--traceback", action="store_true", help="show where a type failed")
    args = parser.parse_args()
    _quiet()
    text, images = text_types(), image_types()
    rows = []
    for name in args.types or [*text, *images]:
        row = Row(name, name in images)
        with tempfile.TemporaryDirectory(prefix="evomerge-bench-") as folder:
            _try(row, Path(folder), not args.no_search, args.traceback)
        rows.append(row)
        marks = " ".join(f"{step} {_mark(row.passed.get(step))}" for step in STEPS)
        print(f"{name:28} {marks if row.made else 'not made'}  {row.reason}"[:240], flush=True)
    counted = [row for row in rows if row.made]
    figures = {"types": len(counted)}
    for step in STEPS:
        figures[step] = sum(row.passed.get(step, False) for row in counted)
    if args.table is not None:
        known = vllm_classes(args.vllm_registry)
        args.table.write_text(table(rows, known), encoding="utf-8")
    print(json.dumps(figures))


STEPS = ("build", "live", "search")


def text_types() -> list[str]:
    """Types with a class for causal language models and none for images."""
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(images) - NO_DECODERS)


def image_types() -> list[str]:
    """Types that read images and text."""
    return sorted(set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - NO_DECODERS)


# encoders and encoder-decoders that can be made to write, but are not decoders of text
NO_DECODERS = {
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot"),
    *("blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "marian", "mbart"),
    *("megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta"),
    *("roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper", "xlm", "xlm-roberta"),
    *("xlm-roberta-xl", "xlnet", "xmod", "musicgen", "musicgen_melody", "moshi", "udop"),
    *("pix2struct", "vision-encoder-decoder", "git", "blip", "pp_formulanet", "florence2", "pi0"),
    *("t5gemma2",),
}


def _try(row: Row, folder: Path, search: bool, show: bool) -> None:
    steps: list[tuple[str, Callable[[], None]]] = [
        ("build", lambda: check_build(folder)),
        ("live", lambda: check_live(folder)),
    ]
    if search:
        steps.append(("search", lambda: check_search(folder)))
    try:
        make(row.name, folder)
        config = json.loads((folder / "base/config.json").read_text(encoding="utf-8"))
        row.class_name = config["architectures"][0]
    except Exception as error:
        row.reason = _line(error)
        if show:
            traceback.print_exc()
        return
    row.made = True
    for step, check in steps:
        try:
            with _silence(show):
                check()
            row.passed[step] = True
        except (Exception, SystemExit) as error:
            row.passed[step] = False
            row.reason = row.reason or f"{step}: {_line(error)}"
            if show:
                traceback.print_exc()


def make(name: str, folder: Path) -> None:
    """base and one, which transformers loads again and which write."""
    config = tiny_models.tiny_config(name)
    for seed, model in enumerate(("base", "one")):
        tiny_models.make_tiny(config, folder / model, seed)
    loaded = load(folder / "base")
    loaded(input_ids=torch.tensor([[5, 6, 7, 8]]))


def load(folder: Path) -> Any:
    """A fresh load in bfloat16, as for answering."""
    from evomerge.merging.architecture.empty_model import model_class

    config = transformers.AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=torch.bfloat16).eval()


def recipe_of(folder: Path) -> Recipe:
    """Two slices of layers, each with its weight."""
    count = tiny_models.LAYERS
    slices = [(0, count // 2), (count // 2, count)]
    weights = [[weight] for weight in WEIGHTS]
    return task_arithmetic_recipe(
        str(folder / "base"), [str(folder / "one")], slices, weights, dtype="bfloat16"
    )


def check_build(folder: Path) -> None:
    """Merge to disk, and compare every tensor with the formula in the dtype of the merge."""
    build_model(recipe_of(folder), folder / "out")
    base, one, out = (open_model(str(folder / name)) for name in ("base", "one", "out"))
    assert out.keys == base.keys, sorted(out.keys ^ base.keys)[:3]
    allowed = (0.0, *WEIGHTS)
    for name in out.keys:
        merged, b, s = out.get_tensor(name), base.get_tensor(name), one.get_tensor(name)
        if not merged.is_floating_point():
            assert torch.equal(merged, b), name
            continue
        b, s = b.bfloat16(), s.bfloat16()
        fits = [torch.equal(merged, b + (s - b) * torch.tensor(w).bfloat16()) for w in allowed]
        assert any(fits), f"{name} is not base + weight * delta"


@torch.no_grad()
def check_live(folder: Path) -> None:
    """The live model against a fresh load of the folder that `check_build` has written."""
    model = load(folder / "base")
    base, one = open_model(str(folder / "base")), open_model(str(folder / "one"))
    live = LiveModel(model, base, [one])
    live.apply(recipe_of(folder))
    fresh = load(folder / "out")
    ours, theirs = model.state_dict(), fresh.state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"live: {name} differs"
    moved = [
        name
        for name, tensor in load(folder / "base").state_dict().items()
        if not torch.equal(tensor, theirs[name])
    ]
    assert moved, "nothing was merged"
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    a, b = model(input_ids=ids).logits, fresh(input_ids=ids).logits
    assert torch.equal(a, b), "live: the logits differ"


def check_search(folder: Path) -> None:
    """A study of four candidates, through the command line."""
    tasks = [json.dumps({"input": f"{i} and {i}", "output": str(2 * i)}) for i in range(8)]
    (folder / "tasks.jsonl").write_text("\n".join(tasks) + "\n", encoding="utf-8")
    study = (
        f"genome: {{base_model: {folder}/base, models: [{folder}/one], layer_granularity: 2}}\n"
        f"tasks: [{{file: {folder}/tasks.jsonl}}]\n"
        "judge: {kind: rules}\n"
        "search: {trials: 4, population: 4, warm_start_steps: 2, dtype: bfloat16}\n"
        "generation: {max_new_tokens: 4}\n"
        "engine: {device: cpu}\n"
    )
    (folder / "study.yml").write_text(study, encoding="utf-8")
    with contextlib.chdir(folder):  # its storage and results
        status = evomerge(["search", "study.yml"])
    assert status == 0, f"search ended with {status}"


def vllm_classes(registry: Path | None) -> set[str]:
    """The classes that vLLM's registry names."""
    if registry is None:
        return set()
    classes: set[str] = set()
    for node in ast.walk(ast.parse(registry.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            classes.update(key for key in keys if isinstance(key, str))
    return classes


def table(rows: list[Row], vllm: set[str]) -> str:
    """The table of docs/MODELS.md."""
    lines = ["| type | reads images | merged on disk | merged live | searched | vLLM has it |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        if row.made:
            marks = " | ".join(_mark(row.passed.get(step)) for step in STEPS)
            images, known = _mark(row.images), _mark(row.class_name in vllm)
            lines.append(f"| {row.name} | {images} | {marks} | {known} |")
    return "\n".join(lines) + "\n"


def _mark(passed: bool | None) -> str:
    if passed is None:
        return "-"
    return "yes" if passed else "no"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def _silence(show: bool) -> Iterator[None]:
    if show:
        yield
        return
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    except AssertionError as error:
        last = (err.getvalue().strip().splitlines() or [""])[-1]
        raise AssertionError(f"{error} {last}") from error


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    os.environ["TQDM_DISABLE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
