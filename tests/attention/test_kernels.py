"""The local kernels, alone: each on one tile, and on several from the final out and log-sum-exp."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention import stand_ins
from attention.dense import HEADS, ROWS, compare_tile, compare_tiles, inputs
from close import assert_close
from seqloom.attention.dropout import keys
from seqloom.attention.kernels import (
    KERNELS,
    PLAIN,
    TORCH_CPU,
    Call,
    Kernel,
    choose,
    flex,
    kernels_for,
    plain,
    torch_cuda,
)
from seqloom.errors import ModelError

BY_NAME = {kernel.name: kernel for _, kernels in KERNELS for kernel in kernels}
EVERY = [pytest.param(kernel, id=name) for name, kernel in BY_NAME.items()]
SCALE = 0.3
FEATURES = ("softcap", "slopes", "allowed", "dropout")


def rule(q: Any, k: Any) -> Any:
    """A rule that no tile can say; query 4 sees nothing of it."""
    return ((q * 7 + k * 3) % 5 != 0) & (q != 4)


def make_call(queries: range, positions: range, features: tuple[str, ...] = (), causal: bool = False) -> Call:
    """A call on those positions of the row that asks for the features."""
    placed = bool({"slopes", "allowed", "dropout"} & set(features))
    return Call(
        scale=SCALE,
        causal=causal,
        softcap=1.5 if "softcap" in features else None,
        slopes=torch.linspace(0.5, 0.01, HEADS, dtype=torch.float64) if "slopes" in features else None,
        q_positions=torch.tensor(queries) if placed else None,
        k_positions=torch.tensor(positions) if placed else None,
        allowed=rule if "allowed" in features else None,
        dropout=0.3 if "dropout" in features else 0.0,
        dropout_keys=keys(3, range(ROWS), 1, range(HEADS)) if "dropout" in features else None,
    )


@contextmanager
def runnable(kernel: Kernel, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel can be called here, on the CPU and in float64, with a stand-in for its library where it needs one."""
    with stand_ins.libraries(patch):
        patch.setattr(torch_cuda, "OPS", stand_ins.aten(4))
        patch.setattr(torch_cuda, "_stats_dims", lambda device: 4)
        patch.setattr(flex, "_attend", stand_ins.dense_flex)
        yield


