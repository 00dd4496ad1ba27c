"""seqloom train"""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seqloom.errors import ConfigError, SeqloomError, counted

if TYPE_CHECKING:
    from seqloom.train import Config, Summary

REFUSED = 2
"""Exit status of anything refused with a reason; 1 means that a check ran and failed."""


def train(
    config: Annotated[str, typer.Argument(help="A YAML file; see docs/training.md. With --from, a file or flags.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, replacing the file's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dialect: Annotated[
        str | None,
        typer.Option("--from", help="Run settings of colossalai, mindformers or megatron (flags after --)."),
    ] = None,
    scale: Annotated[
        str | None, typer.Option("--scale", help="With --from: tiny keeps the plan's axes, and reduces all sizes.")
    ] = None,
    world: Annotated[
        int | None, typer.Option("--world", help="With --from: processes there are, where the file leaves it open.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--dialect-version", help="With --from: of their system, where versions differ.")
    ] = None,
    keep_order: Annotated[
        bool, typer.Option("--keep-rank-order", help="With --from: keep their rank order too, or refuse.")
    ] = False,
) -> None:
    """Train a model on text, its sequences split as the plan says.

    Starts its own processes on this machine, or joins those of torchrun or Slurm's srun. Ctrl-C saves and leaves.
    """
    from seqloom.train import load_config, prepare

    if dialect is None:
        _refuse_alone(
            {"--scale": scale, "--world": world, "--dialect-version": version, "--keep-rank-order": keep_order}
        )
        settings, made = load_config(Path(config), overrides or []), None

    # What starts processes loads after the settings are read, so that a mistake in them is told at once.
    from seqloom.fabric.launch import launched, speaks

    try:
        if dialect is not None:
            from seqloom.cli.foreign import read

            words = [config, *(overrides or [])]
            made = read(dialect, words, scale=scale, world=world, version=version, keep_order=keep_order)
            settings = made.config
        notes = prepare(settings, resume=resume, world=launched())
    except SeqloomError:
        if speaks():
            raise
        raise typer.Exit(REFUSED) from None  # all ranks are refused alike, and one of them says why
    if speaks():
        if made is not None:
            made.keep()
        for line in (*(made.lines if made is not None else ()), *notes):
            typer.echo(line)
        typer.echo(f"Reading the text and starting '{settings.plan}' ...")
    summary = _run(settings, resume)
    if speaks():
        typer.echo(_told(summary))


def _refuse_alone(options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{given[0]} is for settings of another system; say whose with --from, or leave it out.")


def _run(settings: "Config", resume: bool) -> "Summary":
    """Train phase after phase, in processes of its own or as one of a launcher's."""
    from seqloom.fabric.launch import distributed, launched, run_local, speaks
    from seqloom.train import remaining, steps_taken
    from seqloom.train import train as run

    timeout, world = settings.run.timeout_seconds, launched()
    phases = remaining(settings, steps_taken(settings) if resume else 0)
    # Processes that a launcher started meet once: its store knows the addresses of their first meeting for good.
    with distributed(timeout) if world is not None else nullcontext():
        for stretch in phases:
            if settings.curriculum and speaks():
                length = stretch.config.data.sequence_length
                typer.echo(
                    f"Until step {stretch.until}: '{stretch.config.plan}', sequences of {counted(length, 'token')}."
                )
            if world is not None:
                summary = run(settings, resume, stretch)
            else:
                processes = stretch.config.plan.world_size
                summary = run_local(processes, run, settings, resume, stretch, timeout_seconds=timeout)[0]
            resume = True  # each phase goes on from the checkpoint at the end of the one before
            if summary.stopped:
                break
    return summary


def _told(summary: "Summary") -> str:
    """How a run ended, in a sentence."""
    if summary.stopped and summary.step == 0:
        return "Stopped before the first step; there is nothing to save."
    if summary.stopped:
        return f"Stopped and saved at step {summary.step} of {summary.steps}; the same command with --resume goes on."
    if summary.loss is None:
        return f"Nothing is left of {counted(summary.steps, 'step')}; raise train.steps to train on."
    against = "below" if summary.loss < summary.unigram_entropy else "above"
    return (
        f"Trained {counted(summary.step, 'step')}. Mean loss of the last {summary.averaged}: {summary.loss:.3f} nats, "
        f"{against} the text's unigram entropy of {summary.unigram_entropy:.3f}. "
        f"Metrics, checkpoints and the model are in {summary.folder}."
    )
