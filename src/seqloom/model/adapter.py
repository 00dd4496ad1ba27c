"""How an unmodified transformers model reaches seqloom's attention.

transformers looks an attention function up by name and hands every keyword it does not know down to
it. So a `SequenceShard` passed as `model(..., sequence=shard)` arrives here with each layer's q, k, v.
What a layer asks of attention is honoured or refused by name; nothing is ignored.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from seqloom.attention import attention
from seqloom.errors import ModelError
from seqloom.sequence import SequenceShard

NAME = "seqloom"

NEUTRAL = frozenset(
    {"position_ids", "cache_position", "use_cache", "past_key_values", "return_dict", "output_hidden_states"}
)
"""Keywords that reach attention functions and say nothing about attention."""


def register() -> None:
    """Make the attention function known to transformers under NAME. Repeating it is harmless."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Stop transformers from building a dense mask: the shard carries the mask. Raises ModelError for a given one."""
    if attention_mask is None:
        return
    if len(attention_mask.shape) != 2:  # a tensor of scores, or FlexAttention's block mask
        raise ModelError(
            f"The model was given a dense attention_mask of {len(attention_mask.shape)} dims; the mask comes with the "
            "sequence shard: write it as a rule on positions, Batch(..., rule=Mask(allowed=...))."
        )
    if not bool(attention_mask.all()):
        raise ModelError(
            "The model was given an attention_mask with padding; give it to the batch instead, as "
            "Batch.from_tokens(tokens, attention_mask=...), and the shard carries it."
        )


def attend(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence: SequenceShard | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slopes: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Called by every layer: attention of this rank's tokens on the whole sequence.

    query: [rows, Hq, local_tokens, Dk]; key: [rows, Hk, local_tokens, Dk]; value: [rows, Hk, local_tokens, Dv].
    s_aux: [Hq] attention sinks. slopes: [Hq] of ALiBi. dropout: probability, in training alone.
    Returns [rows, local_tokens, Hq, Dv]. Raises ModelError for what cannot be honoured.
    """
    layer = type(module).__name__
    if sequence is None:
        raise ModelError(
            f"{layer} was called without a sequence; after parallelize call the model with "
            "model(**local.inputs, sequence=shard), as shard_batch gives them."
        )
    no_mask(attention_mask=attention_mask)
    refuse_unknown(layer, asked)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and any(mask.causal for mask in sequence.masks):
        raise ModelError(
            f"{layer} asks for attention that is not causal, but the batch's mask is; "
            "give the batch rule=Mask(causal=False)."
        )
    drop = dropout if dropout and module.training else 0.0
    out = attention(
        query,
        key,
        value,
        sequence,
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        slopes=slopes,
        sinks=s_aux,
        dropout=drop,
        layer=_number(module) if drop else 0,
    )
    return out.transpose(1, 2), None


def _number(module: nn.Module) -> int:
    """The layer's number, which keys its dropout: two layers of one number would drop the same pairs."""
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int):
        raise ModelError(
            f"{type(module).__name__} has no layer_idx to draw its attention dropout from; set the dropout to 0."
        )
    return number


def refuse_unknown(layer: str, asked: dict[str, Any]) -> None:
    """Raise ModelError for a keyword that would change attention and is not honoured here."""
    for name, given in asked.items():
        # None, 0 and False are how families say that they do not use an option.
        if name not in NEUTRAL and (isinstance(given, Tensor) or given):
            said = f"a tensor {list(given.shape)}" if isinstance(given, Tensor) else given
            raise ModelError(f"{layer} asks attention for {name}={said}, which is not supported yet; leave it out.")
