"""Plans that are looked for: every legal one of a world, and the legal one nearest to another."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import log2
from operator import itemgetter
from typing import Any, get_args

from seqloom.errors import PlanError
from seqloom.plan.experts import expert_reasons
from seqloom.plan.grid import GRID_AXES, TensorKind, divisors, factors
from seqloom.plan.legality import reasons, tensor_reasons, unsplittable
from seqloom.plan.plan import MOST, Plan, Schedule
from seqloom.plan.recompute import recompute_reasons
from seqloom.plan.shape import ModelShape
from seqloom.plan.zero import zero_reasons

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
    for degrees in factors(world, len(AXES)):
        values: dict[str, Any] = dict(zip(AXES, degrees, strict=True))
        alone = Plan(**values)
        for tensor, schedule, zero, expert in product(
            _every_grid(alone), _schedules(alone), _shares(alone), _experts(alone, model)
        ):
            plan = replace(alone, **tensor, **schedule, **zero, **expert)
            if not reasons(plan, model, num_tokens, world=world, batch=batch):
                yield plan


def _every_grid(plan: Plan) -> Iterator[dict[str, Any]]:
    """Kinds and grids of a tensor degree; every axis of a grid has two ranks or more."""
    yield {}
    if plan.tensor == 1:
        return
    yield {"sequence_parallel": False}
    for kind in get_args(TensorKind)[1:]:
        for sizes in factors(plan.tensor, len(GRID_AXES[kind])):
            if min(sizes) > 1:
                yield _grid_fields(kind, sizes)


def _grid_fields(kind: TensorKind, sizes: tuple[int, ...]) -> dict[str, Any]:
    """What a plan says of a grid of these sizes, slowest axis first; square and cubic ones need no words."""
    depth, *sides = sizes if kind == "2.5d" else (1, *sizes)
    return {"tensor_kind": kind, "depth": depth, "grid": None if len(set(sides)) == 1 else "x".join(map(str, sides))}


def _schedules(plan: Plan) -> Iterator[dict[str, Any]]:
    yield {}
    if plan.pipeline > 1:
        yield from ({"schedule": name} for name in get_args(Schedule) if name != Plan.schedule)


def _shares(plan: Plan) -> Iterator[dict[str, Any]]:
    """ZeRO stages, with shares repeated in every way too."""
    yield {}
    for stage in (1, 2, 3) if plan.replicas > 1 else ():
        yield from ({"zero": stage, "zero_replicas": groups} for groups in divisors(plan.replicas)[:-1])


def _experts(plan: Plan, model: ModelShape) -> Iterator[dict[str, Any]]:
    yield {}
    if not model.experts:
        return
    for split in dict.fromkeys((1, plan.tensor)):
        ranks = plan.replicas * (plan.tensor if split == 1 else 1)
        for degree in divisors(ranks):
            if (split, degree) != (1, 1):
                yield {"expert": degree, "expert_tensor": split}


def check(
    plan: Plan,
    model: ModelShape,
    num_tokens: int | None = None,
    *,
    world: int | None = None,
    batch: int | None = None,
    micro_batches: int | None = None,
) -> None:
    """Raise PlanError with every reason why `plan` cannot run, and the nearest plan that can.

    num_tokens: length of one global sequence, when known. world: number of processes there are, when known.
    batch: rows of one global micro-batch, when known. micro_batches: of a step, when known.

    >>> from seqloom.plan import fit, read_config
    >>> tiny = ModelShape.from_config(fit(read_config("llama"), Plan(), 64, heads=12))
    >>> check(Plan(ulysses=16), tiny, 64)    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    seqloom.errors.PlanError: ulysses=16 is more than the model's 12 query heads... Try ring=2 ulysses=8.
    """
    found = reasons(plan, model, num_tokens, world=world, batch=batch, micro_batches=micro_batches)
    if found:
        near = nearest(plan, model, num_tokens, world=world, batch=batch, micro_batches=micro_batches)
        if (
            near
            and near.world_size < (world or plan.world_size)
            and set(found) <= set(unsplittable(plan, num_tokens, batch))
        ):
            near = None  # the reasons name lengths that fit; fewer processes would be a poor way out
        raise PlanError(found, str(near) if near else None)


def legal_plans(
    plan: Plan,
    model: ModelShape,
    num_tokens: int | None,
    *,
    world: int,
    batch: int | None = None,
    micro_batches: int | None = None,
) -> Iterator[Plan]:
    """Every legal way to spread `world` processes over data, ring and ulysses, the rest as in `plan`.

    Where it has a tensor axis, that too takes its own degree and others, down to 1: see `_tensors`; and so does
    the pipeline. ZeRO, experts and recomputation stay as they are where such degrees allow it, and are else relaxed
    as little as will do. An inner ring that does not divide another ring degree, or is all of it, is left out.
    """
    for each in dict.fromkeys(
        replace(tensor, **stages)
        for tensor in _tensors(plan, model, world)
        for stages in _pipelines(plan, world // tensor.tensor)
    ):
        again = _relaxed(each, lambda other: recompute_reasons(other, model, num_tokens), _less_recomputed)
        if any(recompute_reasons(again, model, num_tokens)):
            continue
        kept: dict[str, Any] = {"recompute": again.recompute, "activations": again.activations}
        alone = replace(again, recompute="none", activations="whole")  # looked at once, whatever the other degrees
        grid, left = alone.tensor_grid, world // alone.tensor // alone.pipeline
        most = model.heads // grid.heads // alone.attention_ulysses
        for data in divisors(left):
            if batch is not None and batch % data:
                continue
            for ring in divisors(left // data):
                ulysses = left // (data * ring)
                if ulysses > most or (num_tokens is not None and num_tokens < ring * ulysses * grid.tokens):
                    continue
                candidate = replace(alone, data=data, ring=ring, ulysses=ulysses)
                inner, around = plan.inner_ring, candidate.attention_ring
                if inner and around % inner == 0 and not around == inner < plan.attention_ring:
                    candidate = replace(candidate, inner_ring=inner)
                candidate = _relaxed(candidate, zero_reasons, _less_shared)
                candidate = _relaxed(candidate, lambda other: expert_reasons(other, model), _less_dealt)
                if not reasons(candidate, model, num_tokens, world=world, batch=batch, micro_batches=micro_batches):
                    yield replace(candidate, **kept)


def _relaxed(
    plan: Plan, wrong: Callable[[Plan], Iterator[str]], ways: Callable[[Plan], Iterator[dict[str, Any]]]
) -> Plan:
    """The plan where nothing is wrong with it, else the first of its other ways with which nothing is, else itself."""
    if not any(wrong(plan)):
        return plan
    others = (replace(plan, **way) for way in ways(plan))
    return next((other for other in others if not any(wrong(other))), plan)


def _less_recomputed(plan: Plan) -> Iterator[dict[str, Any]]:
    """What to try in place of recomputation that cannot be, the nearest first."""
    yield {"activations": "whole"}
    if plan.recompute.startswith("full:") and "/" not in plan.recompute:  # of too many layers
        yield {"recompute": "full"}
        yield {"recompute": "full", "activations": "whole"}
    yield {"recompute": "none", "activations": "whole"}


def _less_shared(plan: Plan) -> Iterator[dict[str, Any]]:
    """What to try in place of ZeRO that cannot be, the nearest first."""
    yield {"zero_replicas": 1}
    yield {"offload": False}
    yield {"zero_replicas": 1, "offload": False}
    yield {"zero": 0, "zero_replicas": 1, "offload": False}


def _less_dealt(plan: Plan) -> Iterator[dict[str, Any]]:
    """What to try in place of experts dealt out as they cannot be, the most ranks first."""
    splits = dict.fromkeys((plan.expert_tensor, *([plan.tensor] if plan.expert_tensor > 1 else ()), 1))
    for degree in reversed(divisors(plan.expert)):
        yield from ({"expert": degree, "expert_tensor": split} for split in splits)


def _pipelines(plan: Plan, world: int) -> Iterator[dict[str, Any]]:
    """What to try in place of the pipeline fields: as they are, of each degree that divides it plainer ones, none."""
    plainer = dict.fromkeys((plan.schedule, Plan.schedule, "gpipe"))
    for degree in reversed(divisors(plan.pipeline)):
        if world % degree:
            continue
        if degree == plan.pipeline:
            yield {}
        for schedule in plainer if degree > 1 else (Plan.schedule,):
            yield {"pipeline": degree, "schedule": schedule, "chunks": None, "stages": None}


def _tensors(plan: Plan, model: ModelShape, world: int) -> Iterator[Plan]:
    """Plans of a tensor axis alone to try in place of that of `plan`, which comes first; it is 1 where that is.

    Other degrees take an even grid of the kind asked for, the same degree any grid of that kind, and
    every degree a line of ranks.
    """
    alone = replace(plan, data=1, ring=1, ulysses=1, inner_ring=None)
    candidates = [alone]
    if plan.tensor > 1:
        line = replace(alone, tensor_kind="1d", depth=1, grid=None, tensor_tokens="ring")
        for degree in divisors(world)[1:]:
            candidates += [*_grids(alone, degree), replace(line, tensor=degree)]
        candidates.append(
            replace(line, tensor=1, sequence_parallel=True, tensor_overlap=Plan.tensor_overlap, regather=Plan.regather)
        )
    for candidate in dict.fromkeys(candidates):
        if world % candidate.tensor == 0 and not any(tensor_reasons(candidate, model)):
            yield candidate


def _grids(alone: Plan, degree: int) -> Iterator[Plan]:
    """The even grid of this degree, where there is one; of the degree asked for every grid. The evenest come first."""
    kind, found = alone.tensor_kind, []
    for sizes in factors(degree, len(GRID_AXES[kind])):
        fields = _grid_fields(kind, sizes)
        if fields["depth"] == alone.depth and (fields["grid"] is None or degree == alone.tensor):
            found.append((max(sizes[kind == "2.5d" :]), fields))
    for _, fields in sorted(found, key=itemgetter(0)):
        yield replace(alone, tensor=degree, **fields)


_RELAXED = ("zero", "zero_replicas", "offload", "expert", "expert_tensor", "recompute", "activations")


def nearest(
    plan: Plan,
    model: ModelShape,
    num_tokens: int | None = None,
    *,
    world: int | None = None,
    batch: int | None = None,
    micro_batches: int | None = None,
) -> Plan | None:
    """The legal plan whose degrees are closest in ratio, or None.

    It takes as many processes as there are, or else the largest part of them that divides them. Ties keep most of
    ZeRO, experts and recomputation, then the kind of tensor axis and the ranks that share its heads, then the data
    degree, since it changes how many rows a batch needs, then what attention's axes were with those of a tensor grid.
    """
    heads = plan.tensor_grid.heads

    def apart(other: Plan, *axes: str) -> float:
        return sum(abs(log2(getattr(other, axis) / getattr(plan, axis))) for axis in axes)

    def distance(other: Plan) -> tuple[float, ...]:
        return (
            apart(other, "ring", "ulysses", "tensor", "data", "pipeline"),
            sum(getattr(other, name) != getattr(plan, name) for name in _RELAXED),
            other.tensor_kind != plan.tensor_kind,
            abs(log2(other.tensor_grid.heads / heads)),
            apart(other, "data"),
            apart(other, "attention_ring", "attention_ulysses"),
        )

    if model.unsupported or (world is not None and not 1 <= world <= MOST):
        return None
    for size in reversed(divisors(world or plan.world_size)):
        for layout in dict.fromkeys([plan.layout, "contiguous"]):
            asked = replace(plan, layout=layout)
            legal = legal_plans(asked, model, num_tokens, world=size, batch=batch, micro_batches=micro_batches)
            if found := min(legal, key=distance, default=None):
                return found
    return None
