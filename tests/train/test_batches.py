"""Batch-size ramp-up, against Megatron-LM's rule taken one step at a time."""

import pytest

from seqloom.train.batches import Batches


def megatron(batch: int, start: int, increment: int, samples: int, steps: int) -> list[tuple[int, int]]:
    """Consumed sequences and batch size of each step, as Megatron-LM's calculator counts them."""
    each, consumed, found = samples / ((batch - start) / increment), 0, []
    for _ in range(steps):
        size = batch if consumed > samples else start + int(consumed / each) * increment
        found.append((consumed, size))
        consumed += size
    return found


@pytest.mark.parametrize(
    ("batch", "rampup"), [(512, (192, 16, 9_765)), (8, (4, 2, 20)), (32, (16, 16, 1)), (7, (1, 3, 64)), (6, (1, 1, 3))]
)
def test_ramp_up_is_megatrons(batch: int, rampup: tuple[int, int, int]) -> None:
    """Catches growth by steps instead of sequences, a stage too early or late, and a position that skips sequences."""
    assert [Batches(batch, rampup).at(step) for step in range(60)] == megatron(batch, *rampup, steps=60)


def test_constant_batch() -> None:
    """Catches a position that is off by a batch without ramp-up."""
    assert [Batches(3).at(step) for step in range(3)] == [(0, 3), (3, 3), (6, 3)]
    assert Batches(3).consumed(5) == 15
