"""Counts the bytes this rank hands to the network, by mesh axis, and knows where it stands."""

from collections import defaultdict
from fractions import Fraction

from seqloom.fabric.watch import Place, Watch


class Meter:
    """Bytes sent since the last reset.

    Counted is what leaves this rank under the bandwidth-optimal form of each collective: a shift
    sends its block once, an all-to-all everything but its own part, an all-gather its block to each
    of the P-1 others, a reduce-scatter the P-1 parts of others, an all-reduce 2 (P-1)/P of its
    buffer, a broadcast its buffer once from the source.

    place: which collective this rank is in. watch: asks the other ranks for theirs; None where there are none.
    """

    def __init__(self) -> None:
        self._sent: dict[str, Fraction] = defaultdict(Fraction)
        self.place = Place()
        self.watch: Watch | None = None

    def add(self, axis: str, num_bytes: int | Fraction) -> None:
        """Record that this rank sent `num_bytes` along `axis`."""
        self._sent[axis] += num_bytes

    @property
    def sent(self) -> dict[str, int]:
        """Bytes sent per axis name, rounded down once; an axis that sent nothing is absent."""
        return {axis: int(num_bytes) for axis, num_bytes in self._sent.items() if num_bytes}

    def reset(self) -> None:
        """Start counting from zero."""
        self._sent.clear()
