"""YAML and JSON that may come from anyone: every fault is an error of one line.

A text that is small on disk may not become large in memory: aliases are counted as often as they
are used, and numbers, nesting and files have limits.
"""

from __future__ import annotations

import json
import re
import stat
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import InputError

LARGEST_YAML = 20 * 1000**2  # bytes; much of a knowledge base is text
LARGEST_SETTINGS = 2 * 1000**2  # PyYAML reads 0.2 MB of short values a second
LARGEST_JSON = 500 * 1000**2  # an index of shards may name a million tensors
LONGEST_NUMBER = 100  # characters of a number
MOST_VALUES = 500_000  # aliases counted; a text counts once more for every 80 characters
DEEPEST = 100  # levels of lists and mappings
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MERGE = "tag:yaml.org,2002:merge"  # of the key <<
_ONE_EACH = {"RecipeError": "merge", "StudyFileError": "study"}  # of documents in a file
# ValueError: an impossible date; the others: what PyYAML's own constructors let pass
_YAML_FAULTS = (
    yaml.YAMLError,
    RecursionError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes time in the square of the brackets that are open."""

    def fetch_flow_collection_start(self, kind: type) -> None:
        if self.flow_level >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(kind)


def parse_yaml(text: str, where: object, error: type[InputError] = InputError) -> Any:
    """The value of a YAML text; `where` names it. Raises `error`."""
    root = compose_yaml(text, where, error)
    if root is None:
        return None
    try:
        for node in _nodes(root):
            _check_node(node)
        return yaml.constructor.SafeConstructor().construct_document(root)
    except _YAML_FAULTS as fault:
        raise _explained(fault, where, error) from fault


def compose_yaml(text: str, where: object, error: type[InputError]) -> yaml.Node | None:
    """The nodes of a YAML text, whose scalars are as written. Raises `error`."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _nodes(root)
    except _YAML_FAULTS as fault:
        raise _explained(fault, where, error) from fault
    return root


def read_yaml(path: Path, error: type[InputError] = InputError) -> Any:
    """The value of a YAML file. Raises `error`."""
    return parse_yaml(read_text(path, LARGEST_SETTINGS, error), path, error)


def parse_json(text: str, where: object, error: type[InputError], remedy: str) -> Any:
    """The value of a JSON text; of a key that is given twice, the last, as everywhere.

    Raises `error`.
    """
    try:
        value = json.loads(text)
        _check_depth(value)
    except RecursionError as fault:
        raise error("is nested too deeply", where=where, remedy=remedy) from fault
    except ValueError as fault:  # also a number of thousands of digits
        raise error(f"is not valid JSON: {fault}", where=where, remedy=remedy) from fault
    return value


def read_json_object(
    path: Path, error: type[InputError] = InputError, remedy: str = "Save it again."
) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error`."""
    value = parse_json(read_text(path, LARGEST_JSON, error, remedy), path, error, remedy)
    if not isinstance(value, dict):
        raise error("is not a mapping", where=path, found=value, remedy=remedy)
    return value


def read_text(
    path: Path, largest: int, error: type[InputError], remedy: str = "Check the file."
) -> str:
    """A regular file's text, UTF-8 with or without a mark. Raises `error`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error("is not a regular file", where=path, remedy="Name a file.")
        if status.st_size > largest:
            what = f"is larger than {largest // 1000**2} MB"
            raise error(what, where=path, found=status.st_size, remedy=remedy)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error("no such file", where=path, remedy="Check the name.") from None
    except UnicodeDecodeError as fault:
        raise error("is not UTF-8", where=path, remedy="Save it as UTF-8.") from fault
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        what = getattr(fault, "strerror", None) or str(fault)
        raise error(f"cannot be read: {what}", where=path, remedy=remedy) from fault


def _nodes(root: yaml.Node) -> list[yaml.Node]:
    """Every node once. Raises YAMLError: one contains itself, or they are too many or too deep."""
    found: list[yaml.Node] = []
    weights: dict[int, float] = {}
    above: set[int] = set()  # the nodes that contain the one that is looked at
    waiting = [(root, False)]
    while waiting:
        node, inside = waiting.pop()
        children = _children(node)
        if inside:
            above.discard(id(node))
            weights[id(node)] = _weight(node) + sum(weights[id(child)] for child in children)
            if weights[id(node)] > MOST_VALUES:
                raise _fault(node, f"there are more than {MOST_VALUES:,} values, with aliases")
        elif id(node) in above:
            raise _fault(node, "an alias names what contains it")
        elif id(node) not in weights:
            if len(above) > DEEPEST:
                raise RecursionError
            found.append(node)
            above.add(id(node))
            waiting.append((node, True))
            waiting.extend((child, False) for child in children)
    return found


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return list(chain.from_iterable(node.value))
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    return []


def _weight(node: yaml.Node) -> float:
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value) / 80
    return 1


def _check_node(node: yaml.Node) -> None:
    """Raise YAMLError for a number too long, a text that no file can hold, a key given twice."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBER_TAGS and len(node.value) > LONGEST_NUMBER:
            raise _fault(node, f"a number has more than {LONGEST_NUMBER} characters")
        if found := _UNWRITABLE.search(node.value):
            raise _fault(node, f"a text contains the character {found[0]!a}")
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        if (key.tag, key.value) in seen:
            raise _fault(key, f"the key {key.value[:80]!r} is given twice")
        seen.add((key.tag, key.value))


def _check_depth(value: Any) -> None:
    """Raise RecursionError for more levels than DEEPEST."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner.extend(child for child in part.values() if isinstance(child, dict | list))
            elif isinstance(part, list):
                inner.extend(child for child in part if isinstance(child, dict | list))
        if not inner:
            return
        level = inner
    raise RecursionError


def _fault(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


def _explained(fault: Exception, where: object, error: type[InputError]) -> InputError:
    """The fault with its place."""
    if isinstance(fault, RecursionError):
        return error("is nested too deeply", where=where, remedy="Write fewer levels.")
    if "single document" in str(getattr(fault, "context", "")):
        one = _ONE_EACH.get(error.__name__, "document")
        remedy = f"Split it: one {one} per file."
        return error("holds several YAML documents", where=where, remedy=remedy)
    mark = getattr(fault, "problem_mark", None)
    if mark is not None:
        where = f"{where}, line {mark.line + 1}"
    problem = getattr(fault, "problem", None) or fault
    return error(f"not valid YAML: {problem}", where=where, remedy="Fix the line named.")
