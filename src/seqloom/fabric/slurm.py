"""The ranks of a Slurm job step, in the variables torchrun would set; srun has started the processes."""

import re
from collections.abc import Mapping

from seqloom.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 10_000
"""The meeting port is drawn from the job's number, so that two jobs on one machine seldom take the same."""

_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a process that srun started, or nothing.

    A step of one task is nothing: such a process starts its ranks itself. Nor is a batch script's own process, which
    has no step's node list. MASTER_ADDR and MASTER_PORT hold where they are set; otherwise the ranks meet on the first
    node of the step. Raises ConfigError where Slurm's variables contradict each other.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks == "1" or any(name not in environment for name in _STEP):
        return {}
    rank, local, job = environment["SLURM_PROCID"], environment["SLURM_LOCALID"], environment.get("SLURM_JOB_ID", "0")
    if not (all(word.isdecimal() for word in (tasks, rank, local, job)) and int(rank) < int(tasks)):
        raise ConfigError(
            f"Slurm says that this is process '{rank}' ('{local}' of its node) of '{tasks}' in job '{job}', which "
            "cannot be; start the processes with srun, or with torchrun."
        )
    return {
        "RANK": rank,
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": local,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + int(job) % PORTS),
    }


def first_host(nodes: str) -> str:
    """The first name of a list as Slurm writes it.

    Raises ConfigError for a list that is not of the forms `a`, `a,b`, `a[01-03,07]` and products of these.

    >>> first_host("gpu[007-010,012],login1"), first_host("rack[2-3]node[4,6]"), first_host("alone")
    ('gpu007', 'rack2node4', 'alone')
    """
    first = re.sub(r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]", r"\1", nodes).partition(",")[0]
    if not re.fullmatch(r"[\w.-]+", first):
        raise ConfigError(
            f"The node list '{nodes}' is of no form that is read here; set MASTER_ADDR to its first host."
        )
    return first
