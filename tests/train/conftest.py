"""Runs that several tests look at; none may change them."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pool import Pool
from seqloom.train import Summary
from train.runs import run_file, write_config


@dataclass(frozen=True)
class Finished:
    """A run that was never stopped: its YAML file, its folder and how it ended."""

    config: Path
    folder: Path
    summary: Summary


@pytest.fixture(scope="session")
def finished(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """12 steps on ring=2, with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder)
    return Finished(config, folder / "run", run_file(pool, config, "run.keep=3"))


@pytest.fixture(scope="session")
def long_run(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """80 steps on ring=2: long enough to be stopped in the middle."""
    folder = tmp_path_factory.mktemp("long")
    config = write_config(folder, steps=80, save_every=10)
    return Finished(config, folder / "run", run_file(pool, config))
