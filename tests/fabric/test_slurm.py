"""Ranks that srun started, in an environment made up as Slurm documents it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqloom.errors import ConfigError
from seqloom.fabric.slurm import first_host, slurm_variables

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}

SUM = """
import torch, torch.distributed as dist
from seqloom.fabric.launch import distributed, launched, speaks
with distributed(60):
    total = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(total)
    print(launched(), dist.get_rank(), total.item(), speaks(), flush=True)
"""

ORPHAN = """
import os, time
from seqloom.fabric.launch import distributed
with distributed(60):
    print(os.getpid(), flush=True)
    time.sleep(300)
"""


def test_variables() -> None:
    """Catches another rank, world or device than Slurm means, and a meeting place on a node without rank 0."""
    assert slurm_variables(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }
    told = slurm_variables(STEP | {"MASTER_ADDR": "other", "MASTER_PORT": "29"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("other", "29")


@pytest.mark.parametrize("lacking", ["SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"])
def test_a_batch_script_is_no_rank(lacking: str) -> None:
    """Catches a batch script's own process, which Slurm numbers too, waiting for ranks that nobody starts."""
    assert slurm_variables({name: value for name, value in STEP.items() if name != lacking}) == {}


def test_a_step_of_one_task_starts_its_own() -> None:
    """Catches an interactive shell on a node taken for the only rank of a run."""
    assert slurm_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3,5-7]", "n3"), ("n[001-004],m", "n001"), ("r[1-2]n[04-5]x", "r1n04x")],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    """Catches a comma inside brackets taken for the end of a name, and leading zeros lost."""
    assert first_host(nodes) == first


def test_what_cannot_be_read_is_refused() -> None:
    """Catches a name made of pieces of a list that is not understood, and numbers that are none."""
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_host("n[a-b]")
    with pytest.raises(ConfigError, match="cannot be; start the processes with srun"):
        slurm_variables(STEP | {"SLURM_PROCID": "8"})


def test_processes_meet_as_srun_starts_them() -> None:
    """Catches a process under srun that trains alone, and two that say everything twice."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    plain |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SUM],
            env=plain | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in started]
    assert said == ["2 0 3.0 True", "2 1 3.0 False"]


def runs(process: int) -> bool:
    """Whether it is there and not a zombie, whose command line is empty."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_of_torchrun_end_with_it() -> None:
    """Catches workers that live on as orphans when torchrun is killed, holding devices and the run's folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--no-python"]
    command += [sys.executable, "-c", ORPHAN]
    with subprocess.Popen(
        [sys.executable, "-m", *command], env=environment, stdout=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        worker = int(launcher.stdout.readline())
        launcher.kill()
        deadline = time.monotonic() + 60
        while (lives := runs(worker)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if lives:
            os.kill(worker, signal.SIGKILL)
        assert not lives
