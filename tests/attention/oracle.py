"""Dense attention of a whole batch on one device, and a split run held against it."""

from typing import Any

import torch
from torch import Tensor

from close import assert_close
from seqloom.attention import attention, dropout, specification
from seqloom.fabric import Fabric
from seqloom.sequence import Batch, shard_batch

FORMS = {"fast": attention, "specification": specification.attention}


def visible_pairs(batch: Batch, row: int, window: int | None) -> Tensor:
    """[S, S] bool: the mask of a row written out from document numbers, places and positions."""
    lengths = torch.tensor(batch.documents[row] if batch.documents else [batch.num_tokens])
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(batch.num_tokens)
    place = position - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    apart, rule = position[:, None] - position, batch.rule
    seen = torch.ones_like(apart, dtype=torch.bool) if not rule.causal else apart >= 0
    for limit in (rule.window, window):
        if limit is not None:
            seen &= apart.abs() < limit
    seen |= place < rule.prefix
    if rule.allowed is not None:
        seen &= torch.as_tensor(rule.allowed(position[:, None], position)).bool()
    seen &= document[:, None] == document
    padding = batch.padding[row] if batch.padding else ()
    return seen & ~torch.isin(document, torch.tensor(padding, dtype=torch.int64))[:, None]


def dense_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    drop: float = 0.0,
    layer: int = 0,
) -> Tensor:
    """softmax(score) v under the batch's mask; a query that sees nothing gives 0."""
    rows, heads, tokens, width = q.shape
    visible = torch.stack([visible_pairs(batch, row, window) for row in range(rows)])[:, None]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (torch.arange(tokens) - torch.arange(tokens)[:, None])
    scores = scores.masked_fill(~visible, float("-inf"))
    blind = ~visible.any(-1, keepdim=True)
    if sinks is not None:
        weights = torch.cat([scores, sinks[:, None, None].expand(rows, heads, tokens, 1)], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.masked_fill(blind, 0.0).softmax(-1)
    if drop:
        drawn = dropout.keys(batch.seed, range(batch.first_row, batch.first_row + rows), layer, range(heads))
        weights = weights * dropout.keep(drawn, torch.arange(tokens), torch.arange(tokens), drop) / (1 - drop)
    return (weights @ v).masked_fill(blind, 0.0)


def compare(
    fabric: Fabric,
    batch: Batch,
    heads: tuple[int, int],
    widths: tuple[int, int] = (8, 8),
    form: str = "fast",
    *,
    tolerance: float = 1e-12,
    slopes: bool = False,
    sinks: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Hold this rank's part of out, dq, dk, dv (and the sum of dsinks) against dense attention, in float64.

    heads: query and key/value heads; widths: of keys and of values. Raises where they part.
    """
    rows, tokens = batch.tokens.shape
    torch.manual_seed(tokens)
    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1]), (heads[0], widths[1])]
    q, k, v, dout = (torch.randn(rows, h, tokens, d, dtype=torch.float64) for h, d in shapes)
    given = {
        **options,
        "slopes": torch.linspace(0.1, 0.9, heads[0], dtype=torch.float64) if slopes else None,
        "sinks": torch.linspace(-1, 1, heads[0], dtype=torch.float64).requires_grad_() if sinks else None,
    }
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    renamed = {("drop" if name == "dropout" else name): value for name, value in given.items()}
    expected = dense_attention(*whole, batch, **renamed)
    expected.backward(dout)
    expected_sinks = given["sinks"].grad if sinks else None
    data = fabric.data
    here = slice(data.rank * rows // data.size, (data.rank + 1) * rows // data.size)
    _, shard = shard_batch(batch, fabric)
    held = torch.tensor([p for span in shard.spans for p in range(*span)])
    mine = [x[here, :, held].clone().requires_grad_() for x in (q, k, v)]
    if sinks:
        given["sinks"] = given["sinks"].detach().clone().requires_grad_()
    out = FORMS[form](*mine, shard, **given)
    out.backward(dout[here, :, held])
    found = [out, *(x.grad for x in mine)]
    for part, full in zip(found, [expected, *(x.grad for x in whole)], strict=True):
        full_part = full[here, :, held]
        if full_part.any():
            assert_close(part, full_part, tolerance=tolerance, ranks=fabric.world.size)
        else:
            assert not part.any()
    if sinks:
        total = given["sinks"].grad.clone()
        torch.distributed.all_reduce(total) if fabric.world.size > 1 else None
        assert_close(total, expected_sinks, tolerance=tolerance, ranks=fabric.world.size)
    return [x.detach() for x in found]
