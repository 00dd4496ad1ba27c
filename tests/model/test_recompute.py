"""Layers computed again in backward: the same numbers, attention's communication once, and the bytes that are kept."""

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from close import assert_close
from model.dense import TOKENS, batch_of, build
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.model import parallelize, sum_gradients, token_loss, whole_tensors
from seqloom.model import recompute as seam
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import KeptResults, shard_batch
from seqloom.verify import Case, verify_here
from tensor.test_activations import HEADS, HIDDEN, KV_HEADS, ROWS, held, saved

DOCUMENTS = (7, 13, 28)


def errors(text: str, families: tuple[str, ...], others: dict[str, Any]) -> list[tuple[str, float]]:
    """The largest error of each family's steps under a plan, of three layers."""
    found = []
    for family in families:
        plan = Plan.parse(text)
        settings = fit(read_config(family), plan, TOKENS)
        name = next(key for key in ("num_hidden_layers", "n_layer") if key in settings)
        settings = {**settings, name: 3}
        if "layer_types" in settings:
            settings["layer_types"] = (settings["layer_types"] * 3)[:3]
        case = Case(config=settings, plan=plan, num_tokens=TOKENS, documents=DOCUMENTS, **others)
        seen = verify_here(case)
        found.append((family, max(seen.loss_error, seen.worst_gradient_error, seen.parameter_error)))
    return found


FAMILIES = ("bloom", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "llama", "mistral", "qwen2", "qwen3")
CASES: dict[str, tuple[str, ...]] = {
    "ring=2 recompute=selective": ("llama", "bloom"),
    "recompute=full:uniform:2": ("llama", "bloom"),
    "recompute=selective ring=2 exchange=rsa layout=striped": ("gemma2",),
    "recompute=full:uniform:2 tensor=2 sequence_parallel=false activations=partitioned": ("gpt2",),
    "recompute=selective tensor=2 ulysses=2 activations=offloaded": ("qwen2",),
}
WIDE: dict[str, tuple[str, ...]] = {
    "ring=2 ulysses=2 recompute=selective": FAMILIES,
    "recompute=full:uniform:2": FAMILIES,
    "data=2 zero=3 recompute=full:uniform:2": ("llama", "gpt2"),
    "ring=2 zero=3 recompute=selective": ("llama", "gemma2"),
    "ring=2 zero=2 recompute=full:block:2": ("llama",),
    "data=2 ulysses=2 expert=4 recompute=selective": ("mixtral",),
    "ring=2 expert=2 recompute=full:uniform:2": ("qwen3_moe", "deepseek_v3"),
    "recompute=full:block:1 ring=2": ("llama", "gpt2"),
    "pipeline=2 ring=2 recompute=selective/full:uniform:2": ("llama", "bloom"),
    "pipeline=2 schedule=interleaved stages=1-1-1-0 recompute=full/none/selective/none": ("llama",),
    "recompute=selective exchange=gather": ("llama",),
    "recompute=selective ring=2 exchange=needed": ("gemma2", "gpt_oss"),
    "recompute=full tensor=2 ring=2 activations=offloaded": ("llama", "bloom"),
    "recompute=selective tensor=2 ulysses=2 sequence_parallel=false activations=partitioned": ("qwen2", "bloom"),
    "recompute=selective tensor=4 tensor_kind=2d tensor_tokens=ulysses activations=offloaded": ("llama",),
    "recompute=full:uniform:2 tensor=4 tensor_kind=3d grid=2x2x1": ("qwen3",),
    "recompute=selective tensor=4 tensor_kind=2.5d depth=1": ("mistral",),
    "recompute=selective tensor=3 tensor_overlap=ring regather=false": ("llama",),
}


def hold(pool: Pool, text: str, families: tuple[str, ...]) -> None:
    """Biases of LayerNorm models, and soft caps, leave gradients of which rounding takes more, recomputed or not."""
    for found in pool.run(Plan.parse(text).world_size, errors, text, families, {"accumulate": 2}, timeout_seconds=200):
        assert all(error < (1e-11 if family in ("bloom", "gemma2", "gpt2") else 1e-12) for family, error in found), (
            found
        )


@pytest.mark.parametrize("text", CASES)
def test_equal_to_one_device(pool: Pool, text: str) -> None:
    """Catches a layer run again under other masks, float32 where it ran in float64, results taken in another order."""
    hold(pool, text, CASES[text])


@pytest.mark.sweep
@pytest.mark.parametrize("text", WIDE)
def test_every_family_and_kind(pool: Pool, text: str) -> None:
    """Catches a family or a kind of plan that does not survive being run again."""
    hold(pool, text, WIDE[text])


@pytest.mark.parametrize("text", ["ulysses=2 recompute=selective", "tensor=2 recompute=full:uniform:2"])
def test_dropout_and_steps(pool: Pool, text: str) -> None:
    """Catches coins drawn anew when a layer runs again."""
    for found in pool.run(
        Plan.parse(text).world_size, errors, text, ("gpt2",), {"dropout": 0.2, "accumulate": 2, "steps": 2, "batch": 2}
    ):
        assert all(error < 1e-11 for _, error in found), found


