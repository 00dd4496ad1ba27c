"""Norms with the hidden dim split against their plain formulas, in float64 and as transformers rounds them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from close import assert_close
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.plan import Plan, chunks
from seqloom.tensor import ParallelLayerNorm, ParallelRMSNorm, TensorGroup, local, split

KINDS = ("llama", "gemma", "layer", "layer, no bias", "layer, plain")
EPS = 1e-5


def inputs(width: int, dtype: torch.dtype = torch.float64, offset: float = 0.5) -> list[Tensor]:
    """x [2, 5, width], weight, bias and the cotangent, alike on all ranks."""
    draw = torch.Generator().manual_seed(width)
    shapes = ((2, 5, width), (width,), (width,), (2, 5, width))
    x, weight, bias, cotangent = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes)
    return [one.to(dtype) for one in (x + offset, weight, bias, cotangent)]


def plain(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula in one type."""
    if kind.startswith("layer"):
        return layer_norm(
            x, x.shape[-1:], None if kind == "layer, plain" else weight, bias if kind == "layer" else None, EPS
        )
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return normed * (1 + weight) if kind == "gemma" else weight * normed


def made(kind: str, weight: nn.Parameter, bias: nn.Parameter, width: int, axis: Any) -> nn.Module:
    if kind == "layer, plain":
        return ParallelLayerNorm(None, None, width, EPS, axis)
    if kind.startswith("layer"):
        return ParallelLayerNorm(weight, bias if kind == "layer" else None, width, EPS, axis)
    return ParallelRMSNorm(weight, width, EPS, axis, zero_centered=kind == "gemma")


def on_ranks(kind: str, width: int, dtype: torch.dtype = torch.float64, offset: float = 0.5) -> dict[str, Any]:
    """A norm used twice in one graph, its parameters DTensors over `col`; output, gradients, bytes of one use."""
    world = torch.distributed.get_world_size()
    fabric = Fabric.build(Plan(tensor=world, tensor_kind="2d", grid=f"1x{world}"))
    group, axis = TensorGroup.of(fabric), fabric.grid["col"]
    sizes = list(chunks(width, world))
    x, weight, bias, cotangent = inputs(width, dtype, offset)
    x, cotangent = (one.split(sizes, -1)[axis.rank] for one in (x, cotangent))
    x = x.clone().requires_grad_()
    weight, bias = (split(one.requires_grad_(), group, {"col": 0}, group.grid.outer) for one in (weight, bias))
    norm = made(kind, weight, bias, width, axis)
    other = norm(x.detach() * 2)
    fabric.meter.reset()
    out = norm(x)
    forward = fabric.meter.sent.get("col", 0)
    fabric.meter.reset()
    out.backward(cotangent)
    backward = fabric.meter.sent.get("col", 0)
    if other.requires_grad:
        other.sum().backward()
    grads = {name: local(p.grad) for name, p in norm.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "bytes": (forward, backward), **grads}


def expected(kind: str, width: int) -> dict[str, Tensor]:
    x, weight, bias, cotangent = inputs(width)
    leaves = [one.requires_grad_() for one in (x, weight, bias)]
    out = plain(kind, *leaves)
    out.backward(cotangent)
    if weight.grad is not None:
        plain(kind, x.detach() * 2, weight, bias).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad}
    return {name: one for name, one in found.items() if one is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "width"), [(2, 8), (2, 7), (3, 10), (4, 8), (4, 5), (4, 10)])
