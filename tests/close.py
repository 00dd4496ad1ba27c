"""A comparison that cannot pass by accident."""

import math

import torch
from torch import Tensor

MARGIN = 4.0
"""How far beyond the tolerance the wrong answers must lie."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in norms: 1.0 for zeros, 0.5 for half the answer, NaN for the infinite."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_close(actual: Tensor | float, expected: Tensor | float, *, tolerance: float, ranks: int = 2) -> None:
    """Assert that `actual` is `expected` within a relative `tolerance`, in norms.

    First it makes sure that the test can fail: zeros, and the expected value times 1/2, 2, 1/ranks and ranks, must lie
    well outside the tolerance, and so must the answer with the sign turned. An expected value of zeros has no such
    scale, so it is refused; assert equality with 0 instead.
    """
    actual, expected = (
        torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else torch.float64) for x in (actual, expected)
    )
    whole = expected.detach().double()
    assert whole.numel() and math.isfinite(whole.norm()) and whole.norm() > 0, (
        "no teeth: nothing finite to compare with"
    )
    for factor in {0.0, 0.5, 2.0, -1.0, *((1 / ranks, float(ranks)) if ranks > 1 else ())}:
        missed = relative_error(whole * factor, whole)
        assert missed > MARGIN * tolerance, f"no teeth: {factor:g} times the answer passes a tolerance of {tolerance:g}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"error {error:.2e} is over {tolerance:g}"
