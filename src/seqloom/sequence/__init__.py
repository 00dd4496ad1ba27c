"""Batches, and how their sequences are split."""

from seqloom.sequence.batch import NO_LABEL, Batch
from seqloom.sequence.shard import LocalBatch, RowTiles, SequenceShard, shard_batch

__all__ = ["NO_LABEL", "Batch", "LocalBatch", "RowTiles", "SequenceShard", "shard_batch"]
