"""Ctrl-C and SIGTERM end a run at the next step, on all ranks together."""

import os
import signal
from types import FrameType, TracebackType

import torch

from seqloom.fabric import Fabric, all_reduce_


class StopRequest:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process.

    speaks: whether this rank tells the user that it has heard.
    """

    def __init__(self, *, speaks: bool) -> None:
        self.asked = False
        self._speaks = speaks

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._speaks and not self.asked:
            # Not print: a handler may interrupt one.
            os.write(
                1, b"\nStopping after this step, then saving; asked a second time, it ends at once without saving.\n"
            )
        self.asked = True

    def agreed(self, fabric: Fabric) -> bool:
        """Whether any rank was asked to stop; every rank calls it together and gets the same answer."""
        return bool(all_reduce_(torch.tensor(int(self.asked), device=fabric.device), fabric.world, "max").item())
