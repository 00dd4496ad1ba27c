"""Exact attention over split sequences."""

from seqloom.attention.front import attention
from seqloom.attention.local import attend, attend_backward, merge

__all__ = ["attend", "attend_backward", "attention", "merge"]
