"""What a script's tokens tell before they are followed: functions, names that loops change, tests of [[ ]]."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from seqloom.dialects.shell_words import Piece, Token, Word

ENDS = ("\n", ";", "&", "&&", "||", "|", ";;", "(", ")")
"""Operators that end a command."""

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(?:\[[^]]*\])?\+?=")
_RECKONED = re.compile(r"([A-Za-z_]\w*)\s*(?:\+\+|--|[-+*/%&|^]?=(?!=)|<<=|>>=)|(?:\+\+|--)\s*([A-Za-z_]\w*)")
_MOST_LOOPS = 100


def literal(word: Word) -> str | None:
    """The word, if it is plain text."""
    return word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else None


def joined_tests(found: Iterable[Token]) -> list[Token]:
    """Tokens with && and || as words inside [[ ]], where they join tests and end no command."""
    joined: list[Token] = []
    inside = False
    for token in found:
        if token.kind == "word":
            word = literal(token.word)
            inside = word == "[[" or (inside and word != "]]")
        elif token.text in ("\n", ";"):
            inside = False
        sign = inside and token.kind == "operator" and token.text in ("&&", "||", "(", ")")
        joined.append(Token("word", token.line, word=(Piece("text", token.text),)) if sign else token)
    return joined


def changed_in_loops(found: Sequence[Token]) -> dict[int, frozenset[str]]:
    """Names that each loop's body changes, by the identity of the token `do` that begins it."""
    changed: dict[int, frozenset[str]] = {}
    stack: list[tuple[int, set[str]]] = []
    for token in found:
        word = literal(token.word) if token.kind == "word" else None
        if word == "do" and len(stack) < _MOST_LOOPS:
            stack.append((id(token), set()))
        elif word == "done" and stack:
            begun, names = stack.pop()
            changed[begun] = frozenset(names)
            if stack:
                stack[-1][1].update(names)
        elif stack:
            stack[-1][1].update(_names(token))
    return changed


def _names(token: Token) -> list[str]:
    """Names that a word or array sets."""
    if token.kind == "array":
        return [token.text.rstrip("+=")]
    if token.kind != "word" or not token.word or token.word[0].kind != "text":
        return []
    text = token.word[0].text
    assigned = _ASSIGNED.match(text)
    if assigned and not token.word[0].quoted:
        return [assigned[1]]
    return [pair[0] or pair[1] for pair in _RECKONED.findall(text)] if token.word[0].quoted else []


@dataclass(frozen=True)
class Function:
    """A function: its name, and where its body begins and stops."""

    name: str
    start: int
    stop: int


def braces(found: Sequence[Token]) -> dict[int, int]:
    """Where each { of the tokens is closed."""
    closed: dict[int, int] = {}
    stack: list[int] = []
    for at, token in enumerate(found):
        word = literal(token.word) if token.kind == "word" else None
        if word == "{":
            stack.append(at)
        elif word == "}" and stack:
            closed[stack.pop()] = at
    return closed


def function_at(found: Sequence[Token], at: int, closed: Mapping[int, int]) -> Function | None:
    """The function whose definition begins here, as NAME() { ...; } or function NAME { ...; }.

    closed: as `braces` gives it.
    """
    name, place = literal(found[at].word) or "", at + 1
    if name == "function" and place < len(found):
        name, place = literal(found[place].word) or "", place + 1
    elif not _is(found, place, "("):
        return None
    if not _NAME.match(name):
        return None
    if _is(found, place, "(") and _is(found, place + 1, ")"):
        place += 2
    while _is(found, place, "\n"):
        place += 1
    return Function(name, place + 1, closed[place]) if place in closed else None


def handed_to_shell(words: Sequence[str]) -> str | None:
    """What a command hands to a shell to run, as `srun bash -c TEXT`; None where it hands nothing."""
    for place, word in enumerate(words[:-2]):
        if re.fullmatch(r"(.*/)?(ba|z|da)?sh", word) and re.fullmatch(r"-[a-z]*c", words[place + 1]):
            return words[place + 2]
    return None


def _is(found: Sequence[Token], place: int, operator: str) -> bool:
    return place < len(found) and found[place].kind == "operator" and found[place].text == operator
