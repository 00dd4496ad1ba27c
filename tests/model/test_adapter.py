"""What a layer asks of attention reaches it: each keyword against a few dense lines."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from close import assert_close
from model.dense import batch_of
from seqloom.fabric import Fabric
from seqloom.model.adapter import attend
from seqloom.plan import Plan
from seqloom.sequence import SequenceShard, shard_batch

ROWS, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 8


class Layer(nn.Module):
    """As much of an attention layer as the adapter reads."""

    layer_idx = 0


def shard() -> SequenceShard:
    return shard_batch(batch_of(ROWS, num_tokens=TOKENS), Fabric.build(Plan()))[1]


def tensors(v_width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    shapes = [(HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, v_width)]
    return tuple(torch.randn(ROWS, h, TOKENS, d, generator=random, dtype=torch.float64) for h, d in shapes)  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
    """[rows, tokens, heads, v width]: attention as the words say it."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * asked.get("scaling", WIDTH**-0.5)
    if cap := asked.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    apart = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    if "slopes" in asked:
        scores = scores - asked["slopes"][:, None, None] * apart
    seen = (apart >= 0) & (apart < asked.get("sliding_window", TOKENS))
    scores = scores.masked_fill(~seen, float("-inf"))
    if "s_aux" in asked:
        sinks = asked["s_aux"][None, :, None, None].expand(ROWS, -1, TOKENS, 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scaling": 0.7},
    "window": {"sliding_window": 5},
    "softcap": {"softcap": 0.5, "scaling": 1.0},
    "slopes": {"slopes": torch.tensor([0.5, 0.25, 0.1, 1.0], dtype=torch.float64)},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
    "all": {
        "scaling": 1.1,
        "sliding_window": 7,
        "softcap": 1.5,
        "s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64),
    },
}


@pytest.mark.parametrize("v_width", [WIDTH, 5])
@pytest.mark.parametrize("name", ASKED)
def test_what_a_layer_asks_for(name: str, v_width: int) -> None:
    """Catches a keyword that is accepted and lost, and values of another width than keys cut to it."""
    q, k, v = tensors(v_width)
    found, weights = attend(Layer(), q, k, v, None, sequence=shard(), **ASKED[name])
    assert found.shape == (ROWS, TOKENS, HEADS, v_width) and weights is None
    assert_close(found, dense(q, k, v, **ASKED[name]), tolerance=1e-12)
    if name != "nothing":
        assert (found - dense(q, k, v)).norm() > 1e-2


def test_dropout_in_training_alone() -> None:
    """Catches dropout in evaluation, where some families pass their probability all the same."""
    layer, sequence = Layer(), shard()
    plain = dense(*tensors())
    kept = attend(layer.eval(), *tensors(), None, sequence=sequence, dropout=0.5)[0]
    assert_close(kept, plain, tolerance=1e-12)
    drawn = attend(layer.train(), *tensors(), None, sequence=sequence, dropout=0.5)[0]
    assert (drawn - plain).norm() > 0.1 * plain.norm()
    assert torch.equal(drawn, attend(layer, *tensors(), None, sequence=sequence, dropout=0.5)[0])
