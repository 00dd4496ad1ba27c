"""Which plans a model, a length and a world allow; every reason at once."""

from collections.abc import Iterator

from seqloom.errors import counted
from seqloom.plan.experts import expert_reasons
from seqloom.plan.grid import divisors
from seqloom.plan.pipeline import pipeline_reasons
from seqloom.plan.plan import MOST, Plan
from seqloom.plan.recompute import recompute_reasons
from seqloom.plan.shape import ModelShape
from seqloom.plan.tiny import FAMILIES
from seqloom.plan.zero import zero_reasons

_ON_A_GRID = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""The families whose weights can be split over a grid of ranks; over a line of them (tensor_kind=1d) all can."""


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
    if world is not None and (impossible := impossible_world(world)):
        return [*found, impossible]
    if world is not None and plan.world_size != world:
        found.append(f"The plan '{plan}' takes {counted(plan.world_size, 'process')}, but there are {world}.")
    found += tensor_reasons(plan, model)
    found += _ulysses_reasons(plan, model)
    found += zero_reasons(plan)
    found += pipeline_reasons(plan, model, micro_batches)
    found += expert_reasons(plan, model)
    found += recompute_reasons(plan, model, num_tokens)
    if num_tokens is not None:
        found += _length_reasons(model, num_tokens)
    found += unsplittable(plan, num_tokens, batch)
    return found


def impossible_world(world: int) -> str | None:
    """Why there cannot be so many processes, or None."""
    return None if 1 <= world <= MOST else f"A world of {world:,} processes is not possible; it has 1 to {MOST:,}."


def unsplittable(plan: Plan, num_tokens: int | None, batch: int | None = None) -> Iterator[str]:
    """Why sequences of `num_tokens`, `batch` of them, as far as known, cannot be dealt to the plan's ranks."""
    if num_tokens is not None and 0 < num_tokens < shortest(plan):
        tensor = f" {_tensor_words(plan)}" if _piece(plan) > 1 or plan.tensor_grid.tokens > 1 else ""
        yield (
            f"A sequence of {counted(num_tokens, 'token')} is too short for ring={plan.ring} "
            f"ulysses={plan.ulysses}{tensor} layout={plan.layout} to give each rank at least one; the shortest "
            f"sequence has {shortest(plan)}."
        )
    if batch is not None and batch < 1:
        yield f"A batch of {counted(batch, 'sequence')} is empty; the smallest has 1."
    elif batch is not None and batch % plan.data:
        yield (
            f"A batch of {counted(batch, 'sequence')} cannot be split over data={plan.data} "
            f"(divisors: {_listed(divisors(batch))})."
        )


def tensor_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
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
            f"{counted(model.heads, 'query head')} cannot be split evenly over {over}; use a {of} that divides them: "
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
            f"A sequence of {counted(num_tokens, 'token')} is longer than the model's "
            f"{counted(model.max_positions, 'position')}; use at most so many, or a model that has more."
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


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
