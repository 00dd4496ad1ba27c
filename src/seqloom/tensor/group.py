"""What the split modules of one model share: the grid they stand on, and the tokens of the pass under way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqloom.errors import DataError, counted
from seqloom.fabric import Axis, Fabric
from seqloom.plan import Grid, Move, Moves, chunks
from seqloom.sequence import SequenceShard

TOKENS, HIDDEN = -2, -1
"""The dims of activations [..., tokens, hidden]."""


@dataclass(frozen=True)
class Transfer:
    """A move as it happens: over `axis` along `dim`, of which each rank has one of `sizes`.

    dim None is a tensor as a whole: the same on all ranks, its other direction summed over them.
    """

    axis: Axis
    dim: int | None
    sizes: tuple[int, ...] = ()


@dataclass
class TensorGroup:
    """One model's place on a tensor grid.

    shard: how the sequences of the pass under way are split. Each layer binds it anew when it is called,
    also when backward recomputes the layer. Without one, tokens are taken to be split evenly, as in
    a module that is used by itself.
    """

    grid: Grid
    axes: dict[str, Axis]
    mesh: DeviceMesh | None
    overlap: str = "backward"
    regather: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shard: SequenceShard | None = field(default=None, repr=False)

    @classmethod
    def of(cls, fabric: Fabric) -> "TensorGroup":
        """The tensor group of a fabric."""
        plan = fabric.plan
        return cls(plan.tensor_grid, fabric.grid, fabric.mesh, plan.tensor_overlap, plan.regather, fabric.device)

    def collecting(self, move: Move | None, x: Tensor, width: int) -> Transfer | None:
        """The gathering of activations `x` [..., tokens, hidden]; width: of the whole hidden dim.

        None where nothing moves.
        """
        return self._activations(move, width, (x.shape[TOKENS],) * self.axes[move.axis].size if move else ())

    def scattering(self, move: Move | None, num_tokens: int, width: int) -> Transfer | None:
        """The summing and scattering of activations of so many tokens and of `width` over the whole hidden dim.

        Raises DataError where no shard says how tokens are split and they do not divide.
        """
        uneven = self.shard is None and move is not None and move.dim == "tokens"
        if uneven and move is not None and num_tokens % self.axes[move.axis].size:
            raise DataError(
                f"{counted(num_tokens, 'token')} cannot be split evenly over {self.axes[move.axis].size} ranks of "
                f"{move.axis}, as a module used by itself splits them; give a number that divides, or run the whole "
                "model."
            )
        return self._activations(move, width, chunks(num_tokens, self.axes[move.axis].size) if move else ())

    def _activations(self, move: Move | None, width: int, even: tuple[int, ...]) -> Transfer | None:
        if move is None or self.axes[move.axis].size == 1:
            return None
        axis = self.axes[move.axis]
        if move.dim == "whole":
            return Transfer(axis, None)
        if move.dim == "hidden":
            return Transfer(axis, HIDDEN, chunks(width, axis.size))
        return Transfer(axis, TOKENS, self.shard.tokens.sizes[move.axis] if self.shard and self.shard.tokens else even)

    def weight(self, moves: Moves, shape: Sequence[int]) -> Transfer | None:
        """The gathering of a weight of this whole shape [out, in]."""
        if moves.w is None or self.axes[moves.w.axis].size == 1:
            return None
        if not isinstance(moves.w.dim, int):
            raise TypeError(f"a weight moves along a dim, not along {moves.w.dim}")
        axis, size = self.axes[moves.w.axis], shape[moves.w.dim]
        for name, dim in moves.shards.items():
            if name == moves.w.axis:
                break
            if dim == moves.w.dim:  # split over a slower axis first
                size = chunks(size, self.axes[name].size)[self.axes[name].rank]
        return Transfer(axis, moves.w.dim, chunks(size, axis.size))
