"""What a run shows while it runs, and the metrics it leaves."""

import json
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl.

    loss: nats per label token. label_tokens: of the step, on all ranks. tokens_per_second: tokens
    of all sequences of the step over its wall time. sent_bytes: what rank 0 sent in the step, by
    mesh axis. loss_scale: of float16. gradient_norm: None where it overflowed and the weights stayed as they were.
    evaluation_loss: nats per label token of the held-out text, after the step.
    """

    step: int
    loss: float
    gradient_norm: float | None
    learning_rate: float
    label_tokens: int
    seconds: float
    tokens_per_second: float
    sent_bytes: dict[str, int]
    loss_scale: float | None = None
    evaluation_loss: float | None = None


_ALWAYS = [field.name for field in fields(Metrics) if field.default is MISSING]
"""Fields of every line; the others stand where there is something to say."""


class MetricsFile:
    """metrics.jsonl of a run folder; a line is on disk when its step is over."""

    def __init__(self, path: Path, steps_kept: int) -> None:
        """Open for appending after `steps_kept` steps; lines of later steps, to be taken again, are dropped."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept = path.with_suffix(".kept")  # replaced whole, so that a kill in between loses no line
        kept.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= steps_kept), encoding="utf-8")
        kept.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        """Add a line. Floats are written so that they read back exactly."""
        self._file.write(
            json.dumps({key: value for key, value in asdict(metrics).items() if key in _ALWAYS or value is not None})
            + "\n"
        )
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def _step_of(line: str) -> float:
    """The step a line tells of; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")


class Display:
    """A progress bar on a terminal; elsewhere a line at the start, every ten seconds, and at the end."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._console = Console(file=sys.stdout)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done, loss=float("nan"), speed=0.0)
        self._printed = 0.0
        self._started, self._first = monotonic(), done

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, metrics: Metrics) -> None:
        """Tell of a step."""
        self._bar.update(
            self._task, completed=metrics.step, loss=metrics.loss, speed=metrics.tokens_per_second, refresh=True
        )
        due = monotonic() - self._printed > SECONDS_BETWEEN_LINES or metrics.step == self._total
        if not self._console.is_terminal and due:
            self._printed = monotonic()
            rest = (self._printed - self._started) / (metrics.step - self._first) * (self._total - metrics.step)
            self.say(
                f"step {metrics.step}/{self._total}  loss {metrics.loss:.4f}  "
                f"{metrics.tokens_per_second:,.0f} tokens/s  {rest:.0f} s left"
            )

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
