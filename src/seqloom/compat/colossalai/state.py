"""What Colossal-AI keeps per process: its groups, the CONFIG, and how far the construction of a model has come."""

import atexit
import logging
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.distributed import ProcessGroup

from seqloom.dialects import Note
from seqloom.errors import ConfigError
from seqloom.fabric import Fabric
from seqloom.fabric.launch import distributed

LOGGER = logging.getLogger("seqloom.compat.colossalai")


class Config(dict[str, Any]):
    """A CONFIG, whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """The value of a key, a dict as one of these."""
        try:
            found = self[name]
        except KeyError:
            raise AttributeError(f"The CONFIG says no '{name}', or not as a plain value.") from None
        return Config(found) if isinstance(found, dict) else found


@dataclass
class Process:
    """The state of this process.

    launched: whether `launch` was called. fabric: the processes as the CONFIG arranges them, None without one.
    alone: a group of this process, for torch.distributed, to which none means all.
    seed: what `launch` seeded generators with; dropout of boosted models draws from it.
    side: of the tensor grid, on which the module stands that is constructed next. dropouts: how many there are.
    """

    launched: bool = False
    config: Config = field(default_factory=Config)
    fabric: Fabric | None = None
    alone: ProcessGroup | None = None
    seed: int = 1024
    side: Literal["outer", "inner"] = "outer"
    dropouts: int = 0
    joined: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def arranged(self) -> Fabric:
        """The fabric of the CONFIG. Raises ConfigError where there is none."""
        if self.fabric is None:
            raise ConfigError(
                "No CONFIG has said how the processes are arranged; call launch or launch_from_torch with "
                "config=dict(parallel=...) first."
            )
        return self.fabric

    def join(self) -> None:
        """Join the processes that a launcher started, until this one ends."""
        self.joined.enter_context(distributed())
        atexit.register(self.leave)

    def leave(self) -> None:
        """Give up what `launch` made: a process may then launch anew."""
        atexit.unregister(self.leave)
        if self.fabric is not None:
            self.fabric.close()
        failed = getattr(sys, "last_value", None)  # of an exception that ends the interpreter
        joined = self.joined
        self.__init__()  # type: ignore[misc]
        try:
            joined.__exit__(type(failed), failed, None) if failed is not None else joined.close()
        except BaseException as error:
            if error is not failed:
                raise


PROCESS = Process()


def tell(notes: Iterable[Note], rank: int) -> None:
    """Log on rank 0 what became of options: a warning where they mean something else here, or nothing."""
    for note in notes if rank == 0 else ():
        level = logging.INFO if note.verdict == "mapped" else logging.WARNING
        LOGGER.log(level, "%s: %s. %s", note.option, note.verdict, note.why)
