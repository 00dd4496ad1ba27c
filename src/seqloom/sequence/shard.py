"""What one rank holds of a batch, and the value that tells attention how the rest is spread."""

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from seqloom.errors import DataError, PlanError
from seqloom.fabric import Axis, Fabric, all_reduce_
from seqloom.geometry import Layout, Mask, Span, Tile, even_sizes, total
from seqloom.plan import unsplittable
from seqloom.sequence.batch import Batch
from seqloom.sequence.kept import KeptResults
from seqloom.sequence.tokens import TokenSplit, split_tokens

ASKED = 64
"""Positions along a row of which each pair is asked, to tell rules of the user's own apart."""


@dataclass(frozen=True)
class RowTiles:
    """Consecutive rows of a batch that share a mask, and the tiles to compute for them.

    allowed: `Mask.allowed`, to be asked inside each tile.
    """

    rows: Span
    tiles: tuple[Tile, ...]
    allowed: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class SequenceShard:
    """How the sequences of a batch are spread and masked; travels with the batch to attention.

    masks: one mask a local row. layout: which rank holds which positions. ring, ulysses: the axes
    that attention communicates over; outer x inner is the ring once more, as a double ring takes it.
    exchange: `Plan.exchange`. seed, first_row: what dropout draws from; first_row is the number of
    the first local row in the run's data. tokens: what the two sides of the tensor grid hold.
    head_rank: this rank's place among those the heads are split over by the tensor grid, evenly.
    sharing: the axes over which a sequence's tokens are split on the outer side.
    kept: what attention keeps of the layers under way, where the rest of them is computed again in backward.
    """

    masks: tuple[Mask, ...]
    layout: Layout
    ring: Axis
    outer: Axis
    inner: Axis
    ulysses: Axis
    exchange: str
    seed: int = 0
    first_row: int | None = None
    tokens: TokenSplit | None = None
    head_rank: int = 0
    sharing: tuple[Axis, ...] = ()
    kept: KeptResults | None = None
    _made: dict[Hashable, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with this key: layers share what they all need."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def keep(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returns; where it is kept, also when the layer is computed again. See `KeptResults.once`."""
        return make() if self.kept is None else self.kept.once(make)

    def keeping(self, kept: KeptResults) -> "SequenceShard":
        """The same shard for layers that keep these results; what is made once is shared."""
        shard = copy(self)
        object.__setattr__(shard, "kept", kept)
        return shard

    @property
    def spans(self) -> tuple[Span, ...]:
        """The global positions this rank holds, in order."""
        return self.layout.shard(self.ring.rank, self.ulysses.rank)

    @property
    def ring_tokens(self) -> tuple[int, ...]:
        """How many tokens each ring rank holds, its Ulysses group together."""
        return self.once("ring_tokens", lambda: tuple(map(total, self.layout.ring_spans)))

    @property
    def group_tokens(self) -> tuple[int, ...]:
        """How many tokens each rank of this rank's Ulysses group holds."""
        return even_sizes(self.ring_tokens[self.ring.rank], self.ulysses.size)

    def row_masks(self, window: int | None = None) -> tuple[tuple[Span, Mask], ...]:
        """The local rows in runs of one mask each, within a layer's window."""
        starts = [i for i in range(len(self.masks)) if i == 0 or self.masks[i] != self.masks[i - 1]]
        stops = [*starts[1:], len(self.masks)]
        return tuple(
            (Span(start, stop), self.masks[start].within(window)) for start, stop in zip(starts, stops, strict=True)
        )

    def work(self, window: int | None = None) -> tuple[tuple[RowTiles, ...], ...]:
        """For each ring rank, the tiles between this ring rank's queries and that one's keys.

        window: of the layer that asks; the tighter of it and the masks' own holds.
        """
        return self.once(("work", window), lambda: tuple(self._tiles(keys, window) for keys in self.layout.ring_spans))

    def _tiles(self, keys: tuple[Span, ...], window: int | None) -> tuple[RowTiles, ...]:
        queries = self.layout.ring_spans[self.ring.rank]
        return tuple(
            RowTiles(rows, tiles, mask.allowed)
            for rows, mask in self.row_masks(window)
            if (tiles := mask.tiles(queries, keys))
        )

    def positions(self, owner: int, device: torch.device) -> Tensor:
        """[tokens] int64: the global positions of what ring rank `owner` holds, in order."""
        spans = self.layout.ring_spans[owner]
        return self.once(
            ("positions", owner, device), lambda: torch.cat([torch.arange(*span) for span in spans]).to(device)
        )


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of a batch, on its device.

    input_ids, position_ids, labels: [local rows, local tokens], int64; positions count from the
    start of each document. Under a tensor grid input_ids are the tokens of its outer side, the others
    those of its inner side. label_count, sequences: labels and rows of the whole batch, on all ranks together.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    label_count: int
    sequences: int

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a transformers model, to be joined by `sequence=shard`."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


def shard_batch(
    batch: Batch, fabric: Fabric, *, windows: tuple[int | None, ...] = (None,)
) -> tuple[LocalBatch, SequenceShard]:
    """Take this rank's part: rows over data, tokens over ring x ulysses.

    Every rank passes the same global batch. windows: those of the model's layers, as
    `ModelShape.windows` holds them, for layout=balanced to even out. Raises DataError when the ranks
    pass different batches, and PlanError when rows or tokens cannot be split.
    """
    plan = fabric.plan
    reasons = list(unsplittable(plan, batch.num_tokens, len(batch.tokens)))
    if reasons:
        raise PlanError(reasons)
    _same_everywhere(batch, windows, fabric)
    rows = len(batch.tokens) // plan.data
    mine = slice(fabric.data.rank * rows, (fabric.data.rank + 1) * rows)
    masks = tuple(batch.mask(row) for row in range(mine.start, mine.stop))
    even = tuple(mask.within(window) for window in windows for mask in masks) if plan.layout == "balanced" else ()
    layout = Layout(plan.layout, batch.num_tokens, plan.attention_ring, plan.attention_ulysses, even)
    tokens = split_tokens(layout, fabric)
    outer_only = filter(None, [plan.tensor_grid.outer_only])
    shard = SequenceShard(
        masks=masks,
        layout=layout,
        ring=fabric.ring,
        outer=fabric.outer,
        inner=fabric.inner,
        ulysses=fabric.ulysses,
        exchange=plan.exchange,
        seed=batch.seed,
        first_row=None if batch.first_row is None else batch.first_row + mine.start,
        tokens=tokens,
        head_rank=fabric.grid[plan.tensor_grid.inner.hidden or ""].rank,
        sharing=(fabric.ring, fabric.ulysses, *(fabric.grid[name] for name in outer_only)),
    )
    inner = torch.cat([torch.arange(*span) for span in shard.spans])
    outer = torch.cat([torch.arange(*span) for span in tokens.outer])
    parts = (
        part[mine].index_select(1, held).to(fabric.device)
        for part, held in zip(_columns(batch), (outer, inner, inner), strict=True)
    )
    return LocalBatch(*parts, label_count=batch.label_count, sequences=len(batch.tokens)), shard


def _columns(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.tokens.cpu(), batch.positions(), batch.labels.cpu()


def _same_everywhere(batch: Batch, windows: tuple[int | None, ...], fabric: Fabric) -> None:
    """Refuse ranks that come with different batches: attention would mix their sequences unnoticed."""
    content = crc32(batch.labels.cpu().numpy().tobytes(), crc32(batch.tokens.cpu().numpy().tobytes()))
    rule = [getattr(batch.rule, f.name) for f in fields(batch.rule) if f.name != "allowed"]
    if batch.rule.allowed is not None:  # a function cannot be compared across processes, what it says of some pairs can
        rule.append(crc32(_said_of_some_pairs(batch.rule.allowed, batch.num_tokens).numpy().tobytes()))
    said = (batch.documents, batch.padding, rule, windows, batch.first_row, batch.seed, tuple(batch.tokens.shape))
    content = crc32(repr(said).encode(), content)
    extremes = torch.tensor([content, -content], device=fabric.device)
    high, low = all_reduce_(extremes, fabric.world, "max").tolist()
    if high != -low:
        raise DataError(
            "The ranks were given different batches; every rank passes the same global batch to shard_batch, "
            "which takes its part (seed every rank's data order alike)."
        )


def _said_of_some_pairs(allowed: Callable[[Any, Any], Any], num_tokens: int) -> Tensor:
    """[asked, asked] bool: what a rule of the user's own says of some pairs; raises DataError where it is none."""
    drawn = torch.randint(num_tokens, (ASKED // 2,), generator=torch.Generator().manual_seed(num_tokens))
    spread = torch.linspace(0, num_tokens - 1, ASKED // 2, dtype=torch.float64).long()
    asked = torch.cat([spread, drawn])
    try:
        said = torch.as_tensor(allowed(asked[:, None], asked))
        return said.expand(len(asked), len(asked)).to(torch.bool).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The mask's rule `allowed` gives no true or false for each pair of {len(asked)} x {len(asked)} positions "
            f"({' '.join(str(error).split())[:120]}); write it with elementwise operators: (q - k) % 4 == 0, & and |."
        ) from error
