"""How many sequences each step takes, and which: a function of the step alone, so that resuming needs no state."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """The sizes of a run's batches, in sequences over all processes.

    batch: the size, once ramp-up is over. rampup: (start, increment, samples) as Megatron-LM's --rampup-batch-size:
    the size begins at `start` and grows to `batch` in steps of `increment`, each after an equal share of `samples`
    sequences.

    >>> [Batches(8, (4, 2, 20)).at(step) for step in range(6)]
    [(0, 4), (4, 4), (8, 4), (12, 6), (18, 6), (24, 8)]
    """

    batch: int
    rampup: tuple[int, int, int] | None = None

    def at(self, step: int) -> tuple[int, int]:
        """Sequences that were consumed before step number `step`, counted from 0, and its batch size."""
        consumed = 0
        for size, bound in self._stages():
            steps = -(-max(0, bound - consumed) // size)  # a size is kept while fewer than `bound` are consumed
            if step < steps:
                return consumed + step * size, size
            step -= steps
            consumed += steps * size
        return consumed + step * self.batch, self.batch

    def consumed(self, steps: int) -> int:
        """Sequences that the first `steps` steps take."""
        return self.at(steps)[0]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size there is, smallest first."""
        return (*(size for size, _ in self._stages()), self.batch)

    def _stages(self) -> list[tuple[int, int]]:
        """The sizes before the full one, and how many sequences have been consumed when each ends."""
        if self.rampup is None:
            return []
        start, increment, samples = self.rampup
        growths = (self.batch - start) // increment
        return [(start + number * increment, -(-(number + 1) * samples // growths)) for number in range(growths)]
