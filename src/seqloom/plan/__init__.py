"""Plans and their legality. Importing this package leaves torch unloaded."""

from seqloom.plan.legality import check, granularity, legal_plans, nearest, reasons, unsplittable
from seqloom.plan.plan import Plan
from seqloom.plan.shape import FAMILIES, TINY_SHAPES, ModelShape, fit, read_config

__all__ = [
    "FAMILIES",
    "TINY_SHAPES",
    "ModelShape",
    "Plan",
    "check",
    "fit",
    "granularity",
    "legal_plans",
    "nearest",
    "read_config",
    "reasons",
    "unsplittable",
]
