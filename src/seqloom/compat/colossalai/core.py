"""`colossalai.core`: the place of this process among the others, as the CONFIG arranges them."""

from torch import distributed

from seqloom.compat.colossalai.context import ParallelMode
from seqloom.compat.colossalai.state import PROCESS, Config
from seqloom.errors import ConfigError
from seqloom.fabric import Axis

__all__ = ["global_context"]

_GRID = {
    ParallelMode.PARALLEL_1D: ("1d", "tensor"),
    ParallelMode.PARALLEL_2D_ROW: ("2d", "col"),
    ParallelMode.PARALLEL_2D_COL: ("2d", "row"),
    ParallelMode.PARALLEL_2P5D_ROW: ("2.5d", "col"),
    ParallelMode.PARALLEL_2P5D_COL: ("2.5d", "row"),
    ParallelMode.PARALLEL_2P5D_DEP: ("2.5d", "depth"),
    ParallelMode.PARALLEL_3D_INPUT: ("3d", "input"),
    ParallelMode.PARALLEL_3D_WEIGHT: ("3d", "weight"),
    ParallelMode.PARALLEL_3D_OUTPUT: ("3d", "output"),
}
"""The tensor kind and its axis: their ROW group is the ranks of one row, who differ in column."""

_AXES = {
    ParallelMode.GLOBAL: "world",
    ParallelMode.DATA: "data",
    ParallelMode.PIPELINE: "pipeline",
    ParallelMode.TENSOR: "tensor",
    ParallelMode.SEQUENCE: "ring",
}


class _GlobalContext:
    """What their `ParallelContext` is asked for, read from the fabric of the CONFIG."""

    @property
    def config(self) -> Config:
        """The CONFIG that `launch` was given, its plain values as keys and as attributes; empty without one."""
        return PROCESS.config

    def get_global_rank(self) -> int:
        """This process among all."""
        return distributed.get_rank()

    def get_local_rank(self, parallel_mode: ParallelMode) -> int:
        """This process in its group of a mode. Raises ConfigError for a mode that the CONFIG does not have."""
        return distributed.get_rank() if self._of_all(parallel_mode) else self._axis(parallel_mode).rank

    def get_world_size(self, parallel_mode: ParallelMode) -> int:
        """The size of this process's group of a mode. Raises ConfigError as `get_local_rank`."""
        return distributed.get_world_size() if self._of_all(parallel_mode) else self._axis(parallel_mode).size

    def get_group(self, parallel_mode: ParallelMode) -> distributed.ProcessGroup | None:
        """The group itself, of one process where that is alone in it. Raises ConfigError as `get_local_rank`."""
        if self._of_all(parallel_mode):
            return distributed.group.WORLD
        return self._axis(parallel_mode).group or PROCESS.alone

    def is_initialized(self, parallel_mode: ParallelMode) -> bool:
        """Whether `launch` made the groups of a mode."""
        if self._of_all(parallel_mode):
            return distributed.is_initialized()
        try:
            return self._axis(parallel_mode).size > 0
        except ConfigError:
            return False

    def is_first_rank(self, parallel_mode: ParallelMode) -> bool:
        """Whether this process is the first of its group."""
        return self.get_local_rank(parallel_mode) == 0

    def is_last_rank(self, parallel_mode: ParallelMode) -> bool:
        """Whether this process is the last of its group."""
        return self.get_local_rank(parallel_mode) == self.get_world_size(parallel_mode) - 1

    def _of_all(self, mode: ParallelMode) -> bool:
        return mode is ParallelMode.GLOBAL and PROCESS.fabric is None

    def _axis(self, mode: ParallelMode) -> Axis:
        fabric = PROCESS.arranged
        if mode in _AXES:
            axis: Axis = getattr(fabric, _AXES[mode])
            return axis
        kind, name = _GRID[mode]
        if fabric.plan.tensor_kind != kind:
            raise ConfigError(
                f"ParallelMode.{mode.name} is a group of tensor mode {kind}, but the CONFIG says "
                f"{fabric.plan.tensor_kind} over {fabric.plan.tensor}; ask for the groups of that mode."
            )
        return fabric.grid[name]


global_context = _GlobalContext()
