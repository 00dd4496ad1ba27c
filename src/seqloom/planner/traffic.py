"""Bytes each rank sends, from the formulas: what a byte meter must count, no more and no less.

For one rank, layer and row of the batch. n(r) are the tokens of ring rank r and N their sum, P the
ring's degree, Hk the key/value heads this rank attends with, Dk and Dv the widths of keys and values.
Keys and values of a token are w = Hk (Dk + Dv) elements, sent in the type of the activations; dK and
dV of a token are w too, in the accumulation type. Tokens' worth of keys and values, and of gradients,
that rank r sends in each pass:

    exchange  blocks, forward and again backward      gradients, backward
    ring      N - n(r + 1)                            N - n(r)
    rsa       the same, keys and values apart         the same, apart
    gather    (P - 1) n(r)                            N - n(r)
    needed    what others' queries see of mine        what my queries see of others'

In the ring a rank passes on every block but that of the rank after it, which goes no further, and
starts or adds to every gradient but its own: P - 1 hops each way. An inner ring of I ranks and O of
them are such rings, too: the outer of O blocks once, the inner of I blocks O times. `gather`
sends one's own block to every other rank, and the gradient of every other block to its owner. `rsa`
sends keys, then values; backward values, then keys, each followed by its gradient.

Ulysses: member u of a group of U holds m(u) tokens between layers, and Hq(u) query and Hk(u) key/value
heads inside attention. To each other member p it sends, forward, p's heads of its own tokens and its
own heads' output of p's; backward, gradients the other way, in the type of the activations:

    forward   m(u) (Hq(p) Dk + Hk(p) (Dk + Dv)) + m(p) Hq(u) Dv
    backward  m(p) (Hq(u) Dk + Hk(u) (Dk + Dv)) + m(u) Hq(p) Dv

With even splits and one width D that is 2 (P - 1) n Hk D for a pass around the ring, and
(U - 1) / U m D (2 Hq + 2 Hk) for Ulysses, with all heads.

Under a tensor grid P and U are attention's own degrees, of which the token axes of the grid are a part, and
Hq and Hk the heads that a tensor rank holds. What its linears send is in `planner.tensor_traffic`.

Sources: arXiv 2309.14509 (Ulysses), 2310.01889 (ring), 2406.18485 (double ring), 2407.21783 (all-gather),
2105.13120 (rsa).
"""

from collections import Counter
from collections.abc import Sequence

from seqloom.geometry import HeadSplit, Layout, Mask, Span, even_sizes, total
from seqloom.plan import ModelShape, Plan


def attention_bytes(  # noqa: PLR0913
    plan: Plan,
    model: ModelShape,
    num_tokens: int,
    *,
    ring_rank: int = 0,
    ulysses_rank: int = 0,
    heads_rank: int = 0,
    masks: Sequence[Mask] = (Mask(),),
    layout: Layout | None = None,
    item_bytes: int = 4,
    accumulate_bytes: int = 4,
    value_dim: int | None = None,
) -> dict[str, dict[str, int]]:
    """Bytes one rank sends in one attention layer, as {axis: {"forward": ..., "backward": ...}}.

    The axes are ring (outer_ring and inner_ring where the plan has an inner ring) and ulysses.

    num_tokens: length of a global sequence. ring_rank, ulysses_rank: on attention's axes; heads_rank: on the
    axis of the tensor grid that splits heads. masks: of this rank's rows in this layer, one each; only
    `exchange=needed` and `layout=balanced` look at more than their number. layout: who holds which
    tokens, by default the plan's, evened out over `masks` where it is balanced. item_bytes: size of an
    activation element; accumulate_bytes: of a gradient that is summed on its way (at least 4).
    value_dim: width of a value head, by default the model's.
    """
    layout = layout or Layout(plan.layout, num_tokens, plan.attention_ring, plan.attention_ulysses, tuple(masks))
    heads = HeadSplit(*local_heads(plan, model, heads_rank), plan.attention_ulysses)
    key_dim, value_dim = model.head_dim, value_dim or model.value_dim
    width = heads.keys(ulysses_rank).size * (key_dim + value_dim)
    sent = {}
    for axis, (blocks, gradients) in _ring_tokens(plan, layout, masks, ring_rank).items():
        forward = blocks * width * item_bytes
        sent[axis] = {"forward": forward, "backward": forward + gradients * width * accumulate_bytes}
    members = even_sizes(total(layout.ring_spans[ring_rank]), plan.attention_ulysses)
    forward, backward = _ulysses_elements(heads, members, ulysses_rank, key_dim, value_dim)
    rows = len(masks)
    sent["ulysses"] = {"forward": rows * forward * item_bytes, "backward": rows * backward * item_bytes}
    return sent


