"""Rooms stand on floors, and a module reaches only down."""

import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from architecture.source import Module, example, imports, modules

FLOORS = {
    "errors": -1,
    "geometry": 0,
    "plan": 0,
    "dialects": 1,
    "planner": 1,
    "fabric": 1,
    "sequence": 2,
    "attention": 3,
    "tensor": 3,
    "memory": 3,
    "model": 4,
    "train": 5,
    "verify": 6,
    "compat": 6,
    "report": 7,
    "cli": 8,
}
TORCH_FREE = ("errors", "geometry", "plan", "dialects", "planner")
HEAVY = ("torch", "transformers", "safetensors", "numpy")


def floor_violations(module: Module) -> Iterator[str]:
    """What `module` imports from its own floor or above, in words."""
    if module.name == "seqloom":
        return  # the root names everything, lazily
    if module.room not in FLOORS:
        yield f"{module.name} stands in no known room"
        return
    for line, dotted in imports(module):
        parts = dotted.split(".")
        if parts[0] != "seqloom" or parts[1:] == ["__version__"]:
            continue
        room = (*parts, "")[1]
        if room == module.room:
            continue
        if room not in FLOORS:
            yield f"{module.name}:{line} imports {dotted}, which names no room (import names from their room)"
        elif FLOORS[room] >= FLOORS[module.room]:
            yield f"{module.name}:{line} imports {dotted}, which is not below it"


def cycle(found: Sequence[Module]) -> list[str]:
    """The names along one import cycle between files of one room, or nothing."""
    names = {module.name for module in found}
    edges: dict[str, set[str]] = {module.name: set() for module in found}
    for module in found:
        for _, dotted in imports(module):
            target = dotted if dotted in names else dotted.rpartition(".")[0]
            same_room = target.split(".")[:2] == module.name.split(".")[:2]
            if target in names and same_room and module.name != "seqloom":
                edges[module.name].add(target)
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if loop := visit(target, [*path, name]):
                return loop
        done.add(name)
        return []

    return next((loop for name in sorted(edges) if (loop := visit(name, []))), [])


def heavy_imports(module: Module) -> Iterator[str]:
    """Imports of torch, or of what loads it, by a module that must do without."""
    for line, dotted in imports(module):
        if module.room in TORCH_FREE and dotted.partition(".")[0] in HEAVY:
            yield f"{module.name}:{line} imports {dotted}"


def test_every_import_goes_down() -> None:
    """Catches an upward or sideways import, one hidden inside a function too."""
    assert [violation for module in modules() for violation in floor_violations(module)] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("seqloom.plan.plan", "from seqloom.fabric import Fabric"),
        ("seqloom.plan.plan", "from seqloom.geometry import Mask"),
        ("seqloom.geometry.mask", "from seqloom import plan"),
        ("seqloom.planner.search", "def late():\n    import seqloom.fabric.mesh"),
        ("seqloom.attention.ring", "from ..model import parallelize"),
        ("seqloom.attention.ring", "from seqloom import parallelize"),
        ("seqloom.attention.ring", "from importlib import import_module\nimport_module('seqloom.cli')"),
        ("seqloom.errors", "from seqloom.plan import Plan"),
        ("seqloom.misc", "import math"),
    ],
)
def test_the_floor_check_has_teeth(name: str, text: str) -> None:
    """Catches a floor check that misses a form of import."""
    assert len(list(floor_violations(example(name, text)))) == 1


@pytest.mark.parametrize(
    "text", ["from seqloom.plan import Plan", "from seqloom.errors import PlanError", "import torch"]
)
def test_the_floor_check_lets_downward_imports_pass(text: str) -> None:
    """Catches a floor check that refuses what the floors allow."""
    assert not list(floor_violations(example("seqloom.fabric.mesh", text)))


def test_no_two_files_of_a_room_import_each_other() -> None:
    """Catches an import cycle, which makes the order of imports matter."""
    assert cycle(modules()) == []


def test_the_cycle_check_has_teeth() -> None:
    """Catches a cycle check that follows only one kind of import."""
    a = example("seqloom.fabric.a", "from seqloom.fabric.b import x")
    b = example("seqloom.fabric.b", "def late():\n    from . import c")
    c = example("seqloom.fabric.c", "import seqloom.fabric.a")
    assert cycle([a, b, c]) == ["seqloom.fabric.a", "seqloom.fabric.b", "seqloom.fabric.c", "seqloom.fabric.a"]
    assert cycle([a, b, example("seqloom.fabric.c", "import math")]) == []


def test_the_rooms_below_fabric_import_no_torch() -> None:
    """Catches torch creeping into legality or planning, which must answer at once on a laptop."""
    assert [found for module in modules() for found in heavy_imports(module)] == []
    assert len(list(heavy_imports(example("seqloom.plan.x", "def f():\n    import torch.nn")))) == 1


@pytest.mark.parametrize(
    "name", ["seqloom", "seqloom.errors", "seqloom.geometry", "seqloom.plan", "seqloom.planner", "seqloom.dialects"]
)
def test_importing_them_leaves_torch_unloaded(name: str) -> None:
    """Catches torch loaded indirectly, through something these rooms import or a package on the way to them."""
    code = f"import {name}, sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    path = ":".join(entry for entry in sys.path if entry)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert ran.stdout.strip() == "[]"
