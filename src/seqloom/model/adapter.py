"""How an unmodified transformers model reaches seqloom's attention.

transformers looks an attention function up by name and hands every keyword it does not know down to
it. So a `SequenceShard` passed as `model(..., sequence=shard)` arrives here with each layer's q, k, v.
What a layer asks for beyond causal attention is honoured or refused by name; nothing is ignored.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from seqloom.attention import attention
from seqloom.errors import ModelError
from seqloom.sequence import SequenceShard

NAME = "seqloom"
PROBE = "seqloom_probe"

NEUTRAL = frozenset(
    {"position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "output_hidden_states"}
)
"""Keywords that reach attention functions and say nothing about attention."""


def register() -> None:
    """Make the attention functions known to transformers under NAME and PROBE. Repeating it is harmless."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    AttentionInterface.register(PROBE, _probe_attention)


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Stop transformers from building a dense mask; the shard carries the mask. Padding is refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ModelError(
            "An attention_mask with padding is not supported yet; pack documents into full sequences "
            "and name their lengths in Batch(documents=...)."
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence: SequenceShard | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Called by every layer. query: [rows, Hq, local_tokens, D]; returns [rows, local_tokens, Hq, D]."""
    layer = type(module).__name__
    if sequence is None:
        raise ModelError(
            f"{layer} was called without a sequence; after parallelize call the model with "
            "model(**local.inputs, sequence=shard), as shard_batch gives them."
        )
    if attention_mask is not None:
        raise ModelError(f"{layer} was given a dense attention_mask; the mask comes with the sequence shard instead.")
    if sliding_window is not None and sliding_window < sequence.layout.num_tokens:
        raise ModelError(
            f"{layer} has a window of {sliding_window}, shorter than the sequence of {sequence.layout.num_tokens} "
            f"tokens; windows are not supported yet, sequences of up to {sliding_window} tokens are."
        )
    refuse_unknown(layer, asked)
    return attention(query, key, value, sequence, scale=scaling).transpose(1, 2), None


def refuse_unknown(layer: str, asked: dict[str, Any]) -> None:
    """Raise ModelError for a keyword that would change attention and is not honoured here."""
    for name, given in asked.items():
        # None, 0 and False are how families say that they do not use an option; causal is what we do.
        if name in NEUTRAL or (not isinstance(given, Tensor) and (not given or (name, given) == ("is_causal", True))):
            continue
        raise ModelError(f"{layer} asks attention for {name}={given}, which is not supported yet; set it to none.")
    if asked.get("is_causal") is False:
        raise ModelError(f"{layer} asks for attention that is not causal, which is not supported yet.")


class Probe:
    """Stands in for a shard and counts the layers it reaches."""

    def __init__(self) -> None:
        self.calls = 0


def _probe_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    probe = asked.get("sequence")
    if isinstance(probe, Probe):
        probe.calls += 1
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None


def probe(model: PreTrainedModel) -> None:
    """Run the model's code once on shapes alone and refuse a family that does not hand the shard to attention.

    Without it such a model would quietly attend to its own shard only.
    """
    register()
    build: Callable[..., PreTrainedModel] = type(model)
    with torch.device("meta"):
        twin = build(type(model.config).from_dict(model.config.to_dict()))
        twin.set_attn_implementation(PROBE)
        witness = Probe()
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        try:
            twin(input_ids=tokens, position_ids=tokens, use_cache=False, sequence=witness)
            problem = None
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            problem = str(error).splitlines()[0]
    layers = model.config.num_hidden_layers
    if problem or witness.calls != layers:
        reached = f"reached attention in {witness.calls} of {layers} layers" if not problem else f"failed: {problem}"
        raise ModelError(
            f"{type(model).__name__} cannot be split: a sequence shard given to its forward {reached}, "
            "so its attention would not see the other shards; use a family that calls transformers' AttentionInterface."
        )
