"""Shell scripts as tokens: words, operators, arrays and here-documents. Nothing is expanded or run."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from seqloom.errors import DialectError

MOST_NESTING = 40
"""How deep expansions may stand inside each other."""


@dataclass(frozen=True)
class Piece:
    """A part of a word: text as it stands, a parameter, a sum $((...)) or a command $(...)."""

    kind: Literal["text", "parameter", "sum", "command"]
    text: str
    quoted: bool = False


Word = tuple[Piece, ...]


@dataclass(frozen=True)
class Token:
    """A word, an operator, or an array NAME=( words ); `body` is that of a here-document."""

    kind: Literal["word", "operator", "array", "body"]
    line: int
    word: Word = ()
    text: str = ""
    words: tuple[Word, ...] = ()


_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=$")
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_OPERATORS = (
    "<<<",
    ">>>",
    "&>>",
    "2>&1",
    "<<-",
    "&&",
    "||",
    ";;",
    ">>",
    "<<",
    "&>",
    ">&",
    ">",
    "<",
    "|",
    "&",
    ";",
    "(",
    ")",
)


@dataclass
class Reader:
    """A place in a script."""

    text: str
    at: int = 0
    bodies: list[tuple[str, bool]] = field(default_factory=list)
    counted: tuple[int, int] = (0, 1)

    @property
    def line(self) -> int:
        """The line read now, from 1."""
        before, lines = self.counted
        self.counted = (self.at, lines + self.text.count("\n", before, self.at))
        return self.counted[1]

    def starts(self, what: str) -> bool:
        """Whether `what` comes next."""
        return self.text.startswith(what, self.at)


def tokens(text: str) -> Iterator[Token]:
    """The tokens of a script, with an operator for each end of line.

    Raises DialectError for a quote or bracket that is not closed.
    """
    reader = Reader(text.replace("\r\n", "\n"))
    waiting = False
    while reader.at < len(reader.text):
        if reader.starts("\\\n"):
            reader.at += 2
        elif reader.text[reader.at] in " \t":
            reader.at += 1
        elif reader.text[reader.at] == "#":
            _comment(reader)
        elif reader.text[reader.at] == "\n":
            yield Token("operator", reader.line, text="\n")
            reader.at += 1
            yield from _bodies(reader)
        elif reader.starts("(("):
            line = reader.line
            yield Token("word", line, word=(Piece("text", "let"),))
            yield Token(
                "word", line, word=(*_pieces(Reader(_balanced(reader, 2, "(", ")", 2)), "", quoted=True, depth=0),)
            )
        elif operator := _operator(reader):
            line = reader.line
            reader.at += len(operator)
            if operator in ("<<", "<<-"):
                waiting = True
            yield Token("operator", line, text=operator)
        else:
            token = _word_or_array(reader)
            if waiting and token.kind == "word":
                ending = "".join(piece.text for piece in token.word)
                reader.bodies.append((ending, any(piece.quoted for piece in token.word)))
                waiting = False
            yield token


def _comment(reader: Reader) -> None:
    end = reader.text.find("\n", reader.at)
    reader.at = len(reader.text) if end < 0 else end


def _operator(reader: Reader) -> str | None:
    return next((operator for operator in _OPERATORS if reader.starts(operator)), None)


def _bodies(reader: Reader) -> Iterator[Token]:
    """The here-documents that the line just ended asked for."""
    for ending, quoted in reader.bodies:
        start, line = reader.at, reader.line
        found = re.compile(rf"^\t*{re.escape(ending)}$", re.MULTILINE).search(reader.text, start)
        stop = found.start() if found else len(reader.text)
        reader.at = found.end() if found else stop
        body = reader.text[start:stop]
        word: Word = (Piece("text", body, True),) if quoted else _pieces(Reader(body), "", quoted=True, depth=0)
        yield Token("body", line, word=word)
    reader.bodies.clear()


def _word_or_array(reader: Reader) -> Token:
    line, start = reader.line, reader.at
    word = _pieces(reader, " \t\n;&|<>()", quoted=False, depth=0)
    literal = word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else ""
    if reader.starts("(") and _ARRAY.match(literal):
        reader.at += 1
        return Token("array", line, text=literal, words=tuple(_array(reader)))
    if reader.at == start:  # a character that begins nothing, such as a lone closing brace
        reader.at += 1
    return Token("word", line, word=word)


def _array(reader: Reader) -> Iterator[Word]:
    while reader.at < len(reader.text) and not reader.starts(")"):
        if reader.starts("\\\n"):
            reader.at += 2
        elif reader.text[reader.at] in " \t\n;&|<>(":
            reader.at += 1
        elif reader.text[reader.at] == "#":
            _comment(reader)
        else:
            yield _pieces(reader, " \t\n;&|<>()", quoted=False, depth=0)
    if reader.at >= len(reader.text):
        raise DialectError("An array in the script is not closed; end it with ')'.")
    reader.at += 1


def _pieces(reader: Reader, ends: str, *, quoted: bool, depth: int) -> Word:
    """The pieces up to one of `ends`, or to the end of the text."""
    if depth > MOST_NESTING:
        raise DialectError(f"The script nests expansions deeper than {MOST_NESTING}; write them out.")
    found: list[Piece] = []
    plain: list[str] = []

    def flush() -> None:
        if plain:
            found.append(Piece("text", "".join(plain), quoted))
            plain.clear()

    while reader.at < len(reader.text) and reader.text[reader.at] not in ends:
        char = reader.text[reader.at]
        if char == "\\":
            plain.append(_escaped(reader, quoted))
        elif char == "'" and not quoted:
            flush()
            found.append(Piece("text", _until(reader, "'"), True))
        elif char == '"' and not quoted:
            flush()
            reader.at += 1
            inner = _pieces(reader, '"', quoted=True, depth=depth + 1)
            if reader.at >= len(reader.text):
                raise DialectError('A quote in the script is not closed; end it with ".')
            reader.at += 1
            found.extend(inner or (Piece("text", "", True),))
        elif char == "`":
            flush()
            found.append(Piece("command", _until(reader, "`"), quoted))
        elif char == "$" and (piece := _dollar(reader, quoted)):
            flush()
            found.append(piece)
        else:
            plain.append(char)
            reader.at += 1
    flush()
    return tuple(found)


def _escaped(reader: Reader, quoted: bool) -> str:
    """What a backslash stands for, here."""
    following = reader.text[reader.at + 1 : reader.at + 2]
    reader.at += 2
    if following == "\n":
        return ""
    return following if not quoted or following in '"\\$`' else "\\" + following


def _until(reader: Reader, end: str) -> str:
    stop = reader.text.find(end, reader.at + 1)
    if stop < 0:
        raise DialectError(f"A quote in the script is not closed; end it with {end}.")
    text = reader.text[reader.at + 1 : stop]
    reader.at = stop + 1
    return text


def _dollar(reader: Reader, quoted: bool) -> Piece | None:
    if reader.starts("$(("):
        return Piece("sum", _balanced(reader, 3, "(", ")", 2), quoted)
    if reader.starts("$("):
        return Piece("command", _balanced(reader, 2, "(", ")", 1), quoted)
    if reader.starts("${"):
        return Piece("parameter", _balanced(reader, 2, "{", "}", 1), quoted)
    if found := _NAME.match(reader.text, reader.at + 1):
        reader.at = found.end()
        return Piece("parameter", found[0], quoted)
    return None


def _balanced(reader: Reader, skip: int, opening: str, closing: str, depth: int) -> str:
    """The text inside brackets that `skip` characters opened, `depth` of them."""
    start, at = reader.at + skip, reader.at + skip
    closings = depth
    while at < len(reader.text):
        if reader.text[at] == opening:
            depth += 1
        elif reader.text[at] == closing:
            depth -= 1
            if depth == 0:
                reader.at = at + 1
                return reader.text[start : at - closings + 1]
        at += 1
    raise DialectError(f"A '{opening}' in the script is not closed; end it with '{closing}'.")


def inner_word(text: str) -> Word:
    """The pieces of a text that stands inside an expansion, as in ${NAME:-text}."""
    return _pieces(Reader(text), "", quoted=False, depth=0)
