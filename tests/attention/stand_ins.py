"""Stand-ins for GPU libraries: they check what they are handed as the real ones do, and compute with the plain kernel.

Each takes the arguments of the library's own function, by the name and order of the release that the
kernel's docstring names. That release itself has not been run: these tests need no GPU.
"""

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from seqloom.attention.kernels import PLAIN, Call


def check_layout(*tensors: Tensor, multiple: int = 8) -> None:
    """What the compiled code relies on: a last dim laid out in memory, and its width."""
    for x in tensors:
        assert x.dim() == 4 and x.stride(-1) == 1 and x.shape[-1] % multiple == 0
    assert len({x.shape[-1] for x in tensors}) == 1
    assert len({x.dtype for x in tensors}) == 1


def check_lse(lse: Tensor, q: Tensor) -> None:
    """[rows, Hq, n] as one block of memory; q is [rows, n, Hq, D]."""
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()


def turned(*tensors: Tensor) -> list[Tensor]:
    """[rows, n, H, D] as [rows, H, n, D] or back."""
    return [x.transpose(1, 2) for x in tensors]


def compute(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The forward in the libraries' layout [rows, n, H, D]."""
    check_layout(q, k, v)
    out, lse = PLAIN.forward(*turned(q, k, v), call)
    return out.transpose(1, 2).contiguous(), lse


def compute_backward(tensors: tuple[Tensor, ...], lse: Tensor, call: Call) -> list[Tensor]:
    """The backward of (dout, q, k, v, out), in the libraries' layout."""
    check_layout(*tensors)
    check_lse(lse, tensors[1])
    return turned(*PLAIN.backward(*turned(*tensors), lse, call))


class FlashAttention2:
    """flash_attn.flash_attn_interface of 2.7 and 2.8."""

    @staticmethod
    def _flash_attn_forward(  # noqa: PLR0913, PLR0917
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert (dropout_p, window_size_left, window_size_right, alibi_slopes) == (0.0, -1, -1, None)
        assert isinstance(softcap, float) and not return_softmax
        out, lse = compute(q, k, v, Call(softmax_scale, causal, softcap or None))
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_backward(  # noqa: PLR0913, PLR0917
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, window_size_left, window_size_right, alibi_slopes) == (0.0, -1, -1, None)
        call = Call(softmax_scale, causal, softcap or None)
        for into, grad in zip((dq, dk, dv), compute_backward((dout, q, k, v, out), softmax_lse, call), strict=True):
            into.copy_(grad)
        return torch.empty(0)


class FlashAttention4:
    """flash_attn.cute.interface of early 2026."""

    @staticmethod
    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float | None = None,
        return_lse: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert not unused and softcap is None and q.shape[-1] in (64, 96, 128)
        out, lse = compute(q, k, v, Call(softmax_scale, causal))
        return out, lse if return_lse else None

    @staticmethod
    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        **unused: Any,
    ) -> list[Tensor]:
        assert not unused and softcap == 0.0 and q.shape[-1] in (64, 96, 128)
        return compute_backward((dout, q, k, v, out), lse, Call(softmax_scale, causal))


OPTIONS = (
    "float? softmax_scale{none}, bool is_causal{false}, int window_size_left = -1, int window_size_right = -1, "
    "float softcap = 0.0, "
)
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new{none}, Tensor? out{none}, Tensor? cu_seqlens_q{none}, "
    "int? max_seqlen_q{none}, " + OPTIONS + "int num_splits = 0, int sm_margin = 0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq{none}, "
    "Tensor(dk!)? dk{none}, Tensor(dv!)? dv{none}, Tensor? cu_seqlens_q{none}, "
    + OPTIONS
    + "bool deterministic = False, int sm_margin = 0) -> Tensor"
)


