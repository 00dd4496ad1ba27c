"""Branches, loops and groups of a shell script: which of their commands run, and what they leave in variables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from seqloom.dialects.shell_tests import matches
from seqloom.dialects.shell_values import State, Values
from seqloom.errors import DialectError

MOST_BRANCHES = 100
"""How deep ifs, loops, groups and subshells may stand inside each other."""

Kind = Literal["if", "loop", "case", "group", "subshell"]


@dataclass
class Frame:
    """An if, loop, case, group or subshell.

    base: whether it runs. now: whether what stands now in it does. status: that before it. tried: what its tests or
    patterns came to so far. word: of a case, or a loop's keyword. waiting: whether a case's next words are patterns.
    held: whether those so far stand for the word. whole: whether one of its branches runs for certain. assumed:
    whether a test of it takes a variable that is not set as empty. piped: whether it stands after a pipe, in a
    shell of its own. ends: what branches that are not decided left in the variables that they changed.
    """

    kind: Kind
    base: bool | None
    now: bool | None
    status: bool | None
    tried: set[bool | None] = field(default_factory=set)
    word: str = ""
    waiting: bool = False
    held: list[bool | None] = field(default_factory=list)
    whole: bool = False
    assumed: bool = False
    piped: bool = False
    ends: list[dict[str, State]] = field(default_factory=list)


@dataclass
class Frames:
    """The frames that are open, innermost last."""

    values: Values
    stack: list[Frame] = field(default_factory=list)

    @property
    def runs(self) -> bool | None:
        """Whether what stands now runs: None where that is not known."""
        found = [frame.now for frame in self.stack]
        return False if False in found else None if None in found else True

    def last(self, kind: Kind) -> Frame | None:
        """The innermost frame, if it is of this kind."""
        return self.stack[-1] if self.stack and self.stack[-1].kind == kind else None

    def open(self, kind: Kind, runs: bool | None, status: bool | None) -> Frame:
        """Begin a frame."""
        if len(self.stack) >= MOST_BRANCHES:
            raise DialectError(f"The script nests branches deeper than {MOST_BRANCHES}; give the program's flags.")
        self.stack.append(Frame(kind, runs, runs, status))
        self.values.begin()
        return self.stack[-1]

    def close(self, piped: bool = False) -> Frame:
        """End the innermost frame: what its branches leave is kept where they agree, else in doubt.

        piped: whether it stands before a pipe, in a shell of its own.
        """
        frame = self.stack.pop()
        if frame.kind == "subshell" or piped or frame.piped:
            self.values.take_back()
            return frame
        self._end_branch(frame)
        before = self.values.commit()
        for name in dict.fromkeys(name for end in frame.ends for name in end):
            found = [end.get(name, before[name]) for end in frame.ends if name in before]
            found += [] if frame.whole and (frame.base or frame.kind == "loop") else [before[name]]
            found = [*found[len(frame.ends) :], *found[: len(frame.ends)]]
            if any(other != found[0] for other in found):
                self.values.undecided(name, found, "loop" if frame.kind == "loop" else "branch")
            else:
                self.values.put(name, found[0])
        return frame

    def branch(self, frame: Frame, chosen: bool | None) -> None:
        """Go on to a branch of an if or case; `chosen`: whether its test holds and none before it did."""
        self._end_branch(frame)
        unknown = frame.base is None or None in frame.tried
        frame.now = False if chosen is False or frame.base is False else None if unknown else chosen

    def tested(self, frame: Frame, status: bool | None) -> None:
        """Go on from the test of an if, or the patterns of a case, to its branch."""
        if frame.now is None and (changed := self.values.rewind()):
            frame.ends.append(changed)
        elif frame.base and not frame.tried:  # what the first test changes is changed for all branches
            self.values.commit()
            self.values.begin()
        frame.now = True
        chosen = False if True in frame.tried else status
        frame.tried.add(chosen)
        frame.whole = frame.whole or chosen is True
        self.branch(frame, chosen)

    def never_runs(self, status: bool | None) -> bool:
        """Go on from the test of a while or until to its body; whether the first test says that it never runs."""
        frame = self.last("loop")
        if frame is None or frame.word not in ("while", "until") or status is not (frame.word == "until"):
            return False
        frame.now = False
        return True

    def pattern(self, frame: Frame, words: Sequence[str], last: bool) -> None:
        """Patterns of a case, which stand for one branch; `last`: whether no more of them follow."""
        frame.held += [matches(frame.word, word) for word in words]
        if last:
            held, frame.held, frame.waiting = frame.held, [], False
            self.tested(frame, True if True in held else None if None in held else False)

    def fall_through(self, frame: Frame) -> None:
        """Go on into the next branch of a case without a decision, as after ;&."""
        self._end_branch(frame)
        frame.now, frame.base, frame.whole, frame.held = None, None, False, []

    def leave(self) -> None:
        """Skip the rest of the innermost branch, whose end is not reached."""
        if self.stack[-1].now is None:
            self.values.rewind()
        self.stack[-1].now = False

    def _end_branch(self, frame: Frame) -> None:
        """Keep what a branch that is not decided leaves, and go back to what was before it."""
        if frame.now is None:
            frame.ends.append(self.values.rewind())
