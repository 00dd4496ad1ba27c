"""The learning rate, against values worked out by hand."""

from math import cos, pi

import pytest

from seqloom.train.method import TrainConfig
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


def test_linear_and_wsd_by_hand() -> None:
    """Catches a fall that starts at the wrong step, ends beside its floor, or does not stay there."""
    linear = rates(steps=6, schedule="linear", learning_rate=1.0, warmup_steps=1, decay_steps=4)
    assert linear == pytest.approx([1.0, 1.0, 0.775, 0.55, 0.325, 0.1])
    assert rates(steps=8, schedule="linear", learning_rate=1.0, decay_steps=4)[4:] == [0.1] * 4
    wsd = rates(steps=8, schedule="wsd", learning_rate=1.0, warmup_steps=2, decay_steps=4, final_learning_rate_share=0)
    assert wsd == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates(schedule="constant", learning_rate=0.5, warmup_steps=2) == [0.25] + [0.5] * 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_samples_and_steps_agree_at_one_batch(schedule: str) -> None:
    """Catches a schedule by samples that counts another moment of the step than the one by steps."""
    by_steps = rates(schedule=schedule, batch=4, warmup_steps=3, decay_steps=5)
    assert rates(schedule=schedule, batch=4, warmup_samples=12, decay_samples=20) == pytest.approx(by_steps, abs=1e-15)


def test_samples_follow_ramp_up() -> None:
    """Catches a schedule by samples that counts steps while the batch grows."""
    found = rates(steps=4, batch=4, micro_batch=1, rampup=[1, 1, 3], learning_rate=1.0, warmup_samples=6)
    assert found == pytest.approx([1 / 6, 3 / 6, 1.0, 0.1 + 0.45 * (1 + cos(pi / 5))])
