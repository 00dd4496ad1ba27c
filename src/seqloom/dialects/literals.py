"""Python files read as syntax trees: calls, constants and sums, never run."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from seqloom.dialects.ledger import Unread
from seqloom.dialects.sums import combine, parse
from seqloom.errors import DialectError

MOST_NODES = 50_000
"""The most nodes of a file's tree."""

MOST_STEPS = 10_000
"""The most nodes that one value may be read from, names that stand for others included."""


@dataclass(frozen=True)
class Source:
    """A Python file: its tree, and the names it binds once to a value that is written out; `steps` counts reading.

    changed: names whose value is changed after it is made, or bound where that is not decided. aliases: what else
    the file calls an imported name.
    """

    tree: ast.Module
    constants: Mapping[str, ast.expr]
    changed: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def read(cls, text: str) -> "Source":
        """The tree of a text. Raises DialectError where it is no Python."""
        try:
            tree = parse(text, "exec")
            count = sum(1 for _ in islice(ast.walk(tree), MOST_NODES + 1))
        except ValueError as error:
            raise DialectError(f"The settings cannot be read: {error}.") from error
        if count > MOST_NODES or not isinstance(tree, ast.Module):
            raise DialectError(f"The file holds more than {MOST_NODES:,} nodes; give the settings of one run.")
        changed = _changed(tree)
        constants = {name: value for name, value in _bound_once(tree).items() if name not in changed}
        return cls(tree, constants, changed, _aliases(tree))

    def calls(self, names: Sequence[str]) -> Iterator[tuple[str, ast.Call]]:
        """(name, call) of every call of one of `names`, however it was imported, in the file's order."""
        found = [
            (node.lineno, name, node)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and (name := self._called(node)) in names
        ]
        for _, name, node in sorted(found, key=lambda one: one[0]):
            yield name, node

    def changes(self, call: ast.Call) -> bool:
        """Whether the file changes what a call makes, under the name it gives it."""
        return any(
            isinstance(target, ast.Name) and target.id in self.changed
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Assign) and node.value is call
            for target in node.targets
        )

    def _called(self, call: ast.Call) -> str:
        """The name of what a call calls, as it was before the file renamed it."""
        name = _last(call.func)
        return self.aliases.get(name, name) if isinstance(call.func, ast.Name) else name

    def value(self, node: ast.AST, depth: int = 0) -> Any:
        """What an expression stands for: literals, sums of them, and names bound once to such; else Unread."""
        if depth == 0:
            self.steps.clear()
        try:
            return self._value(node, depth)
        except (ValueError, RecursionError) as error:
            why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
            return Unread(_source(node), f"{why}, and no file is run here")

    def _value(self, node: ast.AST, depth: int) -> Any:
        self.steps.append(1)
        if depth > 50 or len(self.steps) > MOST_STEPS:
            raise ValueError("it is nested too deeply")
        if isinstance(node, ast.Constant):
            if node.value is Ellipsis or isinstance(node.value, (bytes, complex)):
                raise ValueError("it is no plain literal")
            return node.value
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._value(each, depth + 1) for each in node.elts]
        if isinstance(node, ast.Dict):
            return {key: value for key, value in self._pairs(node, depth)}
        if isinstance(node, ast.Call) and _last(node.func) == "dict" and not node.args:
            return self.keywords(node, depth + 1)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
            inner = self._value(node.operand, depth + 1)
            if isinstance(node.op, ast.Not):
                return not inner
            if not isinstance(inner, (int, float)):
                raise ValueError("it is no number")
            return -inner if isinstance(node.op, ast.USub) else inner
        if isinstance(node, ast.BinOp):
            left, right = self._value(node.left, depth + 1), self._value(node.right, depth + 1)
            if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
                raise ValueError("it is not a sum of numbers")
            return combine(node.op, left, right)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self._value(self.constants[node.id], depth + 1)
        if isinstance(node, ast.Name) and node.id in self.changed:
            raise ValueError(f"{node.id} is or may be changed after it is made")
        raise ValueError("it is not a literal")

    def _pairs(self, node: ast.Dict, depth: int) -> Iterator[tuple[str, Any]]:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                inner = self._value(value, depth + 1)
                if not isinstance(inner, dict):
                    raise ValueError("it is not a literal")
                yield from inner.items()
            else:
                yield str(self._value(key, depth + 1)), self.value(value, depth + 1)

    def keywords(self, call: ast.Call, depth: int = 0) -> dict[str, Any]:
        """The keyword arguments of a call, those of ** too. Raises ValueError where they are not written out."""
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is not None:
                found[keyword.arg] = self.value(keyword.value, depth + 1)
                continue
            inner = self._value(keyword.value, depth + 1)
            if not isinstance(inner, dict):
                raise ValueError("** is given something that is not a literal")
            found |= inner
        return found

    def arguments(self, call: ast.Call, names: Sequence[str]) -> dict[str, Any]:
        """The arguments of a call by name, `names` being those that may be given by place.

        Raises DialectError where they are not all written out.
        """
        if any(isinstance(arg, ast.Starred) for arg in call.args) or len(call.args) > len(names):
            raise DialectError(
                f"{_last(call.func)} at line {call.lineno} takes arguments that are not named; name them."
            )
        placed = {name: self.value(arg) for name, arg in zip(names, call.args, strict=False)}
        try:
            named = self.keywords(call)
            if twice := placed.keys() & named.keys():
                raise DialectError(
                    f"{_last(call.func)} at line {call.lineno} is given {min(twice)} twice; give it once."
                )
            return placed | named
        except (ValueError, RecursionError) as error:
            raise DialectError(
                f"{_last(call.func)} at line {call.lineno} is given ** of something that is not a literal "
                f"({error}), and no file is run here; write its arguments out."
            ) from error

    def assignments(self) -> Iterator[tuple[str, ast.expr]]:
        """(name, value) of every assignment at the top of the file."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        yield target.id, node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                yield node.target.id, node.value


def _bound_once(tree: ast.Module) -> dict[str, ast.expr]:
    """Names that the whole file binds once, by a plain assignment."""
    values: dict[str, ast.expr] = {}
    times: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = node.value
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            times[node.id] = times.get(node.id, 0) + 1
        elif isinstance(node, ast.arg):
            times[node.arg] = times.get(node.arg, 0) + 2
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            times |= {name: 2 for name in node.names}
        elif isinstance(node, ast.alias):
            times[node.asname or node.name] = 2
    return {name: value for name, value in values.items() if times.get(name) == 1}


_CHANGING = frozenset(
    ["update", "pop", "popitem", "setdefault", "clear", "append", "extend", "insert", "remove", "sort", "reverse"]
)
"""Methods by which a dict or list changes in place."""


_READERS = frozenset(
    [
        *(
            "print",
            "pprint",
            "len",
            "str",
            "repr",
            "dict",
            "list",
            "tuple",
            "sorted",
            "sum",
            "max",
            "min",
            "any",
            "all",
            "bool",
            "type",
            "isinstance",
        ),
        *("enumerate", "zip", "copy", "deepcopy", "dumps", "dump", "info", "debug", "warning", "log", "format"),
        *("initialize", "launch", "launch_from_torch", "launch_from_slurm", "launch_from_openmpi", "join"),
    ]
)
"""Functions that a dict or list may be handed to and stay as it is; so may classes, which are written Large."""


def _handed(call: ast.Call) -> Iterator[str]:
    """Names that a call hands to a function which may change what they stand for."""
    name = _last(call.func)
    if name in _READERS or name[:1].isupper():
        return
    for given in [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is not None)]:
        parts = given.elts if isinstance(given, (ast.List, ast.Tuple)) else [given]
        yield from (part.id for part in parts if isinstance(part, ast.Name))


def _mutable(value: ast.expr) -> bool:
    """Whether an expression makes a dict or list, which a function may change."""
    made = isinstance(value, ast.Call) and _last(value.func) in ("dict", "list")
    return made or isinstance(value, (ast.Dict, ast.List))


def _changed(tree: ast.Module) -> frozenset[str]:
    """Names whose value something of the file changes in place, and those that are bound to the same value."""
    found: set[str] = set()
    made = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _mutable(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= made.intersection(_handed(node))
        if isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
            found.add(_root(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
            found.add(_root(node.func))
        elif isinstance(node, ast.AugAssign):
            found.add(_root(node.target))
    top = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in tree.body:
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            stored = [each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)]
            found |= {each.id for each in stored if each.id in top}
    same = [
        (node.targets[0].id, node.value.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name)
    ]
    for _ in range(8):
        found |= {pair[which] for pair in same for which in (0, 1) if pair[1 - which] in found}
    return frozenset(found - {""})


def _aliases(tree: ast.Module) -> dict[str, str]:
    """What imports and plain assignments call another name."""
    found = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    for name, value in _bound_once(tree).items():
        if isinstance(value, (ast.Name, ast.Attribute)) and name not in found:
            found[name] = _last(value)
    return found


def _root(node: ast.expr) -> str:
    """The name that `a.b[c].d` starts from; empty where it starts from something else."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _last(node: ast.expr) -> str:
    """The last name of `a.b.c`, or of `c`; empty for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _source(node: ast.AST) -> str:
    try:
        text = ast.unparse(node)
    except (RecursionError, ValueError):
        return "an expression"
    return text if len(text) <= 200 else text[:197] + "..."
