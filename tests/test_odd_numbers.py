"""Every number that a user can write has a sane range, and a line that names the key for the rest.

The keys are those of the schema: one that is added is tried as well.
"""

import copy
import itertools
import json
import math

import pytest
import yaml

from evomerge.cli import main
from evomerge.console import parse_size, seconds
from evomerge.errors import EvomergeError, InputError, RecipeError, StudyFileError
from evomerge.inference.best_of import sample_settings
from evomerge.inference.request import InferenceRequest, check_request
from evomerge.inference.selfcheck import retry_settings
from evomerge.recipe import Recipe
from evomerge.study import GenerationSection, Study, read_study, study_schema
from evomerge.study.reading import study_from_mapping

MINIMAL = {
    "genome": {"base_model": "a/base", "models": ["a/one", "a/two"], "merge_method": "ties"},
    "tasks": [{"file": "tasks.jsonl"}],
}
POWERS = [-400, -308, -300, -100, -30, -20, -12, -9, -7, -6, -4, -3, 3, 4, 6, 9, 12, 15, 18, 20]
POWERS += [30, 100, 300, 308]
ODD = [0, 1, -1, 2, 3, 7, 63, 64, 100, 1023, 1024, 1025, -2, -1000, 99_999, 100_000]
ODD += [2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63]
ODD += [2**64, -(2**31), -(2**63), -(2**64), 10**30, -(10**30), 10**99, 10**4200, 10**5000]
ODD += [0.0, -0.0, 0.5, 0.1, 0.9999999999999999, 1.0000000000000002, -0.5, 1.5, 1e-320, 5e-324]
ODD += [float(f"1e{power}") for power in POWERS] + [float(f"-1e{power}") for power in (-20, 6, 300)]
ODD += [math.nan, math.inf, -math.inf, True, False, "1", "0x10", "1e3", "nan", ".inf", "１", "", []]
ODD += [{}, [1], None, "1_000", 5, 8, 16, 10_000, 10**6, 10**7, -3.5, 1e16, "0b1", "1:30"]


def numeric_keys():
    """The path of every number in a study file, 0 for an item of a list."""
    schema = json.loads(study_schema())

    def walk(part, path):
        if "$ref" in part:
            part = schema["$defs"][part["$ref"].rpartition("/")[2]]
        for inner in part.get("anyOf", []):
            yield from walk(inner, path)
        if part.get("type") in ("integer", "number"):
            yield path
        if part.get("type") == "array":
            items = part.get("prefixItems") or [part.get("items", {})]
            for i, item in enumerate(items):
                yield from walk(item, (*path, i))
        for name, inner in part.get("properties", {}).items():
            yield from walk(inner, (*path, name))

    return sorted(set(walk(schema, ())), key=str)


KEYS = numeric_keys()


def set_in(data, path, value):
    """`data` with a value at the path; lists are as long as they must be."""
    key, *rest = path
    if isinstance(key, int):
        while len(data) <= key:
            data.append(1 + len(data))
    if not rest:
        data[key] = value
        return
    inner = data[key] if isinstance(key, int) else data.get(key)
    if not isinstance(inner, dict | list):
        inner = [] if isinstance(rest[0], int) else {}
        data[key] = inner
    set_in(inner, rest, value)


def with_value(path, value):
    data = copy.deepcopy(MINIMAL)
    if path[:2] == ("search", "start_density"):
        data["search"] = {"density_bounds": [0.001, 1]}
    set_in(data, path, value)
    for key in ("bounds", "density_bounds"):  # pairs, of which one number is tried
        pair = data.get("search", {}).get(key)
        if pair is not None and len(pair) == 1:
            pair.append(1.0)
    return data


def test_there_are_numbers_to_try():
    assert len(KEYS) > 45
    assert ("tasks", 0, "weight") in KEYS
    assert len(ODD) >= 95


@pytest.mark.parametrize("path", KEYS, ids=lambda path: ".".join(map(str, path)))
def test_a_number_of_a_study_file_is_moderate_or_refused_in_a_line(path, tmp_path):
    name = next(key for key in reversed(path) if isinstance(key, str))
    lines = []
    for value in ODD:
        data = with_value(path, value)
        try:
            study = study_from_mapping(data, tmp_path, environ={})
        except StudyFileError as error:
            lines.append((value, str(error)))
            continue
        numbers = [n for n in leaves(study.to_dict()) if isinstance(n, int | float)]
        assert all(n == 0 or 1e-9 <= abs(n) <= 1e15 for n in numbers), value
    for value, line in lines:
        assert "\n" not in line
        assert name in line or "max_cost" in line or "no part" in line, (value, line)


