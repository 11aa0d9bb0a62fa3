"""What a study gives says all that is needed to build its winner again."""

import re

import pytest
from merging_tools import differing, load_all

from evomerge.cli import main
from evomerge.inference.opening import open_study
from evomerge.searching.snapshot import load_snapshot

METHODS = {"dare_ties": 5, "slerp": 0, "ties": 0, "linear": 0}


@pytest.mark.parametrize("method", METHODS)
def test_the_exported_winner_is_the_one_that_answered(pair, tmp_path, capsys, method):
    """Merged from best.yaml with the seed that it names, exported as a folder, or live in an
    engine: the same bits.
    """
    storage, results, seed = f"sqlite:///{tmp_path}/s.db", tmp_path / "results", METHODS[method]
    settings = [
        "--set",
        f"genome.merge_method={method}",
        "--set",
        f"search.seed={seed}",
        "--trials",
        "4",
    ]
    where = ["--storage", storage, "--results", str(results)]
    assert main(["search", str(pair / "study.yaml"), *where, *settings]) == 0
    best = results / "tiny/best.yaml"
    named = re.findall(r"--random-seed (\d+)", best.read_text())
    assert named == ([str(seed)] if method == "dare_ties" else [])
    assert (
        main(["merge", str(best), str(tmp_path / "merged"), "--random-seed", *(named or ["0"])])
        == 0
    )
    assert (
        main(
            [
                "export",
                "tiny",
                "--storage",
                storage,
                "--model",
                str(tmp_path / "exported"),
                "-o",
                str(tmp_path / "again.yaml"),
            ]
        )
        == 0
    )
    assert (tmp_path / "again.yaml").read_text() == best.read_text()
    merged = load_all(tmp_path / "merged")
    assert not differing(merged, load_all(tmp_path / "exported"))
    engine = open_study(storage, "tiny", []).engine
    assert not differing(merged, {name: p.data for name, p in engine.model.named_parameters()})
    header = (results / "tiny/trials.csv").read_text().splitlines()[0]
    assert header.count("weight ") == load_snapshot(storage, "tiny").genome.dimensions
    capsys.readouterr()
