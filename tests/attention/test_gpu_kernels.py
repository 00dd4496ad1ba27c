"""The GPU libraries' kernels as far as a machine without a GPU can tell: arguments, layouts, and when they are used."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from attention import stand_ins
from attention.dense import inputs
from attention.test_kernels import FEATURES, SCALE, make_call
from close import assert_close
from seqloom.attention.kernels import (
    PLAIN,
    Call,
    Kernel,
    choice,
    choose,
    flash_attn,
    flash_attn_3,
    flash_attn_4,
    flex,
    kernels_for,
    limits,
    torch_cuda,
)
from seqloom.attention.kernels.flash_attn_3 import FLASH_ATTN_3
from seqloom.attention.kernels.flash_attn_4 import FLASH_ATTN_4

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CUDA = torch.device("cuda", 0)


def gpu(patch: pytest.MonkeyPatch, major: int = 9, minor: int = 0) -> None:
    """As if there were a GPU of this compute capability, with every library installed."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
    patch.setattr(torch_cuda, "_stats_dims", lambda device: 4)
    for module in (flash_attn, flash_attn_3, flash_attn_4, flex):
        patch.setattr(module, "installed", lambda name: True)
    patch.setattr(flash_attn, "version", lambda name: "2.8.3")


def chosen(call: Call, *, tokens: int = 256, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> str:
    """The name of the kernel for q, k and v of that shape and type on the GPU."""

    class OnGpu(Tensor):
        """A tensor that says it is on the GPU, and has no memory."""

        device = CUDA

    q = torch.empty(1, 4, tokens, width, dtype=dtype, device="meta").as_subclass(OnGpu)
    return choose(q, q, call).name


@pytest.mark.parametrize("kernel", [torch_cuda.TORCH_FLASH, torch_cuda.CUDNN], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize(("width", "v_width"), [(64, 64), (100, 64), (64, 100)])
def test_torch_operators_take_the_arguments(kernel: Kernel, kv_heads: int, width: int, v_width: int) -> None:
    """Catches arguments that torch's own schema refuses, and shapes and types other than ours; on meta tensors."""
    q, out, dout = (
        torch.empty(2, 6, 256, each, dtype=torch.bfloat16, device="meta") for each in (width, v_width, v_width)
    )
    k, v = (torch.empty(2, kv_heads, 128, each, dtype=torch.bfloat16, device="meta") for each in (width, v_width))
    found, lse = kernel.forward(q, k, v, Call(SCALE))
    assert (found.shape, found.dtype) == (out.shape, out.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    for grad, x in zip(kernel.backward(dout, q, k, v, out, lse, Call(SCALE, True)), (q, k, v), strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("stats", [3, 4])
def test_cudnn_gets_its_statistics_as_it_gives_them(stats: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a log-sum-exp with a dim too many or too few: torch versions differ."""
    monkeypatch.setattr(torch_cuda, "OPS", stand_ins.aten(stats))
    torch_cuda._stats_dims.cache_clear()
    dout, q, k, v = inputs(6, 6)
    try:
        out, lse = torch_cuda.CUDNN.forward(q, k, v, Call(SCALE))
        wide = torch.stack((lse, lse), -1)[..., 0]  # a cut of a larger tensor, as of some of the queries
        assert lse.shape == q.shape[:3] and not wide.is_contiguous()
        grads = torch_cuda.CUDNN.backward(dout, q, k, v, out, wide, Call(SCALE))
    finally:
        torch_cuda._stats_dims.cache_clear()
    for grad, expected in zip(grads, PLAIN.backward(dout, q, k, v, out, lse, Call(SCALE)), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("defaults", [True, False])
def test_flash_attention_3_of_either_kind(defaults: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an argument left out that an older release has no default for."""
    dout, q, k, v = inputs(6, 6)
    call = make_call(range(6), range(6), ("softcap",), True)
    with stand_ins.libraries(monkeypatch, defaults):
        out, lse = FLASH_ATTN_3.forward(q, k, v, call)
        grads = FLASH_ATTN_3.backward(dout, q, k, v, out, lse, call)
    for actual, expected in zip(grads, PLAIN.backward(dout, q, k, v, out, lse, call), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kernel", [flash_attn.FLASH_ATTN, FLASH_ATTN_3, FLASH_ATTN_4, torch_cuda.TORCH_FLASH])
def test_a_cut_of_the_log_sum_exp_is_copied(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a view handed to code that reads it as one block of memory: wrong gradients, no error."""
    monkeypatch.setattr(torch_cuda, "OPS", stand_ins.aten(4))
    dout, q, k, v = inputs(6, 6)
    out, lse = PLAIN.forward(q, k, v, Call(SCALE))
    cut = torch.cat((lse, lse), 2)[:, :, 6:]
    assert not cut.is_contiguous()
    with stand_ins.libraries(monkeypatch):
        grads = kernel.backward(dout, q, k, v, out, cut, Call(SCALE))
    for actual, expected in zip(grads, PLAIN.backward(dout, q, k, v, out, lse, Call(SCALE)), strict=True):
        assert_close(actual, expected, tolerance=1e-12)


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a table whose order or conditions changed unnoticed."""
    gpu(monkeypatch)
    places = range(256)
    assert chosen(Call(SCALE)) == "flash_attn_3"
    assert chosen(Call(SCALE), width=300) == "flex"
    assert chosen(Call(SCALE), dtype=torch.float32) == "flex"
    assert chosen(Call(SCALE), width=8, dtype=torch.float32) == "plain"
    assert chosen(Call(SCALE), dtype=torch.float64) == "plain"
    assert chosen(make_call(places, places, ("softcap",))) == "flash_attn_3"
    for name in ("slopes", "allowed", "dropout"):
        assert chosen(make_call(places, places, (name,))) == "flex"
    gpu(monkeypatch, 10)
    assert chosen(Call(SCALE)) == "flash_attn_4"
    assert chosen(make_call(places, places, ("softcap",))) == "flash_attn"
    monkeypatch.setattr(flash_attn_4, "installed", lambda module: False)
    assert chosen(Call(SCALE)) == "cudnn"
    assert chosen(Call(SCALE), tokens=257) == "flash_attn"
    gpu(monkeypatch, 8)
    monkeypatch.setattr(torch_cuda, "_stats_dims", lambda device: 0)
    assert chosen(Call(SCALE)) == "flash_attn"
    monkeypatch.setattr(flash_attn, "installed", lambda module: False)
    assert chosen(Call(SCALE)) == "torch_flash"
    gpu(monkeypatch, 7)
    assert chosen(Call(SCALE)) == "flex"


def test_deterministic_algorithms_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a backward that adds in any order though the user asked for one order."""
    gpu(monkeypatch, 10)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for kernel in (FLASH_ATTN_4, torch_cuda.CUDNN):
        assert kernel.absent(CUDA) == "its backward is not deterministic"
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert FLASH_ATTN_4.absent(CUDA) is None


def test_reasons_for_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel taken where its library, its version or the GPU is missing, and a reason that is not the one."""
    kernels = [kernel for kernel in kernels_for("cuda") if kernel is not PLAIN]
    assert {kernel.absent(torch.device("cpu")) for kernel in kernels} == {"for CUDA GPUs"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {kernel.absent(CUDA) for kernel in kernels} == {"no CUDA GPU here"}
    gpu(monkeypatch)
    assert [kernel.name for kernel in kernels if kernel.absent(CUDA)] == []
    monkeypatch.setattr(flash_attn, "version", lambda name: "2.6.3")
    assert flash_attn.absent(CUDA) == "flash-attn 2.6.3 is older than 2.7"
    monkeypatch.setattr(flash_attn, "version", lambda name: "2.10.0.post1")
    assert flash_attn.absent(CUDA) is None
    monkeypatch.setattr(flash_attn, "installed", lambda module: module == "flash_attn")  # FlashAttention-4 alone
    assert flash_attn.absent(CUDA) == "flash-attn is not installed"
    monkeypatch.setattr(torch_cuda, "_stats_dims", lambda device: 0)
    assert torch_cuda.CUDNN.absent(CUDA) == "this torch, cuDNN or GPU has none"
    gpu(monkeypatch, 12)
    assert FLASH_ATTN_3.absent(CUDA) == "for compute capability 9 to 9; this GPU has 12.0"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert torch_cuda.TORCH_FLASH.absent(CUDA) == "for NVIDIA GPUs"
    assert flex.absent(CUDA) is None


def test_a_module_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failing parent that stops the choice, and a library imported to see whether it is there."""
    assert limits.installed("xml.sax") and not limits.installed("no_such_module.at_all")
    monkeypatch.setitem(sys.modules, "half_made", SimpleNamespace(__spec__=None))  # type: ignore[arg-type]
    assert not limits.installed("half_made")


@pytest.mark.parametrize("features", [(), *((name,) for name in FEATURES), FEATURES], ids="+".join)
@pytest.mark.parametrize("causal", [True, False])
def test_flex_forward_through_torch_itself(features: tuple[str, ...], causal: bool) -> None:
    """Catches functions or a block mask that FlexAttention reads in another way; several blocks, the last one short."""
    queries, positions = range(30, 330), range(300) if causal else range(150)
    call = make_call(queries, positions, features, causal)
    _, q, k, v = (x.contiguous() for x in inputs(300, len(positions), 16, 24))
    with torch.no_grad():
        out, lse = flex.forward(q.float(), k.float(), v.float(), call)
        expected, expected_lse = PLAIN.forward(q, k, v, call)
    blind = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind)
    assert_close(lse.masked_fill(blind, 0.0), expected_lse.masked_fill(blind, 0.0), tolerance=1e-5)
    assert_close(out, expected, tolerance=1e-5)


def test_flex_functions_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches functions that torch.compile cannot read as one graph, and one graph for each length or each call."""
    from torch.nn.attention import flex_attention as library

    graphs: list[object] = []
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(library.flex_attention, fullgraph=True, backend=count)
    monkeypatch.setattr(library, "flex_attention", compiled)
    torch._dynamo.reset()
    try:
        for n in (300, 260, 420, 640):
            call = make_call(range(30, 30 + n), range(n), FEATURES, True)
            _, q, k, v = (x.contiguous().float() for x in inputs(n, n))
            with torch.no_grad():
                out, _ = flex.forward(q, k, v, call)
            assert_close(out, PLAIN.forward(q, k, v, call)[0], tolerance=1e-4)
            counts.append(len(graphs))
    finally:
        torch._dynamo.reset()
    # Of the two passes each, one graph for the first length, one for others in as many blocks, one for all.
    assert counts == [2, 4, 6, 6]


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_flex_skips_empty_blocks(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches blocks computed though nothing in them is visible, and blocks called full that are not."""
    monkeypatch.setattr(flex, "PAIRS_AT_ONCE", at_once)
    n, m = 500, 900
    places = (torch.arange(n), torch.arange(m))

    def near(q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() < 200

    call = Call(SCALE, q_positions=places[0], k_positions=places[1], allowed=near)
    some, every = flex._some_and_all(call, n, m, torch.device("cpu"))
    wide = torch.zeros(512, 1024, dtype=torch.bool)
    wide[:n, :m] = near(places[0][:, None], places[1])
    blocks = wide.view(4, 128, 8, 128)
    assert torch.equal(some, blocks.any(3).any(1)) and torch.equal(every, blocks.all(3).all(1))
    assert int(every.sum()) == 3 and int(some.sum()) == 17
    mask = flex._block_mask(call, n, m, torch.device("cpu"), False)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some) and int(mask.full_kv_num_blocks.sum()) == 3
    # In a full block the mask function is not asked, and dropout throws a coin for every pair.
    mask = flex._block_mask(replace(call, dropout=0.1), n, m, torch.device("cpu"), True)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some) and int(mask.full_kv_num_blocks.sum()) == 0


def test_the_order_of_kernels() -> None:
    """Catches a kernel behind one that takes everything."""
    for _, kernels in choice.KERNELS:
        assert kernels[-1] is PLAIN and len({kernel.name for kernel in kernels}) == len(kernels)
