"""Command lines as options: of a string, of a list of words, or of a launch script."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seqloom.dialects.ledger import Unread, Verdict, as_whole
from seqloom.dialects.shell import run
from seqloom.dialects.shell_script import Launch, Script
from seqloom.errors import DialectError, counted

_TELLING = ("echo", "printf", "cat", "ls", "cp", "mv", "rm", "mkdir", "grep", "sed", "which", "chmod", "export")
"""Commands that take programs as words and start none."""

_LAUNCHER = re.compile(r"torchrun|deepspeed|torch\.distributed|colossalai|accelerate|srun|mpirun|mpiexec|msrun")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What a program is started with.

    program: its file, or None where only flags were given. options: by name with dashes; True without a
    value, a list with several. launcher: those of torchrun and the like. launched: whether such a one starts it.
    stray: words that belong to no option. world: processes the launcher starts, None where that is not said.
    unused: variables that a script sets and never reads, exported those among them that go to the environment.
    files: here-documents that it writes. others: programs that it starts without a launcher, where this one has
    one. dropped: flags that a comment cuts off. repeated: names given twice, where the last counts.
    """

    program: str | None
    options: dict[str, Any]
    launcher: dict[str, Any] = field(default_factory=dict)
    launched: bool = False
    stray: tuple[str, ...] = ()
    world: int | None = None
    unused: Mapping[str, str] = field(default_factory=dict)
    exported: frozenset[str] = frozenset()
    files: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    dropped: dict[str, Any] = field(default_factory=dict)
    repeated: tuple[str, ...] = ()


def from_words(words: Sequence[str]) -> CommandLine:
    """The options in a list of words, with or without the program before them."""
    return _command_line(Launch(tuple(words), 1), Script())


def from_text(text: str) -> CommandLine:
    """The options in a script, or in flags as one would type them.

    Raises DialectError where no command starts a program, or several do differently.
    """
    script = run(text)
    found = [_command_line(launch, script) for launch in script.launches if _starts(launch)]
    if not found:
        flags = [launch for launch in script.launches if _is_flag(launch.words[0])]
        found = [_command_line(launch, script) for launch in flags[:1]]
    if not found:
        raise DialectError(
            "The settings hold no command that starts a program with flags; give its launch script or its flags."
        )
    launched = [one for one in found if one.launched]
    if len(launched) < len(found) and _alike(launched):
        return replace(launched[0], others=tuple(one.program or "" for one in found if not one.launched))
    if not _alike(found):
        programs = ", ".join(dict.fromkeys(str(one.program) for one in found))
        several = counted(len(found), "program")
        raise DialectError(f"The script starts {several} with different flags ({programs}); give the flags of one.")
    return found[0]


def _alike(found: Sequence[CommandLine]) -> bool:
    """Whether there are programs, and all have the same flags."""
    return bool(found) and all(one.options == found[0].options for one in found)


def _starts(launch: Launch) -> bool:
    """Whether a command starts a Python program with flags of its own."""
    place = _program(launch.words) if launch.words[0] not in _TELLING else None
    return place is not None and any(map(_is_flag, launch.words[place + 1 :]))


def _program(words: Sequence[str | Unread]) -> int | None:
    """Where the program stands among the words of its command."""
    texts = [word if isinstance(word, str) else word.text for word in words]
    for place, text in enumerate(texts):
        if text.endswith(".py") and not text.startswith("-"):
            return place
    if any(re.fullmatch(r"(.*/)?(python[\d.]*|torchrun|deepspeed|accelerate)", text) for text in texts):
        for place, text in enumerate(texts[:-1]):
            if text == "-m" and texts[place + 1] not in ("torch.distributed.launch", "torch.distributed.run"):
                return place + 1
    return None


def _is_flag(word: str | Unread) -> bool:
    text = word if isinstance(word, str) else word.text
    return re.match(r"--[A-Za-z]|-[A-Za-z]", text) is not None


def _command_line(launch: Launch, script: Script) -> CommandLine:
    place = _program(launch.words)
    before = launch.words[:place] if place is not None else ()
    after = launch.words[place + 1 :] if place is not None else launch.words
    program = None if place is None else _text(launch.words[place])
    options, stray, repeated = _options(after)
    launcher = _options(before)[0]
    dropped: dict[str, Any] = {}
    for other in script.launches:
        if _is_flag(other.words[0]) and other is not launch:
            dropped |= _options(other.words)[0]
    return CommandLine(
        program=program,
        options=options,
        launcher=launcher,
        launched=any(_LAUNCHER.search(_text(word)) for word in before),
        stray=stray,
        world=_world(launcher, script),
        unused=script.unused,
        exported=frozenset(script.exported),
        files=script.files,
        dropped=dropped,
        repeated=repeated,
    )


def _options(words: Sequence[str | Unread]) -> tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]:
    """Options by name, words that belong to none, and names that came twice (the last one counts)."""
    options: dict[str, Any] = {}
    stray: list[str] = []
    repeated: list[str] = []
    name: str | None = None
    for word in words:
        text = _text(word)
        if not _is_flag(word):
            if name is None:
                stray.append(text)
            else:
                before = options[name]
                options[name] = (
                    word if before is True else [*before, word] if isinstance(before, list) else [before, word]
                )
            continue
        name, equals, value = text.partition("=") if text.startswith("--") else (text, "", "")
        if name in options:
            repeated.append(name)
        options[name] = True
        if equals or isinstance(word, Unread):
            options[name] = Unread(value, word.why) if isinstance(word, Unread) else value
    return {name: _certain(value) for name, value in options.items()}, tuple(stray), tuple(repeated)


def _certain(value: Any) -> Any:
    """A list of values as one Unread, where one of them is."""
    if isinstance(value, list) and (doubts := [each for each in value if isinstance(each, Unread)]):
        return Unread(" ".join(map(_text, value)), doubts[0].why)
    return value


def _text(word: str | Unread) -> str:
    return word.text if isinstance(word, Unread) else word


def said_world(line: CommandLine) -> tuple[Verdict, str]:
    """The verdict and reason of the processes that a launcher starts; a file of hosts may name several machines."""
    processes = counted(line.world or 1, "process")
    if "--hostfile" in line.launcher and not {"--nnodes", "--num_nodes"} & set(line.launcher):
        return "changed", f"{processes} of one machine; if --hostfile names several, give --world."
    return "mapped", f"The launcher starts {processes}."


def _world(launcher: Mapping[str, Any], script: Script) -> int | None:
    """Processes that the launcher starts, or else what the script calls the world."""

    def said(*names: str) -> int | None:
        for name in names:
            if (number := as_whole(launcher.get(name))) is not None and number > 0:
                return number
        return None

    here = said("--nproc_per_node", "--nproc-per-node", "--num_gpus", "--worker_num")
    nodes = said("--nnodes", "--num_nodes")
    if here is not None and (nodes is not None or not {"--nnodes", "--num_nodes"} & set(launcher)):
        return here * (nodes or 1)
    words = script.variables.get("WORLD_SIZE")
    world = as_whole(words[0]) if words else None
    return world if world and world > 0 else None
