"""Which ZeRO stages a plan allows, and which rows of a tensor each rank then holds."""

from collections.abc import Iterator

from seqloom.plan.grid import divisors
from seqloom.plan.plan import Plan


def zero_reasons(plan: Plan) -> Iterator[str]:
    """Why the plan's replicas cannot share out what they hold."""
    replicas, groups = plan.replicas, plan.zero_replicas
    if plan.zero and replicas == 1:
        yield (
            f"zero={plan.zero} shares out what data x ring x ulysses hold alike, which is one rank here; leave zero "
            "out, or raise data, ring or ulysses."
        )
    if groups > 1 and not plan.zero:
        yield (
            f"zero_replicas={groups} repeats the shares of zero, and zero=0 has none; leave it out or use zero=1, 2 or "
            "3."
        )
    elif groups > 1 and (replicas % groups or groups == replicas):
        fitting = list(map(str, divisors(replicas)[1:-1]))
        way = f"use {' or '.join(fitting)}, or leave it out" if fitting else "leave it out"
        yield (
            f"zero_replicas={groups} does not cut the {replicas} ranks of data x ring x ulysses in groups that share "
            f"something out; {way}."
        )
    if plan.offload and plan.zero < 2:
        yield (
            f"offload=true keeps shares of parameters, gradients and the optimizer's state in host memory, and "
            f"zero={plan.zero} does not share out all three; use zero=2 or zero=3, or leave it out."
        )


def row_shares(rows: int, ranks: int) -> tuple[int, ...]:
    """Rows of a tensor that each rank of a ZeRO group holds: even chunks rounded up, the last ones short or empty.

    As torch.chunk has it, and FSDP2 with it.

    >>> row_shares(10, 4), row_shares(2, 3)
    ((3, 3, 3, 1), (1, 1, 0))
    """
    each = -(-rows // ranks)
    return tuple(max(0, min(each, rows - rank * each)) for rank in range(ranks))
