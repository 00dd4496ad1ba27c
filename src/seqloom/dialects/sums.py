"""Arithmetic of whole numbers in other people's files, without running any of it."""

import ast
import operator
import warnings
from collections.abc import Callable

LARGEST = 2**80
"""No step of a sum may leave this."""


def parse(text: str, mode: str = "eval") -> ast.AST:
    """Python source as a tree. Raises ValueError with a sentence where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode=mode)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" at line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply or holds null bytes"
        raise ValueError(f"it is not readable as Python{line}: {said}") from error


def combine(node: ast.operator, left: int | float, right: int | float) -> int | float:
    """A sum of two numbers. Raises ValueError for an operation or a size that is not read."""
    function = _OPERATIONS.get(type(node))
    if function is None or isinstance(left, bool) or isinstance(right, bool):
        raise ValueError("it is not a sum of numbers")
    if isinstance(node, ast.Pow) and not (0 <= right <= 80 and abs(left) <= 2**20):
        raise ValueError("it is a power too large to be a setting")
    try:
        found = function(left, right)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError("it divides by zero or grows too large") from error
    if isinstance(found, complex) or abs(found) > LARGEST:
        raise ValueError("it grows too large")
    return found


def shell_sum(text: str, lookup: Callable[[str], int]) -> int:
    """The value of $((text)); `lookup` gives the whole number of a name, or raises ValueError."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name):
            return lookup(node.id)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Div):  # a shell divides towards zero
                whole = combine(ast.FloorDiv(), abs(left), abs(right))
                return int(whole) if (left < 0) == (right < 0) else -int(whole)
            return int(combine(node.op, left, right))
        raise ValueError("it is not a sum of whole numbers")

    if len(text) > 2000:
        raise ValueError("it is too long to be a sum")
    try:
        return value(parse(text.strip()))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


_OPERATIONS: dict[type[ast.operator], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
