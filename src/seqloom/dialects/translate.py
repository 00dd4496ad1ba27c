"""One door to every dialect: a file, or the settings themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path

from seqloom.dialects import colossalai, megatron, mindformers
from seqloom.dialects.translation import Translation
from seqloom.errors import DialectError

DIALECTS: dict[str, Callable[..., Translation]] = {
    "colossalai": colossalai.translate,
    "megatron": megatron.translate,
    "mindformers": mindformers.translate,
}
"""The systems whose settings are read."""

MOST_BYTES = 200_000
"""The largest file that is read."""


def translate(
    dialect: str,
    settings: Sequence[str],
    *,
    world: int | None = None,
    version: str | None = None,
    keep_order: bool = False,
) -> Translation:
    """The plan, model and training that another system's settings describe, with a note for every option.

    dialect: `colossalai`, `mindformers` or `megatron`. settings: the path of a file, or one text, or flags one
    by one. world: processes there are, where the settings leave it open. version: of the other system, where
    versions differ. keep_order: whether ranks must sit where they sit there.
    Raises DialectError with every reason why there is no plan. Nothing of a file is ever run.

    >>> str(translate("megatron", ["--tensor-model-parallel-size", "2", "--sequence-parallel"], world=4).plan)
    'data=2 tensor=2'
    """
    if dialect not in DIALECTS:
        raise DialectError(f"'{dialect}' is no dialect; it is one of {', '.join(DIALECTS)}.")
    if not settings or not any(part.strip() for part in settings):
        raise DialectError("There are no settings; give the path of a file, or flags.")
    if world is not None and world < 1:
        raise DialectError(f"A world of {world} processes is not possible; give 1 or more.")
    if sum(map(len, settings)) > MOST_BYTES:
        raise DialectError(f"The settings are longer than {MOST_BYTES:,} characters; give those of one run.")
    path = _file(settings)
    text = None if path is None else _text(path)
    return DIALECTS[dialect](
        text if text is not None else settings[0].removeprefix("\ufeff") if len(settings) == 1 else list(settings),
        world=world,
        version=version,
        keep_order=keep_order,
        folder=path.parent if path else None,
        title=path.name if path else "",
    )


def _file(settings: Sequence[str]) -> Path | None:
    """The file that the settings name, None where they are the settings themselves."""
    if len(settings) != 1 or len(settings[0]) > 4096 or "\n" in settings[0]:
        return None
    try:
        path = Path(settings[0]).expanduser()
        if path.is_file():
            return path
        if path.is_dir():
            raise DialectError(f"{path} is a folder; give the path of a file.")
    except (OSError, ValueError, RuntimeError):
        return None
    if path.suffix in (".py", ".sh", ".yaml", ".yml") and " " not in settings[0].strip() and "(" not in settings[0]:
        raise DialectError(f"There is no file {path}; give the path of a file, or the settings themselves in quotes.")
    return None


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DialectError(f"{path} is larger than {MOST_BYTES:,} bytes; give the settings of one run.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DialectError(f"{path} cannot be read as text ({' '.join(str(error).split())}).") from error
