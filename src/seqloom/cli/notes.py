"""What became of another system's settings, for people."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from seqloom.errors import counted

if TYPE_CHECKING:
    from seqloom.dialects import Note, Translation


def translation_lines(found: "Translation") -> list[str]:
    """A translation: the plan, what is trained, and a line for each option."""
    said = {key: value for key, value in found.train.items() if value not in (None, {}, "none")}
    lines = [f"Plan: '{found.plan}' on {counted(found.world_size, 'process')}."]
    lines += [f"Model: {json.dumps(found.model)}"] if found.model else ["Model: not known from these settings."]
    lines.append(f"Training: {json.dumps(said)}")
    for verdict in ("changed", "mapped", "no effect"):
        notes = [note for note in found.notes if note.verdict == verdict]
        lines += ["", f"{verdict.capitalize()}:"] if notes else []
        lines += note_lines(notes)
    return lines


def note_lines(notes: Sequence["Note"]) -> Iterator[str]:
    """A line for each note."""
    for note in notes:
        value = "" if note.value is None or note.value is True else f" {_short(_as_given(note))}"
        yield f"  {note.option}{value}: {note.why}"


def _as_given(note: "Note") -> object:
    """A flag's several values as a command line has them."""
    flag = note.option.startswith("--") and isinstance(note.value, list | tuple)
    return " ".join(map(str, note.value)) if flag else note.value


def _short(value: object) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
