"""seqloom train"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqloom.errors import SeqloomError

if TYPE_CHECKING:
    from seqloom.train import Summary

REFUSED = 2
"""Exit status of anything refused with a reason; 1 means that a check ran and failed."""


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see docs/training.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, replacing the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train a model on text, its sequences split as the plan says.

    Starts its own processes on this machine, or joins those of torchrun or Slurm's srun. Ctrl-C saves and leaves.
    """
    from seqloom.train import load_config, prepare, remaining, steps_taken
    from seqloom.train import train as run

    settings = load_config(config, overrides or [])

    # What starts processes loads after the settings are read, so that a mistake in them is told at once.
    from seqloom.fabric.launch import distributed, launched, run_local, speaks

    world = launched()
    try:
        notes = prepare(settings, resume=resume, world=world)
    except SeqloomError:
        if speaks():
            raise
        raise typer.Exit(REFUSED) from None  # all ranks are refused alike, and one of them says why
    for note in notes if speaks() else ():
        typer.echo(note)
    if speaks():
        typer.echo(f"Reading the text and starting '{settings.plan}' ...")
    timeout = settings.run.timeout_seconds
    phases = remaining(settings, steps_taken(settings) if resume else 0)
    # Processes that a launcher started meet once: its store knows the addresses of their first meeting for good.
    with distributed(timeout) if world is not None else nullcontext():
        for stretch in phases:
            if settings.curriculum and speaks():
                length = stretch.config.data.sequence_length
                typer.echo(f"Until step {stretch.until}: '{stretch.config.plan}', sequences of {length:,} tokens.")
            if world is not None:
                summary = run(settings, resume, stretch)
            else:
                processes = stretch.config.plan.world_size
                summary = run_local(processes, run, settings, resume, stretch, timeout_seconds=timeout)[0]
            resume = True  # each phase goes on from the checkpoint at the end of the one before
            if summary.stopped:
                break
    if speaks():
        typer.echo(_told(summary))


def _told(summary: "Summary") -> str:
    """How a run ended, in a sentence."""
    if summary.stopped and summary.step == 0:
        return "Stopped before the first step; there is nothing to save."
    if summary.stopped:
        return f"Stopped and saved at step {summary.step} of {summary.steps}; the same command with --resume goes on."
    if summary.loss is None:
        return f"All {summary.steps} steps were taken already; raise train.steps to train on."
    against = "below" if summary.loss < summary.unigram_entropy else "above"
    return (
        f"Trained {summary.step} steps. Mean loss of the last {summary.averaged}: {summary.loss:.3f} nats, "
        f"{against} the text's unigram entropy of {summary.unigram_entropy:.3f}. "
        f"Metrics, checkpoints and the model are in {summary.folder}."
    )
