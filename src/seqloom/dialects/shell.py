"""What a launch script hands to the program it starts; nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from seqloom.dialects.ledger import Unread
from seqloom.dialects.shell_words import Piece, Token, Word, inner_word, tokens
from seqloom.dialects.sums import shell_sum
from seqloom.errors import DialectError

MOST_CHARACTERS = 200_000
"""The longest script, and the longest text that its variables may grow to."""


@dataclass(frozen=True)
class Launch:
    """A command of the script: its words after expansion, those not known here as Unread, and its line."""

    words: tuple[str | Unread, ...]
    line: int


@dataclass
class Script:
    """A script as far as it was followed.

    launches: commands that start a program, in order. files: here-documents it writes, by name.
    exported: variables handed to the environment.
    """

    variables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    exported: set[str] = field(default_factory=set)

    @property
    def unused(self) -> dict[str, str]:
        """Variables that are set and never read, with their values."""
        return {name: _MARK.sub("", " ".join(words)) for name, words in self.variables.items() if name not in self.used}


_MARK = re.compile("\ue000(\\d+)\ue001")
"""Stands in a text for what is not known here: the number of a doubt."""

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_SIMPLE = re.compile(r"(#?)([A-Za-z_]\w*|[0-9@*#?$!-])(\[[^]]*\])?((?::?[-=+?])(.*))?$", re.DOTALL)
_OPENING = {"for", "while", "until", "case", "select", "function", "{"}
_CLOSING = {"done", "esac", "}"}
_DECLARING = {"export", "declare", "local", "readonly", "typeset"}


def run(text: str) -> Script:
    """Follow a script's assignments in order, and gather the commands that start a program.

    Tests between literals decide their branches; a variable set differently in branches that are not decided is
    in doubt. Raises DialectError where the text is no script.
    """
    if len(text) > MOST_CHARACTERS:
        raise DialectError(f"The script has {len(text):,} characters; the most that are read is {MOST_CHARACTERS:,}.")
    follower = _Follower(Script())
    command: list[Token] = []
    for token in tokens(re.sub("[\ue000\ue001\x00]", "", text)):
        if token.kind == "body":
            follower.here_document(token)
        elif token.kind == "operator" and token.text in ("\n", ";", "&", "&&", "||", "|", ";;", "(", ")"):
            follower.command(command, token.text)
            command = []
        else:
            command.append(token)
    follower.command(command)
    return follower.script


@dataclass
class _Follower:
    """The state of a script that is followed: `branches` of ifs hold True, False or None for undecided."""

    script: Script
    branches: list[list[bool | None]] = field(default_factory=list)
    loops: int = 0
    target: str | None = None
    doubts: list[str] = field(default_factory=list)

    def doubt(self, why: str) -> str:
        """A mark that stands for what is not known."""
        if why not in self.doubts:
            self.doubts.append(why)
        return f"\ue000{self.doubts.index(why)}\ue001"

    def certain(self, text: str) -> str | Unread:
        """A text without marks, or what is known of it and why that is not all."""
        marks = _MARK.findall(text)
        return Unread(_MARK.sub("", text), self.doubts[int(marks[0])]) if marks else text

    @property
    def skipped(self) -> bool:
        return any(tried[-1] is False for tried in self.branches)

    @property
    def undecided(self) -> bool:
        return self.loops > 0 or any(tried[-1] is None for tried in self.branches)

    def command(self, found: Sequence[Token], end: str = "") -> None:
        """Follow one simple command, up to the operator that ends it."""
        while found and found[0].kind == "word" and (keyword := _literal(found[0].word)) in _KEYWORDS:
            found = found[1:]
            if keyword in ("if", "elif"):
                self.condition(keyword, found, end)
                return
            if keyword == "else" and self.branches:
                tried = self.branches[-1]
                decided = True if all(one is False for one in tried) else None
                tried.append(False if True in tried else decided)
            elif keyword == "fi" and self.branches:
                self.branches.pop()
            elif keyword in _OPENING:
                self.loops += 1
                if keyword == "for" and found and (name := _literal(found[0].word)):
                    self.script.variables[name] = (self.doubt(f"{name} takes several values in a loop"),)
                if keyword != "{":
                    return
            elif keyword in _CLOSING:
                self.loops = max(0, self.loops - 1)
        if not self.skipped:
            self.simple(found)

    def condition(self, keyword: str, found: Sequence[Token], end: str) -> None:
        """Begin a branch with its test decided as far as it can be; of several tests the first may decide."""
        if keyword == "if":
            self.branches.append([])
        elif not self.branches:
            return
        tried = self.branches[-1]
        if True in tried:
            tried.append(False)
            return
        decided = self.test([word for token in found if token.kind == "word" for word in self.expand(token.word)])
        if end in ("&&", "||") and decided is not (end == "||"):
            decided = None
        tried.append(None if None in tried and decided else decided)

    def test(self, words: Sequence[str]) -> bool | None:
        """Whether [ words ] holds, or None where that is not known here."""
        if len(words) < 3 or words[0] not in ("[", "[[") or any(map(_MARK.search, words)):
            return None
        inside = words[1:-1]
        if len(inside) == 2 and inside[0] in ("-z", "-n"):
            return (inside[1] == "") == (inside[0] == "-z")
        if len(inside) == 3 and inside[1] in ("=", "==", "-eq"):
            return inside[0] == inside[2]
        if len(inside) == 3 and inside[1] in ("!=", "-ne"):
            return inside[0] != inside[2]
        return None

    def simple(self, found: Sequence[Token]) -> None:
        """Assign, or keep the command if it may start a program."""
        self.target, exporting = None, False
        rest: list[Token] = []
        for token in found:
            if token.kind == "array":
                name, append = _ASSIGNMENT.match(token.text).groups()  # type: ignore[union-attr]
                self.assign(name, [each for word in token.words for each in self.expand(word)], bool(append))
            elif token.kind == "operator":
                rest.append(token)
            elif not any(one.kind == "word" for one in rest) and (name := self.assignment(token.word)):
                self.script.exported |= {name} if exporting else set()
            elif not rest and _literal(token.word) in _DECLARING:
                exporting = _literal(token.word) == "export"
            elif exporting and (name := _literal(token.word)):
                self.script.exported.add(name)
            elif rest and rest[-1].kind == "operator":
                self.redirect(rest[-1].text, token.word)
            else:
                rest.append(token)
        words = tuple(self.certain(word) for token in rest if token.kind == "word" for word in self.expand(token.word))
        if words:
            self.script.launches.append(Launch(words, next(token.line for token in rest if token.kind == "word")))

    def redirect(self, operator: str, word: Word) -> None:
        if operator in (">", ">>"):
            self.target = "".join(self.expand(word))

    def here_document(self, token: Token) -> None:
        """Keep the body of a here-document under the name of the file it is written to."""
        if self.target is not None and not self.skipped:
            self.script.files[self.target] = _MARK.sub("", "".join(self.expand(token.word, split=False)))

    def assignment(self, word: Word) -> str | None:
        """Take NAME=value, if that is what the word is; its name."""
        found = _ASSIGNMENT.match(word[0].text) if word and word[0].kind == "text" and not word[0].quoted else None
        if found is None:
            return None
        rest = Piece("text", word[0].text[found.end() :], False)
        value = self.expand((rest, *word[1:]) if rest.text else word[1:], split=False)
        self.assign(found[1], ["".join(value)], bool(found[2]))
        return found[1]

    def assign(self, name: str, value: list[str], append: bool) -> None:
        before = self.script.variables.get(name)
        if append and before is not None:
            joined = len(value) == len(before) == 1
            value = [before[0] + value[0]] if joined else [*before, *value]
        if sum(map(len, value)) > MOST_CHARACTERS:
            raise DialectError(f"The script's variable {name} grows beyond {MOST_CHARACTERS:,} characters.")
        if self.undecided and before not in (None, tuple(value)):
            mark = self.doubt(f"{name} is set in a branch or loop that is not decided here")
            value = [re.sub(r"(\S+)", rf"\1{mark}", each) or mark for each in value]
        self.script.variables[name] = tuple(value)

    def expand(self, word: Word, *, split: bool = True, depth: int = 0) -> list[str]:
        """The words that one word stands for."""
        words: list[str] = []
        text, begun = "", False
        for piece in word:
            parts = [piece.text] if piece.kind == "text" else self.value(piece, depth)
            several = piece.kind == "parameter" and piece.text.endswith(("[@]", "@"))
            if piece.kind != "text" and split and not piece.quoted:
                parts, several = [one for part in parts for one in part.split()], True
            if not (several and split):
                parts = [" ".join(parts)]
            for number, part in enumerate(parts):
                if number:
                    words.append(text)
                    text = ""
                text, begun = text + part, True
            begun = begun or (piece.quoted and not several)
        if begun:
            words.append(text)
        if sum(map(len, words)) > MOST_CHARACTERS:
            raise DialectError(f"A word of the script grows beyond {MOST_CHARACTERS:,} characters.")
        return words

    def value(self, piece: Piece, depth: int) -> list[str]:
        """What a parameter, a sum or a command stands for."""
        if piece.kind == "command":
            return [self.doubt(f"$({' '.join(piece.text.split())[:40]}) is not run")]
        if piece.kind == "sum":
            return [self.sum(piece.text, depth)]
        found = _SIMPLE.match(piece.text)
        if found is None or depth > 20:
            return [self.doubt(f"${{{piece.text[:40]}}} is an expansion that is not read")]
        counted, name, index, operation, other = found.groups()
        self.script.used.add(name)
        known = self.script.variables.get(name)
        if name in "@*" and operation is None:
            return []
        empty = known is None or (operation is not None and operation[0] == ":" and not "".join(known))
        kind = operation.lstrip(":")[0] if operation else ""
        if (kind in ("-", "=") and empty) or (kind == "+" and not empty):
            return self.expand(inner_word(other), split=False, depth=depth + 1) or [""]
        if kind == "+":
            return []
        if known is None:
            return [self.doubt(f"${name} is not set in the script")]
        if counted:
            return [str(len(known))] if index else [str(len(known[0]))] if known else ["0"]
        if index and index not in ("[@]", "[*]"):
            number = index[1:-1]
            return [known[int(number)]] if len(number) < 6 and number.isdecimal() and int(number) < len(known) else [""]
        return list(known) if index else list(known[:1])

    def sum(self, text: str, depth: int) -> str:
        """The value of $((text))."""
        inside = _MARK.sub("?", "".join(self.expand(inner_word(text), split=False, depth=depth + 1)))

        def lookup(name: str) -> int:
            self.script.used.add(name)
            known = self.script.variables.get(name)
            if not known or not re.fullmatch(r"-?\d{1,18}", known[0]):
                raise ValueError(f"{name} is no whole number that is known here")
            return int(known[0])

        try:
            return str(shell_sum(inside, lookup))
        except ValueError as error:
            return self.doubt(f"$(({' '.join(text.split())[:40]})) is not known here: {error}")


_KEYWORDS = {"if", "elif", "else", "then", "fi", "do", "!", "time", *_OPENING, *_CLOSING}


def _literal(word: Word) -> str | None:
    """The word, if it is plain text."""
    return word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else None
