"""mergekit 0.1.5's own outputs, bit for bit."""

import json
import shutil

import pytest
from merging_tools import differing, load_all

from evomerge.cli import main

CASES = {
    "seed40_llama": [],
    "tied_llama": [],
    "gqa_qwen2": [],
    "fp32_llama": [],
    "fp32calc_bf16out": [],
    "models_gradient": [],
    "sharded": ["--out-shard-size", "20K"],
    "ta_normalize_lambda": [],
    "ties": [],
    "dare_ties_seed42": ["--random-seed", "42"],
    "slerp": [],
    "linear": [],
    "linear_nonorm": [],
    "vocab_mismatch_tokbase": [],
}
# of the other methods
MORE_CASES = {
    "passthrough_one_model": [],
    "passthrough_repeat": [],
    "passthrough_interleaved": [],
    "passthrough_scaled": [],
    "nuslerp": [],
    "nuslerp_task": [],
    "multislerp": [],
    "multislerp_task": [],
    "karcher": [],
    "della": ["--random-seed", "7"],
    "della_linear": ["--random-seed", "7"],
    "breadcrumbs": [],
    "breadcrumbs_ties": [],
    "model_stock": [],
    "model_stock_filter_wise": [],
    "sce": [],
    "nearswap": [],
    "arcee_fusion": [],
    "ram": [],
    "ramplus_tl": [],
}


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES])
def test_every_bit(shared, tmp_path, monkeypatch, case):
    folder = tmp_path / case
    stored, flags = ("golden", CASES) if case in CASES else ("golden2", MORE_CASES)
    shutil.copytree(shared / stored / case, folder)
    monkeypatch.chdir(folder)
    assert main(["merge", "config.yml", "out", *flags[case]]) == 0
    assert not differing(load_all(folder / "out"), load_all(folder / "expected"))
    wanted = {p.name for p in (folder / "expected").iterdir()}
    if case == "vocab_mismatch_tokbase":
        wanted.add("generation_config.json")  # which mergekit loses with a tokenizer source
    assert {p.name for p in (folder / "out").iterdir()} == wanted
    ignored = {"transformers_version"}
    config, wanted = (
        json.loads((folder / d / "config.json").read_text()) for d in ("out", "expected")
    )
    assert {k: v for k, v in config.items() if k not in ignored} == {
        k: v for k, v in wanted.items() if k not in ignored
    }
    tokens, wanted = (
        json.loads((folder / d / "tokenizer_config.json").read_text()) for d in ("out", "expected")
    )
    # how it was loaded, where a tokenizer is saved anew
    anew = dict.fromkeys(("is_local", "local_files_only"))
    assert tokens | anew == wanted | anew
    for name in (
        "mergekit_config.yml",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        if (folder / "expected" / name).exists():
            assert (folder / "out" / name).read_bytes() == (
                folder / "expected" / name
            ).read_bytes(), name
    if case == "sharded":
        ours, theirs = (
            json.loads((folder / d / "model.safetensors.index.json").read_text())["weight_map"]
            for d in ("out", "expected")
        )
        assert ours.keys() == theirs.keys()


def test_different_vocabularies_are_refused(shared, tmp_path, monkeypatch, capsys):
    shutil.copytree(shared / "golden/vocab_mismatch_error", tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    assert main(["merge", "config.yml", "out"]) == 2
    assert "vocab_size" in capsys.readouterr().err
    assert not (tmp_path / "case/out").exists()
