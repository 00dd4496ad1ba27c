"""Plans of every kind of grid, and the group of a rank with a batch bound to it."""

from dataclasses import replace

import torch
from torch import Tensor

from seqloom.fabric import Fabric
from seqloom.geometry import Span
from seqloom.plan import Plan
from seqloom.sequence import Batch, LocalBatch, shard_batch
from seqloom.tensor import TensorGroup

GRIDS = (
    "tensor=2",
    "tensor=3",
    "tensor=4",
    "tensor=2 sequence_parallel=false",
    "tensor=4 sequence_parallel=false",
    "tensor=4 tensor_kind=2d",
    "tensor=3 tensor_kind=2d grid=3x1",
    "tensor=6 tensor_kind=2d grid=3x2",
    "tensor=6 tensor_kind=2d grid=2x3 layout=striped",
    "tensor=8 tensor_kind=2.5d depth=2",
    "tensor=8 tensor_kind=3d",
    "tensor=4 tensor_kind=3d grid=2x2x1",
    "ring=2 tensor=2",
    "data=2 tensor=4 tensor_kind=2d",
    "ring=2 tensor=4 tensor_kind=3d grid=1x2x2 layout=contiguous",
)
"""Plans of at most eight ranks, each kind among them, square, rectangular and beside other axes."""

NUM_TOKENS, ROWS = 37, 2


def batch(vocabulary: int, seed: int = 0, first_row: int | None = 5) -> Batch:
    """ROWS rows of NUM_TOKENS tokens, an awkward length."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (ROWS, NUM_TOKENS), generator=draw)
    return Batch.from_tokens(tokens, first_row=first_row, seed=11)


def bound(plan: str, given: Batch) -> tuple[Fabric, TensorGroup, LocalBatch]:
    """This rank's fabric and group under a plan, with the batch's shard bound to the group."""
    fabric = Fabric.build(Plan.parse(plan))
    local, shard = shard_batch(given, fabric)
    return fabric, replace(TensorGroup.of(fabric), shard=shard), local


def positions(spans: tuple[Span, ...]) -> Tensor:
    """The positions of spans, in order."""
    return torch.cat([torch.arange(*span) for span in spans])


def world_of(plan: str) -> int:
    """The processes of a plan."""
    return Plan.parse(plan).world_size
