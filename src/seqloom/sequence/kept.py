"""What backward does not compute again: results that a recomputed part of a model keeps."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from torch import Tensor

Unpack = Callable[[], Tensor]
"""Gives a kept tensor back."""


def whole(x: Tensor) -> Unpack:
    """Keep a tensor as it is."""
    return lambda: x


class KeptResults:
    """What some functions made when a part of a model ran first; while entered, that part runs again and takes it.

    Both runs ask for the same results in the same order. What comes out takes part in no graph: it is made, and
    taken, inside of `torch.autograd.Function.forward`, which ties it to a backward of its own.
    """

    def __init__(self, pack: Callable[[Tensor], Unpack] = whole) -> None:
        """pack: puts a tensor where it is to wait."""
        self._pack = pack
        self._packed: list[tuple[Unpack, ...]] = []
        self._next: int | None = None

    def once(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returns in the first run; in others what it returned then, without a call."""
        if self._next is None:
            made = make()
            # Detached, since an output of an autograd function holds on to its graph, and the graph to this.
            self._packed.append(tuple(self._pack(x.detach()) for x in made))
            return made
        self._next += 1
        return tuple(unpack().detach() for unpack in self._packed[self._next - 1])

    def __enter__(self) -> Self:
        self._next = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._next = None
