"""The command line. Each command is a thin face of a Python function."""

import sys
import traceback
from typing import Annotated

import typer

from seqloom import __version__
from seqloom.cli.export import export
from seqloom.cli.plan import plan
from seqloom.cli.report import report
from seqloom.cli.train import REFUSED, train
from seqloom.cli.translate import translate
from seqloom.cli.verify import verify
from seqloom.errors import SeqloomError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (train, verify, plan, report, export):
    app.command()(command)
# Flags of another system pass through as they are; none of them is an option of this command.
app.command(context_settings={"ignore_unknown_options": True})(translate)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"seqloom {__version__}")
        raise typer.Exit


@app.callback()
def seqloom_command(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Train transformers on very long sequences, split over devices and equal to one device."""


def main() -> None:
    """Run the command line; an error is one sentence, with its traceback only after --debug."""
    debug = "--debug" in sys.argv
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app()
    except SeqloomError as error:
        if debug:
            traceback.print_exception(error)
            print(getattr(error, "trace", ""), file=sys.stderr)
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
