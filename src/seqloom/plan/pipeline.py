"""How layers are cut into stages, and which cuts a plan allows."""

from collections.abc import Iterator

from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape


def pipeline_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    """Why the plan's stages cannot compute this model."""
    if plan.pipeline > 1:
        yield f"pipeline={plan.pipeline} is not supported yet; the only degree is 1."
    elif plan.schedule != "1f1b" or plan.chunks or plan.stages:
        yield "schedule, chunks and stages are for pipeline above 1; leave them out."
