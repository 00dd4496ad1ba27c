"""seqloom translate"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from seqloom.errors import DialectError

if TYPE_CHECKING:
    from seqloom.dialects import Translation


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
    typer.echo(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: "Translation") -> list[str]:
    """The translation for people: the plan, what is trained, and a line for each option."""
    said = {key: value for key, value in found.train.items() if value not in (None, {}, "none")}
    lines = [f"Plan: '{found.plan}' on {found.world_size} processes."]
    lines += [f"Model: {json.dumps(found.model)}"] if found.model else ["Model: not known from these settings."]
    lines.append(f"Training: {json.dumps(said)}")
    for verdict in ("changed", "mapped", "no effect"):
        notes = [note for note in found.notes if note.verdict == verdict]
        lines += ["", f"{verdict.capitalize()}:"] if notes else []
        for note in notes:
            value = "" if note.value is None or note.value is True else f" {_short(note.value)}"
            lines.append(f"  {note.option}{value}: {note.why}")
    return lines


def _short(value: object) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
