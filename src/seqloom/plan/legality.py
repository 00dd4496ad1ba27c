"""Which plans a model, a length and a world allow; every reason at once, and the nearest legal plan."""

from collections.abc import Iterator
from dataclasses import replace
from math import isqrt, log2
from typing import Any

from seqloom.errors import PlanError
from seqloom.plan.experts import expert_reasons
from seqloom.plan.pipeline import pipeline_reasons
from seqloom.plan.plan import MOST, Plan
from seqloom.plan.recompute import recompute_reasons
from seqloom.plan.shape import ModelShape
from seqloom.plan.tiny import FAMILIES
from seqloom.plan.zero import zero_reasons

_ON_A_GRID = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""The families whose weights can be split over a grid of ranks; over a line of them (tensor_kind=1d) all can."""


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


def reasons(
    plan: Plan,
    model: ModelShape,
    num_tokens: int | None = None,
    *,
    world: int | None = None,
    batch: int | None = None,
    micro_batches: int | None = None,
) -> list[str]:
    """Every reason why `plan` cannot run this model at this length; empty when it is legal."""
    found = list(model.unsupported)
    if world is not None and not 1 <= world <= MOST:
        return [*found, f"A world of {world} processes is not possible; it has 1 to {MOST:,}."]
    if world is not None and plan.world_size != world:
        found.append(f"The plan '{plan}' takes {plan.world_size} processes, but there are {world}.")
    found += _tensor_reasons(plan, model)
    found += _ulysses_reasons(plan, model)
    found += zero_reasons(plan)
    found += pipeline_reasons(plan, model, micro_batches)
    found += expert_reasons(plan, model)
    found += recompute_reasons(plan, model)
    if num_tokens is not None:
        found += _length_reasons(model, num_tokens)
    found += unsplittable(plan, num_tokens, batch)
    return found


def unsplittable(plan: Plan, num_tokens: int | None, batch: int | None = None) -> Iterator[str]:
    """Why sequences of `num_tokens`, `batch` of them, as far as known, cannot be dealt to the plan's ranks."""
    if num_tokens is not None and 0 < num_tokens < shortest(plan):
        tensor = f" {_tensor_words(plan)}" if _piece(plan) > 1 or plan.tensor_grid.tokens > 1 else ""
        yield (
            f"{num_tokens} tokens are too few for ring={plan.ring} ulysses={plan.ulysses}{tensor} "
            f"layout={plan.layout} to give each rank at least one; the shortest sequence has {shortest(plan)}."
        )
    if batch is not None and batch < 1:
        yield f"A batch of {batch} sequences is empty; the smallest has 1."
    elif batch is not None and batch % plan.data:
        yield (
            f"A batch of {batch} sequences cannot be split over data={plan.data} "
            f"(divisors: {_listed(divisors(batch))})."
        )


def _tensor_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    """Why the tensor grid cannot split this model's layers."""
    if plan.tensor == 1:
        return
    if plan.tensor_kind != "1d" and model.family in set(FAMILIES) - set(_ON_A_GRID):
        yield (
            f"tensor_kind={plan.tensor_kind} cannot split {model.family} yet; use tensor_kind=1d, or a model of "
            f"{', '.join(_ON_A_GRID)}."
        )
    elif model.experts and not plan.sequence_parallel:
        yield (
            f"sequence_parallel=false gives every rank of tensor={plan.tensor} all tokens, and each would send them to "
            f"the experts of {model.family}; leave it out."
        )
    ranks = plan.tensor_grid.heads
    if model.heads % ranks:
        over, of = f"the {ranks} columns of {_tensor_words(plan)}", "number of columns"
        if plan.tensor_kind == "1d":
            over, of = f"tensor={plan.tensor}", "degree"
        elif plan.tensor_kind == "3d":
            over, of = f"the {ranks} input ranks of {_tensor_words(plan)}", "number of input ranks"
        yield (
            f"{model.heads} query heads cannot be split evenly over {over}; use a {of} that divides them: "
            f"{_listed(divisors(model.heads))}."
        )


def _tensor_words(plan: Plan) -> str:
    """The fields that say how the tensor group is arranged, as a plan says them."""
    return " ".join(
        part for part in str(plan).split() if part.startswith(("tensor=", "tensor_kind=", "depth=", "grid="))
    )


