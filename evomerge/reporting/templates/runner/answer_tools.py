"""What answer.py needs besides the model: its options, task files, and files for answers."""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import re
import sys
from pathlib import Path

NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
DURATION = re.compile(
    rf"(?:{NUMBER} ?d)? ?(?:{NUMBER} ?h)? ?(?:{NUMBER} ?m)? ?(?:{NUMBER} ?s)?|{NUMBER}"
)
UNITS = (86400, 3600, 60, 1, 1)
LONGEST = 3650 * 86400.0
CHOICE = "name another --out, or add --overwrite"


def load(folder: str, **how):
    """The model in transformers' class for text; where it has none, in that for images and text."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    if type(transformers.AutoConfig.from_pretrained(folder)) not in auto._model_mapping:
        auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder, **how)


def fail(why: str, code: int = 2):
    """End with one line."""
    line = "answer.py: " + " ".join(why.split())[:1000]
    print(line, file=sys.stderr)
    end = SystemExit(code)
    end.args = (line,)
    raise end


@contextlib.contextmanager
def one_line_errors():
    """No traceback: neither for Ctrl-C nor for what goes wrong."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; finished answers are kept: run the same command again to resume", 130)
    except ModuleNotFoundError as error:
        fail(f"{error}: run pip install torch, then pip install -r requirements.txt", 1)
    except Exception as error:
        fail(f"{type(error).__name__}: {error}", 1)


def seconds(text: str) -> float:
    """The seconds of 90s, 55m, 1h30m, 2d or a bare number, as in evomerge."""
    match = DURATION.fullmatch(text.strip())
    numbers = match.groups() if match else ()
    total = sum(float(number or 0) * unit for number, unit in zip(numbers, UNITS, strict=False))
    if not 0 < total <= LONGEST:
        raise argparse.ArgumentTypeError(f"not a duration: {text!r}; write 90s, 55m or 1h30m")
    return total


def read_options(does: str) -> argparse.Namespace:
    """The command line's options; `does` is the program's description."""
    parser = argparse.ArgumentParser(prog="answer.py", description=does)
    forms = "task_id and input, as .jsonl, .json, .csv or .xlsx"
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE", help=forms)
    where = "where the answers go, as JSON lines"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=where)
    more = "replace answers in --out from another model, task file or settings"
    parser.add_argument("--overwrite", action="store_true", help=more)
    parser.add_argument("--model", metavar="FOLDER", help="a merged model, used without merging")
    when = "90s, 55m or 1h30m: after it no batch starts, and unfinished tasks are marked"
    parser.add_argument("--time-limit", type=seconds, default=LONGEST, metavar="TIME", help=when)
    where = "where a model of recipe.yaml is on this machine"
    parser.add_argument("--path", nargs="*", default=[], metavar="NAME=FOLDER", help=where)
    args = parser.parse_args()
    if args.out.is_dir():
        parser.error(f"--out {args.out}: is a folder")
    if args.out.resolve() == args.tasks.resolve():
        parser.error(f"--out {args.out}: would overwrite the tasks")
    wrong = [path for path in args.path if "=" not in path]
    if wrong:
        parser.error(f"--path {wrong[0]}: write NAME=FOLDER")
    return args


def read_tasks(path: Path) -> dict[str, dict]:
    """The tasks of a file by their ids as texts, each with task_id and input."""
    if not path.is_file():
        fail(f"{path}: no such task file")
    readers = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".xlsx": xlsx_rows}
    if path.suffix.lower() not in readers:
        fail(f"{path}: unknown type of task file; save it as {', '.join(readers)}")
    tasks = {}
    for place, row in readers[path.suffix.lower()](path):
        number, text = row.get("task_id"), row.get("input")
        if number in (None, ""):
            number = len(tasks)
        if not isinstance(number, int | str) or isinstance(number, bool):
            fail(f"{path}, {place}: task_id is neither a number nor text: {number!r}")
        if not isinstance(text, str) or not text.strip():
            fail(f"{path}, {place}: has no text under `input`: {row}")
        try:
            f"{number}{text}".encode()
        except UnicodeEncodeError:
            fail(f"{path}, {place}: contains half of a surrogate pair")
        task = {"task_id": number, "input": text}
        if tasks.setdefault(str(number), task) is not task:
            fail(f"{path}, {place}: repeats an earlier task_id: {number}")
    if not tasks:
        fail(f"{path}: contains no tasks")
    return tasks


def read_text(path: Path) -> str:
    """UTF-8, or what Excel saves in Japan."""
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "cp932"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    fail(f"{path}: is not UTF-8")


def json_rows(path: Path):
    """Records of JSON lines or a JSON list; one may span several lines."""
    text, at = read_text(path), 0
    between = " \t\r\n,[]" if path.suffix.lower() == ".json" else " \t\r\n"
    decoder = json.JSONDecoder(strict=False)  # a raw line break in a text is read as it is
    while True:
        while at < len(text) and text[at] in between:
            at += 1
        if at >= len(text):
            return
        place = f"line {text.count(chr(10), 0, at) + 1}"
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            fail(f"{path}, {place}: is not valid JSON: {error}")
        if not isinstance(row, dict):
            fail(f"{path}, {place}: a record is not an object: {str(row)[:60]}")
        yield place, row


