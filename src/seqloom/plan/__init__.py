"""Plans and their legality. Importing this package leaves torch unloaded."""

from seqloom.plan.dropout import without_dropout
from seqloom.plan.grid import Direction, Grid, Move, Moves, Side, chunks, input_stays
from seqloom.plan.legality import reasons, shortest, unsplittable
from seqloom.plan.pipeline import cut, layer_costs, micro_batches_needed, stage_rank, stages_of
from seqloom.plan.plan import Plan
from seqloom.plan.recompute import Unit, run_again, units
from seqloom.plan.scale import few_micro_batches, reduced, shrunk
from seqloom.plan.search import check, every_plan, legal_plans, nearest
from seqloom.plan.shape import ModelShape
from seqloom.plan.tiny import ALIASES, FAMILIES, TINY_SHAPES, fit, fit_world, read_config

__all__ = [
    "ALIASES",
    "FAMILIES",
    "TINY_SHAPES",
    "Direction",
    "Grid",
    "ModelShape",
    "Move",
    "Moves",
    "Plan",
    "Side",
    "Unit",
    "check",
    "chunks",
    "cut",
    "every_plan",
    "few_micro_batches",
    "fit",
    "fit_world",
    "input_stays",
    "layer_costs",
    "legal_plans",
    "micro_batches_needed",
    "nearest",
    "read_config",
    "reasons",
    "reduced",
    "run_again",
    "shortest",
    "shrunk",
    "stage_rank",
    "stages_of",
    "units",
    "unsplittable",
    "without_dropout",
]
