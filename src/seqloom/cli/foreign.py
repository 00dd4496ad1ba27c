"""seqloom train --from"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from seqloom.cli.notes import note_lines, translation_lines
from seqloom.dialects import DIALECTS, notes_as_json, translate
from seqloom.errors import ConfigError, counted
from seqloom.fabric.launch import launched
from seqloom.train import Config, Scale, translated

SCALES: tuple[Scale, ...] = ("tiny", "full")

_OVERRIDE = re.compile(r"([a-z_]+(\.\w+)+|plan|curriculum)=")


@dataclass(frozen=True)
class Foreign:
    """A run that other settings describe: its configuration, what is said of it, and what is kept with it."""

    config: Config
    lines: tuple[str, ...]
    record: dict[str, Any]

    def keep(self) -> None:
        """Write translation.json, every option and what became of it, and config.yaml, which trains without --from."""
        folder = self.config.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "translation.json").write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        (folder / "config.yaml").write_text(text, encoding="utf-8")


def read(
    dialect: str, words: Sequence[str], *, scale: str | None, world: int | None, version: str | None, keep_order: bool
) -> Foreign:
    """The run of another system's settings; words of the form section.key=value are overrides, wherever they stand."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    settings = [word for word in words if not _OVERRIDE.match(word)]
    size: Scale = "full"
    if scale is not None:
        if scale not in SCALES:
            raise ConfigError(f"--scale is '{scale}'; it is one of {', '.join(SCALES)}.")
        size = "tiny" if scale == "tiny" else "full"
    if dialect in DIALECTS and not settings:
        raise ConfigError(f"--from {dialect} has nothing to read; give the path of a file, or flags after --.")
    joined = launched()
    # At reduced size the launcher's processes are those of the reduced plan.
    theirs = world if world is not None or size == "tiny" else joined
    found = translate(dialect, settings, world=theirs, version=version, keep_order=keep_order)
    run = translated(dialect, found, overrides, scale=size, world=joined)
    config, train = run.config, run.config.train
    lines = ["Translation", *translation_lines(found), "", "This run:", *note_lines(run.notes)]
    lines.append(
        f"  '{config.plan}' on {counted(config.plan.world_size, 'process')}; {counted(train.steps, 'step')} of "
        f"{counted(train.batch, 'sequence')} of {counted(config.data.sequence_length, 'token')}, {train.micro_batch} "
        f"at a time; {train.precision}, recompute={config.plan.recompute}."
    )
    lines.append(
        f"  All of it is in {config.run.folder}: translation.json, and config.yaml, which trains without --from."
    )
    record = {
        "dialect": dialect,
        "settings": settings,
        "overrides": overrides,
        "scale": size,
        **found.as_json(),
        "run": notes_as_json(run.notes),
    }
    return Foreign(config, tuple([*lines, ""]), record)
