"""Whether tests of a shell script hold, as far as their words are known."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from seqloom.dialects.shell_values import compare, marked


def holds(words: Sequence[str]) -> bool | None:
    """Whether [ words ], [[ words ]] or test words holds; None where that is not known here.

    >>> holds(["[", "1", "-eq", "1", "-a", "a", "=", "b", "]"]), holds(["[[", "a", "==", "a", "||", "-f", "x", "]]"])
    (False, True)
    """
    closing = {"[": "]", "[[": "]]"}.get(words[0])
    if closing and words[-1] != closing:
        return None
    inside, double = list(words[1:-1] if closing else words[1:]), words[0] == "[["
    if "(" in inside or ")" in inside:
        return None
    either, both = ("||", "&&") if double else ("-o", "-a")
    if len(inside) <= 3 and not double:  # too few words for two tests
        return _one(inside, double)
    return _any(_split(inside, either), lambda part: _all(_split(part, both), lambda one: _one(one, double)))


def matches(word: str, pattern: str) -> bool | None:
    """Whether a word is one that a pattern of `case` stands for; None where that is not known here."""
    if pattern == "*":
        return True
    if marked(word) or marked(pattern) or re.search(r"[@+!?*]\(", pattern):
        return None
    return fnmatchcase(word, pattern.replace("[^", "[!"))


def _split(words: Sequence[str], sign: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == sign:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _any(parts: Sequence[list[str]], test: Callable[[list[str]], bool | None]) -> bool | None:
    found = [test(part) for part in parts]
    return True if True in found else None if None in found else False


def _all(parts: Sequence[list[str]], test: Callable[[list[str]], bool | None]) -> bool | None:
    found = [test(part) for part in parts]
    return False if False in found else None if None in found else True


def _one(inside: list[str], double: bool) -> bool | None:
    """Whether one test holds."""
    if any(map(marked, inside)):
        return None
    if inside[:1] == ["!"] and len(inside) > 1:
        held = _one(inside[1:], double)
        return None if held is None else not held
    if len(inside) == 1:
        return inside[0] != ""
    if len(inside) == 2 and inside[0] in ("-z", "-n"):
        return (inside[1] == "") == (inside[0] == "-z")
    if len(inside) != 3:
        return None
    left, sign, right = inside
    if double and sign in ("==", "=", "!="):
        held = matches(left, right)
        return None if held is None else held is not (sign == "!=")
    if sign.startswith("-"):
        numbers = [int(one) for one in (left, right) if re.fullmatch(r"-?\d{1,18}", one)]
        return compare(numbers[0], sign, numbers[1]) if len(numbers) == 2 else None
    return compare(left, sign, right)
