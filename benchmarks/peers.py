"""Peers that run on CPU, unpatched, at their published versions; one that is missing is skipped with a message.

DeepSpeed comes with the extra `bench`; `benchmarks.attention` sets DS_ACCELERATOR=cpu for it. torch's ring attention is
private and comes with torch.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from benchmarks.contenders import RANKS, Case, Contender, Prepared, Results, Unavailable, fused, heads_first, local
from seqloom import Layout
from seqloom.geometry import Span


def _consecutive(case: Case) -> tuple[Span, ...]:
    return Layout("contiguous", case.tokens, RANKS).ring_spans[distributed.get_rank()]


def _deepspeed() -> None:
    """Join DeepSpeed's communication to the running process group; it compiles an extension on its first use."""
    try:
        import deepspeed.comm as joined

        if not joined.is_initialized():
            joined.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    except ImportError as error:
        raise Unavailable(f"deepspeed does not import ({error}); the extra `bench` brings it") from error
    except Exception as error:  # without a compiler, for one; whatever it is, it is why this peer is missing
        raise Unavailable(f"deepspeed does not start ({error})") from error


def _deepspeed_ulysses(case: Case) -> Prepared:
    """DeepSpeed's `DistributedAttention`, [rows, n, heads, width], around torch's fused attention."""
    _deepspeed()
    from deepspeed.sequence.layer import DistributedAttention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heads_first(fused(*heads_first(q, k, v)))[0]

    spans = _consecutive(case)
    layer = DistributedAttention(attend, distributed.group.WORLD, scatter_idx=2, gather_idx=1)
    *leaves, dout = local(case, spans)

    def run() -> Results:
        out = layer(*leaves, 0)
        return tuple(heads_first(out, *torch.autograd.grad(out, leaves, dout)))

    return Prepared(run, spans)


def _deepspeed_transformers(case: Case) -> Prepared:
    """DeepSpeed's `UlyssesSPAttentionHF` around transformers' own sdpa function, as its users have it."""
    _deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    spans = _consecutive(case)
    layer = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward,
        batch_size=1,
        attn_head_count=case.heads,
        attn_head_size=case.width,
        kv_head_count=case.kv_heads,
        num_hidden_layers=1,
        process_group=distributed.group.WORLD,
        local_seq_length=case.tokens // RANKS,
        global_seq_length=case.tokens,
    )
    module = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=case.heads // case.kv_heads)
    *leaves, dout = local(case, spans)
    positions = torch.arange(*spans[0])[None]

    def run() -> Results:
        out, _ = layer(module, *heads_first(*leaves), None, position_ids=positions)  # [1, n, heads * width]
        grads = torch.autograd.grad(out, leaves, dout.flatten(2))
        return tuple(heads_first(out.unflatten(2, (case.heads, -1)), *grads))

    return Prepared(run, spans)


def _templates() -> Any:
    """torch's private module of templates for ring attention."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention as templates
    except ImportError as error:
        raise Unavailable(f"this torch has no ring attention, or keeps it elsewhere ({error})") from error
    return templates


class _TorchRing(torch.autograd.Function):
    """torch's templates around its fused CPU kernel, with their zigzag balancing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        templates = _templates()
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = templates._templated_ring_attention(distributed.group.WORLD, 2, kernel, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        templates = _templates()
        q, k, v, out, lse = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        where = (distributed.group.WORLD, 2, kernel, grads[0], "grad_out")
        found = templates._templated_ring_attention_backward(*where, q, k, v, out, lse, is_causal=True, dropout_p=0.0)
        return tuple(found[:3])


def _torch_ring(case: Case, rotate: str) -> Prepared:
    templates = _templates()
    spans = Layout("zigzag", case.tokens, RANKS).ring_spans[distributed.get_rank()]
    *leaves, dout = local(case, spans)

    def run() -> Results:
        templates.set_rotate_method(rotate)  # of the whole process, so said before each run
        q, k, v, grad = heads_first(*leaves, dout)
        out = _TorchRing.apply(q, k, v)
        return (out, *heads_first(*torch.autograd.grad(out, leaves, grad)))

    return Prepared(run, spans)


PEERS = (
    Contender("DeepSpeed DistributedAttention", "peer", _deepspeed_ulysses),
    Contender("DeepSpeed UlyssesSPAttentionHF", "peer", _deepspeed_transformers),
    Contender("torch ring, all-gather", "peer", partial(_torch_ring, rotate="allgather")),
    Contender("torch ring, all-to-all", "peer", partial(_torch_ring, rotate="alltoall")),
)
