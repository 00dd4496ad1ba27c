"""What weights take and send, for `seqloom plan`; in float32, without norms and biases.

What a tensor grid's ranks hold alike, and an embedding tied over a pipeline, are summed besides, which is not counted.
"""

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seqloom.plan import ModelShape, Plan
    from seqloom.planner import Matrices

ITEM_BYTES = 4


def weight_lines(plan: "Plan", model: "ModelShape", num_tokens: int) -> Iterator[str]:
    """What the matrices of the fullest process take between steps, and what it sends of them and of their gradients."""
    from seqloom.planner import matrices

    found = [matrices(plan, model, rank, num_tokens=num_tokens) for rank in range(plan.pipeline)]
    rest = max(_at_rest(plan, each) for each in found)
    yield (
        f"Matrices, their gradients and AdamW's moments take at most {rest:,} bytes of a process between steps, in "
        "float32; norms and biases come on top."
    )
    each_time = "micro-batch" if plan.zero >= 2 else "step"
    for axis, counts in _sent(plan, found).items():
        if most := max(counts):
            often = "step" if axis == "zero replicas" else each_time
            yield f"Of weights and gradients a process sends at most {most:,} bytes a {often} along {axis}, in float32."


def _alike(plan: "Plan") -> int:
    """The ranks that hold the same experts, where these are dealt out."""
    return plan.replicas * (plan.tensor if plan.expert_tensor == 1 else 1) // plan.expert


def _at_rest(plan: "Plan", held: "Matrices") -> int:
    from seqloom.planner import at_rest_bytes

    shapes = [shape for unit in (*held.layers, held.outside) for shape in unit]
    experts = [shape for unit in held.experts for shape in unit]
    found = at_rest_bytes(plan, shapes).total
    return found + at_rest_bytes(plan, experts, ranks=_alike(plan)).total


def _sent(plan: "Plan", found: "list[Matrices]") -> dict[str, list[int]]:
    """Bytes along each axis over which weights are shared out or gradients summed, of a process of each stage."""
    from seqloom.planner import all_reduce_bytes, at_rest_bytes, stepped_bytes, zero_bytes

    sent: dict[str, list[int]] = {"replicas": [], "zero": [], "zero replicas": [], "expert replicas": []}
    for held in found:
        shapes = [shape for unit in (*held.layers, held.outside) for shape in unit]
        experts = [shape for unit in held.experts for shape in unit]
        if plan.zero >= 2:
            sent["zero"].append(zero_bytes(plan, [*held.layers, held.outside]))
            shares = at_rest_bytes(plan, shapes).gradients
            sent["zero replicas"].append(all_reduce_bytes(shares, plan.zero_replicas))
            sent["expert replicas"].append(zero_bytes(plan, [*held.experts, ()], ranks=_alike(plan)))
            continue
        sent["replicas"].append(all_reduce_bytes(_bytes(shapes), plan.replicas))
        sent["zero"].append(stepped_bytes(plan, shapes) if plan.zero else 0)
        stepped = stepped_bytes(plan, experts, ranks=_alike(plan)) if plan.zero else 0
        sent["expert replicas"].append(all_reduce_bytes(_bytes(experts), _alike(plan)) + stepped)
    return {axis: counts or [0] for axis, counts in sent.items()}


def _bytes(shapes: "list[tuple[int, ...]]") -> int:
    return sum(map(prod, shapes)) * ITEM_BYTES
