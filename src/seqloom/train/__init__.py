"""Training: text, steps, checkpoints and the loop."""

from seqloom.train.config import Config
from seqloom.train.curriculum import Stretch, remaining
from seqloom.train.export import export
from seqloom.train.loop import Summary, train
from seqloom.train.optimizer import PlannedAdamW, Stepped, adamw
from seqloom.train.prepare import prepare, steps_taken
from seqloom.train.reading import load_config
from seqloom.train.step import StepReport, apply_gradients, compute_gradients, computing
from seqloom.train.translated import Scale, TranslatedRun, translated

__all__ = [
    "Config",
    "PlannedAdamW",
    "Scale",
    "StepReport",
    "Stepped",
    "Stretch",
    "Summary",
    "TranslatedRun",
    "adamw",
    "apply_gradients",
    "compute_gradients",
    "computing",
    "export",
    "load_config",
    "prepare",
    "remaining",
    "steps_taken",
    "train",
    "translated",
]