def leaves(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


@pytest.mark.parametrize("text", ["-1", str(2**32), "1" + "0" * 30, "1.5", "9" * 5000])
@pytest.mark.parametrize("key", ["search.seed", "split.seed", "generation.seed"])
def test_a_seed_is_refused_on_reading(tmp_path, key, text):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError, match=key.replace(".", "[.]") if len(text) < 50 else "number"):
        read_study(path, [f"{key}={text}"], {})


def test_a_stored_seed_can_still_be_read(tmp_path):
    """A study of 0.1 may have one that is refused today; it must be shown."""
    data = study_from_mapping(MINIMAL, tmp_path, environ={}).to_dict()
    data["search"]["seed"] = -1
    assert Study.from_dict(data).search.seed == -1


def test_derived_seeds_and_lengths_stay_within_their_ranges():
    top = GenerationSection(seed=2**32 - 1, max_new_tokens=10**7)
    assert all(0 <= s.seed < 2**32 for s in sample_settings(8, top))
    again = retry_settings(("cut",), top, 3)
    assert (again.seed < 2**32, again.max_new_tokens) == (True, 10**7)


OPTIONS = [
    ["search", "FILE", "--trials"],
    ["search", "FILE", "--seed"],
    ["search", "FILE", "--set", "engine.threads="],
    ["check", "FILE", "--set", "search.sigma="],
    ["merge", "RECIPE", "OUT", "--random-seed"],
    ["merge", "RECIPE", "OUT", "--out-shard-size"],
    *(
        ["infer", "--model", "none/none", "--tasks", "TASKS", "--out", "OUT", option]
        for option in (
            "--threshold",
            "--max-new-tokens",
            "--batch-size",
            "--concurrency",
            "--seed",
            "--time-limit",
            "--best-of",
        )
    ),
]
NUMBERS = [
    "-1",
    "1e300",
    "1e-20",
    "nan",
    "inf",
    str(2**63),
    "9" * 5000,
    "",
    "１２",
    "9" * 400,
]


@pytest.mark.parametrize("argv", OPTIONS, ids=" ".join)
def test_a_number_of_an_option_is_refused_in_a_line(argv, tmp_path, capsys):
    files = {"FILE": "s.yaml", "RECIPE": "r.yaml", "OUT": "out", "TASKS": "t.jsonl"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(MINIMAL))
    (tmp_path / "r.yaml").write_text("{merge_method: linear, models: [{model: /none}]}")
    (tmp_path / "t.jsonl").write_text('{"task_id": 0, "input": "x"}\n')
    filled = [str(tmp_path / files[word]) if word in files else word for word in argv]
    for number in NUMBERS:
        *first, last = filled
        whole = [*first, last + number] if last.endswith("=") else [*filled, number]
        try:
            code = main(whole)
        except SystemExit as exit_:  # argparse
            code = exit_.code
        captured = capsys.readouterr()
        last_line = (captured.out + captured.err).strip().splitlines()[-1]
        assert code == 2, (number, last_line)
        assert "Traceback" not in last_line


RECIPE = {
    "merge_method": "dare_ties",
    "base_model": "a/base",
    "parameters": {"normalize": 1, "lambda": 1.0},
    "tokenizer": {"source": "base", "pad_to_multiple_of": 8},
    "slices": [
        {
            "sources": [
                {"model": "a/base", "layer_range": [0, 2]},
                {
                    "model": "a/one",
                    "layer_range": [0, 2],
                    "parameters": {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.5}, 1]},
                },
            ]
        }
    ],
}


def numbers_at(value, path=()):
    parts = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    elif isinstance(value, int | float):
        yield path
    for key, part in parts:
        yield from numbers_at(part, (*path, key))


@pytest.mark.parametrize("path", list(numbers_at(RECIPE)), ids=str)
def test_a_number_of_a_recipe_is_finite_or_refused_in_a_line(path):
    for value in ODD:
        data = copy.deepcopy(RECIPE)
        target = data
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        line = ""
        try:
            recipe = Recipe.from_dict(data)
            assert recipe.digest()
            yaml.safe_load(recipe.to_yaml())
        except RecipeError as error:
            line = str(error)
        assert "\n" not in line


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, 1e300])
def test_a_time_limit_of_a_program_is_a_time(limit):
    with pytest.raises(InputError, match="time_limit"):
        check_request(InferenceRequest(model="m", time_limit=limit))


def test_sizes_and_durations_are_moderate():
    for text in ("9" * 400, "1" + "0" * 30, "0", "-1", "nan", "1e5"):
        with pytest.raises(EvomergeError):
            parse_size(text)
    found = [seconds(n + unit) for n, unit in itertools.product(["9" * 400, "0", "1" * 30], "smhd")]
    assert found == [None] * 12
