"""Batches, and how their sequences are split."""

from seqloom.sequence.batch import NO_LABEL, Batch
from seqloom.sequence.kept import KeptResults
from seqloom.sequence.shard import LocalBatch, RowTiles, SequenceShard, shard_batch
from seqloom.sequence.tokens import TokenSplit

__all__ = ["NO_LABEL", "Batch", "KeptResults", "LocalBatch", "RowTiles", "SequenceShard", "TokenSplit", "shard_batch"]
