"""The comparison that the other tests rely on."""

import pytest
import torch

from close import assert_close

EXPECTED = torch.tensor([1.0, -2.0, 3.0])


def test_close_passes() -> None:
    """Catches a comparison that nothing satisfies."""
    assert_close(EXPECTED * (1 + 1e-6), EXPECTED, tolerance=1e-5)
    assert_close(2.0, 2.0, tolerance=0.0)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, 1 / 3, -1.0, float("nan"), float("inf")])
def test_wrong_answers_fail(factor: float) -> None:
    """Catches a comparison that a lost, halved, doubled, turned or broken answer passes."""
    with pytest.raises(AssertionError, match="error"):
        assert_close(EXPECTED * factor, EXPECTED, tolerance=1e-2)


@pytest.mark.parametrize(
    ("expected", "tolerance", "ranks"),
    [
        (torch.zeros(3), 1e-3, 2),  # zeros are compared with: everything is infinitely wrong, or nothing
        (torch.full((3,), float("nan")), 1e-3, 2),
        (torch.empty(0), 1e-3, 2),
        (EXPECTED, 0.3, 2),  # half the answer would nearly pass
        (EXPECTED, 0.24, 1),
        (EXPECTED, 1.0, 2),  # zeros would pass
    ],
)
def test_refuses_to_pass_without_teeth(expected: torch.Tensor, tolerance: float, ranks: int) -> None:
    """Catches a tolerance that wrong answers pass too."""
    with pytest.raises(AssertionError, match="no teeth"):
        assert_close(expected, expected, tolerance=tolerance, ranks=ranks)


def test_shapes_must_agree() -> None:
    """Catches broadcasting that compares a row with a matrix."""
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EXPECTED, EXPECTED[None].repeat(2, 1), tolerance=1e-3)
