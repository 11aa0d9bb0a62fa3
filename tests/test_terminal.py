"""What a terminal shows: no control characters from outside, and no traceback wherever it goes."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest

from evomerge.cli import main
from evomerge.console import Console, put, put_json, shown
from evomerge.errors import InputError

CODES = ["\x1b[2J", "\x1b]0;title\x07", "\r", "\n", "\x00", "\x08", "\x7f", "\x9b31m", "\u202e"]
CODES += ["\u2028", "\u2066", "\x85", "\u200b", "\ufeff", "\u2060", "\xad", "\ud7fc", "\ue000"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("code", CODES, ids=ascii)
def test_control_characters_are_shown_escaped_once(code, capsys):
    stream = io.StringIO()
    console = Console(stream)
    console.say(f"wrote a{code}b")
    console.say(shown(f"wrote a{code}b"))
    first, second, _ = stream.getvalue().split("\n")
    assert first == second
    assert first.startswith("wrote a\\")
    assert first.isprintable()
    terminal = Terminal()
    Console(terminal).status(f"a{code}b")
    assert terminal.getvalue().isprintable()
    put(f"a{code}b")
    put_json({"a": f"a{code}b"})
    line, text, _ = capsys.readouterr().out.split("\n")
    assert line.isprintable()
    assert text.isprintable()
    assert json.loads(text) == {"a": f"a{code}b"}


def test_ordinary_text_is_shown_as_it_is():
    text = "日本語 é 👩‍👧 ❤️ می‌خواهم a\u3000b a\tb \\n [1, 2]"
    assert shown(text) == text


def test_a_console_still_clears_its_own_status():
    terminal = Terminal()
    console = Console(terminal)
    console.status("one")
    console.say("two")
    assert terminal.getvalue() == "one\r\x1b[2Ktwo\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["show", "\x1b[31mred"],
        ["check", "\x1b[31mred.yaml"],
        ["merge", "\x1b[31mred.yaml", "out"],
        ["check", "x", "--\x1b[31mred"],
        ["infer", "--tasks", "t", "--seed", "\x1b[31m"],
        ["\x1b[31mred"],
        ["knowledge", "check", "\x1b[31mred.yaml"],
    ],
    ids=ascii,
)
def test_errors_show_what_was_typed_escaped(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(argv)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\\x1b" in captured.err or "\\\\x1b" in captured.err


def test_warnings_of_the_package_are_shown_escaped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["check", "none.yaml"])
    capsys.readouterr()
    logging.getLogger("evomerge.merging").warning("%s has no tokenizer", "\x1b[31m")
    assert capsys.readouterr().err == "\\x1b[31m has no tokenizer\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_a_stream_that_cannot_be_written_does_not_end_the_work(error):
    class Full(io.StringIO):
        def write(self, text):
            raise error

    console = Console(Full())
    console.say("a")
    console.status("b")
    closed = io.StringIO()
    closed.close()
    console = Console.__new__(Console)
    console.stream, console.tty, console._shown, console._last = closed, True, False, 0.0
    console.say("c")


def test_a_stream_of_few_characters_shows_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream).say("日本")
    assert raw.getvalue() == b"\\u65e5\\u672c\n"


def test_an_error_may_hold_any_number_or_nesting():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for found in (10**5000, nested):
        assert len(str(InputError("is odd", found=found))) < 200
        while isinstance(found, list) and found:  # or its end recurses
            found = found.pop()


def run(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environ):
    return subprocess.run(
        [sys.executable, "-m", "evomerge", *argv],
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environ},
        timeout=120,
        check=False,
    )


def test_an_ascii_terminal_gets_escapes(tmp_path):
    study = tmp_path / "学習.yaml"
    study.write_text("x: 学習\n", encoding="utf-8")
    for environ in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "LANG": "C"}):
        found = run("check", str(study), **environ)
        assert found.returncode == 2
        assert found.stderr.count(b"\n") == 1
        assert b"Traceback" not in found.stderr
        assert run("--help", **environ).returncode == 0


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    found = run("schema", stdout=write)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argv", [["schema"], ["--help"], ["--version"]], ids=str)
def test_a_full_stdout_is_one_line(argv):
    with open("/dev/full", "wb") as full:
        found = run(*argv, stdout=full)
    assert found.returncode == 1
    assert found.stderr.count(b"\n") == 1
    assert b"No space left" in found.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stderr_changes_no_exit_code():
    with open("/dev/full", "wb") as full:
        assert run("check", "none.yaml", stderr=full).returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_closed_streams_are_no_error():
    for closed, code in ((">&-", 0), (">&- 2>&-", 0)):
        command = f"{sys.executable} -m evomerge schema {closed}"
        found = subprocess.run(["sh", "-c", command], capture_output=True, timeout=120, check=False)
        assert (found.returncode, found.stderr) == (code, b"")
