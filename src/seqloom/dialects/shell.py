"""What a launch script hands to the program it starts; nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from seqloom.dialects.ledger import Unread
from seqloom.dialects.shell_values import MOST_CHARACTERS, Values, compare, marked, unmarked
from seqloom.dialects.shell_words import Piece, Token, Word, tokens
from seqloom.errors import DialectError

MOST_BRANCHES = 100
"""How deep ifs, loops, groups and subshells may stand inside each other."""


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
        return {
            name: unmarked(" ".join(words))
            for name, words in self.variables.items()
            if name not in self.used and name.split("[")[0] not in self.used
        }


_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*(?:\[[^]\[]*\])?)(\+?)=")
_ELEMENT = re.compile(r"\[([^]\[]*)\]=")
_CLOSING = {"done": "loop", "esac": "case", "}": "group", "fi": "if"}
_LOOPS = {"for", "while", "until", "select"}
_DECLARING = {"export", "declare", "local", "readonly", "typeset"}
_KEYWORDS = {"if", "elif", "else", "then", "do", "!", "time", "case", "function", "{", *_LOOPS, *_CLOSING}
_READING = {"read", "mapfile", "readarray", "getopts", "unset"}
_HARMLESS = re.compile(r"conda|set_env|setvars|activate|bashrc|profile|\.asc|ssh-agent|modulecmd")
_ENDS = ("\n", ";", "&", "&&", "||", "|", ";;", "(", ")")


def run(text: str) -> Script:
    """Follow a script's assignments in order, and gather the commands that start a program.

    Tests between literals decide their branches, with && and || too; a variable set differently in branches that
    are not decided, or by a command that is not read, is in doubt. Raises DialectError where the text is no script.
    """
    if len(text) > MOST_CHARACTERS:
        raise DialectError(f"The script has {len(text):,} characters; the most that are read is {MOST_CHARACTERS:,}.")
    values = Values()
    follower = _Follower(Script(values.variables, used=values.used), values)
    command: list[Token] = []
    for token in tokens(re.sub("[\ue000\ue001\x00]", "", text)):
        if token.kind == "body":
            follower.here_document(token)
        elif token.kind == "operator" and token.text in _ENDS:
            follower.command(command, token.text)
            command = []
        else:
            command.append(token)
    follower.command(command)
    return follower.script


@dataclass
class _Frame:
    """An if, loop, group and so on.

    base: whether it runs. now: whether what stands now in it does. status: that before it. tried: its tests so far.
    """

    kind: Literal["if", "loop", "case", "group", "function", "subshell"]
    base: bool | None
    now: bool | None
    status: bool | None
    tried: list[bool | None] = field(default_factory=list)


@dataclass
class _Follower:
    """The state of a script that is followed.

    status: whether the list of commands succeeded so far, None where that is not known. after: the operator that
    the last command ended with. naming: whether a function's name was just read.
    """

    script: Script
    values: Values
    frames: list[_Frame] = field(default_factory=list)
    status: bool | None = True
    after: str = ""
    naming: bool = False
    target: str | None = None

    @property
    def gate(self) -> bool | None:
        """Whether the command after `after` runs, by that alone."""
        if self.after not in ("&&", "||") or self.status is None:
            return True if self.after not in ("&&", "||") else None
        return self.status is (self.after == "&&")

    def command(self, found: Sequence[Token], end: str = "") -> None:
        """Follow one simple command, up to the operator that ends it."""
        opened = len(self.frames)
        negated = False
        while found and found[0].kind == "word" and (keyword := _literal(found[0].word)) in _KEYWORDS:
            found = found[1:]
            if keyword in ("if", "elif", "then", "else"):
                self.branch(keyword)
                self.after = ""
            elif keyword in _CLOSING:
                self.close(_CLOSING[keyword])
            elif keyword in _LOOPS or keyword == "case":
                self.open("case" if keyword == "case" else "loop", None)
                self.after = ""
                if keyword in ("for", "select") and found:
                    self.loop_over(found)
                if keyword not in ("while", "until"):
                    found = []
            elif keyword == "{":
                self.open("function" if self.naming else "group", None if self.naming else self.gate)
                self.naming, self.after = False, ""
            elif keyword == "function":
                self.naming, found = True, found[1:]
            else:
                negated ^= keyword == "!"
        if (end == "(" and (self.naming or len(found) == 1)) or (self.naming and not found and end in (")", "\n")):
            self.naming = True  # NAME ( ) before the braces of a function
            return
        if end == "(" and not found:
            self.open("subshell", self.gate)
            self.values.undo.append({})
            self.after = ""
            return
        pattern = end == ")" and self.frames and self.frames[-1].kind == "case"
        if found and not pattern:
            self.naming = False
            self.followed(found, negated)
        if end == ")":
            self.close("subshell")
        if end == "|":
            self.status = None
        if found or end != "\n" or len(self.frames) < opened:
            self.after = end

    def followed(self, found: Sequence[Token], negated: bool) -> None:
        """Follow a command's words where it may run, and keep its status."""
        gate, self.target = self.gate, None
        if gate is False or any(frame.now is False for frame in self.frames):
            return
        self.values.sure = gate is True and all(frame.now is True for frame in self.frames)
        status = self.simple(found)
        status = None if status is None else status is not negated
        repeated = any(frame.kind in ("loop", "function") for frame in self.frames)  # with other values, it may be
        self.status = status if gate is True and not repeated else None

    def open(self, kind: Literal["if", "loop", "case", "group", "function", "subshell"], runs: bool | None) -> None:
        if len(self.frames) >= MOST_BRANCHES:
            raise DialectError(f"The script nests branches deeper than {MOST_BRANCHES}; give the program's flags.")
        self.frames.append(_Frame(kind, runs, runs, self.status))

    def close(self, kind: str) -> None:
        """End the innermost frame, if it is of this kind; whether it succeeded is not kept."""
        if self.frames and self.frames[-1].kind in (kind, "function" if kind == "group" else kind):
            frame = self.frames.pop()
            self.status = frame.status if frame.base is False else None
            if kind == "subshell":
                for name, before in self.values.undo.pop().items():
                    self.values.restore(name, before)

    def loop_over(self, found: Sequence[Token]) -> None:
        """Doubt the variable of a loop, in for NAME in ... or for ((...))."""
        name = _literal(found[0].word) or ""
        if name == "let" and len(found) > 1:
            self.values.sure = False
            self.values.arithmetic("".join(piece.text for piece in found[1].word).replace(";", ","))
        elif name:
            self.values.cast_doubt(name, f"{name} takes several values in a loop")

    def branch(self, keyword: str) -> None:
        """Decide the branches of an if as far as their tests are."""
        if keyword == "if":
            self.open("if", self.gate)
            self.status = True
            return
        if not self.frames or self.frames[-1].kind != "if":
            return
        frame = self.frames[-1]
        if keyword == "then":
            frame.tried.append(False if True in frame.tried else self.status)
            chosen = frame.tried[-1]
        else:
            chosen = True not in frame.tried
        unknown = frame.base is None or None in frame.tried
        frame.now = False if chosen is False or frame.base is False else None if unknown else chosen
        self.status = True

    def simple(self, found: Sequence[Token]) -> bool | None:
        """Assign, or keep the command if it may start a program; whether it succeeds, as far as that is known."""
        declaring = None
        rest: list[Token] = []
        before: dict[str, tuple[str, ...] | None] = {}
        for token in found:
            word = _literal(token.word)
            started = any(one.kind == "word" for one in rest)
            if token.kind == "array":
                self.array(token)
            elif token.kind == "operator":
                if rest and _literal(rest[0].word) == "[[":
                    return None
                rest.extend([token] if token.text != "2>&1" else [])
            elif not started and (name := self.assigned(token.word)):
                before.setdefault(name, self.values.variables.get(name))
                self.assignment(token.word, name)
                self.script.exported |= {name} if declaring == "export" else set()
            elif not rest and declaring is None and word in _DECLARING:
                declaring = word
            elif declaring is not None and not started and word and not (rest and rest[-1].kind == "operator"):
                self.script.exported |= {word} if declaring == "export" and word[0] != "-" else set()
            elif rest and rest[-1].kind == "operator":
                if rest.pop().text in (">", ">>"):
                    self.target = "".join(self.values.expand(token.word))
            else:
                rest.append(token)
        if declaring is None and any(token.kind == "word" for token in rest):
            for name, value in before.items():  # the shell expands the words before it
                self.values.restore(name, value)
        words = [each for token in rest if token.kind == "word" for each in self.values.expand(token.word)]
        if not words:
            return None if any(piece.kind == "command" for token in found for piece in token.word) else True
        line = next(token.line for token in rest if token.kind == "word")
        self.script.launches.append(Launch(tuple(self.values.certain(word) for word in words), line))
        return self.builtin(words)

    def builtin(self, words: Sequence[str]) -> bool | None:
        """Follow what a command does to variables; whether it succeeds, None where that is not known."""
        name, rest = words[0], words[1:]
        if name in ("true", ":", "echo", "set", "shift") or name == "false":
            return name != "false"
        if name in ("[", "[[", "test"):
            return _holds(words)
        if name == "let":
            return [self.values.arithmetic(word) for word in rest][-1] if rest else None
        if name in _READING or name == "printf":
            told = rest[1:2] if name == "printf" and rest[:1] == ["-v"] else [] if name == "printf" else rest
            for word in told:
                if re.fullmatch(r"[A-Za-z_]\w*", word) and (name != "unset" or word in self.values.variables):
                    self.values.cast_doubt(word, f"{word} is set by `{name}`, which is not run")
        elif name in ("source", ".", "eval") and not _HARMLESS.search(text := " ".join(words)):
            why = f"`{' '.join(unmarked(text).split())[:40]}` may have set it, and it is not run"
            written = {found[1] for found in re.finditer(r"(?<![-\w])([A-Za-z_]\w*)\+?=", text)}
            plain = name == "eval" and not marked(text)
            self.values.sourced = self.values.sourced if plain else why
            for variable in sorted(written) if plain else sorted(written | set(self.values.variables)):
                self.values.cast_doubt(variable, f"{variable}: {why}")
        return None

    def here_document(self, token: Token) -> None:
        """Keep the body of a here-document under the name of the file it is written to."""
        if self.target is not None:
            self.script.files[self.target] = unmarked("".join(self.values.expand(token.word, split=False)))

    def assigned(self, word: Word) -> str | None:
        """The name in NAME=value or NAME[INDEX]=value, if that is what the word is."""
        if not word or word[0].kind != "text" or word[0].quoted:
            return None
        if found := _ASSIGNMENT.match(word[0].text):
            return found[1]
        open_index = re.match(r"([A-Za-z_]\w*)\[", word[0].text)
        written = open_index and any(re.match(r"[^]]*\]\+?=", piece.text) for piece in word[1:] if not piece.quoted)
        return open_index[1] if open_index and written else None

    def assignment(self, word: Word, name: str) -> None:
        """Take NAME=value or NAME[INDEX]=value."""
        found = _ASSIGNMENT.match(word[0].text)
        if found is None:
            self.values.cast_doubt(name, f"an element of {name} is set whose place is not read")
            return
        rest = Piece("text", word[0].text[found.end() :], False)
        value = self.values.expand((rest, *word[1:]) if rest.text else word[1:], split=False)
        array, _, index = name.rstrip("]").partition("[")
        elements = list(self.values.variables.get(array, ()))
        if "[" in name and index.isdecimal() and len(index) < 6 and int(index) <= len(elements) and not found[2]:
            elements[int(index) : int(index) + 1] = ["".join(value)]
            self.values.assign(array, elements)
            return
        if "[" in name and array in self.values.variables:
            self.values.cast_doubt(array, f"an element of {array} is set whose place is not read")
        self.values.assign(name, ["".join(value)], bool(found[2]))

    def array(self, token: Token) -> None:
        """Take NAME=( words ), or NAME=( [KEY]=word ... )."""
        name, append = _ASSIGNMENT.match(token.text).groups()  # type: ignore[union-attr]
        plain: list[str] = []
        for word in token.words:
            key = _ELEMENT.match(word[0].text) if word and word[0].kind == "text" and not word[0].quoted else None
            if key is None:
                plain.extend(self.values.expand(word))
                continue
            rest = Piece("text", word[0].text[key.end() :], False)
            value = self.values.expand((rest, *word[1:]) if rest.text else word[1:], split=False)
            self.values.assign(f"{name}[{key[1]}]", ["".join(value)])
        if plain or not any(one.startswith(f"{name}[") for one in self.values.variables):
            self.values.assign(name, plain, bool(append))


def _holds(words: Sequence[str]) -> bool | None:
    """Whether a test of words holds, or None where that is not known here."""
    closing = {"[": "]", "[[": "]]"}.get(words[0])
    if any(map(marked, words)) or (closing and words[-1] != closing):
        return None
    inside = list(words[1:-1] if closing else words[1:])
    if inside[:1] == ["!"]:
        held = _holds(["test", *inside[1:]])
        return None if held is None else not held
    if len(inside) == 1:
        return inside[0] != ""
    if len(inside) == 2 and inside[0] in ("-z", "-n"):
        return (inside[1] == "") == (inside[0] == "-z")
    if len(inside) != 3 or (words[0] == "[[" and re.search(r"[*?\[\\]", inside[2])):
        return None
    left, sign, right = inside
    if sign.startswith("-"):
        numbers = [int(one) for one in (left, right) if re.fullmatch(r"-?\d{1,18}", one)]
        return compare(numbers[0], sign, numbers[1]) if len(numbers) == 2 else None
    return compare(left, sign, right)


def _literal(word: Word) -> str | None:
    """The word, if it is plain text."""
    return word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else None
