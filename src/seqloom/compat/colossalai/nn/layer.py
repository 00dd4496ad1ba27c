"""Layers of 1D, 2D, 2.5D and 3D, whichever the CONFIG says, over `seqloom.tensor`.

Weights are drawn as torch draws them for one device, are those of rank 0 everywhere, and each rank keeps its part; a
linear's is [in, out]. Activations are [..., channels], of which a rank holds some of the rows, counted over all dims
before the last, and some of the channels. Under 1d and 3d a linear takes the outer side of the grid to the
inner one or back, by turns, in the order in which linears are constructed; so it does there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import ConfigError, DataError, counted
from seqloom.fabric import Axis, Fabric, broadcast_
from seqloom.plan import Direction, chunks
from seqloom.tensor import (
    ParallelDropout,
    ParallelEmbedding,
    ParallelLayerNorm,
    ParallelLinear,
    TensorGroup,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_region,
    scatter_to_sequence_parallel_region,
    split,
)

Initializer = Callable[..., Any]
"""Fills a tensor in place; called with fan_in= and fan_out= too."""


def group_of(fabric: Fabric) -> TensorGroup:
    """The grid of the CONFIG, whose parameters are plain tensors of this rank's part."""
    grid = fabric.plan.tensor_grid
    return TensorGroup(grid, fabric.grid, None, fabric.plan.tensor_overlap, fabric.plan.regather, fabric.device)


def _drawn(
    in_features: int,
    out_features: int,
    bias: bool,
    dtype: torch.dtype | None,
    weight_initializer: Initializer | None,
    bias_initializer: Initializer | None,
) -> nn.Linear:
    """The whole linear as torch draws it, or as it is filled."""
    drawn = nn.Linear(in_features, out_features, bias, device="cpu", dtype=dtype)
    for tensor, fill in ((drawn.weight, weight_initializer), (drawn.bias, bias_initializer)):
        if fill is not None and tensor is not None:
            fill(tensor, fan_in=in_features, fan_out=out_features)
    return drawn


def _whole(tensor: Tensor, fabric: Fabric) -> Tensor:
    """The tensor as rank 0 drew it."""
    return broadcast_(tensor.detach().contiguous().to(fabric.device), fabric.world).requires_grad_()


def _sum_in_backward(module: nn.Module, group: TensorGroup) -> None:
    """Have backward leave whole gradients: summed over the axes whose ranks use a parameter for other rows."""
    for parameter in module.parameters(recurse=False):
        for name in parameter.sum_axes:  # type: ignore[attr-defined]
            parameter.register_hook(partial(reduce_from_tensor_region, axis=group.axes[name]))
        parameter.sum_axes = ()  # type: ignore[attr-defined]


def _refuse_uneven(name: str, sizes: dict[str, int], group: TensorGroup) -> None:
    """Raise ConfigError for a size that the ranks of the grid cannot share evenly."""
    ranks = group.grid.heads * (group.axes["weight"].size if group.grid.kind == "3d" else 1)
    for what, size in sizes.items():
        if size % ranks:
            raise ConfigError(
                f"{name} has {what}={size}, which mode {group.grid.kind} splits over {ranks} ranks evenly; use a "
                f"multiple of {ranks}."
            )


def row_axes(group: TensorGroup, side: str) -> list[Axis]:
    """The axes that split rows on a side, slowest first as theirs are: WEIGHT of 3d before INPUT and OUTPUT."""
    names = getattr(group.grid, side).tokens
    return [group.axes[name] for name in (reversed(names) if group.grid.kind == "3d" else names)]


def own_rows(x: Tensor, group: TensorGroup, side: str) -> Tensor:
    """This rank's rows of an x [rows, ...] that all ranks of the grid hold. Raises DataError where they are uneven."""
    for axis in row_axes(group, side):
        if len(x) % axis.size:
            raise DataError(f"{counted(len(x), 'row')} cannot be shared by {axis.size} ranks evenly; give a multiple.")
        x = x.chunk(axis.size)[axis.rank]
    return x


