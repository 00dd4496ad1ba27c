"""Hugging Face models under a plan."""

from seqloom.model.build import build_model, outline, weights_folder, without_progress_bars
from seqloom.model.gradients import (
    clear_gradients,
    copies,
    gradient,
    hand_over,
    main_gradients,
    sum_gradients,
)
from seqloom.model.lift import Float64Islands
from seqloom.model.loss import token_loss
from seqloom.model.parallelize import layer_windows, parallelize
from seqloom.model.pieces import Piece, count_copies, pieces, tied_names
from seqloom.model.pipeline import step_loss
from seqloom.model.probe import probe
from seqloom.model.whole import assemble, install_save, lasting, save_whole, whole_tensors
from seqloom.model.zero import at_rest, inside, is_share, shard, sharded_units, shared_over

__all__ = [
    "Float64Islands",
    "Piece",
    "assemble",
    "at_rest",
    "build_model",
    "clear_gradients",
    "copies",
    "count_copies",
    "gradient",
    "hand_over",
    "inside",
    "install_save",
    "is_share",
    "lasting",
    "layer_windows",
    "main_gradients",
    "outline",
    "parallelize",
    "pieces",
    "probe",
    "save_whole",
    "shard",
    "sharded_units",
    "shared_over",
    "step_loss",
    "sum_gradients",
    "tied_names",
    "token_loss",
    "weights_folder",
    "whole_tensors",
    "without_progress_bars",
]
