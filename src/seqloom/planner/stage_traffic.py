"""Bytes each rank sends to the stages before and after its own."""

from seqloom.geometry import Layout, total
from seqloom.plan import ModelShape, Plan, chunks, stage_rank, stages_of
from seqloom.planner.place import Place, outer_spans


def pipeline_bytes(
    plan: Plan, model: ModelShape, layout: Layout, place: Place, *, rank: int = 0, item_bytes: int = 4
) -> dict[str, int]:
    """Bytes one rank sends along the pipeline for one sequence, as {"forward": ..., "backward": ...}.

    Its block of the residual stream goes from each of its stages to the next one, and the gradient of the block it was
    given goes back, where that stage lies on another rank. Counts for the balance of experts come on top.

    rank: on the pipeline axis. item_bytes: size of an element of the residual stream, which is that of the weights.

    >>> sizes = dict(vocab=9, hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, max_positions=9)
    >>> shape = ModelShape(family="llama", **sizes)
    >>> pipeline_bytes(Plan(pipeline=2), shape, Layout("zigzag", 10), Place(), rank=1)
    {'forward': 0, 'backward': 320}
    """
    hidden = plan.tensor_grid.outer.hidden
    width = model.hidden
    if hidden:
        width = chunks(width, plan.tensor_grid.axes[hidden])[place.on_grid(plan)[hidden]]
    block = total(outer_spans(plan, layout, place)) * width * item_bytes
    stages, last = stages_of(plan, rank), plan.num_stages - 1
    onward = sum(stage < last and stage_rank(plan, stage + 1) != rank for stage in stages)
    back = sum(stage > 0 and stage_rank(plan, stage - 1) != rank for stage in stages)
    return {"forward": onward * block, "backward": back * block}
