"""The learning rate as a function of the step, so that resuming needs no state."""

from math import cos, pi

from seqloom.train.method import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimizer step number `step`, counted from 0: linear warm-up, then the schedule to its floor.

    The first step already moves: warm-up reaches the full rate with step `warmup_steps` - 1. By samples the same
    holds of the sequences that are consumed with the step's own, so that at a constant batch both units agree.
    """
    before, after, total = step, step + 1, train.steps
    warmup, decay = train.warmup_steps, train.decay_steps
    if train.by_samples:
        before, after, total = map(train.batches.consumed, (step, step + 1, train.steps))
        warmup, decay = train.warmup_samples or 0, train.decay_samples
    if before < warmup:
        return train.learning_rate * min(1.0, after / warmup)
    length = max(1, total - warmup) if decay is None else decay
    start = total - length if train.schedule == "wsd" else warmup
    fallen = min(1.0, max(0, before - start) / length)
    kept = {
        "cosine": (1 + cos(pi * fallen)) / 2,
        "linear": 1 - fallen,
        "constant": 1.0,
        "wsd": 1 - fallen,
    }[train.schedule]
    floor = train.final_learning_rate_share
    return train.learning_rate * (floor + (1 - floor) * kept)
