"""The package's source as syntax trees, and what its imports and names mean."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "seqloom"


@dataclass(frozen=True)
class Module:
    """One file. `name` is dotted; `package` is True for an `__init__`."""

    name: str
    tree: ast.Module
    package: bool = False
    lines: int = 0

    @property
    def room(self) -> str:
        """The part of the name below `seqloom`: the folder, or the single file `errors`; '' for the root."""
        return (*self.name.split("."), "")[1]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the package."""
    return tuple(_read(path) for path in sorted(PACKAGE.rglob("*.py")))


def _read(path: Path) -> Module:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = parts[-1] == "__init__"
    text = path.read_text(encoding="utf-8")
    return Module(".".join(parts[:-1] if package else parts), ast.parse(text), package, len(text.splitlines()))


def example(name: str, text: str, *, package: bool = False) -> Module:
    """A module made up by a test, to see that a check catches what it is for."""
    return Module(name, ast.parse(text), package, len(text.splitlines()))


def bindings(module: Module) -> Iterator[tuple[int, str, str]]:
    """(line, local name, dotted name) of every import of a module, those inside functions included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                yield node.lineno, alias.asname or alias.name, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and _is_import_call(node):
            yield node.lineno, "", str(ast.literal_eval(node.args[0]))


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    above = parts[: len(parts) - node.level + module.package]
    return ".".join([*above, *([node.module] if node.module else [])])


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a module."""
    for line, _, dotted in bindings(module):
        yield line, dotted


def references(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import and every attribute of something imported.

    `import torch.distributed as dist; dist.barrier()` refers to torch.distributed.barrier.
    """
    local: dict[str, str] = {}
    for line, name, dotted in bindings(module):
        yield line, dotted
        local[name] = name if dotted.startswith(f"{name}.") else dotted
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and (parts := _chain(node)) and parts[0] in local:
            yield node.lineno, ".".join([local[parts[0]], *parts[1:]])


def _chain(node: ast.expr) -> list[str]:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [*reversed([*parts, node.id])] if isinstance(node, ast.Name) else []


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and nested ones included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