def _by_name(schema: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; torch leaves out those at their default."""
    listed = schema.partition("(")[2].rpartition(") -> ")[0]
    places = [argument.split()[1].partition("{")[0] for argument in listed.split(", ")]
    return {"is_causal": False, "softcap": 0.0} | dict(zip(places, given, strict=False)) | named


def _flash_attn_3_forward(*given: Any, **named: Any) -> tuple[Tensor, ...]:
    at = _by_name(FORWARD, given, named)
    assert all(at.get(name) is None for name in ("k_new", "out", "cu_seqlens_q", "max_seqlen_q"))
    call = Call(at["softmax_scale"], at["is_causal"], at["softcap"] or None)
    return *compute(at["q"], at["k"], at["v"], call), torch.empty(0), torch.empty(0)


def _flash_attn_3_backward(*given: Any, **named: Any) -> Tensor:
    at = _by_name(BACKWARD, given, named)
    assert at.get("cu_seqlens_q") is None
    call = Call(at["softmax_scale"], at["is_causal"], at["softcap"] or None)
    tensors = tuple(at[name] for name in ("dout", "q", "k", "v", "out"))
    for name, grad in zip(("dq", "dk", "dv"), compute_backward(tensors, at["softmax_lse"], call), strict=True):
        at[name].copy_(grad)
    return torch.empty(0)


def module(name: str, **contents: Any) -> ModuleType:
    """A module that can be imported and found, once it stands in sys.modules."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__path__ = []
    made.__dict__.update(contents)
    return made


@contextmanager
def libraries(patch: pytest.MonkeyPatch, defaults: bool = True) -> Iterator[None]:
    """All stand-ins in place. defaults: whether FlashAttention-3's operators have them, as newer releases do."""
    cute = module("flash_attn.cute", interface=FlashAttention4)
    for made in (
        module("flash_attn", flash_attn_interface=FlashAttention2, cute=cute),
        cute,
        module("flash_attn.cute.interface"),
        module("flash_attn_2_cuda"),
        module("flash_attn_3"),
        module("flash_attn_3._C"),
    ):
        patch.setitem(sys.modules, made.__name__, made)
    words = {"none": " = None", "false": " = False"} if defaults else {"none": "", "false": ""}
    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        for schema, function in ((FORWARD, _flash_attn_3_forward), (BACKWARD, _flash_attn_3_backward)):
            library.define(schema.format(**words))
            library.impl(schema.partition("(")[0], function, "CPU")
        yield


def _bound(operator: Any, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name as the real operator's schema takes them; fails where it would."""
    arguments = operator.default._schema.arguments
    places = [arg.name for arg in arguments if not arg.kwarg_only]
    assert len(given) <= len(places)
    bound = dict(zip(places, given, strict=False))
    assert not set(bound) & set(named) and set(named) <= {arg.name for arg in arguments}
    bound |= named
    return {arg.name: bound.get(arg.name, arg.default_value) for arg in arguments}


def _aten_forward(name: str, stats: int) -> Any:
    def forward(*given: Any, **named: Any) -> tuple[Any, ...]:
        at = _bound(getattr(torch.ops.aten, name), given, named)
        assert at["dropout_p"] == 0.0 and not at["return_debug_mask"] and at.get("attn_bias") is None
        check_layout(*(at[each] for each in ("query", "key", "value")))
        out, lse = PLAIN.forward(at["query"], at["key"], at["value"], Call(at["scale"] or 1.0, at["is_causal"]))
        return out, lse[..., None] if stats == 4 else lse, None, None, *out.shape[1:3], None, None, None

    return forward


def _aten_backward(name: str, stats: int) -> Any:
    def backward(*given: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        at = _bound(getattr(torch.ops.aten, name), given, named)
        tensors = [at[each] for each in ("grad_out", "query", "key", "value", "out")]
        check_layout(*tensors)
        lse = at["logsumexp"]
        assert lse.dim() == stats and lse.is_contiguous() and at["dropout_p"] == 0.0
        assert (at["max_q"], at["max_k"]) == (tensors[1].shape[2], tensors[2].shape[2])
        assert at["cum_seq_q"] is None and at["cum_seq_k"] is None
        # Autograd hands over undefined tensors for a mask that is not there, never for the generator's state.
        assert isinstance(at["philox_seed"], Tensor) and isinstance(at["philox_offset"], Tensor)
        return PLAIN.backward(*tensors, lse.view(lse.shape[:3]), Call(at["scale"], at["is_causal"]))

    return backward


def aten(stats: int) -> SimpleNamespace:
    """torch.ops.aten with both CUDA attentions; stats: dims of cuDNN's log-sum-exp, 3 or 4 by torch version."""
    names = {"_scaled_dot_product_flash_attention": 3, "_scaled_dot_product_cudnn_attention": stats}
    found = {name: _aten_forward(name, dims) for name, dims in names.items()}
    found |= {f"{name}_backward": _aten_backward(f"{name}_backward", dims) for name, dims in names.items()}
    return SimpleNamespace(**found)


def dense_flex(q: Tensor, k: Tensor, v: Tensor, score: Any, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    """One pass of FlexAttention that can be differentiated on the CPU: its functions asked pair by pair."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    shape = [
        torch.arange(size).view([-1 if dim == at else 1 for dim in range(4)]) for at, size in enumerate(scores.shape)
    ]
    if score is not None:
        scores = score(scores, *shape)
    if mask is not None:
        blocks = mask.to_dense().repeat_interleave(mask.BLOCK_SIZE[0], 2).repeat_interleave(mask.BLOCK_SIZE[1], 3)
        listed = blocks[:, :, : scores.shape[2], : scores.shape[3]].bool()
        scores = scores.masked_fill(~(listed & mask.mask_mod(*shape)), float("-inf"))
    blind = scores.isneginf().all(-1)
    lse = scores.masked_fill(blind[..., None], 0.0).logsumexp(-1).masked_fill(blind, float("-inf"))
    p = scores.masked_fill(blind[..., None], 0.0).softmax(-1).masked_fill(blind[..., None], 0.0)
    return p @ v, lse