def test_equals_the_formula(pool: Pool, world: int, width: int, kind: str) -> None:
    """Catches statistics of one rank's channels, sums not summed back, and ranks that hold fewer channels or none."""
    found = pool.run(world, on_ranks, kind, width)
    for name, wanted in expected(kind, width).items():
        assert_close(torch.cat([rank[name] for rank in found], -1), wanted, tolerance=1e-12, ranks=world)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_channels_need_no_axis(kind: str) -> None:
    """Catches a norm that works split only; the same function is the plain formula."""
    x, weight, bias, cotangent = inputs(6)
    norm = made(kind, nn.Parameter(weight), nn.Parameter(bias), 6, None)
    out = norm(x.requires_grad_())
    out.backward(cotangent)
    if kind != "layer, plain":
        norm(x.detach() * 2).sum().backward()
    found = {"out": out, "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}}
    for name, wanted in expected(kind, 6).items():
        assert_close(found[name], wanted, tolerance=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_bytes(pool: Pool, world: int) -> None:
    """Catches activations gathered for a norm, or a collective for each sum: 10 tokens, one number each, or two."""
    once = 2 * (world - 1) * 10 * 8 // world
    for kind, forward, backward in (("llama", once, once), ("layer", (world - 1) * 2 * 10 * 8, 2 * once)):
        assert [rank["bytes"] for rank in pool.run(world, on_ranks, kind, 8)] == [(forward, backward)] * world


@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
def test_lower_types(pool: Pool, kind: str) -> None:
    """Catches statistics summed in bfloat16: only what goes in and comes out is rounded."""
    found = pool.run(3, on_ranks, kind, 10, torch.bfloat16)
    leaves = [one.double().requires_grad_() for one in inputs(10, torch.bfloat16)[:3]]
    out = plain(kind, *leaves)
    out.backward(inputs(10, torch.bfloat16)[3].double())
    assert all(rank[name].dtype == torch.bfloat16 for rank in found for name in ("out", "x", "weight"))
    for name, wanted in (("out", out), ("x", leaves[0].grad)):
        assert_close(torch.cat([rank[name] for rank in found], -1), wanted, tolerance=6e-3, ranks=3)


def test_a_large_mean_does_not_cancel(pool: Pool) -> None:
    """Catches a variance as E[x^2] - E[x]^2, which float32 loses where the mean is a thousand times the deviation."""
    found = pool.run(2, on_ranks, "layer", 8, torch.float32, 2000.0)
    x, weight, bias, _ = (one.double() for one in inputs(8, torch.float32, 2000.0))
    wanted = plain("layer", x, weight, bias)
    assert_close(torch.cat([rank["out"] for rank in found], -1), wanted, tolerance=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_rounds_as_transformers_does(kind: str) -> None:
    """Catches Llama's weight applied before rounding and Gemma's after it: bit for bit the models' own in bfloat16."""
    x, weight, _, _ = inputs(64, torch.bfloat16)
    theirs = Gemma2RMSNorm(64, EPS) if kind == "gemma" else LlamaRMSNorm(64, EPS)
    theirs.weight = nn.Parameter(weight)
    ours = made(kind, nn.Parameter(weight), nn.Parameter(weight), 64, None)
    assert torch.equal(ours(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):  # float32 weights, float32 or lower activations
        theirs.weight, ours.weight = (nn.Parameter(weight.float()) for _ in range(2))
        for given in (x, x.float()):
            assert torch.equal(ours(given), theirs(given)) and ours(given).dtype == theirs(given).dtype


def test_a_sketch_has_the_shapes() -> None:
    """Catches a collective on the meta device."""
    fabric = Fabric.sketch(Plan(tensor=6, tensor_kind="2d", grid="2x3"), rank=5)
    for kind in KINDS:
        weight = nn.Parameter(torch.empty(2, device="meta"))
        norm = made(kind, weight, weight, 8, fabric.grid["col"])
        x = torch.empty(2, 5, 2, device="meta", requires_grad=True)
        out = norm(x)
        out.sum().backward()
        assert out.shape == x.shape == x.grad.shape


def test_other_channels_are_refused() -> None:
    """Catches means over heads where means over the hidden dim are meant."""
    axis = Fabric.sketch(Plan(tensor=4, tensor_kind="2d")).grid["col"]
    norm = made("llama", nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4)), 8, axis)
    with pytest.raises(ModelError, match=r"ParallelRMSNorm holds 4 of 8 channels but was given 2"):
        norm(torch.ones(1, 3, 2))


def test_what_is_kept_for_backward() -> None:
    """Catches float32 copies of the activations kept beside them: x itself, and one number a token."""
    x, weight, bias, _ = inputs(64, torch.bfloat16)
    kept: list[int] = []

    def note(one: Tensor) -> Tensor:
        kept.append(one.nbytes if one.dim() > 1 else 0)
        return one

    for kind, statistics in (("llama", 1), ("layer", 2)):
        norm = made(kind, nn.Parameter(weight), nn.Parameter(bias), 64, None)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
            norm(x.requires_grad_())
        assert sum(kept) == x.nbytes + statistics * 10 * 4
