"""What a kernel is asked for on one tile, and what a kernel is.

Every kernel computes, for the queries and keys of one tile,

    s = softcap(scale q k^T) + slope (k_pos - q_pos)        softcap(x) = cap tanh(x / cap), or x
    p = exp(s - lse),  lse = log sum exp(s) over the visible keys
    out = (p keep / (1 - dropout)) v

and its backward from the *final* out and lse of the whole row, so that the gradients of tiles add up:

    dp = keep / (1 - dropout) (dout v^T)     ds = p (dp - rowsum(dout out))
    dq = scale cap'(s) ds k     dk = scale (cap'(s) ds)^T q     dv = (p keep / (1 - dropout))^T dout

| tensor | shape             | type                                    |
|--------|-------------------|-----------------------------------------|
| q, dq  | [rows, Hq, n, Dk] | of the model                            |
| k, dk  | [rows, Hk, m, Dk] | of the model; Hk divides Hq (groups)    |
| v, dv  | [rows, Hk, m, Dv] | of the model; Dv may differ from Dk     |
| out    | [rows, Hq, n, Dv] | at least of the model                   |
| lse    | [rows, Hq, n]     | float32, float64 for float64            |

Gradients are in the model's type or a wider one. q, k and v, their gradients' dout and out may be
views with any strides as long as the last dim is laid out in memory (stride 1).

Source: FlashAttention-2 (arXiv 2307.08691), sections 2.3 and 3.1; softcap: Gemma 2 (arXiv
2408.00118), section 2; slopes: ALiBi (arXiv 2108.12409), section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """One tile's attention, beside its tensors.

    causal: the tile is a square whose lower triangle with diagonal is visible; otherwise all of it.
    slopes [Hq]: ALiBi, in any float type. q_positions [n], k_positions [m]: int64 positions in the
    row, given when slopes, dropout or allowed are. allowed(q_positions[:, None], k_positions[None])
    -> bool [n, m], on top of `causal`; a query that is allowed nothing returns out 0 and lse -inf.
    dropout: probability; dropout_keys [rows, Hq] int64, from `seqloom.attention.dropout.keys`.
    """

    scale: float
    causal: bool = False
    softcap: float | None = None
    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    allowed: Callable[[Tensor, Tensor], Tensor] | None = None
    dropout: float = 0.0
    dropout_keys: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """One way of computing a tile.

    absent(device): why it cannot run on this device with what is installed here, or None.
    lacks(call, q, v): which part of the call it does not honour, in one clause, or None; judged from
    types and shapes alone, wherever the tensors are.
    forward(q, k, v, call) -> (out, lse); backward(dout, q, k, v, out, lse, call) -> (dq, dk, dv).
    """

    name: str
    absent: Callable[[torch.device], str | None]
    lacks: Callable[[Call, Tensor, Tensor], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call],
        tuple[Tensor, Tensor, Tensor],
    ]
