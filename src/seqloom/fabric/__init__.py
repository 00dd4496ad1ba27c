"""Processes, their mesh and every collective between them."""

from seqloom.fabric.bucket import buckets
from seqloom.fabric.collectives import (
    Pending,
    all_gather,
    all_reduce_,
    all_to_all,
    all_to_all_rows,
    barrier,
    broadcast_,
    gather_values,
    send,
    shift,
    start_all_gather,
    start_all_reduce_,
    start_collect,
    start_reduce_scatter,
    start_shift,
    start_sum_,
    start_sum_parts,
    start_trade,
)
from seqloom.fabric.failure import naming_others
from seqloom.fabric.mesh import AXES, Axis, Fabric
from seqloom.fabric.meter import Meter
from seqloom.fabric.sharding import AllGather, ReduceScatter, line

__all__ = [
    "AXES",
    "AllGather",
    "Axis",
    "Fabric",
    "Meter",
    "Pending",
    "ReduceScatter",
    "all_gather",
    "all_reduce_",
    "all_to_all",
    "all_to_all_rows",
    "barrier",
    "broadcast_",
    "buckets",
    "gather_values",
    "line",
    "naming_others",
    "send",
    "shift",
    "start_all_gather",
    "start_all_reduce_",
    "start_collect",
    "start_reduce_scatter",
    "start_shift",
    "start_sum_",
    "start_sum_parts",
    "start_trade",
]
