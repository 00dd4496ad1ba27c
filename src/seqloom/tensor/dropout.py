"""Dropout of activations that does not depend on the plan: every token and channel has its own coin.

The coin is a hash (`sequence.coin`) of the seed, the row's number in the run's data, the module's number, the
token's position in the row and the channel's among all channels, so that one device, any grid, and
a recomputation in backward draw the same. What attention drops is drawn from other numbers: a module counts
down from -1 where an attention layer counts up from 0.

What is kept for backward is a bool per element, as the paper on sequence parallelism counts it (arXiv
2205.05198, section 4.1).
"""

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqloom.errors import DataError, ModelError
from seqloom.fabric import Axis, start_collect
from seqloom.plan import chunks
from seqloom.sequence.coin import after, key_of, stays
from seqloom.tensor.group import TensorGroup

AT_ONCE = 2**20
"""Coins drawn at once: of each, several numbers of eight bytes exist meanwhile."""


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(dropped)
        ctx.scale = scale
        return (x * scale).masked_fill_(dropped, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        return (grads[0] * ctx.scale).masked_fill_(dropped, 0), None, None


class ParallelDropout(nn.Module):
    """nn.Dropout for activations [rows, tokens, channels] of one side of a tensor grid."""

    def __init__(
        self,
        p: float,
        group: TensorGroup,
        side: Literal["outer", "inner"],
        number: int,
        width: int | None = None,
    ) -> None:
        """p: the probability that an element is dropped; the others are multiplied with 1 / (1 - p).

        side: whose tokens and channels come. number: of this module among those of the model, from 0. width: channels
        of all ranks together; where it is not given and the side splits them, each call asks the other ranks.
        """
        super().__init__()
        self.p, self.group, self.side, self.number, self.width = p, group, side, number, width

    @property
    def _axis(self) -> Axis | None:
        """The axis that splits channels, or None."""
        name = getattr(self.group.grid, self.side).hidden
        axis = None if name is None else self.group.axes[name]
        return None if axis is None or axis.size == 1 else axis

    def forward(self, x: Tensor) -> Tensor:
        """[rows, tokens, this rank's channels], or one row without the first dim; the same with elements dropped.

        Forward: a mask of coins, the rest times 1 / (1 - p). Backward: the same mask and factor. In evaluation, or
        with p=0, x itself. Nothing travels but the width, where it was not given. Raises DataError for a batch
        whose rows have no numbers, ModelError for an x that is not the tokens of its side.
        """
        if not self.training or self.p == 0:
            return x
        dropped = self._dropped(x[None] if x.dim() == 2 else x).view(x.shape)
        return _Dropout.apply(x, dropped, 1 / (1 - self.p) if self.p < 1 else 0.0)

    def _dropped(self, x: Tensor) -> Tensor:
        """bool like x [rows, tokens, channels]."""
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        if x.dim() != 3:
            self._refuse(x, "[rows, tokens, channels]")
        if x.is_meta:
            return dropped
        positions, channels = self._positions(x), self._channels(x)
        seed, first_row = self._drawn_from()
        rows = torch.arange(first_row, first_row + x.shape[0], device=x.device)
        keys = after(after(key_of(seed, rows), -1 - self.number)[:, None], positions)
        step = max(1, AT_ONCE // max(1, x.shape[0] * x.shape[2]))
        for start in range(0, x.shape[1], step):
            part = slice(start, start + step)
            torch.logical_not(stays(after(keys[:, part, None], channels), self.p), out=dropped[:, part])
        return dropped

    def _drawn_from(self) -> tuple[int, int]:
        """The seed, and the number of the first row."""
        shard = self.group.shard
        if shard is None:
            return 0, 0
        if shard.first_row is None:
            raise DataError(
                "Dropout draws from the number of each row, which this batch does not have; give "
                "Batch.from_tokens(..., first_row=...), counted on from batch to batch."
            )
        return shard.seed, shard.first_row

    def _positions(self, x: Tensor) -> Tensor:
        """[tokens] int64: the positions of x's tokens in their row."""
        shard, num_tokens = self.group.shard, x.shape[-2]
        if shard is None:
            first = 0
            for name in getattr(self.group.grid, self.side).tokens:
                first = first * self.group.axes[name].size + self.group.axes[name].rank
            return torch.arange(first * num_tokens, (first + 1) * num_tokens, device=x.device)
        spans = getattr(shard.tokens, self.side) if shard.tokens else shard.spans
        found: Tensor = shard.once(
            ("dropout", self.side, x.device),
            lambda: torch.cat([torch.arange(*span) for span in spans]).to(x.device),
        )
        if x.shape[:-1] != (len(shard.masks), len(found)):
            self._refuse(x, f"{len(shard.masks)} rows of {len(found)} tokens")
        return found

    def _channels(self, x: Tensor) -> Tensor:
        """[channels] int64: the numbers of x's channels among all."""
        axis, held, first = self._axis, self.width, 0
        if axis is not None:
            if self.width is None:
                told = start_collect(torch.tensor([x.shape[-1]], device=x.device), axis, 0, (1,) * axis.size).wait()
                parts = tuple(told.tolist())
            else:
                parts = chunks(self.width, axis.size)
            held, first = parts[axis.rank], sum(parts[: axis.rank])
        if held is not None and held != x.shape[-1]:
            self._refuse(x, f"{held} of {self.width} channels")
        return torch.arange(first, first + x.shape[-1], device=x.device)

    def _refuse(self, x: Tensor, held: str) -> NoReturn:
        raise ModelError(
            f"Dropout number {self.number} was given {list(x.shape)} where this rank holds {held}; what the model "
            f"drops out is no activation of the {self.side} side: set that dropout to 0."
        )

    def extra_repr(self) -> str:
        """The probability, the side and the number."""
        return f"p={self.p}, side={self.side}, number={self.number}"