def partition_batch(x: Tensor) -> Tensor:
    """This rank's rows of a batch [rows, ...] that all ranks of the grid hold, as the first layer takes them."""
    return own_rows(x, group_of(PROCESS.arranged), "outer")


class Linear(ParallelLinear):
    """`torch.nn.Linear`, split; `weight` is this rank's part of [in_features, out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        weight_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        *,
        gather_output: bool = False,
    ) -> None:
        """weight_initializer, bias_initializer: fill the whole weight [out, in] and bias, in place of torch's own.

        gather_output: of 1d, whether the output is to be whole on every rank.
        Raises ConfigError before `launch` with a CONFIG, and for sizes that cannot be split evenly.
        """
        fabric = PROCESS.arranged
        group = group_of(fabric)
        kind = group.grid.kind
        _refuse_uneven("Linear", {"in_features": in_features, "out_features": out_features}, group)
        if gather_output and kind != "1d":
            raise ConfigError(f"gather_output is an option of mode 1d, and the CONFIG says {kind}; leave it out.")
        inner = PROCESS.side == "inner"
        # Under 1d, as there: an output that must be whole comes from a linear whose input is split.
        direction: Direction = "rowwise" if kind in ("1d", "3d") and (inner or gather_output) else "colwise"
        if kind in ("1d", "3d"):
            PROCESS.side = "outer" if direction == "rowwise" else "inner"
        drawn = _drawn(in_features, out_features, bias, dtype, weight_initializer, bias_initializer)
        super().__init__(
            group,
            group.grid.linear(direction),
            _whole(drawn.weight, fabric).mT,
            None if drawn.bias is None else _whole(drawn.bias, fabric),
            direction=direction,
            transposed=True,
        )
        self.cut_input = gather_output and not inner
        _sum_in_backward(self, group)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of the output for its part [..., in] of the input. See `ParallelLinear.forward`."""
        if self.cut_input:
            axis = self.group.axes["tensor"]
            x = scatter_to_sequence_parallel_region(x, axis, -1, chunks(self.in_features, axis.size))
        out: Tensor = super().forward(x.flatten(0, -2))
        return out.view(-1, *x.shape[1:-1], out.shape[-1])


class LayerNorm(ParallelLayerNorm):
    """`torch.nn.LayerNorm` over one dim, split as the activations are where it is constructed."""

    def __init__(self, normalized_shape: int, eps: float = 1e-5, dtype: torch.dtype | None = None) -> None:
        """normalized_shape: all channels."""
        fabric = PROCESS.arranged
        group, drawn = group_of(fabric), nn.LayerNorm(normalized_shape, eps, device="cpu", dtype=dtype)
        side = getattr(group.grid, PROCESS.side)
        _refuse_uneven("LayerNorm", {"normalized_shape": normalized_shape}, group)
        held = [split(_whole(one, fabric), group, {side.hidden or "": 0}, side) for one in (drawn.weight, drawn.bias)]
        axis = group.axes[side.hidden] if side.hidden else None
        super().__init__(held[0], held[1], normalized_shape, eps, axis)
        _sum_in_backward(self, group)


class Dropout(ParallelDropout):
    """`torch.nn.Dropout` whose ranks drop what one device would: each call draws a seed, each element its coin."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        """inplace: no effect on what is computed."""
        self.fabric = PROCESS.arranged
        super().__init__(p, group_of(self.fabric), PROCESS.side, PROCESS.dropouts)
        PROCESS.dropouts += 1

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's channels]; see `ParallelDropout.forward`."""
        return super().forward(x.flatten(0, -2)).view(x.shape)

    def _drawn_from(self) -> tuple[int, int]:
        # From the CPU's generator, so that checkpointing, which restores it, draws the same again.
        seed = torch.randint(2**62, (1,)).to(self.fabric.device)
        return int(broadcast_(seed, self.fabric.tensor)), 0

    def _positions(self, x: Tensor) -> Tensor:
        """[rows] int64: the numbers of x's rows among those of all ranks."""
        block = self.fabric.data.rank
        for axis in row_axes(self.group, self.side):
            block = block * axis.size + axis.rank
        return torch.arange(block * x.shape[1], (block + 1) * x.shape[1], device=x.device)


