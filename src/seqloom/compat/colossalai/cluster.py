"""`colossalai.cluster`: who this process is among all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import distributed
from torch.distributed import ProcessGroup

from seqloom.compat.colossalai.state import PROCESS
from seqloom.errors import ConfigError
from seqloom.fabric import Axis, Meter, barrier

__all__ = ["DistCoordinator"]


class DistCoordinator:
    """What a program asks so that one process speaks for all; process_group: of whom, by default of all."""

    def __init__(self) -> None:
        """Raises ConfigError before `launch`."""
        if not distributed.is_initialized():
            raise ConfigError("DistCoordinator was made before launch; call launch_from_torch() first.")
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def is_master(self, process_group: ProcessGroup | None = None) -> bool:
        """Whether this process is the first."""
        return distributed.get_rank(process_group) == 0

    def is_node_master(self) -> bool:
        """Whether this process is the first on this machine."""
        return self.local_rank == 0

    def is_last_process(self, process_group: ProcessGroup | None = None) -> bool:
        """Whether this process is the last."""
        return distributed.get_rank(process_group) == distributed.get_world_size(process_group) - 1

    def print_on_master(self, msg: str, process_group: ProcessGroup | None = None) -> None:
        """Print on the first process."""
        if self.is_master(process_group):
            print(msg, flush=True)

    def print_on_node_master(self, msg: str) -> None:
        """Print on the first process of each machine."""
        if self.is_node_master():
            print(msg, flush=True)

    def block_all(self, process_group: ProcessGroup | None = None) -> None:
        """Wait until every process is here."""
        ranks, size = distributed.get_rank(process_group), distributed.get_world_size(process_group)
        barrier(Axis("coordinator", ranks, size, process_group, Meter()))

    @contextmanager
    def priority_execution(self, executor_rank: int = 0, process_group: ProcessGroup | None = None) -> Iterator[None]:
        """Let one process go first; the others wait until it has left the block."""
        first = distributed.get_rank(process_group) == executor_rank
        if not first:
            self.block_all(process_group)
        try:
            yield
        finally:  # an error there is told, not waited for
            if first:
                self.block_all(process_group)

    def on_master_only(self, process_group: ProcessGroup | None = None) -> Callable[..., Any]:
        """A decorator of functions that the first process alone runs; on others they give None."""
        first = self.is_master(process_group)

        def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
            return wraps(function)(lambda *args, **named: function(*args, **named) if first else None)

        return decorated

    def destroy(self) -> None:
        """Give up what `launch` made."""
        PROCESS.leave()
