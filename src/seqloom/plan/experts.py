"""Which ways to deal out experts a plan allows."""

from collections.abc import Iterator

from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape


def expert_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    """Why the plan cannot deal out this model's experts."""
    if plan.expert > 1 or plan.expert_tensor > 1:
        yield "expert and expert_tensor are not supported yet; leave them out."