def local_heads(plan: Plan, model: ModelShape, heads_rank: int = 0) -> tuple[int, int]:
    """The query and key/value heads that a rank of the tensor grid attends with, its Ulysses group together.

    Key/value heads that other ranks read, too, are there once more. Where their groups are irregular, each
    query head has one of its own.

    >>> tiny = dict(family="llama", vocab=1, hidden=1, layers=1, head_dim=1, max_positions=1)
    >>> shape = ModelShape(heads=12, kv_heads=4, **tiny)
    >>> local_heads(Plan(tensor=6), shape), local_heads(Plan(tensor=3), shape)
    ((2, 1), (4, 4))
    """
    split = HeadSplit(model.heads, model.kv_heads, plan.tensor_grid.heads)
    queries = split.queries(heads_rank).size
    return queries, queries if split.reads(heads_rank) else split.keys(heads_rank).size


def _ring_tokens(plan: Plan, layout: Layout, masks: Sequence[Mask], rank: int) -> dict[str, tuple[int, int]]:
    """By axis: how many tokens' keys and values a rank sends in a pass, and how many tokens' gradients; all rows."""
    spans, rows = layout.ring_spans, len(masks)
    held = [total(part) for part in spans]
    if plan.exchange == "needed":
        others = [part for part in range(plan.attention_ring) if part != rank]
        return {
            "ring": (
                sum(_seen(masks, spans[other], spans[rank]) for other in others),
                sum(_seen(masks, spans[rank], spans[other]) for other in others),
            )
        }
    if plan.exchange == "gather":
        return {"ring": (rows * (plan.attention_ring - 1) * held[rank], rows * (sum(held) - held[rank]))}
    outer, inner = plan.rings
    grid = [held[o * inner : (o + 1) * inner] for o in range(outer)]
    mine, place = divmod(rank, inner)
    column = [row[place] for row in grid]
    across = rows * (sum(column) - column[(mine + 1) % outer]), rows * (sum(column) - column[mine])
    around = (
        rows * sum(sum(row) - row[(place + 1) % inner] for row in grid),
        rows * sum(sum(row) - row[place] for row in grid),
    )
    return {"ring": around} if outer == 1 else {"outer_ring": across, "inner_ring": around}


def _seen(masks: Sequence[Mask], queries: Sequence[Span], keys: Sequence[Span]) -> int:
    """How many tokens of a key block some query of a query block sees, summed over rows."""
    return sum(rows * total(mask.needed(queries, keys)) for mask, rows in Counter(masks).items())


def _ulysses_elements(
    heads: HeadSplit, members: Sequence[int], mine: int, key_dim: int, value_dim: int
) -> tuple[int, int]:
    """Elements of a row that member `mine` sends forward and backward; members: the tokens of each."""

    def arriving(part: int) -> int:
        """Elements of q, k and v that a token is to a member."""
        return heads.queries(part).size * key_dim + heads.keys(part).size * (key_dim + value_dim)

    def leaving(part: int) -> int:
        """Elements of the output that a token is to it."""
        return heads.queries(part).size * value_dim

    forward = backward = 0
    own = members[mine]
    for peer in range(heads.parts):
        if peer == mine:
            continue
        theirs = members[peer]
        forward += own * arriving(peer) + theirs * leaving(mine)
        backward += theirs * arriving(mine) + own * leaving(peer)
    return forward, backward


def all_reduce_bytes(num_bytes: int, degree: int) -> int:
    """Bytes one rank sends to sum a buffer of `num_bytes` over `degree` ranks, bandwidth-optimally.

    2 (P-1)/P of the buffer (reduce-scatter, then all-gather), rounded down.
    """
    return 2 * (degree - 1) * num_bytes // degree
