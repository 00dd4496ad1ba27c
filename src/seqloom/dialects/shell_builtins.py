"""What commands of the shell itself do to variables."""

import re
from collections.abc import Sequence

from seqloom.dialects.shell_script import SLURM
from seqloom.dialects.shell_values import Values, marked, unmarked, written

TESTS = ("[", "[[", "test")

_READING = {"read", "mapfile", "readarray", "getopts", "unset"}
_HARMLESS = re.compile(r"conda|set_env|setvars|activate|bashrc|profile|\.asc|ssh-agent|modulecmd")


def builtin(values: Values, words: Sequence[str]) -> bool | None:
    """Follow what a command does to variables; whether it succeeds, None where that is not known."""
    name, rest = words[0], words[1:]
    if name in ("true", ":", "echo", "set", "shift", "trap", "exit", "false"):
        if name == "set" and "--" in rest:
            values.place(rest[rest.index("--") + 1 :])
        elif name == "shift":
            values.place(list(values.variables.get("@", ()))[int(rest[0]) if rest and rest[0].isdecimal() else 1 :])
        for variable in written(" ".join(rest)) if name == "trap" else ():
            values.cast_doubt(variable, f"{variable} may be changed by `{name}`, which is not followed")
        return name != "false"
    if name == "let":
        return [values.arithmetic(word) for word in rest][-1] if rest else None
    if name in _READING or name == "printf":
        told = rest[1:2] if name == "printf" and rest[:1] == ["-v"] else [] if name == "printf" else rest
        for word in told:
            if re.fullmatch(r"[A-Za-z_]\w*", word) and (name != "unset" or word in values.variables):
                values.cast_doubt(word, f"{word} is set by `{name}`, which is not run")
        return False if name == "getopts" and "@" not in values.variables else None  # there are no arguments
    if name in ("source", ".") or (name == "eval" and marked(" ".join(rest))):
        if _HARMLESS.search(text := " ".join(words)):
            return None
        why = f"`{' '.join(unmarked(text).split())[:40]}` may have set it, and it is not run"
        names = set(written(text))
        values.sourced = why
        for variable in sorted(names | set(values.variables).difference(SLURM)):
            values.cast_doubt(variable, f"{variable}: {why}")
    return None
