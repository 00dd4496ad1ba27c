"""The learning rate as a function of the step, so that resuming needs no state."""

from math import cos, pi

from seqloom.train.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of optimizer step number `step`, counted from 0: linear warm-up, then a cosine to its floor.

    The first step already moves: warm-up reaches the full rate at step `warmup_steps` - 1.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    floor = train.final_learning_rate_share
    return train.learning_rate * (floor + (1 - floor) * (1 + cos(pi * done)) / 2)
