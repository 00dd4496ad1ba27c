"""A dated record of a measurement: JSON for machines, a short table for people. No paths, no host names."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
PACKAGES = ("seqloom", "torch", "transformers", "deepspeed", "megatron-core", "flash-attn")
BUSY = 0.05
"""The share of the processors that other programs may take before a machine counts as busy."""

SAMPLE_SECONDS = 0.5


def command_line(arguments: Sequence[str]) -> str:
    """The command line of a program of this folder, without the folder its record went to."""
    said: list[str] = []
    skipping = False
    for argument in arguments[1:]:
        if not skipping and argument != "--out" and not argument.startswith("--out="):
            said.append(argument)
        skipping = argument == "--out"
    return " ".join(["python -m", f"benchmarks.{Path(arguments[0]).stem}", *said])


def machine_here() -> dict[str, Any]:
    """The processor, how much of it there is, and the GPU if there is one."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
    }


def cores() -> int:
    """The processors this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_seconds() -> float | None:
    """Seconds that all processors together have worked since the machine started, time taken by its host included.

    None where the system does not say.
    """
    try:
        said = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, *others = (int(ticks) for ticks in said[1:9])
    return sum((user, nice, system, *others)) / os.sysconf("SC_CLK_TCK")


def others_share() -> float | None:
    """The share of the processors that others take while this program sleeps for half a second."""
    before = busy_seconds()
    time.sleep(SAMPLE_SECONDS)
    after = busy_seconds()
    return None if before is None or after is None else (after - before) / (SAMPLE_SECONDS * cores())


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
    name = said.get("model name", platform.machine())
    # Cloud machines name no model; family and model number then tell the generation.
    return f"{name} (family {said['cpu family']} model {said['model']})" if "cpu family" in said else name


def _gpu() -> str | None:
    torch = sys.modules.get("torch")  # a program without torch has none to ask
    return torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None


def versions_here() -> dict[str, str]:
    """Python's version and those of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if "seqloom" not in found:
        import seqloom

        found["seqloom"] = seqloom.__version__
    return found


def commit_here() -> str:
    """The commit of the working tree, `-dirty` when files differ from it, or 'unknown'."""
    try:
        ended = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return ended.stdout.strip()


@dataclass
class Record:
    """One run of one program.

    name: of the program. command: what to type to run it again. machine, versions: see `machine_here`, `versions_here`.
    settings: what was asked for. rows: the raw figures, units in their names. notes: sentences a reader needs.
    timed: whether a busy machine spoils the figures.
    """

    name: str
    settings: dict[str, Any]
    command: str = field(default_factory=lambda: command_line(sys.argv))
    written: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    machine: dict[str, Any] = field(default_factory=machine_here)
    versions: dict[str, str] = field(default_factory=versions_here)
    commit: str = field(default_factory=commit_here)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timed: bool = True

    def __post_init__(self) -> None:
        if self.timed:
            self.doubt(others_share(), "before the start")

    def doubt(self, share: float | None, when: str) -> None:
        """Note that others took this share of the processors, if it is more than figures bear."""
        if share is not None and share > BUSY:
            self.notes.append(
                f"Other programs took {share:.0%} of the processors {when}, so the times are not to be trusted; run it "
                "again on a quiet machine."
            )

    def write(self, text: str, folder: Path = RECORDS) -> Path:
        """Write <date>-<name>.json and .md into `folder`, over those of the same day; returns the second.

        text: the body of the page, usually tables.
        """
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"{self.written[:10]}-{self.name}"
        stem.with_suffix(".json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        page = stem.with_suffix(".md")
        page.write_text("\n\n".join([*self._head(), text, *self.notes]) + "\n", encoding="utf-8")
        return page

    def _head(self) -> list[str]:
        where = ", ".join(str(value) for value in (self.machine["cpu"], f"{self.machine['cores']} cores"))
        where += f", {self.machine['gpu']}" if self.machine["gpu"] else ""
        which = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return [f"# {self.name}, {self.written}", f"`{self.command}`", f"{where}; {which}; commit {self.commit}."]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table; None reads as a dash.

    >>> print(table(["a", "b"], [[1, None]]))
    | a | b |
    |---|---|
    | 1 | - |
    """
    lines = [head, ["---"] * len(head), *rows]
    cells = [["-" if cell is None else str(cell) for cell in line] for line in lines]
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in cells)
