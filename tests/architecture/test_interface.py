"""What the package offers: exact `__all__`s, complete annotations, collectives in one place."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from architecture.source import Module, example, functions, modules, references

PACKAGES = [module for module in modules() if module.package]

COLLECTIVE = re.compile(
    r"torch\.distributed\.(.*\.)?_?(all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|isend|irecv|send|recv"
    r"|batch_isend_irecv|barrier|monitored_barrier|gather|scatter|reduce)(_(?!op)\w+)?"
)
GROUP_MAKER = re.compile(r"torch\.distributed\.(.*\.)?(new_group|new_subgroups\w*|split_group|init_device_mesh)")


def public_names(module: Module) -> set[str]:
    """The names without underscore that the top level of an `__init__` imports or defines."""
    found: set[str] = set()
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def collective_calls(module: Module) -> Iterator[str]:
    """Uses of torch.distributed's collectives, or of its makers of groups, outside fabric."""
    for line, dotted in references(module):
        if module.room != "fabric" and (COLLECTIVE.fullmatch(dotted) or GROUP_MAKER.fullmatch(dotted)):
            yield f"{module.name}:{line} uses {dotted}"


def missing_annotations(module: Module) -> Iterator[str]:
    """Arguments and results that carry no annotation."""
    for function in functions(module):
        spec = function.args
        named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, [spec.vararg, spec.kwarg])]
        bare = [arg.arg for arg in named if arg.annotation is None and arg.arg not in ("self", "cls")]
        if function.returns is None:
            bare.append("return")
        if bare:
            yield f"{module.name}:{function.lineno} {function.name} leaves {', '.join(bare)} without annotation"


@pytest.mark.parametrize("module", PACKAGES, ids=lambda module: module.name)
def test_all_is_exact(module: Module) -> None:
    """Catches a name offered that does not exist, one imported and forgotten in `__all__`, and one listed twice."""
    package = import_module(module.name)
    listed = list(getattr(package, "__all__", []))
    assert [name for name in listed if not hasattr(package, name)] == []
    assert len(set(listed)) == len(listed)
    if module.name == "seqloom":
        homes = {name: import_module(f"seqloom.{home}") for name, home in package._HOMES.items()}
        assert [name for name, home in homes.items() if name not in home.__all__] == []
        return
    assert public_names(module) == set(listed)


def test_every_folder_of_modules_is_a_package() -> None:
    """Catches a folder without `__init__`, which works from a checkout and is missing from the installed package."""
    packages = {module.name for module in PACKAGES}
    assert [m.name for m in modules() if not m.package and m.name.rpartition(".")[0] not in packages] == []


def test_collectives_are_called_in_fabric_alone() -> None:
    """Catches communication that no meter counts and no adjoint names."""
    assert [call for module in modules() for call in collective_calls(module)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ndef f(x):\n    torch.distributed.all_reduce(x)",
        "import torch.distributed as dist\ndist.barrier()",
        "from torch import distributed\ndistributed.all_to_all_single(1, 2)",
        "from torch.distributed import reduce_scatter_tensor",
        "from torch.distributed import nn\nnn.all_gather(1)",
        "import torch.distributed as d\nd.P2POp(d.isend, 1, 2)",
        "from torch.distributed.device_mesh import init_device_mesh",
        "import torch.distributed as d\nd._all_gather_base(1, 2)",
    ],
)
def test_the_collective_check_has_teeth(text: str) -> None:
    """Catches a check blind to one way of naming torch.distributed."""
    assert list(collective_calls(example("seqloom.model.x", text)))
    assert not list(collective_calls(example("seqloom.fabric.x", text)))


def test_the_collective_check_spares_the_rest() -> None:
    """Catches a check that refuses what is no communication."""
    text = "import torch.distributed as d\nfrom seqloom.fabric import all_reduce_, barrier\nd.get_rank()\nbarrier(1)"
    assert not list(collective_calls(example("seqloom.model.x", text)))


def test_every_function_is_annotated() -> None:
    """Catches an argument or a result without a type."""
    assert [found for module in modules() for found in missing_annotations(module)] == []


@pytest.mark.parametrize("text", ["def f(a, b: int) -> int: ...", "def f(*a: int, **b) -> None: ...", "def f(): ..."])
def test_the_annotation_check_has_teeth(text: str) -> None:
    """Catches a check that overlooks a kind of argument or the result."""
    assert len(list(missing_annotations(example("seqloom.model.x", text)))) == 1


def test_lazy_names_are_no_modules() -> None:
    """Catches a name of the package that its own submodule overwrites: `seqloom.attention` was a module after all."""
    import seqloom

    for name in seqloom.__all__:
        assert not isinstance(getattr(seqloom, name), ModuleType), name
