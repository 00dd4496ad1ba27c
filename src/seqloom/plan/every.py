"""Every legal way to split a model over a number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from seqloom.plan.legality import divisors, reasons
from seqloom.plan.plan import Plan, Schedule
from seqloom.plan.shape import ModelShape

AXES = ("data", "pipeline", "ring", "ulysses", "tensor")


def every_plan(model: ModelShape, num_tokens: int | None, *, world: int, batch: int | None = None) -> Iterator[Plan]:
    """All legal plans of `world` ranks, over all axes: degrees, ZeRO stages, schedules, tensor grids, experts.

    Options that change no axis (layout, exchange, overlap, recomputation and the like) stand at their
    defaults. num_tokens, batch: as in `check`.

    >>> from seqloom.plan import fit, read_config
    >>> tiny = ModelShape.from_config(fit(read_config("llama"), Plan(), 64))
    >>> [str(plan) for plan in every_plan(tiny, 64, world=1)]
    ['data=1']
    """
    for degrees in _products(world, len(AXES)):
        values: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        alone = Plan(**values)
        for tensor, schedule, zero, expert in product(
            _tensors(alone), _schedules(alone), _stages(alone), _experts(alone, model)
        ):
            plan = replace(alone, **tensor, **schedule, **zero, **expert)
            if not reasons(plan, model, num_tokens, world=world, batch=batch):
                yield plan


def _products(number: int, length: int) -> Iterator[tuple[int, ...]]:
    """All tuples of so many degrees whose product is `number`, small first degrees first."""
    if length == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in _products(number // first, length - 1):
            yield first, *rest


def _tensors(plan: Plan) -> Iterator[dict[str, Any]]:
    """Kinds and grids of a tensor degree; every axis of a grid has two ranks or more."""
    yield {}
    if plan.tensor == 1:
        return
    yield {"sequence_parallel": False}
    for numbers, kind in ((2, "2d"), (3, "2.5d"), (3, "3d")):
        for sizes in _products(plan.tensor, numbers):
            if min(sizes) > 1:
                depth, *grid = sizes if kind == "2.5d" else (1, *sizes)
                even = None if len(set(grid)) == 1 else "x".join(map(str, grid))
                yield {"tensor_kind": kind, "depth": depth, "grid": even}


def _schedules(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {}
    if plan.pipeline > 1:
        yield from ({"schedule": name} for name in get_args(Schedule) if name != Plan.schedule)


def _stages(plan: Plan) -> Iterator[dict[str, Any]]:
    """ZeRO stages, with shares repeated in every way too."""
    yield {}
    for stage in (1, 2, 3) if plan.replicas > 1 else ():
        yield from ({"zero": stage, "zero_replicas": groups} for groups in divisors(plan.replicas)[:-1])


def _experts(plan: Plan, model: ModelShape) -> Iterator[dict[str, Any]]:
    yield {}
    if not getattr(model, "experts", 0):
        return
    for split in dict.fromkeys((1, plan.tensor)):
        ranks = plan.replicas * (plan.tensor if split == 1 else 1)
        for degree in divisors(ranks):
            if (split, degree) != (1, 1):
                yield {"expert": degree, "expert_tensor": split}
