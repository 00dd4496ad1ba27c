"""What a plan costs, from formulas; no torch."""

from seqloom.planner.traffic import all_reduce_bytes, attention_bytes

__all__ = ["all_reduce_bytes", "attention_bytes"]
