"""How the processes of a run come to be: joining those of torchrun or of Slurm's srun, or starting one's own."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from seqloom.errors import CommunicationError, ConfigError
from seqloom.fabric.local import Method, run_family
from seqloom.fabric.slurm import slurm_variables

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _meeting() -> dict[str, str]:
    """Who this process is among those a launcher started, as torchrun says it; incomplete where none has.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are all set by torchrun and by the launchers that imitate
    it. LOCAL_RANK tells them from cluster systems that describe only the machine.
    """
    found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return found if len(found) == len(_VARIABLES) else slurm_variables(os.environ) or found


def launched() -> int | None:
    """How many processes a launcher, torchrun or srun, has started this one among; None where this one is alone."""
    meeting = _meeting()
    return int(meeting["WORLD_SIZE"]) if len(meeting) == len(_VARIABLES) else None


def speaks() -> bool:
    """Whether this process is the one that talks to the user: the only one, or rank 0."""
    return launched() is None or _meeting()["RANK"] == "0"


@contextmanager
def distributed(timeout_seconds: float = 600) -> Iterator[None]:
    """Initialise torch.distributed as the environment says, and destroy it at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them, or what Slurm's srun says
    instead; with none of them set the process is a world of its own. Under torchrun it ends when its launcher does.
    Backend: gloo on CPU; where CUDA is available gloo for CPU tensors and NCCL for CUDA tensors, and LOCAL_RANK becomes
    the current device. A collective fails after `timeout_seconds`.

    Raises ConfigError for an environment that is set in part or asks for a device that is not there, and
    CommunicationError if the ranks do not meet in time.
    """
    found = _meeting()
    missing = [name for name in _VARIABLES if name not in found]
    alone = len(missing) == len(_VARIABLES)
    if missing and not alone:
        raise ConfigError(f"The environment of a distributed run lacks {', '.join(missing)}; start it with torchrun.")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_local_device(int(found.get("LOCAL_RANK", "0"))))
    meeting: dict[str, Any] = {"init_method": "env://"}
    if not alone and "RANK" not in os.environ:  # srun started it
        meeting = {"init_method": "tcp://{MASTER_ADDR}:{MASTER_PORT}".format_map(found)}
        meeting |= {"rank": int(found["RANK"]), "world_size": int(found["WORLD_SIZE"])}
    if alone:
        meeting = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds), **meeting
        )
    except (dist.DistError, RuntimeError) as error:
        if alone:
            raise CommunicationError(f"This process could not start torch.distributed for itself ({error}).") from error
        where = "{MASTER_ADDR}:{MASTER_PORT}".format_map(found)
        raise CommunicationError(
            f"Rank {found['RANK']} did not meet all {found['WORLD_SIZE']} ranks at {where} "
            f"within {timeout_seconds:g} s ({error}); check that all of them run and reach that address."
        ) from error
    failed, ended = True, threading.Event()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_parent, args=(os.getppid(), ended), name="parent", daemon=True).start()
    try:
        yield
        failed = False
    finally:
        ended.set()
        # NCCL waits for collectives in flight, and after a failure a peer may never come: then leave it to the end
        # of the process. gloo just closes its connections, which is how the peers learn of the failure.
        if dist.is_initialized() and not (cuda and failed):
            dist.destroy_process_group()


def _end_with_parent(parent: int, ended: threading.Event) -> None:
    """End this process when the one that started it is gone: torchrun's agent, killed, ends none of its workers."""
    while not ended.wait(1.0):
        if os.getppid() != parent:
            os._exit(1)


def _local_device(rank: int) -> int:
    count = torch.cuda.device_count()
    if rank >= count:
        raise ConfigError(
            f"LOCAL_RANK={rank} needs {rank + 1} CUDA devices, but {count} can be seen; start at most {count} "
            "processes on this machine, or set CUDA_VISIBLE_DEVICES to nothing to run on its CPU."
        )
    return rank


def run_local(
    world: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 600, grace_seconds: float = 3
) -> list[Any]:
    """Run `function(*args)` in `world` processes of this machine, each inside `distributed`; results in rank order.

    function: a module-level callable. It, its arguments and its results travel by pickle, tensors by value.
    timeout_seconds: of each collective. grace_seconds: between SIGTERM and SIGKILL for the ranks that remain after a
    failure. A script that calls this needs the usual `if __name__ == "__main__"`. Each process sees the variables
    torchrun would set, and computes with OMP_NUM_THREADS threads, or its share of the cores when that is not set.
    stdout and stderr are the caller's.

    Failure: one rank's end ends all, within a few seconds. The error raised here is the root's: a rank killed by a
    signal first, else the earliest error that is not the echo of a lost peer. A SeqloomError is raised as itself
    (with the rank's traceback as a note); anything else, death by a signal included, as WorkerError.

    Signals: SIGINT (Ctrl-C) and SIGTERM of the caller reach every rank as one SIGTERM, and the caller waits. SIGINT
    itself is blocked in the ranks, since a terminal sends it to the whole process group and they would hear of one
    Ctrl-C twice. A function that wants to leave cleanly handles SIGTERM and returns: then its results are returned.
    (A cluster system may signal every process itself, so the handler must bear to be called again.) Ranks that do
    not handle it end at once, and KeyboardInterrupt, or SystemExit(143) for SIGTERM, is raised here. A second
    signal kills the ranks. If the caller itself is killed, the ranks end by themselves.
    """
    # The caller holds the meeting place, on a port the system chose: no rank can lose a race for it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    # fork is fast, but a forked process cannot use CUDA if anything imported before has looked for it.
    method: Method = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    return run_family(world, _join, (world, store.port, timeout_seconds, function, args), method, grace_seconds)


def _join(rank: int, world: int, port: int, timeout_seconds: float, function: Callable[..., Any], args: Any) -> Any:
    """What one process of `run_local` does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # As under torchrun: the store already runs at MASTER_PORT, rank 0 need not open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world))
    with distributed(timeout_seconds):
        return function(*args)