def _ulysses_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    """Why not every rank that trades tokens for heads would get a head."""
    heads, ulysses, ranks = model.heads, plan.attention_ulysses, plan.tensor_grid.heads
    if heads % ranks == 0:
        heads //= ranks
    if ulysses > heads:
        joined = f" with the {ulysses // plan.ulysses} token ranks of the grid" if ulysses > plan.ulysses else ""
        whose = f"the model's {heads}" if heads == model.heads else f"a tensor rank's {heads} of {model.heads}"
        way_out = ", and tensor_tokens=ring needs none" if joined else ""
        yield (
            f"ulysses={plan.ulysses}{joined} is more than {whose} query heads, and each rank takes "
            f"at least one; the largest degree is {heads}{way_out}."
        )


def _length_reasons(model: ModelShape, num_tokens: int) -> Iterator[str]:
    if num_tokens < 1:
        yield f"A sequence of {num_tokens} tokens is empty; the shortest has 1."
        return
    if model.max_positions is not None and num_tokens > model.max_positions:
        yield (
            f"A sequence of {num_tokens} tokens is longer than the model's {model.max_positions} positions; "
            "use at most so many, or a model that has more."
        )


def shortest(plan: Plan) -> int:
    """The tokens from which on every sequence gives every rank at least one.

    A rank of attention's ring holds as many tokens as its Ulysses group has ranks, or more, each with as
    many as tensor ranks share them between linears. Zigzag deals it two chunks, of which each may be the
    shorter kind, so an even number of tokens is sure; the blocks of `balanced` may together be short of
    half an even share.
    """
    held = plan.attention_ulysses * _piece(plan)
    if plan.attention_ring == 1:
        return held
    return plan.attention_ring * {"zigzag": held + held % 2, "balanced": 2 * held}.get(plan.layout, held)


def _piece(plan: Plan) -> int:
    """The fewest tokens that a rank of attention may hold for each rank to have one between linears."""
    grid = plan.tensor_grid
    sharing = grid.axes[grid.outer_only] if grid.outer_only else 1
    return -(-sharing // (grid.axes[grid.inner_only] if grid.inner_only else 1))


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
    the pipeline. An inner ring that does not divide another ring degree, or is all of it, is left out.
    """
    for alone in dict.fromkeys(
        replace(tensor, **stages)
        for tensor in _tensors(plan, model, world)
        for stages in _pipelines(plan, world // tensor.tensor)
    ):
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
                if not reasons(candidate, model, num_tokens, world=world, batch=batch, micro_batches=micro_batches):
                    yield candidate


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
        if world % candidate.tensor == 0 and not any(_tensor_reasons(candidate, model)):
            yield candidate


def _grids(alone: Plan, degree: int) -> Iterator[Plan]:
    """The even grid of this degree, where there is one; of the degree asked for every grid."""
    sizes: list[tuple[int, ...]] = []
    if alone.tensor_kind == "3d":
        sizes = [(a, b, degree // (a * b)) for a in divisors(degree) for b in divisors(degree // a)]
    elif alone.tensor_kind != "1d" and degree % alone.depth == 0:
        sizes = [(a, degree // alone.depth // a) for a in divisors(degree // alone.depth)]
    for each in sorted(sizes, key=max):  # the evenest first
        if len(set(each)) == 1:
            yield replace(alone, tensor=degree, grid=None)
        elif degree == alone.tensor:
            yield replace(alone, grid="x".join(map(str, each)))


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

    It takes as many processes as there are, or else the largest part of them that divides them.
    Ties keep the kind of tensor axis and the ranks that share its heads, then the data degree, since
    it changes how many rows a batch needs, then what attention's axes were with those of a tensor grid.
    """
    heads = plan.tensor_grid.heads

    def apart(other: Plan, *axes: str) -> float:
        return sum(abs(log2(getattr(other, axis) / getattr(plan, axis))) for axis in axes)

    def distance(other: Plan) -> tuple[float, ...]:
        return (
            apart(other, "ring", "ulysses", "tensor", "data", "pipeline"),
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


def divisors(number: int) -> list[int]:
    """The divisors of a number, rising."""
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
