"""What keeps memory flat as sequences grow."""

from seqloom.memory.loss import chunked_cross_entropy

__all__ = ["chunked_cross_entropy"]
