"""seqloom translate"""

import json
from typing import Annotated

import typer

from seqloom.cli.notes import translation_lines
from seqloom.errors import DialectError


def translate(
    dialect: Annotated[str, typer.Argument(help="colossalai, mindformers or megatron.")],
    settings: Annotated[list[str], typer.Argument(help="A file of theirs, or their flags (after --).")],
    world: Annotated[
        int | None, typer.Option("--world", help="Processes there are, where the file leaves it open.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--dialect-version", help="Of their system, where versions differ: core_r0.8.0.")
    ] = None,
    keep_order: Annotated[
        bool, typer.Option("--keep-rank-order", help="Keep their rank order too, or refuse; degrees are always kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all as JSON.")] = False,
) -> None:
    """Read another system's settings as a plan, and say of every option what becomes of it.

    Reads only: no file is run, no process started, and torch is not loaded.
    """
    from seqloom import dialects

    try:
        found = dialects.translate(dialect, settings, world=world, version=version, keep_order=keep_order)
    except DialectError as error:
        if as_json:
            notes = dialects.notes_as_json(error.notes)
            typer.echo(
                json.dumps({"plan": None, "world_size": None, "model": None, "train": None, "notes": notes}, indent=2)
            )
        raise
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(translation_lines(found)))
