"""What a plan costs, from formulas, and who holds what under it; no torch."""

from seqloom.planner.bubble import bubble_share
from seqloom.planner.expert_traffic import expert_bytes
from seqloom.planner.kept import Kept, kept_bytes
from seqloom.planner.place import Place, Tokens, inner_spans, outer_spans, places, tokens_held
from seqloom.planner.stage_traffic import pipeline_bytes
from seqloom.planner.tensor_traffic import (
    Linear,
    layer_elements,
    layer_linears,
    linear_elements,
    model_elements,
    tensor_bytes,
)
from seqloom.planner.traffic import all_reduce_bytes, attention_bytes, local_heads
from seqloom.planner.weights import Matrices, matrices
from seqloom.planner.zero import AtRest, at_rest_bytes, stepped_bytes, zero_bytes

__all__ = [
    "AtRest",
    "Kept",
    "Linear",
    "Matrices",
    "Place",
    "Tokens",
    "all_reduce_bytes",
    "at_rest_bytes",
    "attention_bytes",
    "bubble_share",
    "expert_bytes",
    "inner_spans",
    "kept_bytes",
    "layer_elements",
    "layer_linears",
    "linear_elements",
    "local_heads",
    "matrices",
    "model_elements",
    "outer_spans",
    "pipeline_bytes",
    "places",
    "stepped_bytes",
    "tensor_bytes",
    "tokens_held",
    "zero_bytes",
]
