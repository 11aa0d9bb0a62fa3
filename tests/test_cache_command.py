"""The size of a study's answer cache, and clearing it."""

import sqlite3

import pytest

from evomerge.answering.cache import AnswerCache, cache_size, clear
from evomerge.answering.engine import Answer
from evomerge.cli import main
from evomerge.searching.ledger import only_worker


@pytest.fixture(scope="module")
def searched(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    url = f"sqlite:///{folder}/s.db"
    run = [
        "search",
        str(pair / "study.yaml"),
        "--storage",
        url,
        "--results",
        str(folder / "r"),
        "--set",
        "search.trials=4",
    ]
    assert main(run) == 0
    return folder, url, run


def batches(path):
    return sqlite3.connect(path).execute("SELECT count(*) FROM batches").fetchone()[0]


def command(capsys, *argv):
    capsys.readouterr()
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_show_and_cache_say_how_large_it_is(searched, capsys):
    folder, url, _ = searched
    path = folder / "tiny.answers.sqlite"
    line = (
        f"answer cache: {path.stat().st_size / 1000:.1f} kB, {batches(path)} batches, in {path}\n"
    )
    assert batches(path) > 10
    assert command(capsys, "cache", "tiny", "--storage", url) == (0, line, "")
    code, out, _ = command(capsys, "show", "tiny", "--storage", url)
    assert code == 0
    assert out.endswith("\n" + line)


def test_clear(searched, capsys):
    folder, url, run = searched
    path = folder / "tiny.answers.sqlite"
    before = command(capsys, "show", "tiny", "--json", "--storage", url)
    with only_worker(url, "tiny"):
        code, out, err = command(capsys, "cache", "tiny", "--clear", "--storage", url)
        assert (code, out) == (2, "")
        assert "another process" in err
    assert path.exists()
    size = path.stat().st_size
    code, out, err = command(capsys, "cache", "tiny", "--clear", "--storage", url)
    assert (code, out, err) == (0, "", f"cleared {path}: {size / 1000:.1f} kB\n")
    assert not path.exists()
    assert command(capsys, "cache", "tiny", "--storage", url) == (0, "answer cache: none\n", "")
    assert command(capsys, "cache", "tiny", "--clear", "--storage", url)[0] == 0
    assert command(capsys, "show", "tiny", "--json", "--storage", url) == before
    assert main([*run, "--trials", "8"]) == 0  # the study goes on without it
    assert path.exists()


def test_an_unknown_study_is_named_and_nothing_is_made(capsys, tmp_path):
    for options in ([], ["--clear"]):
        code, out, err = command(
            capsys, "cache", "nobody", "--storage", f"sqlite:///{tmp_path}/none.db", *options
        )
        assert (code, out) == (2, "")
        assert "no study 'nobody'" in err
    assert not list(tmp_path.iterdir())


def test_size_and_clear_of_files(tmp_path):
    path = tmp_path / "a b?#%.sqlite"  # a URI would take these for something else
    assert cache_size(path) is None
    assert clear(path) == 0
    assert not path.exists()
    cache = AnswerCache(path, "scope")
    cache.put("k", [Answer("あ", False, 1)])
    cache.put("l", [Answer("", True, 0)])
    assert cache_size(path) == (path.stat().st_size, 2)
    cache.close()
    assert clear(path) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [b"", b"no database at all", b"SQLite format 3\x00" + bytes(50)],
    ids=["empty", "text", "cut"],
)
def test_a_damaged_cache_is_said_and_can_be_cleared(searched, capsys, data):
    folder, url, _ = searched
    path = folder / "tiny.answers.sqlite"
    path.write_bytes(data)
    for name in ("cache", "show"):
        code, out, _ = command(capsys, name, "tiny", "--storage", url)
        assert code == 0
        assert out.splitlines()[-1] == f"answer cache: {len(data)} B, damaged, in {path}"
    assert command(capsys, "cache", "tiny", "--clear", "--storage", url)[0] == 0
    assert not path.exists()
