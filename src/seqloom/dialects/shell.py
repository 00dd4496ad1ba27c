"""What a launch script hands to the program it starts; nothing is run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from seqloom.dialects.shell_assign import assign_array, assign_word, assigned
from seqloom.dialects.shell_builtins import TESTS, builtin
from seqloom.dialects.shell_frames import Frames, Kind
from seqloom.dialects.shell_scan import (
    ENDS,
    braces,
    changed_in_loops,
    function_at,
    handed_to_shell,
    joined_tests,
    literal,
)
from seqloom.dialects.shell_script import SLURM, Launch, Script
from seqloom.dialects.shell_tests import holds
from seqloom.dialects.shell_values import MOST_CHARACTERS, State, Values, marked, unmarked
from seqloom.dialects.shell_words import Token, tokens
from seqloom.errors import DialectError

MOST_SHELLS = 20
"""How deep shells and functions may start each other."""

MOST_CALLED = 100_000
"""How many tokens of functions are followed, the calls of one times those of its body."""


_CLOSING: dict[str | None, Kind] = {"done": "loop", "esac": "case", "}": "group", "fi": "if"}
_LOOPS = {"for", "while", "until", "select"}
_DECLARING = {"export", "declare", "local", "readonly", "typeset"}
_KEYWORDS = {"if", "elif", "else", "then", "do", "!", "time", "case", "{", *_LOOPS, *_CLOSING}


def run(text: str) -> Script:
    """Follow a script's assignments in order, and gather the commands that start a program.

    Tests between known words decide their branches, with && and || too, and so do patterns of case; a variable that
    is set otherwise in branches that are not decided, or by a command that is not read, is in doubt after them.
    Functions are followed where they are called. Raises DialectError where the text is no script.
    """
    if len(text) > MOST_CHARACTERS:
        raise DialectError(f"The script has {len(text):,} characters; the most that are read is {MOST_CHARACTERS:,}.")
    values = Values()
    if nodes := re.search(r"^#SBATCH\s+(?:--nodes[= ]|-N\s*)(\d+)\s*(?:#.*)?$", text, re.MULTILINE):
        values.variables |= {name: (nodes[1],) for name in SLURM}
    found = joined_tests(tokens(re.sub("[\ue000\ue001\x00]", "", text)))
    follower = _Follower(Script(values.variables, used=values.used), values, changed_in_loops(found))
    follower.follow(found)
    if not any(_may_start(launch) for launch in follower.script.launches):
        follower.ended = False
        for name in [name for name in follower.functions if name not in follower.called]:
            follower.call(name, ())  # it may be called from elsewhere
    return follower.script


def _may_start(launch: Launch) -> bool:
    words = [word if isinstance(word, str) else word.text for word in launch.words]
    return any(re.search(r"\.py$|(^|/)(python[\d.]*|torchrun|deepspeed)$", word) for word in words)


@dataclass
class _Call:
    """A function, or a shell, that is followed where it is started.

    depth: the frames around it. before: what its own variables were before. perhaps: those that may be its own.
    """

    depth: int
    before: dict[str, State] = field(default_factory=dict)
    perhaps: set[str] = field(default_factory=set)


@dataclass
class _Follower:
    """The state of a script that is followed.

    loops: names that each loop changes, by the token that begins its body. status: whether the list of commands
    succeeded so far, None where that is not known. after: the operator that the last command ended with. assumed:
    whether the last test took a variable that is not set as empty. ended: whether the script has come to its end.
    functions: the bodies of functions. called: those that were. calls: those followed now, innermost last.
    """

    script: Script
    values: Values
    loops: Mapping[int, frozenset[str]]
    frames: Frames = field(init=False)
    status: bool | None = True
    after: str = ""
    target: str | None = None
    assumed: bool = False
    ended: bool = False
    functions: dict[str, Sequence[Token]] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.frames = Frames(self.values)

    @property
    def gate(self) -> bool | None:
        """Whether the command after `after` runs, by that alone."""
        if self.after not in ("&&", "||") or self.status is None:
            return True if self.after not in ("&&", "||") else None
        return self.status is (self.after == "&&")

    def follow(self, found: Sequence[Token]) -> None:
        """Follow tokens in order."""
        command: list[Token] = []
        at, closed = 0, braces(found)
        while at < len(found) and not self.ended:
            token = found[at]
            case = self.frames.last("case")
            function = function_at(found, at, closed) if not command and not (case and case.waiting) else None
            if function is not None:
                self.functions[function.name] = found[function.start : function.stop]
                at = function.stop
            elif token.kind == "body":
                self.here_document(token)
            elif token.kind == "operator" and token.text in ENDS:
                self.command(command, token.text)
                command = []
            else:
                command.append(token)
            at += 1
        if not self.ended:
            self.command(command)

    def command(self, found: Sequence[Token], end: str = "") -> None:
        """Follow one simple command, up to the operator that ends it."""
        opened = len(self.frames.stack)
        negated = False
        while found and found[0].kind == "word" and (keyword := literal(found[0].word)) in _KEYWORDS:
            case = self.frames.last("case")
            if case and case.waiting and keyword != "esac":
                break
            negated ^= keyword == "!"
            found = self.keyword(keyword or "", found[0], found[1:], end)
        if self.patterns(found, end):
            return
        if end == "(" and not found:
            self.open("subshell", self.gate)
            self.after = ""
            return
        if found:
            self.followed(found, negated, piped="|" in (end, self.after))
        if end == ")":
            self.close("subshell")
        if end == ";;" and (case := self.frames.last("case")):
            case.waiting = True
        if end == "|":
            self.status = None
        if found or end != "\n" or len(self.frames.stack) < opened:
            self.after = end

    def keyword(self, keyword: str, first: Token, found: Sequence[Token], end: str) -> Sequence[Token]:
        """Follow the keyword that a command begins with. Returns what is left of the command, up to `end`."""
        if keyword in ("if", "elif", "then", "else"):
            self.branch(keyword)
            self.after = ""
        elif keyword in _CLOSING:
            self.close(_CLOSING[keyword], piped=end == "|")
        elif keyword in _LOOPS:
            found = self.loop(keyword, found)
            self.after = ""
        elif keyword == "do" and self.frames.runs is not False:
            for name in () if self.frames.never_runs(self.status) else self.loops.get(id(first), ()):
                self.values.cast_doubt(name, f"{name} is set in a loop that may read it before")
        elif keyword == "case":
            found = self.case(found)
        elif keyword == "{":
            self.open("group", self.gate)
            self.after = ""
        return found

    def followed(self, found: Sequence[Token], negated: bool, piped: bool) -> None:
        """Follow a command's words where it may run, and keep its status; piped: it runs in a shell of its own."""
        gate, self.target = self.gate, None
        self.assumed = self.assumed and self.after in ("&&", "||")
        if gate is False or self.frames.runs is False:
            return
        self.values.gated = gate is None
        if piped:
            self.values.begin()
        status = self.simple(found)
        if piped:
            self.values.take_back()
        self.values.gated = False
        status = None if status is None else status is not negated
        self.status = status if gate is True else None

    def open(self, kind: Kind, runs: bool | None) -> None:
        frame = self.frames.open(kind, runs, self.status)
        frame.piped, frame.assumed = self.after == "|", self.assumed and self.after in ("&&", "||")

    def close(self, kind: Kind, piped: bool = False) -> None:
        """End the innermost frame, if it is of this kind; whether it succeeded is not kept."""
        if self.frames.last(kind):
            frame = self.frames.close(piped)
            self.status = frame.status if frame.base is False else None

    def loop(self, keyword: str | None, found: Sequence[Token]) -> Sequence[Token]:
        """Begin a loop; the variable of for NAME in ... or for ((...)) is in doubt in it. Returns what is left."""
        name = literal(found[0].word) or "" if found else ""
        several = [word for token in found[2:] for word in self.values.expand(token.word)]
        runs = None if self.gate is not False else False
        frame = self.frames.open("loop", runs, self.status)
        frame.piped, frame.word = self.after == "|", keyword or ""
        if keyword in ("while", "until"):
            return found
        if name == "let" and len(found) > 1 and runs is not False:
            self.values.gated = True
            self.values.arithmetic("".join(piece.text for piece in found[1].word).replace(";", ","))
            self.values.gated = False
        elif name and runs is not False:
            self.values.cast_doubt(name, f"{name} takes several values in a loop")
            frame.whole = frame.base is None and bool(several) and not any(map(marked, several)) and self.gate is True
        return ()

    def case(self, found: Sequence[Token]) -> Sequence[Token]:
        """Begin a case. Returns its first patterns, where they stand on its line."""
        words = self.values.expand(found[0].word, split=False) if found else [""]
        frame = self.frames.open("case", self.gate, self.status)
        frame.word, frame.waiting, self.after = "".join(words), True, ""
        return found[2:] if len(found) > 1 and literal(found[1].word) == "in" else found[1:]

    def patterns(self, found: Sequence[Token], end: str) -> bool:
        """Take the words before ) as patterns of a case, where it waits for them; whether that is so."""
        case = self.frames.last("case")
        if case is None or not (case.waiting or end == ")"):
            return False
        if not case.waiting:
            self.frames.fall_through(case)
        elif end in (")", "|"):
            words = [self.values.pattern(token.word) for token in found]
            self.frames.pattern(case, words, end == ")")
            self.after = "" if end == ")" else end
            self.status = True if end == ")" else self.status
        return True

    def branch(self, keyword: str) -> None:
        """Decide the branches of an if as far as their tests are."""
        if keyword == "if":
            self.open("if", self.gate)
        elif frame := self.frames.last("if"):
            if keyword == "then":
                frame.assumed = frame.assumed or self.assumed
                self.frames.tested(frame, self.status)
            else:
                frame.whole = frame.whole or keyword == "else"
                self.frames.branch(frame, True not in frame.tried)
        else:
            return
        self.status, self.assumed = True, False

    def call(self, name: str, arguments: Sequence[str]) -> None:
        """Follow a function's body where it is called."""
        self.called.append(name)
        body = self.functions[name]
        if len(self.calls) > MOST_SHELLS or len(self.called) * len(body) > MOST_CALLED:
            raise DialectError(f"The script's function {name} calls too much; give the program's flags.")
        gate, after, depth = self.gate, self.after, len(self.frames.stack)
        self.open("group", gate)
        places = ["@", "#", *map(str, range(1, max(10, len(arguments) + 1)))]
        self.calls.append(_Call(depth, {each: self.values.state(each) for each in places}))
        self.values.place(arguments)
        self.after = ""
        self.follow(body)
        call = self.calls.pop()
        for each, state in call.before.items():
            self.values.put(each, state)
        for each in call.perhaps:
            self.values.cast_doubt(each, f"{each} may be a variable of {name} alone")
        while len(self.frames.stack) > depth:
            self.frames.close()
        self.after, self.status = after, None

    def inner(self, text: str, kind: Kind) -> None:
        """Follow what `bash -c` is given, in a shell of its own, or what `eval` is."""
        if len(self.calls) > MOST_SHELLS or len(text) > MOST_CHARACTERS:
            raise DialectError("The script starts shells within shells; give the program's flags.")
        after, depth = self.after, len(self.frames.stack)
        self.open(kind, self.gate)
        self.calls.append(_Call(depth))
        self.after = ""
        self.follow(joined_tests(tokens(text)))
        self.calls.pop()
        while len(self.frames.stack) > depth:
            self.frames.close()
        self.after, self.status = after, None

    def leave(self) -> None:
        """End the script here, or the branch or loop in which it may end."""
        if self.gate is not True or self.assumed or any(frame.assumed for frame in self.frames.stack):
            return
        if self.frames.runs is True and not self.calls and not any(f.kind == "subshell" for f in self.frames.stack):
            self.ended = True
        elif self.frames.stack:
            self.frames.leave()

    def simple(self, found: Sequence[Token]) -> bool | None:
        """Assign, or keep the command if it may start a program; whether it succeeds, as far as that is known."""
        declaring = None
        rest: list[Token] = []
        before: dict[str, tuple[str, ...] | None] = {}
        for token in found:
            word = literal(token.word)
            started = any(one.kind == "word" for one in rest)
            if token.kind == "array":
                self.keep_local(token.text.rstrip("+="), declaring)
                assign_array(self.values, token)
            elif token.kind == "operator":
                if rest and literal(rest[0].word) == "[[":
                    return None
                rest.extend([token] if token.text != "2>&1" else [])
            elif not started and (name := assigned(token.word)):
                before.setdefault(name, self.values.variables.get(name))
                self.keep_local(name, declaring)
                assign_word(self.values, token.word, name)
                self.script.exported |= {name} if declaring == "export" else set()
            elif not rest and declaring is None and word in _DECLARING:
                declaring = word
            elif declaring is not None and not started and word and not (rest and rest[-1].kind == "operator"):
                self.script.exported |= {word} if declaring == "export" and word[0] != "-" else set()
                declaring = "readonly" if word[0] == "-" and "g" in word else declaring  # -g is not a function's own
            elif rest and rest[-1].kind == "operator":
                target = "".join(self.values.expand(token.word))
                self.target = target if rest.pop().text in (">", ">>") else self.target
            else:
                rest.append(token)
        if declaring is None and any(token.kind == "word" for token in rest):
            for name, value in before.items():  # the shell expands the words before it
                self.values.restore(name, value)
        words = self.words([token for token in rest if token.kind == "word"])
        if not words:
            if any(token.kind == "operator" and token.text == "<" for token in found):
                for name in before:
                    self.values.cast_doubt(name, f"{name} is a placeholder in <>")
            return None if any(piece.kind == "command" for token in found for piece in token.word) else True
        return self.run_words(words, next(token.line for token in rest if token.kind == "word"))

    def words(self, found: Sequence[Token]) -> list[str]:
        """What the words of a command stand for; in [[ ]] those that are compared with are patterns."""
        if not found or literal(found[0].word) != "[[":
            return [each for token in found for each in self.values.expand(token.word)]
        words: list[str] = []
        for token in found:
            if words and words[-1] in ("==", "=", "!="):
                words.append(self.values.pattern(token.word))
            else:
                words.append("".join(self.values.expand(token.word, split=False)))
        return words

    def keep_local(self, name: str, declaring: str | None) -> None:
        """Note what a variable is before a function has one of its own under the name."""
        if declaring not in ("local", "declare", "typeset") or not self.calls:
            return
        call = self.calls[-1]
        if self.gate is True and all(frame.now for frame in self.frames.stack[call.depth + 1 :]):
            call.before.setdefault(name, self.values.state(name))
        elif name not in call.before:
            call.perhaps.add(name)

    def run_words(self, words: Sequence[str], line: int) -> bool | None:
        """Follow a function, or keep a command with what it does to variables; whether it succeeds, if known."""
        if words[0] in self.functions:
            self.call(words[0], words[1:])
            return None
        if (text := handed_to_shell(words)) is not None:
            self.inner(text, "subshell")
            return None
        if words[0] == "eval":
            self.inner(" ".join(words[1:]), "group")
            return builtin(self.values, words)
        self.script.launches.append(Launch(tuple(self.values.certain(word) for word in words), line))
        if words[0] in ("exit", "exec") and (words[0] == "exit" or len(words) > 1):
            self.leave()
        if words[0] in TESTS:
            known = self.values.assumed(words)
            self.assumed = known != list(words)
            return holds(known)
        return builtin(self.values, words)

    def here_document(self, token: Token) -> None:
        """Keep the body of a here-document under the name of the file it is written to."""
        if self.target is not None:
            self.script.files[unmarked(self.target)] = unmarked("".join(self.values.expand(token.word, split=False)))
