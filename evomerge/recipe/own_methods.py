"""Merge methods of a user's own: `path/to/file.py:function`, or an entry point's name.

Naming one runs its file. What it is registered as holds the file's place; what its merges are kept
by holds the file's contents.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError
from evomerge.once import warn_once
from evomerge.recipe.mergekit_keys import BOOLEANS, COMMON_PARAMETERS
from evomerge.recipe.method_traits import METHODS, MethodParameter, MethodTraits

log = logging.getLogger(__name__)
GROUP = "evomerge.methods"
IN_FILE = re.compile(r"\A(?P<file>.+\.py):(?P<function>[^\W\d]\w*)", re.ASCII)
POSITIONAL = ("base", "others", "plan", "generator")
# what a function's `traits` may say
TRAITS: Mapping[str, type] = {
    "link": str,
    "needs_base": bool,
    "takes_deltas": bool,
    "elementwise": bool,
    "weighted": bool,
    "has_densities": bool,
    "normalize": bool,
}


@dataclass(frozen=True)
class OwnMethod:
    """A user's function, what it is called, and the SHA-256 of the file that it stands in."""

    function: Callable[..., Any]
    title: str
    digest: str


OWN: dict[str, OwnMethod] = {}  # by the name in METHODS


def find_method(name: str, folder: Path | None, where: str) -> str:
    """The name in METHODS of what `merge_method` names, which is read where it is a user's own.

    A file is relative to `folder`, and is read again when it has changed; with None, one that has
    been read is not looked at: a search goes on with the code that it began with. Raises
    RecipeError; a name that nothing has is returned as it is.
    """
    if folder is None and name in OWN:
        return name
    match = IN_FILE.fullmatch(name)
    if match is None:
        if name not in METHODS:
            return _from_entry_point(name, where)
        if METHODS[name].built_in:
            _tell_of_namesakes(name)
        return name
    path = ((folder or Path()) / Path(match["file"]).expanduser()).resolve()
    try:
        source = path.read_bytes()
    except OSError:
        raise RecipeError(
            "`merge_method` names a file that cannot be read",
            where=where,
            found=match["file"],
            remedy="Write its path, relative to the file that names it.",
        ) from None
    full, digest = f"{path}:{match['function']}", hashlib.sha256(source).hexdigest()
    if full not in OWN or OWN[full].digest != digest:
        module = _run(source, path, digest, where)
        function = getattr(module, match["function"], None)
        if function is None:
            raise RecipeError(
                f"`merge_method`: {path.name} has no function `{match['function']}`",
                where=where,
                remedy="Name one that it defines.",
            )
        _register(full, OwnMethod(function, f"{match['function']} of {path.name}", digest), where)
    return full


def _tell_of_namesakes(name: str) -> None:
    """Log a line where an installed package gives its method the name of a built-in one."""
    for point in _named(name):
        package = "an installed package"
        if point.dist is not None:
            package = f"the package {point.dist.name}"
        warn_once(
            log,
            f"`merge_method: {name}` is the built-in method: the entry point {name} = "
            f"{point.value} of {package} has its name and is not used. Give it another name.",
        )


def _named(name: str) -> list[EntryPoint]:
    """The entry points of our group that have the name."""
    return [point for point in _installed(tuple(sys.path)) if point.name == name]


@lru_cache(maxsize=1)
def _installed(path: tuple[str, ...]) -> EntryPoints:
    """Our group's entry points, read once: a search makes thousands of recipes, and reading what
    every installed package says takes longer than the rest of a recipe.
    """
    return entry_points(group=GROUP)


def _from_entry_point(name: str, where: str) -> str:
    for point in _named(name):
        try:
            function = point.load()
            source = Path(inspect.getsourcefile(function) or "").read_bytes()
        except (Exception, SystemExit) as error:
            raise _raised(f"the entry point {point.value}", error, where) from error
        _register(name, OwnMethod(function, name, hashlib.sha256(source).hexdigest()), where)
    return name


def _run(source: bytes, path: Path, digest: str, where: str) -> types.ModuleType:
    """The file as a module; nothing is written beside it."""
    module = types.ModuleType(f"evomerge_method_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look for it
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise _raised(path.name, error, where) from error
    return module


def _raised(what: str, error: BaseException, where: str) -> RecipeError:
    text = (str(error).splitlines() or [""])[0]
    return RecipeError(
        f"`merge_method`: {what} raises {type(error).__name__}: {text}",
        where=where,
        remedy="Correct it: it is run to read the method.",
    )


def _register(name: str, own: OwnMethod, where: str) -> None:
    METHODS[name] = _traits(own, where)
    OWN[name] = own


def _traits(own: OwnMethod, where: str) -> MethodTraits:
    """What the signature and the function's `traits` say. Raises RecipeError."""
    place, function = f"{where}, {own.title}", own.function
    try:
        arguments = list(inspect.signature(function).parameters.values())
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise RecipeError(
            f"is not a merge function: {error}", where=place, remedy="Name a plain function."
        ) from error
    parameters = {}
    positional = 0
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY:
            hint = hints.get(argument.name)
            parameters[argument.name] = _parameter(argument, hint, place)
        elif argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD):
            positional += 1
    if positional != len(POSITIONAL):
        raise RecipeError(
            "is not a merge function",
            where=place,
            found=f"{positional} arguments before the keyword-only ones",
            remedy=f"Write def NAME({', '.join(POSITIONAL)}, *, …).",
        )
    given = getattr(function, "traits", {})
    if not isinstance(given, Mapping):
        given = {"traits": given}
    for key, value in given.items():
        if key not in TRAITS or not isinstance(value, TRAITS[key]):
            raise RecipeError(
                f"its `traits` have no {key!r} of this value",
                where=place,
                found=value,
                remedy=f"Use true or false for {', '.join(TRAITS)}; link is text.",
            )
    defaults = {"link": own.title, "takes_deltas": given.get("needs_base", True)}
    fixed = {"scales": False, "parameters": parameters, "built_in": False}
    return MethodTraits(**{**defaults, **given, **fixed})


def _parameter(argument: inspect.Parameter, hint: Any, where: str) -> MethodParameter:
    """A keyword-only argument: float, or Annotated[float, (low, high)]. Raises RecipeError."""
    name, span = argument.name, None
    if typing.get_origin(hint) is typing.Annotated:
        hint, *notes = typing.get_args(hint)
        span = next((note for note in notes if isinstance(note, tuple)), None)
    if hint is not float or name in (*COMMON_PARAMETERS, *BOOLEANS):
        raise RecipeError(
            f"its argument `{name}` is no parameter",
            where=where,
            remedy="Annotate it with float or Annotated[float, (low, high)], and give it a name "
            "that mergekit's parameters do not have.",
        )
    default = None
    if argument.default is not argument.empty:
        default = argument.default
    numbers = [default] if default is not None else []
    if span is not None:
        numbers += [*span]
    plain = all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if not plain or (span is not None and (len(span) != 2 or not span[0] < span[1])):
        raise RecipeError(
            f"its argument `{name}` has a range or default that is none",
            where=where,
            found=f"{span}, {default}",
            remedy="Write name: Annotated[float, (low, high)] = default.",
        )
    if span is None:
        return MethodParameter(default=default)
    if default is not None and not span[0] <= default <= span[1]:
        raise RecipeError(
            f"the default of its argument `{name}` is out of its range",
            where=where,
            found=default,
            remedy="Change one of them.",
        )
    return MethodParameter(default=default, low=span[0], high=span[1], search=tuple(span))
