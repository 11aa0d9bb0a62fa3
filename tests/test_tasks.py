import hashlib
import json
import time

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


def notebook(path):
    """The records of a file as the competition's notebook reads them, rule by rule."""
    records, item = [], ""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            item += line.strip()
            if item.endswith("}"):
                records.append(json.loads(item))
                item = ""
    return records


@pytest.mark.parametrize(
    "text",
    [
        '{"task_id": 0, "input": "一\n二"}\n{"task_id": 1, "input": "三"}\n',
        '{"task_id": 0, "input": "一 \n\n  二\u3000\n三", "output": "a\\nb\nc"}\n',
        '{\n  "task_id": 0,\n  "input": "一\n二"\n}\n{"task_id": 1, "input": "y"}',
        '{"task_id": 0, "input": "\u2028a\u2028b\x85\nc \\"d\n\\""}\n',
        '{"task_id": 0, "input": "a\n\n\n\n\nb"}\n{"task_id": 1,\n"input": "c"}\n',
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_raw_line_break_in_a_string_is_read_as_the_notebook_does(tmp_path, text, end):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(text.replace("\n", end).encode())
    found = [(task.task_id, task.input, task.output) for task in load_tasks(path)]
    assert found == [(r["task_id"], r["input"], r.get("output", "")) for r in notebook(path)]


def test_a_line_of_a_string_may_end_like_an_object(tmp_path):
    """The notebook fails at it."""
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"task_id": 0, "input": "{}\n,{}"}\n', encoding="utf-8")
    assert load_tasks(path)[0].input == "{},{}"


def test_a_list_of_json_and_raw_tabs(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text('[{"input": "a\tb\nc"},\n{"input": "d"}]', encoding="utf-8")
    assert [task.input for task in load_tasks(path)] == ["a\tbc", "d"]


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ('{"input": "a"}\n{"input": "b}\n{"input": "c"}\n', "line 2", "line 3"),
        ('{"input": "a\nb"}\n\n{"input": }\n', "line 4", "Expecting value"),
        ('{"input": "a\nb', "line 1", "Unterminated string"),
        ('{"input": "a\nb", x}', "line 1", "line 2: Expecting property name"),
        ('{"input": "a\nb"}\n[1]\n', "line 3", "not an object"),
        ('{"input": "a\nb"}\n{"output": "a"}\n', "line 3", "no `input`"),
    ],
)
def test_mistakes_after_a_raw_line_break_have_their_line(tmp_path, text, place, what):
    path = tmp_path / "tasks.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(f"{path}, {place}: ")
    assert what in str(caught.value)


def test_a_file_of_many_raw_line_breaks_is_read_in_linear_time(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"input": "' + "a}\n" * 300_000 + '"}\n', encoding="utf-8")
    began = time.process_time()
    assert len(load_tasks(path)[0].input) == 600_000
    assert time.process_time() - began < 2


def test_numbers_of_tables_with_gaps(tmp_path):
    """pandas stores a column with gaps as 8.0 and NaN: in parquet and in JSON."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns = {"task_id": [0.0, 1.0], "input": ["a", "b"], "output": [8.0, float("nan")]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows = zip(*columns.values(), strict=True)
    lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for name in ("t.parquet", "t.jsonl"):
        assert load_tasks(tmp_path / name) == (Task(0, "a", "8"), Task(1, "b", ""))


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
