"""What a rank holds of parameters, gradients and the optimizer's state once backward is done, and what ZeRO sends."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from seqloom.plan import Plan, chunks

MOMENTS = 2
"""AdamW's tensors of the shape of what it steps."""


@dataclass(frozen=True)
class AtRest:
    """Bytes a rank holds between backward and the optimizer's next step."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def at_rest_bytes(
    plan: Plan,
    shapes: Iterable[tuple[int, ...]],
    *,
    zero_rank: int = 0,
    ranks: int | None = None,
    item_bytes: int = 4,
) -> AtRest:
    """Bytes at rest of trainable parameters of one type, their gradients and AdamW's moments.

    shapes: of the rank's part of each parameter, as the tensor grid leaves it. zero_rank: the place among those
    that share it out. ranks: how many these are, where that is not data x ring x ulysses / zero_replicas, as of
    experts that are dealt out. Rows are dealt in even chunks, rounded up; FSDP2 (zero 2 and 3) holds parameters and
    gradients of the last ranks padded to as many rows, while moments are of the rows there are.

    >>> at_rest_bytes(Plan(data=2, zero=1), [(3, 10)], zero_rank=1)
    AtRest(parameters=120, gradients=120, optimizer=80)
    >>> at_rest_bytes(Plan(data=2, zero=3), [(3, 10)], zero_rank=1)
    AtRest(parameters=80, gradients=80, optimizer=80)
    """
    ranks = ranks or plan.replicas // plan.zero_replicas
    ranks, place = (ranks, zero_rank) if plan.zero else (1, 0)
    whole = padded = mine = 0
    for rows, *rest in shapes:
        width, shares = prod(rest), chunks(rows, ranks)
        whole, padded, mine = whole + rows * width, padded + shares[0] * width, mine + shares[place] * width
    held = padded if plan.zero >= 2 else whole
    stepped = mine if plan.zero else whole
    return AtRest(held * item_bytes, held * item_bytes, MOMENTS * stepped * item_bytes)


def zero_bytes(
    plan: Plan,
    units: Iterable[Iterable[tuple[int, ...]]],
    *,
    ranks: int | None = None,
    micro_batches: int = 1,
    item_bytes: int = 4,
) -> int:
    """Bytes one rank sends along `zero` in an optimizer step under zero=2 and zero=3, with FSDP2's padding.

    units: the shapes of this rank's parts of the parameters of each unit; the last is what lies outside the layers.
    ranks: that share them out, as in `at_rest_bytes`.
    Each micro-batch gathers every unit before forward and sums its gradients after backward; under zero=3 the layers,
    freed after forward, are gathered once more for backward.

    >>> zero_bytes(Plan(data=2, zero=3), [[(3, 10)], [(4, 10)]])
    400
    """
    ranks = ranks or plan.replicas // plan.zero_replicas
    shares = [sum(chunks(rows, ranks)[0] * prod(rest) for rows, *rest in unit) for unit in units]
    moves = 2 * sum(shares) + (sum(shares[:-1]) if plan.zero == 3 else 0)
    return (ranks - 1) * moves * item_bytes * micro_batches


def stepped_bytes(
    plan: Plan, shapes: Iterable[tuple[int, ...]], *, zero_rank: int = 0, ranks: int | None = None, item_bytes: int = 4
) -> int:
    """Bytes one rank sends along `zero` after an optimizer step under zero=1: the rows that it stepped, to the others.

    shapes, zero_rank, ranks: as in `at_rest_bytes`.
    """
    ranks = ranks or plan.replicas // plan.zero_replicas
    mine = sum(chunks(rows, ranks)[zero_rank] * prod(rest) for rows, *rest in shapes)
    return (ranks - 1) * mine * item_bytes
