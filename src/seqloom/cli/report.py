"""seqloom report"""

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="The run.folder of a training run.")]) -> None:
    """Write report.html of a training run: one page that needs nothing else."""
    from seqloom.report import write_report

    typer.echo(f"Wrote {write_report(folder)}.")
