"""The learning rate, against values worked out by hand."""

from math import cos, pi

import pytest

from seqloom.train.config import TrainConfig
from seqloom.train.schedule import learning_rate


def rates(**settings: object) -> list[float]:
    train = TrainConfig.model_validate({"steps": 10, **settings})
    return [learning_rate(train, step) for step in range(train.steps)]


def test_values_by_hand() -> None:
    """Catches a warm-up that starts at zero or ends a step late, and a cosine to the wrong floor."""
    found = rates(steps=8, learning_rate=1.0, warmup_steps=4, final_learning_rate_share=0.2)
    half = 2**-0.5
    after = [1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *after], abs=1e-15)


def test_every_step_moves() -> None:
    """Catches a first step at rate zero, which moves nothing, or a last one below the floor."""
    for warmup in (0, 1, 3, 10):
        found = rates(learning_rate=2.0, warmup_steps=warmup, final_learning_rate_share=0.1)
        assert min(found) >= 0.2 * (1 - 1e-12) and max(found) == pytest.approx(2.0)
        peak = found.index(max(found))
        assert found[: peak + 1] == sorted(found[: peak + 1])
        assert found[peak:] == sorted(found[peak:], reverse=True)


def test_no_warmup_and_no_floor() -> None:
    """Catches a division by the warm-up, and a floor that cannot be zero."""
    found = rates(learning_rate=3.0, warmup_steps=0, final_learning_rate_share=0.0)
    assert found == pytest.approx([1.5 * (1 + cos(pi * step / 10)) for step in range(10)])
    assert found[0] == 3.0


def test_all_warmup() -> None:
    """Catches a schedule that divides by the steps after warm-up when there are none."""
    assert rates(steps=4, learning_rate=1.0, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_constant() -> None:
    """Catches a share of one that still falls."""
    assert rates(learning_rate=0.5, final_learning_rate_share=1.0) == [0.5] * 10
