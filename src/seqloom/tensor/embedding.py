"""Lookups in tables that a tensor grid splits by vocabulary, by width or both.

Ids are gathered like the input of a linear, each rank looks up what lies in its part of the vocabulary (the rest
is zeros), and the rows travel like an output: summed, of which each rank keeps its part. Nothing of the sum
is lost in any type, since all but one of its terms are zero. `Grid.embedding` lists the moves:

| grid       | ids gathered over | table gathered over | rows summed over; each keeps |
|------------|-------------------|---------------------|------------------------------|
| 1d         | tensor            | -                   | tensor; tokens               |
| 1d, no sp  | -                 | -                   | tensor; all                  |
| 2d, 2.5d   | row               | -                   | row; tokens                  |
| - tied     | -                 | row (width)         | col; width                   |
| 3d         | input             | weight (vocabulary) | input; tokens                |
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding

from seqloom.errors import DataError, ModelError, counted
from seqloom.plan import Moves, chunks
from seqloom.tensor.group import TensorGroup, Transfer
from seqloom.tensor.linear import start_gather
from seqloom.tensor.parameters import local
from seqloom.tensor.regions import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_region,
    reduce_scatter_to_sequence_parallel_region,
)


class _Lookup(torch.autograd.Function):
    """Rows `first` up to first + rows of a table. Forward: look up. Backward: sum by row, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, first: int, padding_idx: int | None) -> Tensor:
        rows, places = len(table), ids - first
        elsewhere = (places < 0) | (places >= rows)
        # Row number `rows` is one too many: what goes there is dropped.
        ctx.save_for_backward(
            places.masked_fill(elsewhere if padding_idx is None else elsewhere | (ids == padding_idx), rows)
        )
        ctx.rows, ctx.dtype = rows, table.dtype
        if rows == 0:
            return table.new_zeros(*ids.shape, table.shape[1])
        return embedding(places.clamp(0, rows - 1), table).masked_fill_(elsewhere[..., None], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,), rows, grad = ctx.saved_tensors, ctx.rows, grads[0]
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        summed = torch.ops.aten.embedding_dense_backward(wide, places, rows + 1, rows, False)
        return summed[:rows].to(ctx.dtype), None, None, None


def _scattered(rows: Tensor, move: Transfer | None) -> Tensor:
    """Rows summed over the ranks of a move, of which this rank keeps its part."""
    if move is None:
        return rows
    if move.dim is None:
        return reduce_from_tensor_region(rows, move.axis)
    return reduce_scatter_to_sequence_parallel_region(rows, move.axis, move.dim, move.sizes)


class ParallelEmbedding(nn.Module):
    """Token embeddings on any tensor grid; the table may be the head's weight too."""

    def __init__(
        self,
        group: TensorGroup,
        weight: nn.Parameter,
        moves: Moves,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scale: Tensor | float | None = None,
    ) -> None:
        """weight: the table [num_embeddings, embedding_dim], split as `moves`, of `Grid.embedding`, say.

        padding_idx: the row that gets no gradient, as of nn.Embedding. scale: what rows are multiplied with, in the
        type of the table (Gemma).
        """
        super().__init__()
        self.group, self.weight, self.moves = group, weight, moves
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.register_buffer("embed_scale", None if scale is None else torch.as_tensor(scale), persistent=False)
        self.first = _first_row(group, moves, num_embeddings)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., tokens] int64 of the outer side to [..., tokens, this rank's width].

        Forward: gather ids and table, look up, reduce-scatter rows. Backward: gather the gradient of rows, sum it by
        id, reduce-scatter that of the table. Raises DataError for an id that is not in the table.
        """
        _refuse_strange(ids, self.num_embeddings)
        group, whole = self.group, (self.num_embeddings, self.embedding_dim)
        ids = start_gather(ids[..., None], group.collecting(self.moves.x, ids[..., None], 1)).wait()[..., 0]
        table, move = local(self.weight), group.weight(self.moves, whole)
        if move is not None and move.dim is not None:
            table = gather_from_sequence_parallel_region(table, move.axis, move.dim, move.sizes)
        rows = _Lookup.apply(table, ids, self.first, self.padding_idx)
        rows = _scattered(rows, group.scattering(self.moves.y, ids.shape[-1], self.embedding_dim))
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)

    def extra_repr(self) -> str:
        """What nn.Embedding says."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def _first_row(group: TensorGroup, moves: Moves, size: int) -> int:
    """The first row of the table that this rank holds, once the table is gathered."""
    first = 0
    for name, axis in group.axes.items():
        gathered = moves.w is not None and moves.w.axis == name
        if moves.shards.get(name) == 0 and not gathered:
            parts = chunks(size, axis.size)
            first, size = first + sum(parts[: axis.rank]), parts[axis.rank]
    return first


def _refuse_strange(ids: Tensor, num_embeddings: int) -> None:
    """Raise DataError for an id outside the table, which no rank would look up: it would embed as zeros."""
    if ids.is_meta:
        return
    known = ((ids >= 0) & (ids < num_embeddings)).all()
    if ids.is_cuda:  # asked without waiting for the device, which then stops as it does for nn.Embedding
        torch._assert_async(known)
    elif not known:
        low, high = ids.min().item(), ids.max().item()
        raise DataError(
            f"The token ids run from {low} to {high}, but the table has {counted(num_embeddings, 'row')}; make the "
            "tokens with the model's own tokenizer."
        )


class PositionEmbedding(nn.Module):
    """Learned positions beside token embeddings: it is given the inner side's, and embeds the outer side's."""

    def __init__(self, group: TensorGroup, weight: nn.Parameter, padding_idx: int | None = None) -> None:
        """weight: the table [positions, width]; its width may be split over the outer side's hidden axis.

        Raises ModelError on a grid whose outer tokens are not among the inner ones of a rank.
        """
        super().__init__()
        if group.grid.inner_only is not None and group.axes[group.grid.inner_only].size > 1:
            raise ModelError(
                f"Learned position embeddings need positions that ranks of a {group.grid.kind} grid do not hold; use "
                "another tensor_kind."
            )
        self.group, self.weight, self.padding_idx = group, weight, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """[..., inner tokens] int64 to [..., outer tokens, this rank's width]. Nothing travels.

        Forward: take this rank's tokens, look up. Backward: sum by id; of these tokens alone.
        """
        table = local(self.weight)
        _refuse_strange(ids, len(table))
        name = self.group.grid.outer_only
        axis = None if name is None else self.group.axes[name]
        if axis is not None and axis.size > 1:
            shard = self.group.shard
            sizes = shard.tokens.sizes[name] if shard and shard.tokens else chunks(ids.shape[-1], axis.size)
            ids = ids.split(list(sizes), -1)[axis.rank]
        padding = None if self.padding_idx is None else self.padding_idx % len(table)
        return _Lookup.apply(table, ids, 0, padding)