def test_bf16(pool: Pool) -> None:
    """Catches a layer that runs again without autocast, which torch would refuse by its types, or in another type."""
    text = "ring=2 recompute=selective"
    for found in pool.run(2, errors, text, ("llama",), {"dtype": "bf16"}):
        assert all(error < 2.0**-4 for _, error in found), found


def in_flight(text: str) -> list[Tensor]:
    """Gradients of two micro-batches of other lengths and rows, both forward before the first goes backward."""
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("llama"), fabric)
    batches = [batch_of(1, [[7, 13, 28]]), batch_of(2, [[37], [20, 17]], 37, first_row=1)]
    losses = [token_loss(model, *shard_batch(batch, fabric), total=100) for batch in batches]
    for loss in losses:
        loss.backward()
    sum_gradients(model, fabric)
    return list(whole_tensors(model, fabric, "gradient").values())


@pytest.mark.parametrize("text", ["ring=2", "tensor=2 ulysses=2"])
def test_micro_batches_in_flight(pool: Pool, text: str) -> None:
    """Catches what one micro-batch kept taken by another, and split modules that gather by another's tokens."""
    world = Plan.parse(text).world_size
    expected = pool.run(world, in_flight, text)
    for recompute in ("selective", "full:uniform:2"):
        for found, wanted in zip(pool.run(world, in_flight, f"{text} recompute={recompute}"), expected, strict=True):
            for x, y in zip(found, wanted, strict=True):
                assert_close(x, y, tolerance=1e-6, ranks=world)


def sent(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """What this rank sends forward and backward in one micro-batch of two layers."""
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("llama"), fabric)
    local, shard = shard_batch(batch_of(1, [[7, 13, 28]]), fabric)
    fabric.meter.reset()
    loss = token_loss(model, local, shard)
    forward = fabric.meter.sent
    fabric.meter.reset()
    loss.backward()
    return forward, fabric.meter.sent


@pytest.mark.parametrize(
    "text", ["ring=2 ulysses=2", "ring=2 exchange=gather", "ring=2 exchange=needed", "ring=2 exchange=rsa"]
)
def test_attention_communicates_once(pool: Pool, text: str) -> None:
    """Catches keys, values, heads or tokens sent again for a layer whose attention was kept."""
    world = Plan.parse(text).world_size
    none, selective, full = (pool.run(world, sent, f"{text} recompute={way}") for way in ("none", "selective", "full"))
    assert selective == none and all(any(forward.values()) for forward, _ in none)
    for (forward, backward), (again, more) in zip(none, full, strict=True):
        assert again == forward
        assert more == {axis: backward[axis] + forward[axis] for axis in backward}


TOKENS_HELD = 512
SBH = 2 * TOKENS_HELD * HIDDEN
LSE = 4 * TOKENS_HELD * HEADS
KV = KV_HEADS / HEADS
KEPT: dict[str, float] = {
    "recompute=full": SBH,
    "recompute=full:uniform:2": SBH / 2,
    "recompute=selective": 2 * SBH + LSE,
    "ring=2 recompute=selective": (2 * SBH + LSE) / 2,
    "ulysses=2 recompute=selective": (SBH * (4 + 2 * KV) + LSE) / 2,
    "tensor=2 recompute=selective": (2 * SBH + LSE) / 2,
    "tensor=2 sequence_parallel=false recompute=selective": SBH * 3 / 2 + LSE / 2,
    "tensor=2 sequence_parallel=false recompute=full activations=partitioned": SBH / 2,
}
"""Plan to the bytes of a layer in bfloat16 on each rank."""


DAILY = ("recompute=selective",)


@pytest.mark.parametrize(
    "text", [text if text in DAILY else pytest.param(text, marks=pytest.mark.sweep) for text in KEPT]
)
def test_held_bytes(pool: Pool, text: str) -> None:
    """Catches a whole layer's tensors, a gathered input, or attention's q, k and v that stay until backward.

    torch's own record of a layer, about 45 KiB of Python objects whatever its size, is within the tolerance.
    """
    world = Plan.parse(text).world_size
    fewer, more = (pool.run(world, held, "llama", text, layers) for layers in (2, 4))
    for fewest, most in zip(fewer, more, strict=True):
        assert_close((most - fewest) / 2, KEPT[text], tolerance=0.1, ranks=2)


@pytest.mark.parametrize("way", ["full", "selective"])
def test_saved_tensors_are_the_input(pool: Pool, way: str) -> None:
    """Catches an input that is kept beside what torch saves of a layer."""
    one, two = (pool.run(1, saved, "llama", f"recompute={way}", layers)[0] for layers in (1, 2))
    assert two - one == 2 * ROWS * 48 * HIDDEN


