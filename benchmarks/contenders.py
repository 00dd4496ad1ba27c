"""What is timed against each other by `benchmarks.attention`: one process, the ceilings, and seqloom's own ways.

Every contender starts from the same tensors, which lie in memory as a model's projections leave them,
[rows, tokens, heads, width], and are seen as its interface wants them; it gives its results back seen as
[rows, heads, tokens, width]. The gradient of the output lies likewise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import scaled_dot_product_attention

from seqloom import Batch, Fabric, Layout, Plan, shard_batch
from seqloom.attention import attention
from seqloom.errors import SeqloomError
from seqloom.geometry import Span

RANKS = 2
Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""out, dq, dk, dv as [rows, heads, tokens, width]."""


class Unavailable(Exception):
    """This contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """The problem: causal attention of `tokens` tokens, one row, forward and backward, float32."""

    tokens: int
    heads: int
    kv_heads: int
    width: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, [1, tokens, heads, width], the same on every rank."""
        random = torch.Generator().manual_seed(self.tokens)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        q, k, v, dout = (torch.randn(1, self.tokens, h, self.width, generator=random).to(dtype) for h in heads)
        return q, k, v, dout


class Prepared(NamedTuple):
    """A contender ready to run.

    run: forward and backward once; None where this rank has no results to compare. spans: the global positions of
    its results. heads: which of `parts` equal groups of heads they are, as (part, parts).
    """

    run: Callable[[], Results | None]
    spans: tuple[Span, ...]
    heads: tuple[int, int] = (0, 1)
    close: Callable[[], None] = lambda: None


class Contender(NamedTuple):
    """name, kind (one of `one`, `ceiling`, `ours`, `peer`) and how it is made ready on this rank."""

    name: str
    kind: str
    prepare: Callable[[Case], Prepared]


def local(case: Case, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's rows of q, k, v and the output's gradient, [1, n, heads, width]; the first three want gradients."""
    held = torch.cat([torch.arange(*span) for span in spans])
    q, k, v, dout = (x.index_select(1, held) for x in case.tensors())
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused causal attention of [rows, heads, n, width], grouped heads not repeated."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """[rows, n, heads, width] seen as [rows, heads, n, width]."""
    return [x.transpose(1, 2) for x in tensors]


def _one_process(case: Case) -> Prepared:
    """All of it by one call in the first process; the second waits."""
    spans = (Span(0, case.tokens),)
    if distributed.get_rank() > 0:
        return Prepared(lambda: None, spans)
    *leaves, dout = local(case, spans)

    def run() -> Results:
        q, k, v, grad = heads_first(*leaves, dout)
        out = fused(q, k, v)
        return (out, *heads_first(*torch.autograd.grad(out, leaves, grad)))

    return Prepared(run, spans)


def _split_tokens(case: Case) -> Prepared:
    """The kernel calls of a zigzag ring and nothing else: no exchange, no merging, no adding of gradients."""
    rank, half = distributed.get_rank(), case.tokens // RANKS // 2
    *leaves, dout = heads_first(*local(case, Layout("zigzag", case.tokens, RANKS).ring_spans[rank]))
    q, k, v = (x.detach() for x in leaves)
    late = slice(half, None)
    # The other rank's block: rank 0 sees all of it with its later half, rank 1 sees its earlier half with all.
    cut = (q[:, :, late], k, v, dout[:, :, late]) if rank == 0 else (q, k[:, :, :half], v[:, :, :half], dout)
    calls = ((True, q, k, v, dout), (False, *cut))

    def run() -> None:
        ops = torch.ops.aten
        met = [ops._scaled_dot_product_flash_attention_for_cpu(*x[:3], 0.0, causal) for causal, *x in calls]
        for (causal, a, b, c, grad), (out, lse) in zip(calls, met, strict=True):
            ops._scaled_dot_product_flash_attention_for_cpu_backward(grad, a, b, c, out, lse, 0.0, causal)

    return Prepared(run, ())


def _split_heads(case: Case) -> Prepared:
    """Half of the heads on the whole sequence: the kernel calls of Ulysses and nothing else."""
    rank, spans = distributed.get_rank(), (Span(0, case.tokens),)
    *whole, dout = (x.detach().chunk(RANKS, 2)[rank].contiguous() for x in local(case, spans))
    leaves = [x.requires_grad_() for x in whole]

    def run() -> Results:
        q, k, v, grad = heads_first(*leaves, dout)
        out = fused(q, k, v)
        return (out, *heads_first(*torch.autograd.grad(out, leaves, grad)))

    return Prepared(run, spans, heads=(rank, RANKS))


def _ours(case: Case, plan: str) -> Prepared:
    """seqloom's own call on what `shard_batch` gives under the plan."""
    try:
        fabric = Fabric.build(Plan.parse(plan), "cpu")
        _, shard = shard_batch(Batch.from_tokens(torch.zeros(1, case.tokens, dtype=torch.int64)), fabric)
    except SeqloomError as error:
        raise Unavailable(str(error)) from error
    *leaves, dout = local(case, shard.spans)

    def run() -> Results:
        q, k, v, grad = heads_first(*leaves, dout)
        out = attention(q, k, v, shard)
        return (out, *heads_first(*torch.autograd.grad(out, leaves, grad)))

    return Prepared(run, shard.spans, close=fabric.close)


PLANS = {
    "ulysses": f"ulysses={RANKS}",
    "ring": f"ring={RANKS}",
    "gather": f"ring={RANKS} exchange=gather",
    "needed": f"ring={RANKS} exchange=needed",
}
OWN = (
    Contender("one process", "one", _one_process),
    Contender("ceiling, tokens split", "ceiling", _split_tokens),
    Contender("ceiling, heads split", "ceiling", _split_heads),
    *(Contender(f"seqloom {name}", "ours", partial(_ours, plan=plan)) for name, plan in PLANS.items()),
)
