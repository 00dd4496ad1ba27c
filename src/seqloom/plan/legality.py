"""Which plans a model, a length and a world allow; every reason at once, and the nearest legal plan."""

from collections.abc import Iterator
from dataclasses import replace
from math import isqrt, log2

from seqloom.errors import PlanError
from seqloom.plan.plan import MOST, Plan
from seqloom.plan.shape import ModelShape


def check(
    plan: Plan, model: ModelShape, num_tokens: int | None = None, *, world: int | None = None, batch: int | None = None
) -> None:
    """Raise PlanError with every reason why `plan` cannot run, and the nearest plan that can.

    num_tokens: length of one global sequence, when known. world: number of processes there are, when known.
    batch: rows of one global micro-batch, when known.

    >>> from seqloom.plan import fit, read_config
    >>> tiny = ModelShape.from_config(fit(read_config("llama"), Plan(), 64, heads=12))
    >>> check(Plan(ulysses=16), tiny, 64)    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    seqloom.errors.PlanError: ulysses=16 is more than the model's 12 query heads... Try ring=2 ulysses=8.
    """
    found = reasons(plan, model, num_tokens, world=world, batch=batch)
    if found:
        near = nearest(plan, model, num_tokens, world=world, batch=batch)
        if (
            near
            and near.world_size < (world or plan.world_size)
            and set(found) <= set(unsplittable(plan, num_tokens, batch))
        ):
            near = None  # the reasons name lengths that fit; fewer processes would be a poor way out
        raise PlanError(found, str(near) if near else None)


def reasons(
    plan: Plan, model: ModelShape, num_tokens: int | None = None, *, world: int | None = None, batch: int | None = None
) -> list[str]:
    """Every reason why `plan` cannot run this model at this length; empty when it is legal."""
    found = list(model.unsupported)
    if world is not None and not 1 <= world <= MOST:
        return [*found, f"A world of {world} processes is not possible; it has 1 to {MOST:,}."]
    if world is not None and plan.world_size != world:
        found.append(f"The plan '{plan}' takes {plan.world_size} processes, but there are {world}.")
    if plan.ulysses > model.heads:
        found.append(
            f"ulysses={plan.ulysses} is more than the model's {model.heads} query heads, and each rank takes "
            f"at least one; the largest degree is {model.heads}."
        )
    if num_tokens is not None:
        found += _length_reasons(model, num_tokens)
    found += unsplittable(plan, num_tokens, batch)
    return found


def unsplittable(plan: Plan, num_tokens: int | None, batch: int | None = None) -> Iterator[str]:
    """Why sequences of `num_tokens`, `batch` of them, as far as known, cannot be dealt to the plan's ranks."""
    for axis in ("pipeline", "tensor"):
        if getattr(plan, axis) > 1:
            yield f"{axis}={getattr(plan, axis)} is not supported yet; the only degree is 1."
    if num_tokens is not None and 0 < num_tokens < shortest(plan):
        yield (
            f"{num_tokens} tokens are too few for ring={plan.ring} ulysses={plan.ulysses} layout={plan.layout} "
            f"to give each rank at least one; the shortest sequence has {shortest(plan)}."
        )
    if batch is not None and batch < 1:
        yield f"A batch of {batch} sequences is empty; the smallest has 1."
    elif batch is not None and batch % plan.data:
        yield (
            f"A batch of {batch} sequences cannot be split over data={plan.data} "
            f"(divisors: {_listed(_divisors(batch))})."
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

    A ring rank holds as many tokens as its Ulysses group has ranks, or more. Zigzag deals it two
    chunks, of which each may be the shorter kind, so an even number of tokens is sure; the blocks of
    `balanced` may together be short of half an even share.
    """
    if plan.ring == 1:
        return plan.ulysses
    each = {"zigzag": plan.ulysses + plan.ulysses % 2, "balanced": 2 * plan.ulysses}
    return plan.ring * each.get(plan.layout, plan.ulysses)


def legal_plans(
    plan: Plan, model: ModelShape, num_tokens: int | None, *, world: int, batch: int | None = None
) -> Iterator[Plan]:
    """Every legal way to spread `world` processes over data, ring and ulysses, the rest as in `plan`.

    An inner ring that does not divide another ring degree, or is all of it, is left out.
    """
    for data in _divisors(world):
        for ring in _divisors(world // data):
            ulysses = world // (data * ring)
            inner = plan.inner_ring
            if inner and (ring % inner or ring == inner < plan.ring):
                inner = None
            candidate = replace(plan, data=data, pipeline=1, ring=ring, ulysses=ulysses, tensor=1, inner_ring=inner)
            if not reasons(candidate, model, num_tokens, world=world, batch=batch):
                yield candidate


def nearest(
    plan: Plan, model: ModelShape, num_tokens: int | None = None, *, world: int | None = None, batch: int | None = None
) -> Plan | None:
    """The legal plan whose degrees are closest in ratio, or None.

    It takes as many processes as there are, or else the largest part of them that divides them.
    Ties keep the data degree, since it changes how many rows a batch needs.
    """

    def distance(other: Plan) -> tuple[float, float]:
        apart = [abs(log2(getattr(other, axis) / getattr(plan, axis))) for axis in ("ring", "ulysses", "data")]
        return sum(apart), apart[-1]

    if model.unsupported or (world is not None and not 1 <= world <= MOST):
        return None
    for size in reversed(_divisors(world or plan.world_size)):
        for layout in dict.fromkeys([plan.layout, "contiguous"]):
            legal = legal_plans(replace(plan, layout=layout), model, num_tokens, world=size, batch=batch)
            if found := min(legal, key=distance, default=None):
                return found
    return None


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
