"""The exact value of a formula of + - * / and brackets."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

FORMULA = re.compile(r"(?<![0-9.])[0-9(][0-9+\-*/()]{3,60}[0-9)]")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_NOT_A_FORMULA = (
    SyntaxError,
    ValueError,
    ZeroDivisionError,
    KeyError,
    AttributeError,
    TypeError,
    RecursionError,
    MemoryError,
)


def formula_value(formula: str) -> Fraction | None:
    """The value of a formula, exact; None for any other text."""
    if not FORMULA.fullmatch(formula) or not re.search(r"[*/+]", formula):
        return None
    if formula[1:2].isdigit():
        formula = formula.lstrip("0")
    try:
        return _evaluate(ast.parse(formula, mode="eval").body)
    except _NOT_A_FORMULA:
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    raise ValueError("not a formula")
