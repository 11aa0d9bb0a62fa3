"""A server that refuses one prompt: that task is marked, the others are answered; where it refuses
every prompt, the run ends.
"""
# ruff: noqa: F401  # plain is a fixture

import json

import pytest
from chat_server import Server, status, usual
from server_tools import fails, infer, kept, plain, write_tasks

pytest.importorskip("openai", reason="the extra `server` is not installed")

import evomerge

AZURE = {
    "error": {
        "message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
        "management policy. Please modify your prompt and retry.",
        "code": "content_filter",
        "status": 400,
    }
}
FILTERED = {"text": "", "finish_reason": "content_filter"}
REFUSALS = {
    "too long": (status(400, "maximum context length is 8 tokens"), "maximum context length"),
    "too large": (status(413, "prompt is too long: 9 tokens > 8"), "status 413"),
    "a filter": (status(400, body=AZURE), "content management policy"),
    "deepseek": (status(400, "Content Exists Risk"), "Content Exists Risk"),
    "openrouter": (status(403, "Your chosen model requires moderation: flagged"), "moderation"),
    "a law": (status(451, "Unavailable For Legal Reasons"), "status 451"),
    "no reason": (status(400, body={}), "no reason given"),
    "a list": (status(422, body={"detail": [{"msg": "bad\nfield"}]}), "status 422"),
    "an answer that is filtered": (FILTERED, "content filter"),
}


def rows(folder):
    lines = (folder / "a.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize("name", REFUSALS)
def test_one_refused_prompt_is_marked_and_the_others_are_answered(tmp_path, capsys, name, place):
    refusal, words = REFUSALS[name]
    texts = [f"課題{i}" for i in range(10)]
    write_tasks(tmp_path, texts)
    server = Server(plan=lambda number, prompt: refusal if prompt == f"user: 課題{place}" else None)
    with server.running() as url:
        assert infer(tmp_path, url, "--concurrency", "3") == 0
        found = rows(tmp_path)
        assert [row["output"] for i, row in enumerate(found) if i != place] == [
            usual(f"user: {text}") for i, text in enumerate(texts) if i != place
        ]
        marked = found[place]
        assert marked["output"] == ""
        assert marked["unfinished"].startswith("refused: ")
        assert words in marked["unfinished"]
        said = capsys.readouterr().err
        assert (
            f"the server refused 1 of 10 tasks, which are marked in the file (task {place}" in said
        )
        assert len(kept(tmp_path)) == 9
        # the same command asks for it alone
        before = len(server.prompts())
        server.plan = lambda number, prompt: None
        assert infer(tmp_path, url, "--concurrency", "3") == 0
        assert len(server.prompts()) == before + 1
    assert [row["output"] for row in rows(tmp_path)] == [usual(f"user: {text}") for text in texts]
    assert not any("unfinished" in row for row in rows(tmp_path))
    assert not (tmp_path / "a.jsonl.part").exists()


@pytest.mark.parametrize(
    "refusal",
    [
        status(400, "maximum context length is 8 tokens"),
        status(400, "max_tokens is too large: 256"),
        status(422, body={"detail": "unknown field top_p"}),
    ],
)
def test_a_server_that_takes_no_prompt_ends_the_run(tmp_path, capsys, refusal):
    write_tasks(tmp_path, [f"課題{i}" for i in range(40)])
    server = Server(plan=lambda number, prompt: refusal)
    with server.running() as url:
        fails(capsys, 1, infer(tmp_path, url, "--concurrency", "2"), "status 4")
    assert len(server.prompts()) < 8, "40 tasks were sent to a server that takes none"
    assert not (tmp_path / "a.jsonl").exists()


def test_where_every_task_is_refused_the_command_fails(tmp_path, capsys):
    write_tasks(tmp_path, ["長い" * 40, "長い" * 50])
    long = status(400, "maximum context length is 8 tokens")
    with Server(plan=lambda number, prompt: long if "長" in prompt else None).running() as url:
        assert infer(tmp_path, url) == 1
    assert "the server refused 2 of 2 tasks" in capsys.readouterr().err
    assert all(row["unfinished"].startswith("refused: ") for row in rows(tmp_path))


def test_what_is_left_is_still_chosen_and_checked(tmp_path, capsys):
    texts = [f"課題{i}" for i in range(5)]
    write_tasks(tmp_path, texts)
    server = Server(
        plan=lambda number, prompt: status(400, body=AZURE) if prompt.endswith("2") else None
    )
    with server.running() as url:
        result = evomerge.infer(tmp_path / "tasks.jsonl", server=url, best_of=3, self_check="all")
    assert (result.answered, result.unfinished, result.refused) == (4, 0, 1)
    assert [record.unfinished is None for record in result] == [True, True, False, True, True]
    assert any(note.startswith("best of 3") for note in result.notes)
    assert any(note.startswith("self-check") for note in result.notes)