def csv_rows(path: Path):
    """Rows of a CSV file; its header tells what separates its columns."""
    csv.field_size_limit(2**31 - 1)
    text = read_text(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    yield from table(path, rows)


def xlsx_rows(path: Path):
    """Rows of the first sheet of an Excel file."""
    try:
        import openpyxl
    except ModuleNotFoundError:
        fail("reading .xlsx needs openpyxl: run pip install openpyxl, or save the tasks as CSV")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
    except Exception as error:  # a broken archive raises many kinds
        fail(f"{path}: not a readable Excel file: {error}")
    yield from table(path, rows)


def table(path: Path, rows):
    """Rows with their column names; numbers as sheets store them (8.0) become 8."""
    header = None
    for i, row in enumerate(rows, start=1):
        if not any(cell not in (None, "") for cell in row):
            continue
        if header is None:
            header = [str(cell or "").strip() for cell in row]
            if "input" not in header:
                fail(f"{path}: has no column `input`; its columns are {', '.join(header)}")
            continue
        record = dict(zip(header, row, strict=False))
        number = record.get("task_id")
        if re.fullmatch(r"\d{1,18}(\.0+)?", str(number)):
            record["task_id"] = int(float(number)) if "." in str(number) else int(number)
        text = record.get("input")
        if isinstance(text, int | float):
            record["input"] = f"{text:g}"
        yield f"row {i}", record


def find_models(names: list[str], paths: list[str], files: list[str]) -> dict[str, str]:
    """The folder of each model by its name, downloaded from the hub where there is none."""
    from huggingface_hub import snapshot_download

    places = {name: name for name in names} | dict(path.rsplit("=", 1) for path in paths)
    for name, place in places.items():
        if not Path(place).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", place):
            fail(f"there is no folder {place}: give it with --path {name}=FOLDER")
    for name, place in places.items():
        if not Path(place).is_dir():
            places[name] = snapshot_download(place, allow_patterns=files)
    return places


def filled(tokenizer, template: str | None, variables: dict, chat: list[dict]) -> str:
    """The chat template with its turns; a system text that it has no turn for goes above."""
    try:
        return tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
        )
    except Exception as error:  # raise_exception, and whatever an expression can raise
        if chat[0]["role"] != "system" or len(chat) < 2:
            fail(f"the chat template of {tokenizer.name_or_path} cannot be filled in: {error}")
    text = f"{chat[0]['content']}\n\n{chat[1]['content']}"
    return filled(tokenizer, template, variables, [chat[1] | {"content": text}, *chat[2:]])


def find_marks(tokenizer, marks: list[list[str]], auto: bool) -> list[str] | None:
    """The marks around a model's thoughts; with `auto` the first that the tokenizer has."""
    ids = [tokenizer.convert_tokens_to_ids(mark) for pair in marks for mark in pair]
    known = tokenizer.convert_ids_to_tokens([number for number in ids if number is not None])
    template = str(tokenizer.chat_template or "")
    for pair in marks:
        if not auto or all(mark in template or mark in known for mark in pair):
            return pair
    return None


def replied(tokenizer, tokens: list[int], marks: list[str] | None) -> str:
    """The text of new tokens, without special ones that no mark is made of."""
    if marks is None:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    special = {i for i in tokenizer.all_special_ids if tokenizer.decode([i]) not in "".join(marks)}
    return tokenizer.decode([token for token in tokens if token not in special])


def split(text: str, marks: list[str] | None, prompt: str) -> tuple[str, str]:
    """Thoughts without their marks, and the answer, as evomerge reads a reply."""
    from thoughts import Marks, bare_thoughts, split_reply

    if marks is None:
        return "", text
    known = Marks(*marks)
    reply = split_reply(text, known, known.opened_by(prompt))
    return bare_thoughts(reply.thoughts + reply.later, known), reply.answer


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_name(path.name + ".tmp")
    spare.write_text(text, "utf-8", newline="\n")
    spare.replace(path)


def hash_of(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def read_part(part: Path) -> dict[str, dict]:
    """The answers of an earlier run."""
    if not part.exists():
        return {}
    try:
        return dict(json.loads(part.read_text("utf-8")))
    except (ValueError, TypeError):
        fail(f"{part}: contains no readable answers; delete it, or name another --out")


def is_finished(out: Path, facts: dict[str, str], going_on: bool) -> bool:
    """Whether `out` holds, whole, what these facts give; ends where it holds anything else.

    `going_on`: there are answers of a run that may have been killed while it replaced `out`.
    """
    if not out.exists():
        return False
    if going_on and not out.with_name(out.name + ".made").exists():
        return False
    try:
        made = json.loads(out.with_name(out.name + ".made").read_text("utf-8"))
        known, content, whole = made["facts"], made["content"], made["whole"]
        changed = [name for name in facts if known.get(name) != facts[name]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        fail(f"{out}: exists already, and what it was made from is not known; {CHOICE}")
    if changed:
        fail(f"{out}: holds answers from another run (changed: {', '.join(changed)}). {CHOICE}")
    if content != hashlib.sha256(out.read_bytes()).hexdigest():
        if going_on:
            return False
        fail(f"{out}: was changed after it was written; {CHOICE}")
    return whole is True


def finish(out: Path, rows: list[dict], facts: dict[str, str], whole: bool) -> None:
    """Write the answers, and what they were made from."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write(out, text)
    made = {"facts": facts, "content": hashlib.sha256(text.encode()).hexdigest(), "whole": whole}
    write(out.with_name(out.name + ".made"), json.dumps(made, indent=1) + "\n")
