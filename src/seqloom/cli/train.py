"""seqloom train"""

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; see docs/training.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, replacing the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train a model on text, its sequences split as the plan says.

    Starts its own processes on this machine, or joins those of torchrun. Ctrl-C saves and leaves.
    """
    from seqloom.train import load_config, prepare
    from seqloom.train import train as run

    settings = load_config(config, overrides or [])
    notes = prepare(settings, resume=resume)

    # torch loads only now, so that a mistake in the settings is told at once.
    from seqloom.fabric.launch import distributed, run_local, under_torchrun

    speaks = os.environ.get("RANK", "0") == "0"
    for note in notes if speaks else ():
        typer.echo(note)
    if under_torchrun():
        with distributed(settings.run.timeout_seconds):
            summary = run(settings, resume)
    else:
        world, timeout = settings.plan.world_size, settings.run.timeout_seconds
        summary = run_local(world, run, settings, resume, timeout_seconds=timeout)[0]
    if not speaks:
        return
    if summary.stopped:
        typer.echo(
            f"Stopped and saved at step {summary.step} of {summary.steps}; the same command with --resume goes on."
        )
    elif summary.loss == summary.loss:  # not NaN: at least one step was taken
        against = "below" if summary.loss < summary.unigram_entropy else "above"
        typer.echo(
            f"Trained {summary.step} steps. Loss of the last steps {summary.loss:.3f} nats, {against} the text's "
            f"unigram entropy of {summary.unigram_entropy:.3f}. Metrics, checkpoints and the model are in "
            f"{summary.folder}."
        )
    else:
        typer.echo(f"All {summary.steps} steps were taken already; raise train.steps to train on.")
