"""seqloom export"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run: its newest one.")],
    out: Annotated[Path, typer.Argument(help="An empty folder, or one to be made.")],
    best: Annotated[
        bool, typer.Option("--best", help="Of a run, the checkpoint with the lowest evaluation loss.")
    ] = False,
) -> None:
    """Write a checkpoint's weights as from_pretrained and model.path load them; one process, whatever the plan was."""
    from seqloom.train import export as write

    step, notes = write(source, out, marked=best)
    for note in notes:
        typer.echo(note)
    typer.echo(f"The weights of step {step} are in {out}.")
