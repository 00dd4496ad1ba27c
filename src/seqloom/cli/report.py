"""seqloom report"""

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="The run.folder of a training run.")]) -> None:
    """Write report.html of a training run: one page that needs nothing else."""
    from seqloom.report import read_folder, write_report

    typer.echo(f"Wrote {write_report(folder)}.")
    run = read_folder(folder)
    if run.verdict is None or run.verdict_plan != run.plan:
        typer.echo(f"Whether '{run.plan}' equals one device is not verified yet; the page says how.")
    else:
        outcome = "equals" if run.verdict.equal else "DIFFERS FROM"
        typer.echo(
            f"'{run.plan}' {outcome} one device in {run.verdict.dtype}: loss error {run.verdict.loss_error:.1e}, "
            f"worst gradient error {run.verdict.worst_gradient_error:.1e}."
        )
