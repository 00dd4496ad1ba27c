"""Text kept in columns: Parquet and Arrow files, folders that the library datasets wrote, and datasets of the hub.

The library is optional, and loads where it is needed.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seqloom.errors import DataError

ENDINGS = (".parquet", ".arrow")
"""Names of files that are tables, in whatever case."""

_ROWS = 1000  # rows that are made Python strings at once


def table_texts(file: str, key: str) -> Iterator[tuple[str, Any]]:
    """Where each row of a Parquet or Arrow file stands and what it holds under `key`, in order.

    Raises DataError where pyarrow is absent, cannot read the file, or finds no such column.
    """
    _require("pyarrow", f"{file} is a table")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        batches: Any
        if file.lower().endswith(".parquet"):
            opened = parquet.ParquetFile(file)
            names = opened.schema_arrow.names
            batches = opened.iter_batches(_ROWS, columns=[key]) if key in names else ()
        else:
            batches, names = _arrow(file)
        _check_column(file, key, names)
        for batch in batches:
            for value in batch.column(key).to_pylist():
                number += 1
                yield f"{file} row {number}", value
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as a table ({_said(error)}); restore it or leave it out.") from error


def _arrow(file: str) -> tuple[Any, list[str]]:
    """The batches and column names of an Arrow file in either of its forms."""
    import pyarrow

    source = pyarrow.memory_map(file)
    try:
        whole = pyarrow.ipc.open_file(source)
        return (whole.get_batch(number) for number in range(whole.num_record_batches)), whole.schema.names
    except pyarrow.ArrowInvalid:  # datasets writes the streaming form
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream, stream.schema.names


def open_dataset(source: str, split: str, key: str) -> Any:
    """A split of the folder that `save_to_disk` wrote, or of the hub's dataset of that name, as `datasets` has it.

    Raises DataError where the library is absent, there is no such dataset, split or column.
    """
    _require("datasets", f"data.dataset is '{source}'")
    import datasets

    folder = Path(source).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise DataError(f"There is no folder '{source}'; give one that save_to_disk wrote, or a name on the hub.")
    try:
        found = datasets.load_from_disk(str(folder)) if folder.is_dir() else datasets.load_dataset(source)
    # What a broken folder or an absent network raises has no common type; all of it means the same to the reader.
    except Exception as error:
        where = "a folder that save_to_disk wrote" if folder.is_dir() else "on the hub, or the hub cannot be reached"
        raise DataError(
            f"The dataset '{source}' cannot be loaded: it is not {where} ({_said(error)}); name Parquet files by "
            "data.files, or another dataset."
        ) from error
    if isinstance(found, dict):
        if split not in found:
            raise DataError(
                f"The dataset '{source}' has no split '{split}' (it has {', '.join(found)}); set split to one."
            )
        found = found[split]
    _check_column(source, key, found.column_names)
    return found


def dataset_texts(source: str, split: str, key: str) -> Iterator[tuple[str, Any]]:
    """Where each row of a dataset's split stands and what it holds under `key`, in order; see `open_dataset`."""
    number = 0
    for batch in open_dataset(source, split, key).select_columns([key]).iter(_ROWS):
        for value in batch[key]:
            number += 1
            yield f"{source} row {number}", value


def _require(library: str, why: str) -> None:
    if find_spec(library) is None:
        raise DataError(
            f"{why}, which takes the library {library}, and it is not installed here; "
            "install it (pip install datasets), or give text or JSONL by data.files."
        )


def _check_column(source: str, key: str, names: list[str]) -> None:
    if key not in names:
        raise DataError(
            f"{source} has no column '{key}' (it has {', '.join(names)}); set data.text_key to the one with the text."
        )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
