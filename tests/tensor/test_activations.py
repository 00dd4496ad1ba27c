"""Activations that a layer keeps for backward under 1D tensor parallelism, in bytes, against the papers' formulas.

The bytes of one layer in a two-byte type, s tokens of b rows, h channels, a heads, t ranks, as Korthikanti et al. count
them (arXiv 2205.05198, sections 4.1 and 4.2, table 2): sbh(10 + 24/t + 5as/(ht)) with tensor parallelism, and
sbh(34/t + 5as/(ht)) with sequence parallelism beside it. Without dropout its masks go (one byte an element: 1 of
attention's output, 1 of the MLP's, and as^2b/t within attention), and fused attention keeps, in place of softmax and
what dropout makes of it (2as^2b + 2as^2b), one log-sum-exp in float32 for each head and token, 4asb/t. What is
left, in units of sbh:

| kept                                  | bytes | split by tensor ranks        |
|---------------------------------------|-------|------------------------------|
| input of each of two norms            | 2 x 2 | with sequence parallelism    |
| input of q, k, v, and of the MLP      | 2 x 2 | with sequence parallelism    |
| q, k, v                               | 6     | always                       |
| attention's output                    | 2     | always                       |
| what GELU reads, what it gives        | 8 + 8 | always                       |

So sbh(8 + 24/t) + 4asb/t, and sbh 32/t + 4asb/t. Inputs that are gathered are gathered again in backward; with
regather=false they are kept whole, sbh(4 + 28/t). Statistics of norms are O(sb).

A Llama of transformers has other modules, hence a formula of its own, with k key/value heads and an MLP of width i:
its RMSNorm keeps a copy of its input in float32, the normed input and, as everywhere, the linears their input,
2 x 8; q, attention's output, k and v are 4 + 4k/a; gate, silu(gate), up and their product 8i/h.
"""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from close import assert_close
from pool import Pool
from seqloom.fabric import Fabric
from seqloom.model import build_model, parallelize
from seqloom.plan import Plan
from seqloom.sequence import Batch, shard_batch
from seqloom.tensor import local

ROWS, TOKENS, HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 2, 48, 1024, 16, 8, 2816
SBH = ROWS * TOKENS * HIDDEN
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_positions": 512,
        "activation_function": "gelu",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "tie_word_embeddings": False,
    },
}


def of_the_paper(t: int, outer: int, gathered: int) -> float:
    """Bytes of a GPT layer; outer, gathered: over how many ranks the residual stream, and inputs of linears, lie."""
    return SBH * (4 / outer + 4 / gathered + 24 / t) + 4 * HEADS * ROWS * TOKENS / t


def of_llama(t: int, outer: int, gathered: int) -> float:
    """Bytes of a Llama layer."""
    inner = 4 + 4 * KV_HEADS / HEADS + 8 * INTERMEDIATE / HIDDEN
    return SBH * (12 / outer + 4 / gathered + inner / t) + 4 * HEADS * ROWS * TOKENS / t


FORMULAS: dict[str, Callable[[int, int, int], float]] = {"gpt2": of_the_paper, "llama": of_llama}
PLANS = {
    "tensor=2": (2, 2, 2),
    "tensor=4": (4, 4, 4),
    "tensor=2 tensor_overlap=ring": (2, 2, 2),
    "tensor=2 regather=false": (2, 2, 1),
    "tensor=2 sequence_parallel=false": (2, 1, 1),
    "tensor=4 sequence_parallel=false": (4, 1, 1),
}
"""Plan to the arguments of its formula."""


def _forward(family: str, plan: str, layers: int, rows: int, tokens: int) -> tuple[Fabric, Any, Callable[[], Tensor]]:
    """A split model in bfloat16, and its forward pass."""
    fabric = Fabric.build(Plan.parse(plan), "cpu")
    settings = {**SETTINGS[family], "num_hidden_layers": layers}
    model = parallelize(build_model(settings, dtype=torch.bfloat16), fabric)
    batch, shard = shard_batch(Batch.from_tokens(torch.zeros(rows, tokens, dtype=torch.int64)), fabric)
    return fabric, model, lambda: model.base_model(**batch.inputs, sequence=shard).last_hidden_state


def saved(family: str, plan: str, layers: int) -> int:
    """Bytes of all storages that a forward pass saves for backward on this rank, parameters left out."""
    fabric, model, forward = _forward(family, plan, layers, ROWS, TOKENS)
    parameters = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def see(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = (storage.nbytes(), x)  # x keeps the address from being given out again
        return x

    with saved_tensors_hooks(see, lambda x: x):
        forward()
    fabric.close()
    return sum(num_bytes for num_bytes, _ in found.values())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", SETTINGS)
def test_saved_bytes_are_the_formula(pool: Pool, family: str, plan: str) -> None:
    """Catches a gathered input or an output kept without need, copies of q, k and v, and logits of attention."""
    expected = FORMULAS[family](*PLANS[plan])
    one, two = (pool.run(PLANS[plan][0], saved, family, plan, layers) for layers in (1, 2))
    for fewer, more in zip(one, two, strict=True):
        print(f"{family} {plan}: {more - fewer:,} bytes a layer, by formula {expected:,.0f}")
        assert_close(float(more - fewer), expected, tolerance=0.01, ranks=2)


class _Allocated(ctypes.Structure):
    _fields_ = [(f"field_{number}", ctypes.c_size_t) for number in range(10)]

    @property
    def total(self) -> int:
        """What lies in pages of its own (hblkhd), and all the rest in use (uordblks)."""
        return self.field_4 + self.field_7


def _mallinfo() -> Callable[[], _Allocated] | None:
    """glibc's account of what is allocated; None where there is another library."""
    try:
        found: Any = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    found.restype = _Allocated
    return found


def held(family: str, plan: str, layers: int) -> int:
    """Bytes that this process holds after a forward pass and did not before, whoever holds them."""
    fabric, _, forward = _forward(family, plan, layers, 1, 512)
    ask = _mallinfo()
    assert ask is not None
    for _ in range(2):  # the first pass makes what lasts
        gc.collect()
        before = ask()
        out = forward()
        gc.collect()
        after = ask()
        del out
    fabric.close()
    return after.total - before.total


@pytest.mark.skipif(_mallinfo() is None, reason="glibc's allocator is asked")
@pytest.mark.parametrize("plan", ["tensor=2", "tensor=2 sequence_parallel=false"])
def test_nothing_is_held_beside_what_is_saved(pool: Pool, plan: str) -> None:
    """Catches tensors that a function keeps on its context or a module on itself, which no hook sees."""
    one, three = (pool.run(2, held, "gpt2", plan, layers) for layers in (1, 3))
    expected = of_the_paper(*PLANS[plan]) * 512 / (ROWS * TOKENS)
    for fewer, more in zip(one, three, strict=True):
        assert_close((more - fewer) / 2, expected, tolerance=0.02, ranks=2)
