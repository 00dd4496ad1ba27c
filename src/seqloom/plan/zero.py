"""Which ZeRO stages a plan allows."""

from collections.abc import Iterator

from seqloom.errors import counted
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
            f"zero_replicas={groups} does not cut the {counted(replicas, 'rank')} of data x ring x ulysses in groups "
            f"that share something out; {way}."
        )
    if plan.offload and plan.zero < 2:
        yield (
            f"offload=true keeps shares of parameters, gradients and the optimizer's state in host memory, and "
            f"zero={plan.zero} does not share out all three; use zero=2 or zero=3, or leave it out."
        )
