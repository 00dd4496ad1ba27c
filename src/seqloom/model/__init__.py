"""Hugging Face models under a plan."""

from seqloom.model.build import build_model, outline, weights_folder, without_progress_bars
from seqloom.model.parallelize import layer_windows, parallelize, sum_gradients, token_loss
from seqloom.model.probe import probe

__all__ = [
    "build_model",
    "layer_windows",
    "outline",
    "parallelize",
    "probe",
    "sum_gradients",
    "token_loss",
    "weights_folder",
    "without_progress_bars",
]
