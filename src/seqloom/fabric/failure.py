"""A backend's failure as a sentence: which collective, over which axis, and who is missing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from seqloom.errors import CommunicationError
from seqloom.fabric.mesh import Axis, Fabric
from seqloom.fabric.watch import PAGE, missing, standings

_LINK_WORDS = ("connection", "transport", "timed out", "timeout", "socket", "broken pipe", "nccl")
"""How a backend's message reads when a peer is gone, as opposed to wrong use of a collective."""


def _of_the_link(error: RuntimeError) -> bool:
    return any(word in str(error).lower() for word in _LINK_WORDS)


def _cause(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def naming(what: str, axis: Axis, number: int) -> Iterator[None]:
    """Note that this rank waits in a collective, and turn its failure into a sentence that names it.

    number: of the collective on its axis, 0 where not all ranks of the axis take part. Raises CommunicationError:
    after a time-out with the ranks that have not arrived, and at once where a connection has closed, since the rank at
    its other end says why.
    """
    place, started = axis.meter.place, time.monotonic()
    outer, place.inside = place.inside, (what, axis.name, number)  # a pipeline's step has collectives inside
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise RuntimeError and its subclasses for everything
        if not _of_the_link(error):
            raise
        if "timed out" in str(error).lower() and axis.meter.watch is not None and axis.group is not None:
            ranks = distributed.get_process_group_ranks(axis.group)
            waited = time.monotonic() - started
            said = missing(axis.name, number, ranks, axis.meter.watch.ask(place))
            numbered = f"{what} {number}" if number else what
            raise CommunicationError(
                f"{numbered} on axis {axis.name} waited {waited:.0f} s in vain at rank {axis.rank} of {axis.size} "
                f"(ranks {', '.join(map(str, ranks[:64]))}): a peer died or stalled: {said}; {PAGE} ({_cause(error)})."
            ) from error
        raise CommunicationError(
            f"{what} on axis {axis.name} failed at rank {axis.rank} of {axis.size}: a peer died or stalled; if "
            f"another rank reports an error of its own, that is the reason; {PAGE} ({_cause(error)})."
        ) from error
    place.inside = outer


@contextmanager
def naming_others(fabric: Fabric) -> Iterator[None]:
    """Turn the failure of a collective that does not go through the fabric, FSDP's or a pipeline's, into a sentence."""
    try:
        yield
    except CommunicationError:
        raise
    except RuntimeError as error:
        watch, place = fabric.meter.watch, fabric.meter.place
        if watch is None or not _of_the_link(error):
            raise
        where = standings(watch.world, watch.ask(place)) if "timed out" in str(error).lower() else ""
        raise CommunicationError(
            f"A collective of torch itself (of FSDP or of the pipeline) failed at rank {fabric.rank}: a peer died or "
            f"stalled{f'; of the other collectives, {where}' if where else ''}; {PAGE} ({_cause(error)})."
        ) from error
