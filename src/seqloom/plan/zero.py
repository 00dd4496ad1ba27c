"""Which ZeRO stages a plan allows."""

from collections.abc import Iterator

from seqloom.plan.plan import Plan


def zero_reasons(plan: Plan) -> Iterator[str]:
    """Why the plan's replicas cannot share out what they hold."""
    if plan.zero:
        yield f"zero={plan.zero} is not supported yet; leave it out."
    if plan.zero_replicas > 1 or plan.offload:
        yield "zero_replicas and offload are not supported yet; leave them out."