def honours(kernel: Kernel, features: tuple[str, ...]) -> bool:
    """Whether the kernel takes a call with these features, by its own word."""
    call = make_call(range(torch_cuda.STEP), range(torch_cuda.STEP), features)
    q, v = (torch.empty(ROWS, HEADS, torch_cuda.STEP, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    return kernel.lacks(call, q, v) is None


WAYS = [*((name,) for name in FEATURES), FEATURES]
HONOURED = [
    pytest.param(kernel, features, id=f"{kernel.name}-{'+'.join(features)}")
    for kernel in BY_NAME.values()
    for features in WAYS
    if honours(kernel, features)
]


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (5, 11, False), (11, 5, False), (1, 9, False)])
def test_kernel_is_the_definition(
    kernel: Kernel, heads: int, queries: int, keys: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a wrong diagonal, a key head paired with another group's query heads, a scale applied once too few."""
    call = make_call(range(queries), range(keys), causal=causal)
    with runnable(kernel, monkeypatch):
        compare_tile(kernel, call, inputs(queries, keys, heads=heads))


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize(("width", "v_width"), [(24, 16), (16, 40), (17, 19)])
def test_values_of_another_width(kernel: Kernel, width: int, v_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches out or a gradient of the padded width, and q or v cut to the other's."""
    calls = [make_call(range(8), range(8)), make_call(range(8), range(8), causal=True)]
    with runnable(kernel, monkeypatch):
        compare_tiles(kernel, calls, inputs(8, 16, width, v_width))


@pytest.mark.parametrize(("kernel", "features"), HONOURED)
@pytest.mark.parametrize("causal", [False, True])
def test_features(kernel: Kernel, features: tuple[str, ...], causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option left out of one pass, applied in another order, or to the wrong head, row or position.

    The tiles' gradients come from the final out and log-sum-exp; under `allowed` query 4 sees nothing of either.
    """
    queries = range(3, 12)
    calls = [make_call(queries, range(40, 49), features), make_call(queries, queries, features, causal)]
    with runnable(kernel, monkeypatch):
        compare_tiles(kernel, calls, inputs(9, 18, 24, 16))


def test_who_honours_what() -> None:
    """Catches a kernel that says it honours an option it was never tried with, and one that stopped."""
    assert {param.id for param in HONOURED} == {
        *(f"{name}-{'+'.join(features)}" for name in ("plain", "flex") for features in WAYS),
        "flash_attn-softcap",
        "flash_attn_3-softcap",
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bytes_at_once", [1, 700, 2_000, 9_000, 30_000])
def test_plain_kernel_in_blocks(monkeypatch: pytest.MonkeyPatch, bytes_at_once: int, causal: bool) -> None:
    """Catches a block whose diagonal, positions, heads or rows start at 0, a last one forgotten, and sums of one."""
    monkeypatch.setattr(plain, "ON_THE_CPU", bytes_at_once)
    monkeypatch.setattr(plain, "QUERIES_AT_LEAST", 4)
    compare_tile(PLAIN, make_call(range(11), range(11), FEATURES, causal), inputs(11, 11))
    compare_tile(PLAIN, make_call(range(11), range(7), FEATURES), inputs(11, 7))


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, Tensor):
                self.size = max(self.size, each.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("features", [(), FEATURES], ids="+".join)
def test_plain_kernel_makes_no_square(features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the square of the tile."""
    tokens = 300
    tensors = inputs(tokens, tokens)
    call = make_call(range(tokens), range(tokens), features, True)
    sizes = []
    for at_once in (2**18, 2**30):
        monkeypatch.setattr(plain, "ON_THE_CPU", at_once)
        with Largest() as seen, torch.no_grad():
            out, lse = PLAIN.forward(*tensors[1:], call)
            PLAIN.backward(*tensors, out, lse, call)
        sizes.append(seen.size)
    assert sizes[0] <= tensors[0].untyped_storage().nbytes() < sizes[1] == tokens**2 * HEADS * ROWS * 8


def test_plain_kernel_leaves_out_what_a_causal_tile_hides() -> None:
    """Catches twice the work: scores above the diagonal made and thrown away."""
    _, q, k, _ = inputs(1500, 1500, 8, 8)
    done = sum((block.queries.stop - block.queries.start) * block.keys for block in plain._blocks(q, k, True))
    whole = sum((block.queries.stop - block.queries.start) * block.keys for block in plain._blocks(q, k, False))
    assert whole == 1500**2 * ROWS * (HEADS // 3) and 0.5 < done / whole < 0.55


@pytest.mark.parametrize("keys", [0, 3])
def test_plain_kernel_on_empty_tiles(keys: int) -> None:
    """Catches NaN where there is no key, and a failure where there is no query."""
    dout, q, k, v = inputs(4 if not keys else 0, keys)
    out, lse = PLAIN.forward(q, k, v, Call(SCALE))
    assert out.shape == dout.shape and not out.any() and bool(lse.isneginf().all())
    for grad, x in zip(PLAIN.backward(dout, q, k, v, out, lse, Call(SCALE)), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("kernel", [TORCH_CPU, PLAIN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("v_width", [16, 24])
def test_types(kernel: Kernel, v_width: int) -> None:
    """Catches a log-sum-exp in bfloat16, or float64 that sinks to float32."""
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        _, *qkv = (x.to(dtype) for x in inputs(6, 6, 16, v_width))
        out, lse = kernel.forward(*qkv, Call(SCALE, True))
        assert lse.dtype == wide.get(dtype, dtype)
        assert out.dtype in (dtype, wide.get(dtype, dtype))


def test_plain_kernel_in_bfloat16_rounds_no_score() -> None:
    """Catches scores, probabilities or ALiBi held in bfloat16: positions beyond 256 would be rounded."""
    tensors = [x.bfloat16() for x in inputs(40, 40)]
    places = range(1000, 1040)
    call, exact = make_call(places, places, FEATURES, True), [x.double() for x in tensors]
    out, lse = PLAIN.forward(*tensors[1:], call)
    expected, expected_lse = PLAIN.forward(*exact[1:], call)
    assert_close(lse.masked_fill(lse.isneginf(), 0), expected_lse.masked_fill(lse.isneginf(), 0), tolerance=1e-5)
    found = (out, *PLAIN.backward(*tensors, out, lse, call))
    wanted = (expected, *PLAIN.backward(*exact, expected, expected_lse, call))
    for actual, each in zip(found, wanted, strict=True):
        assert_close(actual, each, tolerance=1e-5)


@pytest.mark.parametrize("missing", ["q_positions", "dropout_keys"])
def test_a_call_without_its_positions_is_refused(missing: str) -> None:
    """Catches positions taken from the tile when the row's are forgotten."""
    options: dict[str, Any] = {"dropout": 0.5, "q_positions": torch.arange(4), "k_positions": torch.arange(4)}
    options["dropout_keys"] = keys(0, range(ROWS), 0, range(HEADS))
    with pytest.raises(ValueError, match=missing):
        PLAIN.forward(*inputs(4, 4)[1:], Call(SCALE, **(options | {missing: None})))


def test_choice_on_the_cpu() -> None:
    """Catches the plain kernel where the fused one would do, and an option handed to one that ignores it."""
    _, q, _, v = inputs(6, 6, 24, 16)
    assert choose(q, v, make_call(range(6), range(6), causal=True)) is TORCH_CPU
    for name in FEATURES:
        assert choose(q, v, make_call(range(6), range(6), (name,))) is PLAIN
    with pytest.raises(ModelError, match=r"int64.*torch_cpu: only float64.*plain: only floating-point.*use float32"):
        choose(q.long(), v.long(), Call(SCALE))


def test_choice_elsewhere() -> None:
    """Catches a kernel for CUDA taken on a device that is neither."""
    q = torch.empty(1, 4, 128, 64, device="meta")
    assert kernels_for("mps") == (PLAIN,)
    assert choose(q, q, make_call(range(6), range(6), FEATURES)) is PLAIN
