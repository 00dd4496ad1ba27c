"""A run in phases, each with a plan, a sequence length and a batch of its own: short context first, then long."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seqloom.train.config import Config, Phase


@dataclass(frozen=True)
class Stretch:
    """Steps of a run under one phase: those from number `start` up to `until`, of `rows` sequences before them.

    config: the run's, with what the phase says laid over it.
    """

    config: Config
    start: int
    until: int
    rows: int = 0


def stretches(config: Config) -> tuple[Stretch, ...]:
    """The phases of a run in order; one where it has no curriculum."""
    if not config.curriculum:
        return (Stretch(config, 0, config.train.steps),)
    found: list[Stretch] = []
    start = rows = 0
    for phase in config.curriculum:
        found.append(Stretch(_laid_over(config, phase), start, phase.until_step, rows))
        rows += (phase.until_step - start) * found[-1].config.train.batch
        start = phase.until_step
    return tuple(found)


def _laid_over(config: Config, phase: Phase) -> Config:
    train, plan = config.train, phase.plan or config.plan
    length = phase.sequence_length or config.data.sequence_length
    return config.model_copy(
        update={
            "plan": plan,
            "data": config.data.model_copy(update={"sequence_length": length}),
            "train": train.model_copy(update=phase.sizes(train)),
        }
    )


def remaining(config: Config, done: int) -> tuple[Stretch, ...]:
    """The phases that a run has before it after `done` steps; of a finished one the last."""
    found = stretches(config)
    return tuple(stretch for stretch in found if stretch.until > done) or found[-1:]


def begun(curriculum: Sequence[dict[str, object]], step: int) -> Iterator[dict[str, object]]:
    """Of a curriculum as plain values the phases that had begun before `step`, without what may change."""
    start = 0
    for phase in curriculum:
        if start < step:
            fixed = {
                key: value
                for key, value in phase.items()
                if key not in ("plan", "accumulate", "micro_batch", "until_step")
            }
            yield fixed | {"from_step": start}
        start = int(str(phase["until_step"]))
