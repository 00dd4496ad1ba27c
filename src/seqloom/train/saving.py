"""Saving a run's checkpoints, while it waits or while it goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from seqloom.fabric import Axis, Fabric, barrier
from seqloom.train.boxes import Boxes
from seqloom.train.checkpoint import Progress, begin, publish, step_folder, write
from seqloom.train.state import saved_state


class Saves:
    """The checkpoints that a run writes into `folder`; every rank has one, and all call it together.

    keep: newest checkpoints that are kept; the best one is kept too. beside: None, or the ranks as a group of its own
    over which files are written while the training goes on, of copies in host memory that are taken at once. Then a
    checkpoint has its name when it is whole, at the latest when the next is saved or the run ends, and
    a failure is raised at the next call.
    """

    def __init__(self, folder: Path, fabric: Fabric, *, keep: int, beside: Axis | None = None) -> None:
        self.folder, self.fabric, self.keep, self.beside = folder, fabric, keep, beside
        self._writer = None if beside is None else ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def save(
        self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, *, best: bool = False
    ) -> None:
        """Write the checkpoint of a step. best: whether it is the best so far.

        Raises CheckpointError where it, or the one before it, cannot be written.
        """
        self._finish()
        unfinished = step_folder(self.folder, progress.step).with_suffix(".unfinished")
        if self.fabric.rank == 0:
            begin(unfinished)
        barrier(self.fabric.world)
        state = saved_state(model, optimizer, self.fabric)
        if self._writer is None or self.beside is None:
            self._write(unfinished, progress, state, best, self.fabric.world)
            barrier(self.fabric.world)
        else:
            copied = {name: held.copy() for name, held in state.items()}
            self._under_way = self._writer.submit(self._write, unfinished, progress, copied, best, self.beside)

    def _write(self, unfinished: Path, progress: Progress, state: dict[str, Boxes], best: bool, axis: Axis) -> None:
        write(unfinished, state, axis.group)
        if axis.rank == 0:
            publish(unfinished, progress, self.keep, mark=best)

    def check(self) -> None:
        """Raise what an asynchronous save has met so far; it does not wait."""
        if self._under_way is not None and self._under_way.done():
            self._finish()

    def _finish(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def __enter__(self) -> "Saves":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait until all is whole; what is raised already says why the run ends."""
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        if error is None:
            self._finish()
            barrier(self.fabric.world)
