"""The chunked loss against torch's own, and the memory it promises."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

from close import assert_close
from seqloom.memory import chunked_cross_entropy

TOKENS, HIDDEN, VOCAB = 37, 8, 50


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor | None], Tensor]:
    """hidden, weight and bias with gradients, and labels of which some are none, a whole chunk of them too."""
    torch.manual_seed(1)
    shapes = [(TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[[0, 3, 17, TOKENS - 1]] = -100
    labels[20:30] = -100
    labels[5:9] = VOCAB - 1
    return [*leaves[:2], leaves[2] if bias else None], labels


def reference(
    leaves: list[Tensor | None], labels: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """torch's summed cross entropy in float64, and its gradients times `scale`."""
    copies = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    hidden, weight, bias = copies
    assert hidden is not None and weight is not None
    logits = linear(hidden, weight, bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap  # as modeling_gemma2 writes it
    loss = cross_entropy(logits, labels, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), [x.grad for x in copies if x is not None and x.grad is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 10, 36, 37, 38, 1000])
def test_equals_torch(chunk: int, bias: bool) -> None:
    """Catches a last chunk left out, a bias forgotten, a position without label counted, one chunk's gradients."""
    leaves, labels = inputs(bias)
    expected, expected_grads = reference(leaves, labels, 3.0)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=chunk)
    (loss * 3.0).backward()
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert_close(loss, expected, tolerance=1e-13)
    for x, wanted in zip([x for x in leaves if x is not None], expected_grads, strict=True):
        assert_close(x.grad, wanted, tolerance=1e-13)
    assert torch.equal(leaves[0].grad[labels < 0], torch.zeros_like(leaves[0].grad[labels < 0]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 10, 37, 1000])
@pytest.mark.parametrize("softcap", [1.5, 30.0])
def test_soft_capped_logits(softcap: float, chunk: int, bias: bool) -> None:
    """Catches Gemma 2's final cap dropped, applied to the loss alone, or left out of the gradient of some chunk."""
    leaves, labels = inputs(bias)
    expected, expected_grads = reference(leaves, labels, 3.0, softcap)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=chunk, softcap=softcap)
    (loss * 3.0).backward()
    assert_close(loss, expected, tolerance=1e-13)
    for x, wanted in zip([x for x in leaves if x is not None], expected_grads, strict=True):
        assert_close(x.grad, wanted, tolerance=1e-13)
    plain, plain_grads = reference(leaves, labels, 3.0)
    assert abs(plain - expected) > 1e-3 * expected and (plain_grads[1] - expected_grads[1]).norm() > 1e-3


def test_a_soft_cap_in_bfloat16_is_taken_in_float32() -> None:
    """Catches tanh of rounded quotients: near the cap bfloat16 cannot tell large logits apart."""
    leaves, labels = inputs(True, torch.bfloat16)
    expected, expected_grads = reference(leaves, labels, 1.0, 2.0)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=4, softcap=2.0)
    loss.backward()
    assert_close(loss, expected, tolerance=3e-3)
    for x, wanted in zip(leaves, expected_grads, strict=True):
        assert_close(x.grad, wanted, tolerance=1e-2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),  # a few roundings of 2^-24
        (torch.bfloat16, 1e-2),  # logits and their gradients are rounded to bfloat16 once each: 2^-9 relative, twice
    ],
)
def test_lower_types(dtype: torch.dtype, tolerance: float) -> None:
    """Catches a loss summed in bfloat16, or a head gradient that sums its chunks in it."""
    leaves, labels = inputs(True, dtype)
    expected, expected_grads = reference(leaves, labels, 1.0)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, tolerance=tolerance)
    for x, wanted in zip(leaves, expected_grads, strict=True):
        assert x.grad.dtype == dtype
        assert_close(x.grad, wanted, tolerance=tolerance)


def test_rows_of_a_batch() -> None:
    """Catches labels flattened in another order than the hidden states."""
    leaves, labels = inputs(False)
    hidden, weight, _ = leaves
    flat = chunked_cross_entropy(hidden[:36], weight, None, labels[:36], chunk_tokens=7)
    rows = chunked_cross_entropy(hidden[:36].view(4, 9, HIDDEN), weight, None, labels[:36].view(4, 9), chunk_tokens=7)
    assert torch.equal(flat, rows) and flat > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_labels_at_all(dtype: torch.dtype) -> None:
    """Catches NaN from a mean over nothing: the loss is exactly 0, and so is every gradient, none of them missing."""
    leaves, labels = inputs(True, dtype)
    loss = chunked_cross_entropy(*leaves, torch.full_like(labels, -100), chunk_tokens=5)
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in leaves)


def test_large_logits() -> None:
    """Catches exp without its maximum taken out, which overflows."""
    leaves, labels = inputs(False)
    with torch.no_grad():
        leaves[0].mul_(1e4)
    expected, grads = reference(leaves, labels, 1.0)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=8)
    loss.backward()
    assert_close(loss, expected, tolerance=1e-12)
    assert_close(leaves[1].grad, grads[1], tolerance=1e-12)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_frozen_parts(frozen: tuple[int, ...]) -> None:
    """Catches gradients lost with a frozen head, or made for what is frozen."""
    leaves, labels = inputs(True)
    expected, grads = reference(leaves, labels, 1.0)
    for i in frozen:
        leaves[i].requires_grad_(False)
    loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=8)
    assert_close(loss, expected, tolerance=1e-13)
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for i, (x, wanted) in enumerate(zip(leaves, grads, strict=True)):
        if i in frozen:
            assert x.grad is None
        else:
            assert_close(x.grad, wanted, tolerance=1e-13)


class Largest(TorchDispatchMode):
    """While entered, notes the number of elements of every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: list[int] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel += [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_one_chunk_only(softcap: float | None, training: bool, bias: bool) -> None:
    """Catches logits of the whole sequence, in training or in evaluation, forward or backward."""
    tokens, hidden_size, vocab, chunk = 96, 4, 64, 8
    leaves = [torch.randn(shape).requires_grad_() for shape in ((tokens, hidden_size), (vocab, hidden_size), (vocab,))]
    labels = torch.randint(vocab, (tokens,))
    head = leaves[1], leaves[2] if bias else None
    with Largest() as made, torch.set_grad_enabled(training):
        loss = chunked_cross_entropy(leaves[0], *head, labels, chunk_tokens=chunk, softcap=softcap)
        if training:
            loss.backward()
    assert loss.requires_grad == training
    # Everything else is smaller: hidden states and their gradient 384, the head and its gradient 256 elements.
    assert max(made.numel) == chunk * vocab < tokens * vocab
    with Largest() as dense:
        cross_entropy(linear(leaves[0], leaves[1]), labels)
    assert max(dense.numel) == tokens * vocab  # the count sees what it is there to see


def test_evaluation_keeps_nothing() -> None:
    """Catches gradients computed where nobody asks for them: twice the work."""
    leaves, labels = inputs(False)
    with torch.no_grad(), Largest() as made:
        loss = chunked_cross_entropy(*leaves, labels, chunk_tokens=TOKENS)
    forward = len(made.numel)
    with Largest() as made:
        chunked_cross_entropy(*leaves, labels, chunk_tokens=TOKENS)
    assert not loss.requires_grad and forward < len(made.numel)
