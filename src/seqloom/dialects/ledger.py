"""What a file of settings held, and what became of each option."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from seqloom.errors import DialectError

Verdict = Literal["mapped", "changed", "no effect", "refused"]

MOST_OPTIONS = 5_000
"""The most options that one file may hold."""

_MOST_BITS = 4096
"""Whole numbers beyond are told by their size: Python refuses to write them in digits."""


@dataclass(frozen=True)
class Note:
    """What became of one option; `value` is as it was given, None where it was left out."""

    option: str
    value: Any
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Unread:
    """A value that only running the program would tell: its text, and why it is not known here."""

    text: str
    why: str


class Ledger:
    """The options of a file, in its order, with a note for each that was looked at.

    Reading an option does not note it; `note` does. `close` notes those that nobody noted, so none vanishes.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        if len(given) > MOST_OPTIONS:
            raise DialectError(f"The settings hold {len(given):,} options; the most that are read is {MOST_OPTIONS:,}.")
        self.given = dict(given)
        self.notes: list[Note] = []
        self.reasons: list[str] = []
        self._said: set[tuple[str, str, str]] = set()
        self._noted: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def get(self, name: str, default: Any = None) -> Any:
        """The value as given. One that is not known here is refused, since the layout would depend on it."""
        value = self.given.get(name, default)
        if isinstance(value, Unread):
            self.refuse(name, f"{name} is {shown(value)}: {value.why}; write its value.")
            return default
        return value

    def whole(self, name: str, default: int = 1, *, least: int = 1, most: int = 10**15) -> int:
        """A whole number, given as such or as a word; `default` where it is absent, None or refused."""
        value = self.get(name)
        if value is None:
            return default
        number = as_whole(value)
        if value is True and name.startswith("-"):
            self.refuse(name, f"{name} is given without a value; it takes a whole number.")
            return default
        if number is None or not least <= number <= most:
            self.refuse(name, f"{name} is {shown(value)}, not a whole number from {least:,} to {most:,}.")
            return default
        return number

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number, or `default` where it is absent, None or refused."""
        value = self.get(name)
        if value is None:
            return default
        try:
            number = float(value) if isinstance(value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            self.refuse(name, f"{name} is {shown(value)}, not a number.")
            return default
        return number

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false, also as a word."""
        value = self.get(name)
        if value is None:
            return default
        known = {"true": True, "false": False, "1": True, "0": False, "": True}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in known:
            self.refuse(name, f"{name} is {shown(value)}; it is true or false.")
            return default
        return known[str(value).lower()]

    def word(self, name: str, choices: Sequence[str], default: str | None = None) -> str | None:
        """One of a few words."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            close = get_close_matches(str(value), choices, 1)
            guess = f" (did you mean '{close[0]}'?)" if close else ""
            self.refuse(name, f"{name} is {shown(value)}; it is one of {', '.join(choices)}{guess}.")
            return default
        return value

    def note(self, name: str, verdict: Verdict, why: str, *, value: Any = None) -> None:
        """Say what became of an option; the same is not said twice."""
        if (name, verdict, why) not in self._said:
            self._said.add((name, verdict, why))
            self._noted.add(name)
            self.notes.append(Note(name, plain(self.given.get(name, value)), verdict, why))

    def mapped(self, why: str, *names: str) -> None:
        """Note those of `names` that were given."""
        self.each("mapped", why, names)

    def changed(self, why: str, *names: str) -> None:
        """Note those of `names` that were given."""
        self.each("changed", why, names)

    def no_effect(self, why: str, *names: str) -> None:
        """Note those of `names` that were given."""
        self.each("no effect", why, names)

    def each(self, verdict: Verdict, why: str, names: Sequence[str]) -> None:
        """Note those of `names` that were given, with the same verdict."""
        for name in names:
            if name in self.given:
                self.note(name, verdict, why)

    def refuse(self, name: str, why: str) -> None:
        """Note a refusal; the translation ends with all of them."""
        self.note(name, "refused", why)
        if why not in self.reasons:
            self.reasons.append(why)

    def noted(self, name: str) -> bool:
        """Whether an option has a note already."""
        return name in self._noted

    def close(self, why: Callable[[str], tuple[Verdict, str]]) -> None:
        """Note every option that has none: `why` gives its verdict and the reason."""
        for name in self.given:
            if name not in self._noted:
                self.note(name, *why(name))

    def stop(self) -> None:
        """Raise DialectError if anything was refused."""
        if self.reasons:
            raise DialectError(self.reasons, self.notes)


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, Unread):
        return value.text
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a whole number of {value.bit_length():,} bits"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value)


def as_whole(value: Any) -> int | None:
    """The whole number that a value or word stands for, digits grouped by underscores too; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        return int(value) if not isinstance(value, float) or value.is_integer() else None
    except (ValueError, OverflowError):
        return None


def shown(value: Any) -> str:
    """A value in a sentence, short."""
    text = value.text if isinstance(value, Unread) else str(plain(value))
    text = " ".join(text.split())
    return f"'{text if len(text) <= 60 else text[:57] + '...'}'"


def flatten(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf of nested sections; lists are leaves."""
    stack: list[tuple[str, Any]] = [("", values)]
    count = 0
    while stack:
        path, value = stack.pop()
        count += _elements(value, MOST_OPTIONS - count)
        if isinstance(value, Mapping) and (value or not path):
            inner = [(f"{path}.{plain(key)}" if path else str(plain(key)), each) for key, each in value.items()]
            stack.extend(reversed(inner))
        else:
            yield path, value
        count += 1
        if count > MOST_OPTIONS:
            raise DialectError(f"The settings hold more than {MOST_OPTIONS:,} options; give the file of one run.")


def _elements(value: Any, most: int) -> int:
    """The elements of nested lists, those in them counted as often as they are repeated; at most one above `most`."""
    count, stack = 0, [value] if isinstance(value, (list, tuple, set)) else []
    while stack and count <= most:
        inner = stack.pop()
        if isinstance(inner, (list, tuple, set)):
            count += len(inner)
            stack.extend(inner)
        elif isinstance(inner, Mapping):
            count += len(inner)
            stack.extend(inner.values())
    return count