def packed(text: str) -> tuple[list[tuple[int, ...]], list[Tensor], dict[str, int]]:
    """Shapes that go to host memory in one forward pass, gradients, and what backward sends."""
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("llama"), fabric)
    seen: list[tuple[int, ...]] = []

    def offload(x: Tensor) -> Callable[[], Tensor]:
        seen.append(tuple(x.shape))
        return honest(x)

    honest = seam.offload
    with patch.object(seam, "offload", offload):
        loss = token_loss(model, *shard_batch(batch_of(1), fabric))
    fabric.meter.reset()
    loss.backward()
    return seen, list(whole_tensors(model, fabric, "gradient").values()), fabric.meter.sent


@pytest.mark.parametrize(("way", "each"), [("full", 1), ("full:uniform:2", 1), ("selective", 3)])
def test_offloaded_tensors(way: str, each: int, pool: Pool) -> None:
    """Catches an input, attention's output or its log-sum-exp that stays on the device."""
    seen, found, _ = pool.run(1, packed, f"recompute={way} activations=offloaded")[0]
    _, expected, _ = pool.run(1, packed, "data=1")[0]
    assert len(seen) == each * (1 if "uniform" in way else 2)
    assert sum(shape == (1, TOKENS, 32) for shape in seen) == len(seen) // each
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_partitioned_inputs_are_gathered(pool: Pool) -> None:
    """Catches a part that stays whole, and one gathered more than once for a layer."""
    text = "tensor=2 sequence_parallel=false recompute=full"
    whole, parts = (pool.run(2, packed, f"{text}{more}") for more in ("", " activations=partitioned"))
    for (_, expected, before), (_, found, after) in zip(whole, parts, strict=True):
        assert after["tensor"] - before["tensor"] == 2 * (TOKENS * 32 // 2) * 8
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def between() -> str:
    """What a unit says to a model that doubles its hidden states between two layers."""
    fabric = Fabric.build(Plan(recompute="full:uniform:2"))
    model = parallelize(build("llama"), fabric)
    model.model.layers[0].register_forward_hook(lambda *given: given[-1] * 2)
    with pytest.raises(ModelError) as caught:
        token_loss(model, *shard_batch(batch_of(1), fabric))
    return str(caught.value)


def test_something_between_layers(pool: Pool) -> None:
    """Catches a model whose layers are not one after another, of which a unit would leave something out."""
    assert "computes something between layers" in pool.run(1, between)[0]


def thrice(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return 3 * forward(*args, **kwargs)


def patched(text: str) -> list[Tensor]:
    """Loss and gradients of a model whose layers have a forward of their own."""
    model = build("llama")
    for layer in model.model.layers:
        layer.forward = partial(thrice, layer.forward)
    parallelize(model, fabric := Fabric.build(Plan.parse(text)))
    (loss := token_loss(model, *shard_batch(batch_of(1), fabric))).backward()
    return [loss.detach(), *whole_tensors(model, fabric, "gradient").values()]


def test_a_forward_of_a_layer_s_own(pool: Pool) -> None:
    """Catches a forward that stands on a layer and is left out where the layer runs again: an adapter's, a patch."""
    expected = pool.run(1, patched, "data=1")[0]
    for way in ("full", "selective", "full:uniform:2"):
        assert all(
            torch.equal(x, y) for x, y in zip(pool.run(1, patched, f"recompute={way}")[0], expected, strict=True)
        )


def twins(text: str) -> tuple[bool, bool]:
    """Whether the backward of a copy leaves gradients in the copy, and in the original."""
    model = parallelize(build("llama"), fabric := Fabric.build(Plan.parse(text)))
    twin = copy.deepcopy(model)
    token_loss(twin, *shard_batch(batch_of(1), fabric)).backward()
    return tuple(any(p.grad is not None for p in each.model.layers.parameters()) for each in (twin, model))


@pytest.mark.parametrize("way", ["full", "selective", "full:uniform:2"])
def test_a_copy_runs_its_own_layers(pool: Pool, way: str) -> None:
    """Catches a copy whose layers are the original's when they run."""
    assert pool.run(1, twins, f"recompute={way}") == [(True, False)]


def left_over() -> tuple[int, int]:
    """Stores of attention that a pass makes, and of these that live after backward, without the collector of cycles."""

    def stores() -> int:
        return sum(type(x) is KeptResults for x in gc.get_objects())

    fabric = Fabric.build(Plan(recompute="selective"))
    model = parallelize(build("llama"), fabric)
    gc.collect()
    others = stores()
    gc.disable()
    loss = token_loss(model, *shard_batch(batch_of(1), fabric))
    made = stores() - others
    loss.backward()
    del loss
    left = stores() - others
    gc.enable()
    return made, left


def test_nothing_kept_outlives_backward(pool: Pool) -> None:
    """Catches a kept output that holds the graph which holds it: memory would grow until cycles are looked for."""
    assert pool.run(1, left_over) == [(2, 0)]
