"""Exact attention over split sequences."""

from seqloom.attention.front import attention

__all__ = ["attention"]
