"""Bytes that a layer keeps for backward where it is computed again.

For one sequence, at the rank that holds most; n tokens on this side of the tensor grid, h channels, q query and k
key/value heads here, of widths Dk and Dv, N tokens and heads as the Ulysses group attends with them:

| kept                                | elements                     | by                              |
|-------------------------------------|------------------------------|---------------------------------|
| the layer's input                   | n h                          | full, selective                 |
| attention's output                  | N q Dv                       | selective                       |
| its log-sum-exp                     | N q, four bytes each         | selective                       |
| q, k, v and the output, as traded   | N q Dk + N k (Dk + Dv) + n Hq Dv | selective with Ulysses      |
| weights                             | N q S, four bytes or more    | selective with exchange=rsa     |

Full recomputation of a layer of h channels is the 2sbh of arXiv 2205.05198, table 2.
"""

from typing import NamedTuple

from seqloom.geometry import HeadSplit, Layout, even_sizes, total
from seqloom.plan import Plan, chunks
from seqloom.plan.shape import ModelShape
from seqloom.planner.place import tokens_held
from seqloom.planner.traffic import local_heads


class Kept(NamedTuple):
    """Bytes of one layer and sequence. input: of the layer. attention: what selective recomputation keeps beside it."""

    input: int
    attention: int


def kept_bytes(
    plan: Plan, model: ModelShape, layout: Layout, *, item_bytes: int, input_item_bytes: int | None = None
) -> Kept:
    """What a layer computed again keeps, whatever of it `plan.recompute` asks for.

    item_bytes: size of an element in attention. input_item_bytes: of a layer's input, where it is another, as under
    autocast, which leaves the residual stream in float32.

    >>> sizes = dict(vocab=9, hidden=32, layers=1, heads=4, kv_heads=2, head_dim=8, max_positions=64)
    >>> shape = ModelShape(family="llama", **sizes)
    >>> kept_bytes(Plan(recompute="selective"), shape, Layout("zigzag", 16), item_bytes=2)
    Kept(input=1024, attention=1280)
    """
    grid = plan.tensor_grid
    outer, _ = tokens_held(plan, layout)
    width = chunks(model.hidden, grid.axes[grid.outer.hidden])[0] if grid.outer.hidden else model.hidden
    size = input_item_bytes or item_bytes
    elements = max(outer) * width
    if plan.activations == "partitioned":
        elements = chunks(elements, plan.tensor)[0]
    value = model.value_dim or model.head_dim
    together = max(total(spans) for spans in layout.ring_spans)
    heads, kv_heads = local_heads(plan, model)
    split = HeadSplit(heads, kv_heads, layout.ulysses)
    queries, keys = split.queries(0).size, max(split.keys(part).size for part in range(layout.ulysses))
    kept = together * queries * (value * item_bytes + max(4, item_bytes))
    if layout.ulysses > 1:
        mine = max(even_sizes(together, layout.ulysses))
        traded = together * (queries * model.head_dim + keys * (model.head_dim + value)) + mine * heads * value
        kept += traded * item_bytes
    if plan.exchange == "rsa":
        kept += together * queries * layout.num_tokens * max(4, item_bytes)
    return Kept(elements * size, kept)
