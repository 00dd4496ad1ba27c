"""Where each rank stands among the collectives, so that a hang can be told apart from slowness and laid at a door.

Every rank counts the collectives it begins, by axis, and knows the one it waits in: a few assignments each. When one
waits too long, it raises an alarm in the store where the ranks met. A thread of every rank looks for that
alarm once a second and answers with its rank's place, though the rank itself may be stuck.
"""

import json
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import distributed

from seqloom.errors import counted

LOOK_SECONDS = 1.0
"""Between two looks for an alarm; a rank that has not answered after three of them is not going to."""

NAMED = 8
"""Ranks that are described one by one; the rest is counted."""

PAGE = "see docs/failures.md"


@dataclass
class Place:
    """This rank among the collectives of its fabric.

    counts: collectives begun, by axis name. inside: what it waits in now, as (collective, axis, number).
    last: what it began last.
    """

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    inside: tuple[str, str, int] | None = None
    last: tuple[str, str, int] | None = None

    def begin(self, what: str, axis: str) -> None:
        """Note that a collective in which all ranks of the axis take part begins here."""
        self.counts[axis] += 1
        self.last = (what, axis, self.counts[axis])

    def dump(self) -> str:
        """As the store keeps it."""
        return json.dumps({"counts": dict(self.counts), "inside": self.inside, "last": self.last})


class Watch:
    """One rank's line to the others' places; `ask` is for when something has gone wrong."""

    def __init__(self, place: Place, rank: int, world: int, store: Any) -> None:
        """Start answering alarms; every rank of the run calls it together, for each of its fabrics.

        store: where the ranks met. The thread ends with `place`, or with torch.distributed.
        """
        self.rank, self.world = rank, world
        # Ranks build their fabrics in one order, so each one's own count is the same number on all of them.
        number = store.add(f"seqloom/fabrics of rank {rank}", 1)
        self._prefix, self._store = f"seqloom/fabric {number}/", store
        thread = threading.Thread(target=_answer, args=(weakref.ref(place), self._prefix, rank, store), daemon=True)
        thread.name = "seqloom watch"
        thread.start()

    def ask(self, place: Place) -> dict[int, dict[str, Any]]:
        """The places of all ranks that answer in time, this one's among them."""
        found = {self.rank: json.loads(place.dump())}
        deadline = time.monotonic() + 3 * LOOK_SECONDS
        try:
            self._store.set(f"{self._prefix}{self.rank}", place.dump())
            self._store.set(f"{self._prefix}alarm", "1")
            while len(found) < self.world and time.monotonic() < deadline:
                for rank in range(self.world):
                    if rank not in found and self._store.check([f"{self._prefix}{rank}"]):
                        found[rank] = json.loads(self._store.get(f"{self._prefix}{rank}"))
                time.sleep(LOOK_SECONDS / 20)
        except (RuntimeError, ValueError):  # who kept the store has ended: what is known has to do
            pass
        return found


def _answer(place: "weakref.ref[Place]", prefix: str, rank: int, store: Any) -> None:
    """Body of the thread: wait for an alarm, say where the rank stands, end."""
    while True:
        time.sleep(LOOK_SECONDS)
        here = place()
        if here is None or not distributed.is_initialized():
            return
        try:
            if store.check([f"{prefix}alarm"]):
                store.set(f"{prefix}{rank}", here.dump())
                return
        except RuntimeError:
            return
        del here


def missing(axis: str, number: int, ranks: Sequence[int], places: Mapping[int, Mapping[str, Any]]) -> str:
    """Who has kept the others waiting, as a sentence's end.

    axis, number: the collective that waits. ranks: those that take part in it. places: what `Watch.ask` found.
    """
    late = [rank for rank in ranks if rank not in places or places[rank]["counts"].get(axis, 0) < number]
    elsewhere = [rank for rank in places if rank not in late and not places[rank]["inside"]]
    if not late:
        said = "every rank has arrived, so the connection between them is broken"
    else:
        said = "; ".join(f"rank {rank} has not arrived: {_standing(places.get(rank))}" for rank in late[:NAMED])
        said += f"; nor have {counted(len(late) - NAMED, 'more rank')}" if len(late) > NAMED else ""
    outside = [rank for rank in elsewhere if rank not in ranks]
    if outside and all(rank in places and places[rank]["inside"] for rank in late):
        said += "; " + "; ".join(f"rank {rank} keeps them: {_standing(places[rank])}" for rank in outside[:NAMED])
    return said


def standings(world: int, places: Mapping[int, Mapping[str, Any]]) -> str:
    """Where every rank stands, for a collective that did not go through the fabric."""
    said = "; ".join(f"rank {rank}: {_standing(places.get(rank))}" for rank in range(min(world, NAMED)))
    return said + (f"; and {counted(world - NAMED, 'more rank')}" if world > NAMED else "")


def _standing(place: Mapping[str, Any] | None) -> str:
    if place is None:
        return "it does not answer, so its process has ended, is stopped, or cannot be reached"
    if place["inside"]:
        return f"it waits in {_named(place['inside'])}"
    return f"it is in no collective, after {_named(place['last'])}" if place["last"] else "it has begun no collective"


def _named(collective: Sequence[Any]) -> str:
    what, axis, number = collective
    return f"{what} {number} over {axis}" if number else f"{what} over {axis}"
