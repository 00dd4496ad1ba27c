"""`colossalai.launch` and what stands around it."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import set_seed

from seqloom.compat.colossalai.state import LOGGER, PROCESS, Config, tell
from seqloom.dialects import Note
from seqloom.dialects.colossalai import translate_config
from seqloom.dialects.ledger import Unread
from seqloom.dialects.literals import Source
from seqloom.errors import ConfigError
from seqloom.fabric import Fabric


def get_default_parser() -> argparse.ArgumentParser:
    """A parser of the arguments that `launch` takes; what is not given is None, and the launcher says it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=str, help="path of a configuration file")
    parser.add_argument("--host", type=str, help="where the processes meet")
    parser.add_argument("--port", type=int, help="where the processes meet")
    parser.add_argument("--world_size", type=int, help="how many processes there are")
    parser.add_argument("--rank", type=int, help="which of them this one is")
    parser.add_argument("--local_rank", type=int, help="which of those on this machine this one is")
    parser.add_argument("--backend", type=str, help="chosen by the device; see launch")
    return parser


def launch(
    config: Mapping[str, Any] | str | Path | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    host: str | None = None,
    port: int | None = None,
    backend: str | None = None,
    local_rank: int | None = None,
    seed: int = 1024,
    verbose: bool = True,
) -> None:
    """Join the other processes, arrange them as the CONFIG says, and seed every generator, alike on all of them.

    config: a dict, or the path of a Python file, which is read and never run; without one a plugin arranges them.
    rank, world_size, host, port, local_rank: what the launcher says where they are None. backend: gloo for CPU
    tensors and NCCL for CUDA ones, whatever is asked for. Raises ConfigError for a second call, and where the
    arguments and the launcher contradict each other, DialectError for a CONFIG that cannot be honoured.
    """
    if PROCESS.launched:
        raise ConfigError("launch was called twice in one process; call it once, at the start of the program.")
    if isinstance(config, int):
        raise ConfigError("launch was given a number where config stands; name its arguments: launch(rank=...).")
    if not distributed.is_initialized():
        _meet({"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "MASTER_ADDR": host}, port)
        PROCESS.join()
    PROCESS.launched, PROCESS.seed = True, seed
    if backend not in (None, "gloo" if not torch.cuda.is_available() else "nccl"):
        LOGGER.info("backend: no effect. gloo carries CPU tensors and NCCL carries CUDA tensors.")
    set_seed(seed)
    if config is not None:
        _arrange(config)
    if verbose and distributed.get_rank() == 0:
        LOGGER.info("launched: %d processes, seed %d", distributed.get_world_size(), seed)


def launch_from_torch(
    config: Mapping[str, Any] | str | Path | None = None,
    backend: str | None = None,
    seed: int = 1024,
    verbose: bool = True,
) -> None:
    """`launch` with what torchrun says; a process that nobody launched is a world of its own."""
    if isinstance(config, str) and config in ("nccl", "gloo", "hccl"):  # their later releases take no config
        config, backend = None, config
    launch(config, backend=backend, seed=seed, verbose=verbose)


def _meet(given: Mapping[str, str | int | None], port: int | None) -> None:
    """Put what `launch` was given where a launcher would have put it."""
    named = {name: str(value) for name, value in {**given, "MASTER_PORT": port}.items() if value is not None}
    for name, value in named.items():
        said = os.environ.setdefault(name, value)
        if said != value and not name.startswith("MASTER"):  # the launcher's meeting place is where the others are
            raise ConfigError(f"launch was given {name.lower()}={value}, but the launcher says {said}; leave it out.")
    if "RANK" in named:
        os.environ.setdefault("LOCAL_RANK", str(int(named["RANK"]) % max(1, torch.cuda.device_count())))


_INITIALIZED = ("fp16", "zero", "clip_grad_norm", "gradient_accumulation", "gradient_handler", "model", "amp")
"""Sections that `colossalai.initialize` acts on there, which is not here."""


def _arrange(config: Mapping[str, Any] | str | Path) -> None:
    """Make the groups of a CONFIG, and keep it for the program."""
    if isinstance(config, str | Path):
        try:
            config = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"The configuration {config} cannot be read ({error}); give the path of a file."
            ) from error
    found = translate_config(config, world=distributed.get_world_size())
    PROCESS.config = _plain(config) if isinstance(config, str) else Config(config)
    tell((_for_a_program(note) for note in found.notes), distributed.get_rank())
    if found.plan.pipeline > 1 or (found.plan.attention_ring > 1 and found.plan.tensor == 1):
        raise ConfigError(
            f"The CONFIG means '{found.plan}', but the layers of compat.colossalai.nn are split by tensor parallelism "
            "alone; use a Booster with HybridParallelPlugin for pipelines and sequences."
        )
    PROCESS.fabric = Fabric.build(found.plan)
    PROCESS.alone = PROCESS.fabric.alone()


def _plain(text: str) -> Config:
    """The names of a file that stand for plain values."""
    source = Source.read(text)
    named = {name: source.value(node) for name, node in source.assignments() if name not in source.changed}
    return Config({name: value for name, value in named.items() if not isinstance(value, Unread)})


def _for_a_program(note: Note) -> Note:
    """A note as it is for a program with a loop of its own, which reads what is not about groups by itself."""
    section = note.option.partition(".")[0]
    if section in _INITIALIZED:
        why = "colossalai.initialize does it there, and is not here; do it in the program's loop."
        return replace(note, verdict="no effect", why=why)
    if section in PROCESS.config and section != "parallel":
        return replace(note, verdict="mapped", why="The program finds it in global_context.config.")
    return note
