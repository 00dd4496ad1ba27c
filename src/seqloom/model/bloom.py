"""BLOOM under a plan: its attention is its own, so the forwards of one instance are replaced.

transformers' BLOOM calls no attention function that could be looked up, drops the keyword
`sequence` on its way down, and with no mask attends to both sides. So the model, its base and each
attention get a forward of their own, set on the instances: the classes, other models, the weights and
what is saved stay as they are.
"""

import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions

from seqloom.errors import ModelError
from seqloom.model.adapter import no_mask, refuse_unknown

Attend = Callable[..., tuple[Tensor, None]]
"""An attention function as transformers calls it: (module, query, key, value, mask, **asked)."""


def reroute(model: PreTrainedModel, attend: Attend) -> None:
    """Make every attention of this BloomForCausalLM call `attend` with the sequence given to the model's forward."""
    base = model.base_model
    for block in base.h:
        attention = block.self_attention
        attention.forward = MethodType(partial(_attention_forward, attend, attention.num_heads), attention)
    base.forward = MethodType(_base_forward, base)
    model.forward = MethodType(_model_forward, model)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head: score += slope * (key position - query position) (ALiBi, arXiv 2108.12409, section 3).

    For a power of two the slopes are the powers of 2^(-8 / heads). For other numbers, as the paper's
    code and transformers do it, those of the power of two below, then every other one of twice that.

    >>> alibi_slopes(4)
    (0.25, 0.0625, 0.015625, 0.00390625)
    >>> [round(slope, 3) for slope in alibi_slopes(3)]
    [0.062, 0.004, 0.25]
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2 ** (-4 * i / below) for i in range(1, 2 * below, 2)]
    return (*slopes, *between[: heads - below])


def _attention_forward(
    attend: Attend,
    heads: int,
    attention: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Any,
    **asked: Any,
) -> tuple[Tensor, None]:
    """In place of BloomAttention.forward; `alibi` holds the sequence. hidden_states: [rows, local_tokens, hidden]."""
    q, k, v = attention._reshape(attention.query_key_value(hidden_states))
    wide = torch.promote_types(q.dtype, torch.float32)
    slopes = torch.tensor(alibi_slopes(heads), dtype=wide, device=q.device)
    if attention.num_heads < heads:  # this rank's of a tensor group
        slopes = slopes[attention.first_head : attention.first_head + attention.num_heads]
    out, _ = attend(
        attention,
        q,
        k,
        v,
        asked.pop("attention_mask", None),
        sequence=alibi,
        scaling=attention.inv_norm_factor,
        slopes=slopes,
        dropout=attention.attention_dropout.p,
        **asked,
    )
    return residual + attention.dense(out.flatten(2)), None


def _base_forward(
    base: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    output_hidden_states: bool | None = None,
    sequence: Any = None,
    **asked: Any,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """In place of BloomModel.forward: the blocks hand what stands at `alibi` on to their attention."""
    no_mask(attention_mask=attention_mask)
    if asked.pop("return_dict", True) is False:
        raise ModelError("BloomModel was asked for a tuple by return_dict=False; leave it out and read the fields.")
    refuse_unknown(type(base).__name__, asked)
    hidden = base.word_embeddings_layernorm(base.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
    wanted = base.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    states = []
    for block in base.h:
        states += [hidden] if wanted else []
        out = block(hidden, alibi=sequence, attention_mask=None)
        hidden = out[0] if isinstance(out, tuple) else out  # a layer that waits to be computed gives no tuple
    hidden = base.ln_f(hidden)
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden, hidden_states=(*states, hidden) if wanted else None
    )


def _model_forward(model: Any, input_ids: Tensor | None = None, **asked: Any) -> CausalLMOutputWithCrossAttentions:
    """In place of BloomForCausalLM.forward, which would drop the sequence."""
    found = model.base_model(input_ids, **asked)
    return CausalLMOutputWithCrossAttentions(
        logits=model.lm_head(found.last_hidden_state), hidden_states=found.hidden_states
    )
