import hashlib
import json

import pytest

from evomerge.errors import TaskError
from evomerge.tasks import Task, load_tasks, split_tasks, tasks_hash

ROWS = [
    {"task_id": 0, "input": "一つ目"},
    {"task_id": 1, "input": "二つ目\n続き", "output": "答え"},
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_of_every_kind(tmp_path, end, indent, mark):
    path = tmp_path / "tasks.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False, indent=indent) for row in ROWS) + "\n"
    path.write_bytes(mark + text.replace("\n", end).encode())
    assert [t.input for t in load_tasks(path)] == [row["input"] for row in ROWS]


def test_csv_and_excel_and_parquet(tmp_path):
    import openpyxl
    import pyarrow as pa
    import pyarrow.parquet as parquet

    wanted = (Task(7, "問い", "答え"), Task(8, "次", ""))
    (tmp_path / "t.csv").write_text(
        "task_id,input,output\n7,問い,答え\n8,次,\n", encoding="utf-8-sig"
    )
    book = openpyxl.Workbook()
    for row in (["task_id", "input", "output"], [7, "問い", "答え"], [8, "次", None]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    parquet.write_table(
        pa.table({"task_id": [7, 8], "input": ["問い", "次"], "output": ["答え", None]}),
        tmp_path / "t.parquet",
    )
    for name in ("t.csv", "t.xlsx", "t.parquet"):
        assert load_tasks(tmp_path / name) == wanted


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"task_id": 0}\n', ["`input`", "line 1"]),
        (
            b'{"task_id": 0, "input": "a"}\n{"task_id": 0, "input": "b"}\n',
            ["duplicate", "line 2", "line 1"],
        ),
        (b'{"input": "a"}\n{"input": \n', ["JSON", "tasks.jsonl, line"]),
        ('{"input": "あ"}'.encode("cp932"), ["UTF-8"]),
        (b'{"input": 3}\n', ["not text"]),
        (b"[1]\n", ["line 1"]),
        (b"", ["no tasks"]),
    ],
)
def test_bad_files(tmp_path, data, words):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(data)
    with pytest.raises(TaskError) as caught:
        load_tasks(path)
    for word in words:
        assert word in str(caught.value)


def test_split_is_seeded_and_keeps_the_kinds():
    tasks = [Task(i, f"t{i}", kind="ab"[i % 2]) for i in range(30)]
    split = split_tasks(tasks, 0.5, seed=1)
    assert split == split_tasks(tasks, 0.5, seed=1) != split_tasks(tasks, 0.5, seed=2)
    assert {t.task_id for t in split.search} | {t.task_id for t in split.held_out} == set(range(30))
    assert len(split.search) == len(split.held_out) == 15
    assert abs(sum(t.kind == "a" for t in split.search) - 7.5) <= 0.5


def test_tasks_of_several_sources_are_stored_as_before():
    """Version 0.1 wrote the source into the id: its studies' hashes and grades must still fit."""
    tasks = [Task(3, "a", "b", source=0), Task("x", "c", kind="k", source=1)]
    before = [
        {"task_id": "0-3", "input": "a", "output": "b", "eval_aspect": "", "kind": ""},
        {"task_id": "1-x", "input": "c", "output": "", "eval_aspect": "", "kind": "k"},
    ]
    assert [task.key for task in tasks] == ["0-3", "1-x"]
    text = json.dumps(before, ensure_ascii=False).encode()
    assert tasks_hash(tasks) == hashlib.sha256(text).hexdigest()
    alone = Task(3, "a")
    assert (alone.stored_id, alone.key) == (3, "3")
