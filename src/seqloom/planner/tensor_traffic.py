"""Elements each rank sends in the linears of a tensor grid, from the formulas, exact for uneven sizes too.

For one linear y = scatter_y(gather_x(x) gather_w(w)^T), with its backward dyf = gather_y(dy),
dx = scatter_x(dyf wf), dw = scatter_w(dyf^T xf). A tensor of which this rank holds `own` elements and its
axis of P ranks `all` together (here the parts of x, w or y that it meets on that axis) costs

    gather   (P - 1) own        to every other rank; in ring steps, all - next: every block but that of the rank after
    scatter  all - own          the others' parts of a partial sum
    whole    2 (P - 1) / P all  an all-reduce; in ring steps, a scatter of even parts and a gather

x and w gather forward and scatter backward, and gather once more where backward gathers again (`regather`); y
scatters forward and gathers backward. Linears that read the same input share what moves x.

With even sizes, Y[M, N] = X[M, K] W^T over q x q ranks (depth d of 2.5d; its sum of dW is a sum of gradients,
not counted here) or q x q x q:

                            gathered inputs kept             gathered again in backward
    2d, 2.5d, as SUMMA      2 (q-1) (MK/d + KN) / q^2        3 (q-1) (MK/d + KN) / q^2
    row-wise, input stays   2 (q-1) (MN/d + KN) / q^2        (q-1) (2 MN/d + 3 KN) / q^2
    3d                      2 (q-1) (MK + KN + MN) / q^3     (q-1) (3 MK + 3 KN + 2 MN) / q^3

and 1d with sequence parallelism over t ranks sends 8 (t-1)/t N h in a decoder layer of N tokens and hidden h, or
10 (t-1)/t N h. Multi-head latent attention gathers latents of width l once and scatters their gradient, 2 (t-1)/t N l
where q, k and v of other families send 2 or 3 (t-1)/t N h. Sources: arXiv 2205.05198 (1d), 2104.05343 (2d),
2105.14500 (2.5d), 2105.14450 (3d).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from seqloom.geometry import HeadSplit, Layout, even_sizes
from seqloom.plan import Direction, Grid, ModelShape, Move, Moves, Plan, chunks, input_stays
from seqloom.planner.place import Place, Tokens
from seqloom.planner.traffic import local_heads

Sent = dict[str, dict[str, Fraction]]
"""{axis: {"forward": elements, "backward": elements}}; whole numbers but for what an all-reduce sends."""


@dataclass(frozen=True)
class Linear:
    """A linear of a model as a plan splits it.

    rows: how many rows of its weight this rank works with, where that is not its even part of them.
    """

    direction: Direction
    in_features: int
    out_features: int
    moves: Moves
    rows: int | None = None


def linear_elements(
    linears: Sequence[Linear],
    grid: Grid,
    at: Mapping[str, int],
    tokens: Tokens,
    *,
    sequences: int = 1,
    regather: bool = True,
    ring: bool = False,
) -> Sent:
    """Elements one rank sends, forward and backward, in linears that read the same input.

    at: its rank on each axis of the grid. tokens: what it and the ranks of its axes hold of a sequence, of
    which there are so many at once. regather, ring: the plan's `regather`, and whether its `tensor_overlap`
    is `ring`.
    """
    first = linears[0]
    colwise = first.direction == "colwise"
    side, held = (grid.outer, tokens.outer) if colwise else (grid.inner, tokens.inner)
    width = chunks(first.in_features, grid.axes[side.hidden])[at[side.hidden]] if side.hidden else first.in_features
    sent = _Sending(grid, at, tokens, sequences, regather=regather, ring=ring)
    move = first.moves.x
    sent.gathered(move, first.in_features, held, width)
    gathered = sum(tokens.sizes[move.axis]) if move is not None and move.dim == "tokens" else held
    for linear in linears:
        rows, _ = sent.weight(linear)
        sent.scattered(linear.moves.y, linear.out_features, gathered, rows)
    return sent.counts


class _Sending:
    """Counts what one rank sends."""

    def __init__(
        self, grid: Grid, at: Mapping[str, int], tokens: Tokens, sequences: int, *, regather: bool, ring: bool
    ) -> None:
        self.grid, self.at, self.tokens, self.sequences = grid, at, tokens, sequences
        self.again, self.ring = int(regather), ring
        self.counts = {axis: {"forward": Fraction(), "backward": Fraction()} for axis in grid.axes}

    def _add(self, axis: str, forward: int | Fraction, backward: int | Fraction) -> None:
        self.counts[axis]["forward"] += forward
        self.counts[axis]["backward"] += backward

    def _gather(self, sizes: Sequence[int], rank: int) -> int:
        """Parts sent by a rank while all collect all."""
        return sum(sizes) - sizes[(rank + 1) % len(sizes)] if self.ring else (len(sizes) - 1) * sizes[rank]

    def _whole(self, num_tokens: int, width: int, parts: int, rank: int) -> int | Fraction:
        """Elements of an all-reduce of [tokens, width], of one sequence."""
        if not self.ring:
            return Fraction(2 * (parts - 1) * num_tokens * width, parts)
        sizes = even_sizes(num_tokens, parts)
        return width * (num_tokens - sizes[rank] + (parts - 1) * sizes[rank])

    def gathered(self, move: Move | None, features: int, num_tokens: int, width: int) -> None:
        """An input [tokens, width of features] on its way, and its gradient on the way back."""
        if move is None:
            return
        parts, rank = self.grid.axes[move.axis], self.at[move.axis]
        if move.dim == "whole":
            self._add(move.axis, 0, self.sequences * self._whole(num_tokens, width, parts, rank))
            return
        along = move.dim == "tokens"
        sizes, times = (self.tokens.sizes[move.axis], width) if along else (chunks(features, parts), num_tokens)
        times *= self.sequences
        there, back = self._gather(sizes, rank) * times, (sum(sizes) - sizes[rank]) * times
        self._add(move.axis, there, self.again * there + back)

    def scattered(self, move: Move | None, features: int, num_tokens: int, rows: int) -> None:
        """A partial output [tokens, rows] on its way, and its gradient on the way back."""
        if move is None:
            return
        parts, rank = self.grid.axes[move.axis], self.at[move.axis]
        if move.dim == "whole":
            self._add(move.axis, self.sequences * self._whole(num_tokens, rows, parts, rank), 0)
            return
        along = move.dim == "tokens"
        sizes, times = (self.tokens.sizes[move.axis], rows) if along else (chunks(features, parts), num_tokens)
        times *= self.sequences
        self._add(move.axis, (sum(sizes) - sizes[rank]) * times, self._gather(sizes, rank) * times)

    def weight(self, linear: Linear) -> tuple[int, int]:
        """A weight on its way, and its gradient on the way back; the rows and columns of it to multiply with here."""
        shape, move = [linear.out_features, linear.in_features], linear.moves.w
        sizes: Sequence[int] = ()
        for axis, dim in linear.moves.shards.items():
            if dim is None:
                continue
            parts = chunks(shape[dim], self.grid.axes[axis])
            if move is not None and move.axis == axis:  # comes last of those that split this dim
                sizes = parts
            else:
                shape[dim] = parts[self.at[axis]]
        if linear.rows is not None:
            shape[0] = linear.rows
        if move is not None and isinstance(move.dim, int):
            times, own = prod(shape) // max(1, shape[move.dim]), sizes[self.at[move.axis]]
            there = (len(sizes) - 1) * own * times
            self._add(move.axis, there, self.again * there + (sum(sizes) - own) * times)
        return shape[0], shape[1]


def layer_linears(
    plan: Plan, model: ModelShape, heads_rank: int = 0, *, layer: int = -1
) -> tuple[tuple[Linear, ...], ...]:
    """The linears of a decoder layer, those that read the same input together; experts of some tokens are none of them.

    heads_rank: the place among the ranks that split heads, for key/value heads that do not divide. layer: its number,
    by default the last, where layers differ.
    """
    grid, hidden, inside = plan.tensor_grid, model.hidden, model.inside[layer]
    attention, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    colwise = grid.linear("colwise")

    def into(out_features: int, moves: Moves = colwise, rows: int | None = None) -> Linear:
        return Linear("colwise", hidden, out_features, moves, rows)

    def back(in_features: int) -> Linear:
        stays = input_stays(in_features, hidden, regather=plan.regather)
        return Linear("rowwise", in_features, hidden, grid.linear("rowwise", input_stays=stays))

    mlp = ((into(inside), into(inside)), (back(inside),)) if inside else ()
    if model.key_latent:
        return *_latent_linears(model, into, colwise), (back(model.heads * model.value_dim),), *mlp
    if model.family in _PACKED:  # all in one, as many rows as of three
        return (into(3 * attention),), (back(attention),), (into(inside),), (back(inside),)
    keys_moves, rows = colwise, None
    if HeadSplit(model.heads, model.kv_heads, grid.heads).kv_heads % grid.heads:
        # Their weights are on all ranks of heads, each of which works with the rows it reads.
        shards = {axis: None if dim == 0 else dim for axis, dim in colwise.shards.items()}
        weight = colwise.w if colwise.w is not None and colwise.w.dim != 0 else None
        keys_moves = Moves(colwise.x, weight, colwise.y, shards)
        rows = local_heads(plan, model, heads_rank)[1] * model.head_dim
    read = into(attention), into(keys, keys_moves, rows), into(keys, keys_moves, rows)
    return read, (back(attention),), *mlp


def _latent_linears(model: ModelShape, into: Callable[[int], Linear], colwise: Moves) -> tuple[tuple[Linear, ...], ...]:
    """The projections of latent attention: to latents, whole on all ranks, and from these to heads."""
    whole, split = Moves(None, None, None, {}), replace(colwise, x=None)
    heads, latent = model.heads, model.key_latent
    keys = Linear("colwise", latent, heads * (model.head_dim - model.shared_key + model.value_dim), split)
    down = Linear("colwise", model.hidden, latent + model.shared_key, whole)
    if not model.query_latent:
        return (into(heads * model.head_dim),), (down,), (keys,)
    queries = Linear("colwise", model.query_latent, heads * model.head_dim, split)
    return (Linear("colwise", model.hidden, model.query_latent, whole), down), (queries,), (keys,)


_PACKED = ("bloom", "gpt2")
"""Families of one projection for q, k and v, and an MLP without a gate."""


def layer_elements(
    plan: Plan, model: ModelShape, layout: Layout, place: Place, *, sequences: int = 1, layer: int = -1
) -> Sent:
    """Elements one rank sends along each axis of the grid in the linears of a decoder layer.

    sequences: that it works on at once. layer: its number, by default the last, where layers differ. Beside these,
    norms whose hidden dim is split sum one number a token, and the gradients of parameters that ranks share are summed
    once a step.
    """
    tokens, at = Tokens.of(plan, layout, place), place.on_grid(plan)
    found = [
        linear_elements(
            linears,
            plan.tensor_grid,
            at,
            tokens,
            sequences=sequences,
            regather=plan.regather,
            ring=plan.tensor_overlap == "ring",
        )
        for linears in layer_linears(plan, model, place.heads, layer=layer)
    ]
    if model.key_latent:  # gathered together, once, and never in ring steps
        latents = _Sending(plan.tensor_grid, at, tokens, sequences, regather=False, ring=False)
        width = model.query_latent + model.key_latent + model.shared_key
        latents.gathered(plan.tensor_grid.linear("colwise").x, width, tokens.outer, width)
        found.append(latents.counts)
    return _sum(found)


def model_elements(plan: Plan, model: ModelShape, layout: Layout, place: Place, *, sequences: int = 1) -> Sent:
    """Elements one rank sends along each axis of the grid in all decoder layers, the embedding and the head.

    The head gathers once, for its gradient is computed beside the loss. Token ids, and the two numbers a
    token that the ranks of a vocabulary exchange, are not counted.
    """
    grid, tokens, at = plan.tensor_grid, Tokens.of(plan, layout, place), place.on_grid(plan)
    table = Linear("colwise", model.hidden, model.vocab, grid.embedding(tied=model.tied))
    embedding = _Sending(grid, at, tokens, sequences, regather=False, ring=False)
    _, width = embedding.weight(table)
    ids = table.moves.x
    looked_up = sum(tokens.sizes[ids.axis]) if ids is not None else tokens.outer
    embedding.scattered(table.moves.y, model.hidden, looked_up, width)
    head = Linear("colwise", model.hidden, model.vocab, grid.linear("colwise"))
    layers = [
        layer_elements(plan, model, layout, place, sequences=sequences, layer=layer) for layer in range(model.layers)
    ]
    rest = embedding.counts, linear_elements([head], grid, at, tokens, sequences=sequences, regather=False)
    return _sum([*layers, *rest])


def tensor_bytes(
    plan: Plan,
    model: ModelShape,
    num_tokens: int,
    *,
    place: Place | None = None,
    sequences: int = 1,
    layout: Layout | None = None,
    item_bytes: int = 4,
    layer: int = -1,
) -> dict[str, dict[str, int]]:
    """Bytes one rank sends in the linears of a decoder layer, as {axis of the grid: {"forward": ..., "backward": ...}}.

    What goes to routed experts is in `planner.expert_traffic`.

    num_tokens: length of a global sequence. layer: its number, by default the last, where layers differ. layout: who
    holds which tokens, by default the plan's for one causal document. item_bytes: size of an element; activations,
    weights and gradients travel alike. Where activations are summed whole in a type below float32, in parts that do
    not divide, a rank sends up to so many elements more or less as there are ranks.
    """
    layout = layout or Layout(plan.layout, num_tokens, plan.attention_ring, plan.attention_ulysses)
    elements = layer_elements(plan, model, layout, place or Place(), sequences=sequences, layer=layer)
    return {axis: {way: int(count * item_bytes) for way, count in ways.items()} for axis, ways in elements.items()}


def _sum(each: Iterable[Sent]) -> Sent:
    total: Sent = {}
    for sent in each:
        for axis, ways in sent.items():
            summed = total.setdefault(axis, {"forward": Fraction(), "backward": Fraction()})
            for way, count in ways.items():
                summed[way] += count
    return total
