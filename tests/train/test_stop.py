"""Runs that end early: by a signal, by the death of a rank, under the command line's own launcher and torchrun."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest

from pool import Pool
from train.conftest import Finished
from train.runs import children, metrics, ranks, run_file, started, wait_for

TRAIN = "seqloom.cli.main", "train"
TORCHRUN = "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *TRAIN


def resumed(pool: Pool, long_run: Finished, folder: Path) -> None:
    """Go on to the end: the same numbers as the run that was never stopped, each step once."""
    run_file(pool, long_run.config, f"run.folder={folder}", resume=True)
    assert metrics(folder) == metrics(long_run.folder)
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        long_run.folder / "model" / "model.safetensors"
    ).read_bytes()


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_killed_rank(pool: Pool, long_run: Finished, tmp_path: Path) -> None:
    """Catches ranks that wait for a dead one, an error that does not say which, and a resumed run that differs in
    the last bit: lost moments, another order of the data, steps told twice."""
    with started(*TRAIN, str(long_run.config), f"run.folder={tmp_path}") as process:
        wait_for(tmp_path / "checkpoints" / "step-000010", process)
        os.kill(ranks(process.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - killed < 30
    assert process.returncode == 2
    assert err.strip() == "Error: rank 1 was killed by SIGKILL (often: out of memory)"
    assert checkpoints(tmp_path)[-1] < 80 and not (tmp_path / "model").exists()
    resumed(pool, long_run, tmp_path)


def to_launcher(number: int) -> Callable[[Popen[str]], None]:
    return lambda process: os.kill(process.pid, number)


def to_group(number: int) -> Callable[[Popen[str]], None]:
    return lambda process: os.killpg(process.pid, number)


@pytest.mark.parametrize(
    "stop",
    [to_launcher(signal.SIGTERM), to_launcher(signal.SIGINT), to_group(signal.SIGINT)],
    ids=["SIGTERM", "SIGINT", "Ctrl-C in a terminal"],
)
def test_asked_to_stop(pool: Pool, long_run: Finished, tmp_path: Path, stop: Callable[[Popen[str]], None]) -> None:
    """Catches work that is lost, a save that a second signal cuts short, ranks that disagree about the last step,
    and a status that tells a cluster the job failed."""
    command = (*TRAIN, str(long_run.config), f"run.folder={tmp_path}", "run.save_every=null")
    with started(*command) as process:
        wait_for(tmp_path / "metrics.jsonl", process)
        time.sleep(0.1)
        stop(process)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    told = re.fullmatch(
        r"Stopped and saved at step (\d+) of 80; the same command with --resume goes on\.", out.splitlines()[-1]
    )
    assert told is not None, out
    step = int(told[1])
    assert step < 80
    assert checkpoints(tmp_path) == ([step] if step else [])
    assert metrics(tmp_path) == metrics(long_run.folder)[:step]
    resumed(pool, long_run, tmp_path)


def test_stopped_again(pool: Pool, long_run: Finished, tmp_path: Path) -> None:
    """Catches a run that can be resumed once only, or that saves a step it did not take when stopped at once."""
    shutil.copytree(long_run.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000080")
    shutil.rmtree(tmp_path / "model")
    with started(*TRAIN, str(long_run.config), f"run.folder={tmp_path}", "train.steps=100000", "--resume") as process:
        while len((tmp_path / "metrics.jsonl").read_text().splitlines()) != 72:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("train.steps was 80 when the checkpoint was written and is 100000 now.\n")
    assert checkpoints(tmp_path)[0] >= 70


def test_torchrun(pool: Pool, long_run: Finished, tmp_path: Path) -> None:
    """Catches processes started inside processes, numbers that depend on the launcher, lines said once a rank, and
    torchrun's SIGTERM, which reaches every rank, taken for the end of the run."""
    with started(*TORCHRUN, str(long_run.config), f"run.folder={tmp_path}") as process:
        wait_for(tmp_path / "checkpoints" / "step-000010", process)
        assert not any(children(rank) for rank in children(process.pid))
        os.kill(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    step = checkpoints(tmp_path)[-1]
    assert step < 80
    assert out.count("2 processes") == 1
    assert out.count(f"Stopped and saved at step {step} of 80; the same command with --resume goes on.") == 1
    assert metrics(tmp_path) == metrics(long_run.folder)[:step]
    with started(*TORCHRUN, str(long_run.config), f"run.folder={tmp_path}", "--resume") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("Trained 80 steps.") == 1
    assert metrics(tmp_path) == metrics(long_run.folder)


def test_torchrun_with_another_number_of_processes(long_run: Finished, tmp_path: Path) -> None:
    """Catches a plan that runs on part of the processes, or waits for ones that were never started."""
    with started(*TORCHRUN, str(long_run.config), f"run.folder={tmp_path / 'x'}", "plan=ring=4") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "The plan 'ring=4' takes 4 processes, but there are 2." in err
    assert not (tmp_path / "x").exists()
