"""Small training runs that tests start, stop and compare."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pool import Pool
from seqloom.train import Config, Summary, load_config, prepare, train

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "looms",
    "weave",
    "rings",
)
CLOCKS = ("seconds", "tokens_per_second")
"""Fields of metrics.jsonl that differ from run to run."""


def write_text(path: Path, lines: int = 200) -> Path:
    """A text with something to learn, the same every time."""
    draw = random.Random(1)
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=9)) for _ in range(lines)), encoding="utf-8")
    return path


def write_config(folder: Path, *, steps: int = 12, save_every: int | None = 4, accumulate: int | None = 2) -> Path:
    """config.yaml for a text beside it; the run goes to `folder`/run. accumulate: None leaves it unsaid."""
    text = write_text(folder / "text.txt")
    path = folder / "config.yaml"
    values: dict[str, Any] = {
        "plan": "ring=2",
        "model": {"path": "llama", "config": {"vocab_size": 257}},
        "data": {"files": [str(text)], "sequence_length": 64},
        "train": {"steps": steps, "batch": 4, "accumulate": 2, "learning_rate": 5e-3, "warmup_steps": 2},
        "run": {"folder": str(folder / "run"), "save_every": save_every, "timeout_seconds": 60},
    }
    if accumulate is None:
        del values["train"]["accumulate"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def run(pool: Pool, config: Config, *, resume: bool = False) -> Summary:
    """Train as the command line does, in the workers of the session."""
    prepare(config, resume=resume)
    summary: Summary = pool.run(config.plan.world_size, train, config, resume)[0]
    return summary


def run_file(pool: Pool, path: Path, *overrides: str, resume: bool = False) -> Summary:
    """`run` of a YAML file and overrides."""
    return run(pool, load_config(path, overrides), resume=resume)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says, floats as exact as they are written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def environment() -> dict[str, str]:
    """For a process of the command line: it computes with one thread, as the session's workers do."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program in a process group of its own, as a terminal starts it; none of it outlives the test."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the path exists; the process must still be running then."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path.name} in {seconds} s"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The processes that `pid` started, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks(launcher: int) -> list[int]:
    """The process ids of a local run's ranks, in rank order: the children of the launcher's nursery."""
    [found] = [grandchildren for child in children(launcher) if (grandchildren := children(child))]
    return found
