"""Every regular expression of the package, and texts that make a bad one slow.

A pattern is pumped: a beginning of something that it matches, then one of the characters, pairs or
words that it mentions a great many times, then something that it does not match.
"""

import ast
import importlib
import pkgutil
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from re import _constants as sre
from re import _parser as sre_parser

import evomerge

FLAGS_AT = {"compile": 1, "search": 2, "match": 2, "fullmatch": 2, "findall": 2, "finditer": 2}
FLAGS_AT |= {"split": 3, "sub": 4}
CATEGORIES = {
    sre.CATEGORY_DIGIT: "07",
    sre.CATEGORY_NOT_DIGIT: "a ",
    sre.CATEGORY_SPACE: " \n\u3000",
    sre.CATEGORY_NOT_SPACE: "a",
    sre.CATEGORY_WORD: "a0あ_",
    sre.CATEGORY_NOT_WORD: " .",
}
ANY = "a0 \nあ\x00"


@dataclass(frozen=True)
class Found:
    """A pattern and where it stands."""

    where: str
    pattern: re.Pattern

    def __str__(self):
        return f"{self.where} {self.pattern.pattern[:40]!r}"


def patterns(made, users=""):
    """All compiled patterns of the package, and those inside its functions.

    Modules whose names begin with `users` are passed over.

    `made` are examples of those that are made from something at run time: {"module:function":
    [patterns]}. Raises AssertionError for one that is made and has no example.
    """
    found = {}
    for info in pkgutil.walk_packages(evomerge.__path__, "evomerge."):
        if info.name.endswith("__main__") or (users and info.name.startswith(users)):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            for pattern in held(value):
                found.setdefault(pattern, f"{info.name}:{name}")
        for where, pattern in inline(module, made):
            found.setdefault(pattern, where)
    return [Found(where, pattern) for pattern, where in found.items()]


def held(value):
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for entry in value:
            yield from held(entry)
    elif isinstance(value, dict):
        for entry in value.values():
            yield from held(entry)


def inline(module, made):
    """(where, pattern) of calls such as re.search(r"…", text), in functions too."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if getattr(call.func.value, "id", "") != "re" or call.func.attr not in FLAGS_AT:
            continue
        inside = [f.name for f in functions if f.lineno <= call.lineno <= f.end_lineno]
        where = f"{module.__name__}:{inside[-1] if inside else ''}"
        try:
            text = evaluated(call.args[0], module)
        except NameError:
            assert where in made, f"{where}, line {call.lineno}: add an example to the test"
            yield from ((where, re.compile(pattern)) for pattern in made[where])
            continue
        if isinstance(text, re.Pattern):
            yield where, text
            continue
        flags = 0
        given = call.args[FLAGS_AT[call.func.attr] :]
        given += [keyword.value for keyword in call.keywords if keyword.arg == "flags"]
        for node in given:
            flags |= evaluated(node, module)
        yield where, re.compile(text, flags)


def evaluated(node, module):
    code = compile(ast.Expression(node), module.__file__, "eval")
    return eval(code, vars(module) | {"re": re})


def mentioned(pattern):
    """(characters, words) that a pattern mentions; a word is a run of two or more characters."""
    characters, words = set(" \na0あ"), set()
    collect(sre_parser.parse(pattern.pattern, pattern.flags), characters, words)
    return sorted(characters), sorted(words)


def collect(tree, characters, words):
    run = ""
    for op, value in [*tree, (None, None)]:
        if op is sre.LITERAL:
            run += chr(value)
            continue
        characters.update(run)
        if len(run) > 1:
            words.add(run)
        run = ""
        if op is sre.IN:
            for kind, item in value:
                characters.update(set_members(kind, item))
        elif op in (sre.NOT_LITERAL,):
            characters.add(chr(value))
        elif op is sre.CATEGORY:
            characters.update(CATEGORIES[value])
        else:
            for inner in subtrees(op, value):
                collect(inner, characters, words)


def set_members(kind, item):
    if kind is sre.LITERAL:
        return chr(item)
    if kind is sre.RANGE:
        return chr(item[0]) + chr(item[1])
    if kind is sre.CATEGORY:
        return CATEGORIES[item]
    return ""


def subtrees(op, value):
    if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
        return [value[2]]
    if op is sre.SUBPATTERN:
        return [value[-1]]
    if op is sre.ATOMIC_GROUP:
        return [value]
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    if op is sre.BRANCH:
        return value[1]
    return []


def example(tree, rng):
    """A text that a pattern roughly matches; assertions are passed over."""
    text = ""
    for op, value in tree:
        if op is sre.LITERAL:
            text += chr(value)
        elif op is sre.IN:
            members = "".join(set_members(kind, item) for kind, item in value)
            negated = value[0][0] is sre.NEGATE
            text += rng.choice([c for c in ANY if c not in members] if negated else members)
        elif op in (sre.ANY, sre.NOT_LITERAL):
            text += rng.choice(ANY)
        elif op in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            low, high, inner = value
            for _ in range(rng.randint(low, min(high, low + 2))):
                text += example(inner, rng)
        elif op is sre.BRANCH:
            text += example(rng.choice(value[1]), rng)
        elif op in (sre.SUBPATTERN, sre.ATOMIC_GROUP):
            text += example(subtrees(op, value)[0], rng)
    return text


def pumps(pattern, rng, most):
    """(beginning, unit, end) triples: characters and words first, then pairs."""
    characters, words = mentioned(pattern)
    tree = sre_parser.parse(pattern.pattern, pattern.flags)
    units = [*characters, *words]
    pairs = [a + b for a in units for b in units if a != b]
    rng.shuffle(pairs)
    made = []
    for unit in (units + pairs)[:most]:
        made.append(("", unit, "\x00"))
        whole = example(tree, rng)
        made.append((whole[: rng.randint(0, len(whole))], unit, rng.choice(["\x00", *characters])))
    return made


def seconds_of(pattern, text):
    """CPU time of every way to apply a pattern to a text."""
    began = time.process_time()
    for _ in pattern.finditer(text):
        pass
    pattern.match(text)
    pattern.fullmatch(text)
    return time.process_time() - began


class TooSlow(Exception):
    pass


def slow(pattern, pump, sizes, limit):
    """(size, seconds) of the first size at which a pattern takes longer than `limit`, or None."""
    beginning, unit, end = pump

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        for size in sizes:
            text = beginning + unit * (size // len(unit)) + end
            if isinstance(pattern.pattern, bytes):
                text = text.encode()
            signal.setitimer(signal.ITIMER_VIRTUAL, 5)
            try:
                took = seconds_of(pattern, text)
                for _ in range(4):  # a busy machine may take its time
                    if took > limit(size):
                        took = min(took, seconds_of(pattern, text))
            except TooSlow:
                return size, 5.0
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if took > limit(size):
                return size, took
    finally:
        signal.signal(signal.SIGVTALRM, before)
    return None
