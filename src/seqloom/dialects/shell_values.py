"""Variables of a shell script, and the words that stand for them; nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import escape

from seqloom.dialects.ledger import Unread
from seqloom.dialects.shell_words import Piece, Word, inner_word
from seqloom.dialects.sums import shell_sum
from seqloom.errors import DialectError

MOST_CHARACTERS = 200_000
"""The longest script, and the longest text that its variables may grow to."""

MOST_DOUBTFUL = 1_000
"""The most words of a variable that is set in branches that are not decided."""

_MARK = re.compile("\ue000(\\d+)\ue001")
"""Stands in a text for what is not known here: the number of a doubt."""

_SIMPLE = re.compile(r"(#?)([A-Za-z_]\w*|[0-9@*#?$!-])(\[[^]]*\])?((?::?[-=+?])(.*))?$", re.DOTALL)
_UNSET = re.compile(r"\$[A-Za-z_]\w* is not set in the script")
_STEP = re.compile(r"\s*([A-Za-z_]\w*)\s*([-+*/%]?)=(?!=)(.*)", re.DOTALL)
_WRITTEN = re.compile(r"([A-Za-z_]\w*)\s*(?:\+\+|--|(?:[-+*/%&|^]|<<|>>)?=(?!=))|(?:\+\+|--)\s*([A-Za-z_]\w*)")
_COMPARED = re.compile(r"([^<>=!&|]+)(==|!=|<=|>=|<|>)([^<>=!&|]+)")


def marked(text: str) -> bool:
    """Whether a text holds something that is not known."""
    return _MARK.search(text) is not None


def written(text: str) -> list[str]:
    """Names that a text assigns to, as NAME=value."""
    return [found[1] for found in re.finditer(r"(?<![-\w])([A-Za-z_]\w*)\+?=", text)]


def unmarked(text: str) -> str:
    """A text without what is not known in it."""
    return _MARK.sub("", text)


def _doubted(text: str, mark: str) -> str:
    """A text with each of its words in doubt."""
    plain = unmarked(text) if "\ue000" in text else text
    return " ".join(f"{word}{mark}" for word in plain.split()) or mark


State = tuple[tuple[str, ...] | None, bool]
"""A variable: its value, None where it is not set, and whether it is set for one command or a subshell only."""


@dataclass
class Values:
    """Variables by name, an array's elements in order, and what is in doubt about them.

    gated: whether what is followed now may not run, by the && or || before it. assigning: the variable that is set
    now, which is empty in its own value where it was not set before. passing: names that were set for one
    command or a subshell only. journal: what branches, loops and subshells found, innermost last. sourced: why a
    name that the script does not set may be set all the same.
    """

    variables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    gated: bool = False
    assigning: str = ""
    passing: set[str] = field(default_factory=set)
    sourced: str = ""
    journal: list[dict[str, State]] = field(default_factory=list)
    doubts: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def doubt(self, why: str) -> str:
        """A mark that stands for what is not known."""
        if why not in self.doubts:
            self.doubts[why] = len(self.doubts)
            self.reasons.append(why)
        return f"\ue000{self.doubts[why]}\ue001"

    def certain(self, text: str) -> str | Unread:
        """A text without marks, or what is known of it and why that is not all."""
        found = _MARK.search(text)
        if found is None:
            return text
        known = unmarked(text)
        if found.start() == 0 and known.startswith("-"):  # what is not known stands before it, so it is no flag
            known = f"?{known}"
        return Unread(known, self.reasons[int(found[1])])

    def assign(self, name: str, value: list[str], append: bool = False, array: bool = False) -> None:
        """Set a variable; one that held something else is in doubt where it is not known that this runs."""
        before = self.variables.get(name) if name not in self.passing else None
        if append and before is not None:
            value = [*before, *value] if array or not before else [before[0] + value[0], *before[1:]]
        if sum(map(len, value)) > MOST_CHARACTERS:
            raise DialectError(f"The script's variable {name} grows beyond {MOST_CHARACTERS:,} characters.")
        if self.gated and before != tuple(value):
            self.undecided(name, [(before, False), (tuple(value), False)], "branch or loop")
        else:
            self._put(name, tuple(value))

    def undecided(self, name: str, found: Sequence[State], where: str) -> None:
        """Set a variable that has one of several states, the last of them the likeliest: what they share is certain.

        Words of all of them stay, since each may be a flag that the program is given.
        """
        mark = self.doubt(f"{name} is set in a {where} that is not decided here")
        plain = all(value is None or len(value) == 1 for value, _ in found)
        parts = [" ".join(value or ()).split() if plain else list(value or ()) for value, _ in found]
        shared = 0
        while all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
            shared += 1
        rest = [part[shared:] for part in {tuple(part): part for part in reversed(parts)}.values()]
        if not any(word.startswith("-") for part in rest for word in part):
            rest = rest[:1]
        doubtful = [f"{unmarked(word)}{mark}" for part in rest for word in part] or [mark]
        words = [*parts[0][:shared], *doubtful]
        if len(words) > MOST_DOUBTFUL:
            raise DialectError(f"The script's variable {name} may be more than can be followed; give the flags.")
        self._put(name, (" ".join(words),) if plain else tuple(words))

    def state(self, name: str) -> State:
        """A variable as it is."""
        return self.variables.get(name), name in self.passing

    def put(self, name: str, state: State) -> None:
        """Set a variable to a state it had."""
        self._note(name)
        self._set(name, state)

    def begin(self) -> None:
        """Begin to note what variables were before they change."""
        self.journal.append({})

    def commit(self) -> dict[str, State]:
        """End the last `begin`: what has changed stays. Returns what those variables were."""
        noted = self.journal.pop()
        for name, before in noted.items() if self.journal else ():
            self.journal[-1].setdefault(name, before)
        return noted

    def rewind(self) -> dict[str, State]:
        """Go back to the last `begin`, and note on. Returns what the changed variables had become."""
        found = {name: self.state(name) for name in self.journal[-1]}
        for name, before in self.journal[-1].items():
            self._set(name, before)
        return found

    def place(self, words: Sequence[str]) -> None:
        """Set $1, $2 and the rest of them, $@ and $#; none of those that were set before stays."""
        own = {"@": tuple(words), "#": (str(len(words)),)} | {str(at): (word,) for at, word in enumerate(words, 1)}
        for name in {*own, *(name for name in self.variables if name.isdecimal())}:
            self.put(name, (own.get(name), False))

    def take_back(self) -> None:
        """End a subshell: what it has set is set there only."""
        for name, before in self.commit().items():
            self.restore(name, before[0])

    def _note(self, name: str) -> None:
        if self.journal:
            self.journal[-1].setdefault(name, self.state(name))

    def _set(self, name: str, state: State) -> None:
        self.variables.pop(name, None) if state[0] is None else self.variables.update({name: state[0]})
        self.passing.discard(name)
        self.passing |= {name} if state[1] else set()

    def _put(self, name: str, value: tuple[str, ...]) -> None:
        self._note(name)
        self.passing.discard(name)
        self.variables[name] = value

    def assumed(self, words: Sequence[str]) -> list[str]:
        """The words of a test in a script that is started without arguments, where what it does not set is empty.

        As in ${NAME:-default}, that is so for -z and -n, and for the number of arguments.
        """
        found = list(words)
        for at, word in enumerate(words):
            mark = _MARK.fullmatch(word)
            why = self.reasons[int(mark[1])] if mark else ""
            if why == "$# is not set in the script":
                found[at] = "0"
            elif at and words[at - 1] in ("-z", "-n") and _UNSET.fullmatch(why) and not self.sourced:
                found[at] = ""
        return found

    def cast_doubt(self, name: str, why: str) -> None:
        """Keep what is known of a variable, in doubt."""
        mark = self.doubt(why)
        known = [_doubted(each, mark) for each in self.variables.get(name, ("",))]
        self._put(name, tuple(known) or (mark,))

    def restore(self, name: str, before: tuple[str, ...] | None) -> None:
        """Take back what a subshell, or one command, was given."""
        if before is None:
            self.passing.add(name)
        else:
            self.variables[name] = before

    def arithmetic(self, text: str) -> bool | None:
        """Follow let or (( text )); whether it is not 0, None where that is not known."""
        if found := _STEP.fullmatch(text):
            name, step, other = found.groups()
            if not _WRITTEN.search(other):
                self.assign(name, [self.sum(f"{name} {step} ({other})" if step else other, 0)])
                return None
        for pair in _WRITTEN.findall(text):
            name = pair[0] or pair[1]
            self.cast_doubt(name, f"{name} is reckoned by (({' '.join(text.split())[:40]})), which is not read")
        if (found := _COMPARED.fullmatch(text)) and not _WRITTEN.search(text):
            left, right = self.sum(found[1], 0), self.sum(found[3], 0)
            if not marked(left + right):
                return compare(int(left), found[2], int(right))
        return None

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

    def pattern(self, word: Word) -> str:
        """The pattern that a word stands for; what is quoted stands for itself."""
        found = ["".join(self.expand((piece,), split=False)) for piece in word]
        return "".join(escape(text) if piece.quoted else text for text, piece in zip(found, word, strict=True))

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
        self.used.add(name)
        known = self.variables.get(name)
        if index and f"{name}{index}" in self.variables:
            known, index = self.variables[f"{name}{index}"], None
        if name in "@*" and operation is None:
            return list(self.variables.get("@", ()))
        if name in self.passing:
            return [self.doubt(f"{name} is set for one command or a subshell only")]
        empty = known is None or (operation is not None and operation[0] == ":" and not "".join(known))
        kind = operation.lstrip(":")[0] if operation else ""
        if kind and known is None and self.sourced:
            return [self.doubt(f"{name}: {self.sourced}")]
        if (kind in ("-", "=") and empty) or (kind == "+" and not empty):
            instead = self.expand(inner_word(other), split=False, depth=depth + 1) or [""]
            if kind == "=":
                self.assign(name, ["".join(instead)])
            return instead
        if kind == "+":
            return []
        if known is None and name == self.assigning and not self.sourced:
            return []
        if known is None:
            return [self.doubt(f"${name} is not set in the script")]
        if counted or index:
            return self.elements(name, known, bool(counted), index or "")
        return list(known[:1])

    def elements(self, name: str, known: tuple[str, ...], counted: bool, index: str) -> list[str]:
        """How many elements an array has, or how long a text is; else the elements that an index names."""
        whole = index in ("[@]", "[*]")
        if not whole and any(map(marked, known if counted else known[:-1])):
            return [self.doubt(f"which element of {name} is {index or 'first'}, is not known here")]
        if counted and any(map(marked, known)):
            return [self.doubt(f"how long {name} is, is not known here")]
        if counted:
            return [str(len(known))] if index else [str(len(known[0]))] if known else ["0"]
        if whole:
            return list(known)
        number = index[1:-1]
        return [known[int(number)]] if len(number) < 6 and number.isdecimal() and int(number) < len(known) else [""]

    def sum(self, text: str, depth: int) -> str:
        """The value of $((text))."""
        inside = _MARK.sub("?", "".join(self.expand(inner_word(text), split=False, depth=depth + 1)))

        def lookup(name: str) -> int:
            self.used.add(name)
            known = self.variables.get(name)
            if not known or name in self.passing or not re.fullmatch(r"-?\d{1,18}", known[0]):
                raise ValueError(f"{name} is no whole number that is known here")
            return int(known[0])

        try:
            return str(shell_sum(inside, lookup))
        except ValueError as error:
            return self.doubt(f"$(({' '.join(text.split())[:40]})) is not known here: {error}")


def compare(left: int | str, sign: str, right: int | str) -> bool | None:
    """Whether a comparison of two whole numbers, or two words, holds; None for a sign that is not read."""
    if sign in ("=", "==", "-eq"):
        return left == right
    if sign in ("!=", "-ne"):
        return left != right
    if isinstance(left, str) or isinstance(right, str):
        return None
    if sign in (">", "-gt"):
        return left > right
    if sign in ("<", "-lt"):
        return left < right
    if sign in (">=", "-ge"):
        return left >= right
    return left <= right if sign in ("<=", "-le") else None
