"""Which ways to deal out experts a plan allows."""

from collections.abc import Iterator

from seqloom.errors import counted
from seqloom.plan.grid import divisors
from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape


def expert_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    """Why the plan cannot deal out this model's experts."""
    if model.balanced and not model.experts:
        yield "output_router_logits=true balances experts, and no layer of the model has any; set it to false."
    if plan.expert == plan.expert_tensor == 1 or model.unsupported:
        return
    if not model.experts:
        field = f"expert={plan.expert}" if plan.expert > 1 else f"expert_tensor={plan.expert_tensor}"
        yield f"{field} deals out experts, and this {model.family} has none; leave it out."
        return
    if plan.expert > model.experts:
        yield (
            f"expert={plan.expert} is more than the {counted(model.experts, 'expert')} of a layer, and each rank takes "
            f"at least one; the largest degree is {model.experts}."
        )
    if plan.expert_tensor > 1 and model.family in _INTERLEAVED:
        yield (
            f"expert_tensor={plan.expert_tensor} cannot split the experts of {model.family}, whose two first linears "
            "alternate channel by channel; use expert_tensor=1."
        )
    if plan.expert_tensor not in (1, plan.tensor):
        yield (
            f"expert_tensor={plan.expert_tensor} is neither 1, each expert whole on a rank, nor all of "
            f"tensor={plan.tensor}; use one of them."
        )
        return
    ranks, axes = plan.replicas, "data x ring x ulysses"
    if plan.expert_tensor == 1:
        ranks, axes = ranks * plan.tensor, f"{axes} x tensor"
    if ranks % plan.expert:
        degrees = ", ".join(str(degree) for degree in divisors(ranks) if degree <= model.experts)
        yield (
            f"expert={plan.expert} does not divide the {counted(ranks, 'rank')} of {axes}; use a degree that does: "
            f"{degrees}."
        )


_INTERLEAVED = ("gpt_oss",)
"""Families whose experts have the channels of two linears in turn."""
