"""What one rank holds of a batch, and the value that tells attention how the rest is spread."""

from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from seqloom.errors import DataError, PlanError
from seqloom.fabric import Axis, Fabric, all_reduce_
from seqloom.geometry import Layout, Mask, Span, Tile
from seqloom.plan import unsplittable
from seqloom.sequence.batch import Batch


@dataclass(frozen=True)
class RowTiles:
    """Consecutive rows of a batch that share a mask, and the tiles to compute for them."""

    rows: Span
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class SequenceShard:
    """How the sequences of a batch are spread and masked; travels with the batch to attention.

    masks: one mask a local row. layout: which rank holds which positions. ring, ulysses: the axes
    that attention communicates over. exchange: `Plan.exchange`.
    """

    masks: tuple[Mask, ...]
    layout: Layout
    ring: Axis
    ulysses: Axis
    exchange: str
    work: tuple[tuple[RowTiles, ...], ...] = field(init=False, repr=False)
    """For each ring rank, the tiles between this ring rank's queries and that one's keys."""

    def __post_init__(self) -> None:
        spans = self.layout.ring_spans
        groups = [(first, last, self.masks[first]) for first, last in _runs(self.masks)]
        work = tuple(
            tuple(
                RowTiles(Span(first, last), tiles)
                for first, last, mask in groups
                if (tiles := mask.tiles(spans[self.ring.rank], keys))
            )
            for keys in spans
        )
        object.__setattr__(self, "work", work)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The global positions this rank holds, in order."""
        return self.layout.shard(self.ring.rank, self.ulysses.rank)


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a batch, on its device.

    input_ids, position_ids, labels: [local rows, local tokens], int64; positions count from the
    start of each document. label_count: labels of the whole batch, on all ranks together.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    label_count: int

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a transformers model, to be joined by `sequence=shard`."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


def shard_batch(batch: Batch, fabric: Fabric) -> tuple[LocalBatch, SequenceShard]:
    """Take this rank's part: rows over data, tokens over ring x ulysses.

    Every rank passes the same global batch. Raises DataError when it does not, and PlanError when
    rows or tokens cannot be split.
    """
    plan = fabric.plan
    reasons = list(unsplittable(plan, batch.num_tokens, len(batch.tokens)))
    if reasons:
        raise PlanError(reasons)
    _same_everywhere(batch, fabric)
    rows = len(batch.tokens) // plan.data
    mine = slice(fabric.data.rank * rows, (fabric.data.rank + 1) * rows)
    shard = SequenceShard(
        masks=tuple(batch.mask(row) for row in range(mine.start, mine.stop)),
        layout=Layout(plan.layout, batch.num_tokens, plan.ring, plan.ulysses),
        ring=fabric.ring,
        ulysses=fabric.ulysses,
        exchange=plan.exchange,
    )
    held = torch.cat([torch.arange(*span) for span in shard.spans])
    parts = (part[mine].index_select(1, held).to(fabric.device) for part in _columns(batch))
    return LocalBatch(*parts, label_count=batch.label_count), shard


def _columns(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens.cpu(), batch.positions(), batch.labels.cpu()


def _same_everywhere(batch: Batch, fabric: Fabric) -> None:
    """Refuse ranks that come with different batches: attention would mix their sequences unnoticed."""
    content = crc32(batch.labels.cpu().numpy().tobytes(), crc32(batch.tokens.cpu().numpy().tobytes()))
    content = crc32(repr((batch.documents, tuple(batch.tokens.shape))).encode(), content)
    extremes = torch.tensor([content, -content], device=fabric.device)
    high, low = all_reduce_(extremes, fabric.world, "max").tolist()
    if high != -low:
        raise DataError(
            "The ranks were given different batches; every rank passes the same global batch to shard_batch, "
            "which takes its part (seed every rank's data order alike)."
        )


def _runs(masks: tuple[Mask, ...]) -> list[tuple[int, int]]:
    """The [first, last) of each run of equal masks."""
    starts = [i for i in range(len(masks)) if i == 0 or masks[i] != masks[i - 1]]
    return list(zip(starts, [*starts[1:], len(masks)], strict=True))
