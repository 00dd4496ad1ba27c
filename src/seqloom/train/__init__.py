"""Training: data, steps, checkpoints and the loop."""

from seqloom.train.step import StepReport, apply_gradients, compute_gradients, computing

__all__ = ["StepReport", "apply_gradients", "compute_gradients", "computing"]