class Embedding(ParallelEmbedding):
    """`torch.nn.Embedding`, split; it is given the ids of all rows and returns this rank's."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        weight_initializer: Initializer | None = None,
        vocab_parallel_limit: int = 2048,
    ) -> None:
        """weight_initializer: fills the whole table in place of torch's own.

        vocab_parallel_limit: no effect; the vocabulary is split whatever its size.
        """
        fabric = PROCESS.arranged
        group = group_of(fabric)
        drawn = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="cpu", dtype=dtype)
        if weight_initializer is not None:
            weight_initializer(drawn.weight, fan_in=num_embeddings, fan_out=embedding_dim)
        _refuse_uneven("Embedding", {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}, group)
        moves = group.grid.embedding(tied=False)
        weight = split(_whole(drawn.weight, fabric), group, moves.shards, group.grid.both)
        super().__init__(group, weight, moves, num_embeddings, embedding_dim, padding_idx)
        PROCESS.side = "outer"
        _sum_in_backward(self, group)

    def forward(self, ids: Tensor) -> Tensor:
        """[rows, ...] int64, the same on all ranks of the grid, to [this rank's rows, ..., its channels].

        Raises DataError for rows that the ranks cannot share evenly.
        """
        ids = own_rows(ids, self.group, "outer")
        rows: Tensor = super().forward(ids.flatten())
        return rows.view(*ids.shape, -1)


class Classifier(ParallelLinear):
    """A linear to class scores: split by classes, of which every rank gets all, for its rows."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        weight_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
    ) -> None:
        """As `Linear`. Raises ConfigError where an odd number of linears stands before it."""
        fabric = PROCESS.arranged
        if PROCESS.side == "inner":
            raise ConfigError("A Classifier comes after pairs of linears, and here one of a pair is missing.")
        group = group_of(fabric)
        _refuse_uneven("Classifier", {"in_features": in_features}, group)
        drawn = _drawn(in_features, num_classes, bias, dtype, weight_initializer, bias_initializer)
        super().__init__(
            group,
            group.grid.linear("colwise"),
            _whole(drawn.weight, fabric).mT,
            None if drawn.bias is None else _whole(drawn.bias, fabric),
            direction="colwise",
            transposed=True,
        )
        _sum_in_backward(self, group)

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's channels] to [..., classes], for `CrossEntropyLoss`.

        Forward: as `ParallelLinear`, then an all-gather of scores. Backward: a split, since all ranks that share the
        classes make the same loss of them.
        """
        axis = self.group.axes[self.group.grid.inner.hidden or ""]
        part = super().forward(x.flatten(0, -2))
        sizes = chunks(self.out_features, axis.size)
        scores = gather_from_sequence_parallel_region(part, axis, -1, sizes, tensor_parallel_output_grad=False)
        return scores.view(-1, *x.shape[1:-1], self.out_features)


class CrossEntropyLoss(nn.Module):
    """The mean cross entropy over the rows of all ranks of the grid, from what a `Classifier` gives."""

    def __init__(self, reduction: bool = True, *, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        """reduction: True; a loss a row is not given. The others are those of torch."""
        super().__init__()
        if not reduction:
            raise ConfigError("CrossEntropyLoss gives the mean over all rows; leave reduction=False out.")
        self.group = group_of(PROCESS.arranged)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """scores: [this rank's rows, ..., classes]; targets: [rows, ...], all of them, as the loader gives them.

        Returns the same on every rank. Forward: all-reduce. Backward: identity.
        """
        mine = own_rows(targets, self.group, "inner")
        share = nn.functional.cross_entropy(
            scores.flatten(0, -2),
            mine.flatten(),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        ) / (targets != self.ignore_index).sum().clamp(min=1)
        for axis in row_axes(self.group, "inner"):
            share = reduce_from_tensor_region(share, axis)
        return share
