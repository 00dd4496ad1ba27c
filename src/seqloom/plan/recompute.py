"""What a plan computes again in backward."""

from collections.abc import Iterator

from seqloom.plan.plan import Plan


def recompute_reasons(plan: Plan) -> Iterator[str]:
    """Why the plan cannot compute again what it says."""
    if plan.recompute != "none" or plan.activations != "whole":
        yield "recompute and activations are not supported yet; leave them out."
