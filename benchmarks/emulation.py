"""Every ring rank's loop on one device, one rank after the other, without communication.

The tiles, the kernels, the merging and the adding of gradients are those of `seqloom.attention`; only the exchange is
left out: each block of keys and values is where the ring would have brought it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor

from seqloom import Layout, Mask
from seqloom.attention.local import Partial, Scoring, Total, accumulation_type, attend, attend_backward
from seqloom.fabric import Axis, Meter
from seqloom.sequence import SequenceShard


@dataclass(frozen=True)
class Sizes:
    """One row of `num_tokens` tokens, causal, in `dtype`, on `device`."""

    num_tokens: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: str

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient, [1, tokens, heads, width] in memory, seen as [1, heads, tokens, width]."""
        random = torch.Generator(self.device).manual_seed(self.num_tokens)

        def draw(heads: int) -> Tensor:
            shape = (1, self.num_tokens, heads, self.width)
            return torch.randn(shape, generator=random, dtype=self.dtype, device=self.device).transpose(1, 2)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)

    @property
    def scoring(self) -> Scoring:
        """Scores as they are by default."""
        return Scoring(self.width**-0.5)


class Loop:
    """The loop of one ring rank."""

    def __init__(self, sizes: Sizes, layout: Layout, rank: int, mask: Mask) -> None:
        ring, alone = Axis("ring", rank, layout.ring, None, Meter()), Axis("alone", 0, 1, None, Meter())
        self.sizes, self.rank = sizes, rank
        self.sequence = SequenceShard((mask,), layout, ring, alone, ring, alone, "ring")
        self.places = [self.sequence.positions(owner, torch.device(sizes.device)) for owner in range(layout.ring)]
        q, k, v, dout = sizes.tensors
        here = self.places[rank]
        self.q, self.dout = _held(q, here), _held(dout, here)
        self.blocks = [(_held(k, at), _held(v, at)) for at in self.places]
        # What the rank before has found for a block: zeros, since only its being added takes time.
        self.before = [torch.zeros_like(x, dtype=accumulation_type(x.dtype)) for x in self.blocks[rank]]
        self.work = self.sequence.work()

    @property
    def order(self) -> list[int]:
        """Whose blocks come by, one's own first."""
        return [(self.rank - step) % len(self.places) for step in range(len(self.places))]

    def _at(self, owner: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Gives the positions of this rank's queries and of the owner's keys."""
        return lambda: (self.places[self.rank], self.places[owner])

    def forward(self) -> tuple[Tensor, Tensor]:
        """out in the type of q, and the log-sum-exp."""
        met = Partial(self.q, self.q.shape[3])
        for owner in self.order:
            at = (self.places[self.rank], self.places[owner])
            attend(self.q, *self.blocks[owner], self.work[owner], self.sizes.scoring, met, lambda at=at: at)
        out, lse = met.finish()
        return out.to(self.q.dtype), lse

    def backward(self, final: tuple[Tensor, Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """dq in the type of q, and for each owner what this rank finds for dk and dv, as it would send it on."""
        dtype, device = accumulation_type(self.q.dtype), self.q.device
        dq = Total(self.q.shape, dtype, device)
        found: list[tuple[Tensor, Tensor]] = [self.blocks[owner] for owner in range(len(self.places))]
        for owner in self.order:
            k, v = self.blocks[owner]
            dk, dv = Total(k.shape, dtype, device), Total(v.shape, dtype, device)
            at = (self.places[self.rank], self.places[owner])
            attend_backward(
                self.dout, self.q, k, v, final, self.work[owner], self.sizes.scoring, (dq, dk, dv), lambda at=at: at
            )
            found[owner] = (dk.finish(), dv.finish())
            if owner != self.rank:
                for mine, theirs in zip(found[owner], self.before, strict=True):
                    mine[:, :, : theirs.shape[2]] += theirs[:, :, : mine.shape[2]]
        return dq.finish().to(self.q.dtype), found


def _held(x: Tensor, positions: Tensor) -> Tensor:
    """What is at these positions of [1, heads, tokens, width], in memory as models lay it and as blocks travel."""
    return x.transpose(1, 2).index_select(1, positions).transpose(1, 2)


def whole(loops: Sequence[Loop]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv of the whole sequence, put together from every rank's loop."""
    sizes = loops[0].sizes
    q, k, v, _ = sizes.tensors
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=accumulation_type(x.dtype)) for x in (k, v))
    for loop in loops:
        final = loop.forward()
        grad, found = loop.backward(final)
        out[:, :, loop.places[loop.rank]], dq[:, :, loop.places[loop.rank]] = final[0], grad
        for at, (dk_part, dv_part) in zip(loop.places, found, strict=True):
            dk[:, :, at] += dk_part
            dv[:, :, at] += dv_part
    return out, dq, dk.to(k.dtype), dv.to(v.dtype)


def seconds(run: Callable[[], object], device: str, repeats: int, warm: int = 1) -> list[float]:
    """How long each of `repeats` runs takes, by events of the device or by the clock, after `warm` more."""
    for _ in range(warm):
        run()
    taken = []
    for _ in range(repeats):
        if device == "cpu":
            start = perf_counter()
            run()
            taken.append(perf_counter() - start)
        else:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            taken.append(began.elapsed_time(ended) / 1000)
    return taken
