"""Many small messages as few large ones."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

BUCKET_BYTES = 32 * 2**20
"""Flat buffers are of about this size: few messages, and each on its way while the next fills."""

Item = TypeVar("Item")


def buckets(items: Iterable[tuple[Hashable, int, Item]]) -> Iterator[list[Item]]:
    """Items of one key at a time, in order, as many as make about `BUCKET_BYTES`.

    items: of each its key, its bytes and itself. Ranks that trade buckets give the same keys and bytes, and so come to
    the same buckets in the same order; where what they hold differs, bytes are those of even shares or of wholes.
    """
    filling: dict[Hashable, list[Item]] = defaultdict(list)
    held: dict[Hashable, int] = defaultdict(int)
    for key, size, item in items:
        filling[key].append(item)
        held[key] += size
        if held[key] > BUCKET_BYTES:
            yield filling.pop(key)
            held[key] = 0
    yield from filling.values()
