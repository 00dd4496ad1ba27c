"""Where gradients are kept, and over which ranks each is summed."""

from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from close import assert_close
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.model import clear_gradients, gradient, hand_over, main_gradients, sum_gradients
from seqloom.plan import Plan, Side
from seqloom.tensor import TensorGroup, local, split

PLANS = {
    "data=2 tensor=3": ("tensor",),
    "tensor=6 tensor_kind=2d grid=3x2": ("row", "col"),
    "ring=1 tensor=8 tensor_kind=2.5d depth=2": ("depth", "row", "col"),
    "data=2 ulysses=2": (),
}
"""By plan the axes that one gradient or another is summed over."""


def summed(text: str, bucket: int) -> int:
    """Each parameter has its own axes to be summed over; every rank puts its own number into its gradient."""
    fabric = Fabric.build(Plan.parse(text))
    group, axes = TensorGroup.of(fabric), PLANS[text]
    model, expected = nn.ParameterDict(), {}
    # Every choice of axes, in both types in turn, so that no two neighbours share a buffer.
    for number, chosen in enumerate(product((False, True), repeat=len(axes))):
        over = tuple(name for name, taken in zip(axes, chosen, strict=True) if taken)
        for dtype, size in product((torch.float32, torch.float64), (5, 1, 2)):
            name = f"{number} {dtype} {size}".replace(".", " ")
            shards = {other: 0 for other in axes if other not in over}
            model[name] = split(
                nn.Parameter(torch.zeros(size, 3, dtype=dtype)), group, dict(list(shards.items())[:1]), Side(over, None)
            )
            model[name].sum_axes = over
            model[name].grad = model[name].detach() + 0.5**fabric.rank
            expected[name] = sum(0.5**rank for rank in partners(fabric, over))
    with patch("seqloom.fabric.bucket.BUCKET_BYTES", bucket):
        sum_gradients(model, fabric)
    for name, parameter in model.items():
        assert parameter.grad is not None and isinstance(parameter.grad, DTensor) == (fabric.tensor.size > 1)
        assert (local(parameter.grad) == expected[name]).all(), name
    fabric.close()
    return len(model)


def partners(fabric: Fabric, over: tuple[str, ...]) -> list[int]:
    """The ranks that this rank's gradient is summed with: those that differ from it on these axes and in data alone."""
    plan = fabric.plan
    sizes = [plan.data, plan.ring, plan.ulysses, *plan.tensor_grid.sizes]
    names = ["data", "ring", "ulysses", *plan.tensor_grid.axes]
    places = list(product(*map(range, sizes)))
    here = places[fabric.rank]
    free = {"data", "ring", "ulysses", *over}
    return [
        rank
        for rank, place in enumerate(places)
        if all(name in free or a == b for name, a, b in zip(names, place, here, strict=True))
    ]


@pytest.mark.parametrize("bucket", [0, 100, 2**20])
@pytest.mark.parametrize("text", PLANS)
def test_each_gradient_is_summed_over_its_axes(pool: Pool, text: str, bucket: int) -> None:
    """Catches a gradient summed twice over an axis or not at all, buffers of mixed types or axes, one copied back to
    another's place, and ranks whose uneven parts fill buffers in another order: they would wait for ever."""
    plan = Plan.parse(text)
    assert pool.run(plan.world_size, summed, text, bucket) == [6 * 2 ** len(PLANS[text])] * plan.world_size


def test_a_parameter_without_a_gradient_is_named() -> None:
    """Catches ranks that skip what others send."""
    model = nn.Linear(2, 3)
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(ModelError, match=r"bias has no gradient: .*; call requires_grad_\(False\) on it\."):
        sum_gradients(model, Fabric.build(Plan()))
    model.bias.requires_grad_(False)
    sum_gradients(model, Fabric.build(Plan()))


def accumulated(text: str, main: bool) -> tuple[Tensor, torch.dtype, bool]:
    """The gradient of a bf16 weight after 64 backwards, of which one alone is large."""
    fabric = Fabric.build(Plan.parse(text))
    group = TensorGroup.of(fabric)
    model = nn.ParameterDict(
        {"w": split(nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)), group, {"tensor": 0}, Side((), None))}
    )
    if main:
        main_gradients(model)
    for step in range(64):
        (local(model["w"]) * (256.0 if step == 0 else 0.5)).sum().backward()
    freed = model["w"].grad is None
    sum_gradients(model, fabric)
    found = gradient(model["w"])
    assert found is not None
    whole, dtype = local(found).clone(), found.dtype
    hand_over(model)
    assert model["w"].grad is not None and model["w"].grad.dtype == torch.bfloat16
    assert (local(model["w"].grad) == whole.bfloat16()).all()
    clear_gradients(model)
    assert gradient(model["w"]) is None
    return whole, dtype, freed


@pytest.mark.parametrize("text", ["data=1", "data=2", "tensor=2"])
def test_main_gradients(pool: Pool, text: str) -> None:
    """Catches micro-batches that bf16 rounds away, a main gradient left out of the sum over ranks or out of what the
    optimizer reads, and gradients kept twice."""
    plan = Plan.parse(text)
    exact = torch.full((4 // plan.tensor, 3), (256.0 + 63 * 0.5) * plan.data)
    for whole, dtype, freed in pool.run(plan.world_size, accumulated, text, True):
        assert freed and dtype == torch.float32
        assert_close(whole, exact, tolerance=1e-6)
    for whole, dtype, freed in pool.run(plan.world_size, accumulated, text, False):
        assert not freed and dtype == torch.bfloat16
        assert (whole.float() - exact).norm() / exact.norm() > 0.05  # so the test above can fail


def test_main_gradients_leave_frozen_parameters_alone() -> None:
    """Catches a hook on what has no gradient, which torch refuses."""
    model: Any = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    main_gradients(model)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None and model.weight.main_grad.dtype == torch.float32
    assert gradient(model.bias) is None
