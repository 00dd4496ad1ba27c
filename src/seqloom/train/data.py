"""Files to documents to packed sequences; every process reads the same text in the same order."""

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape, iglob
from typing import Any, BinaryIO

from numpy.typing import NDArray

from seqloom.errors import DataError, counted
from seqloom.train.config import DataConfig
from seqloom.train.packing import PackedText
from seqloom.train.tables import ENDINGS, dataset_texts, open_dataset, table_texts
from seqloom.train.tokenizer import Tokenizer

_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell half a surrogate pair, which no tokenizer takes
_ENCODE_CHARACTERS = 4_000_000  # characters handed to a tokenizer at once: enough to keep its threads busy


def load_text(data: DataConfig, tokenizer: Tokenizer) -> PackedText:
    """Read, tokenise and pack the text of a configuration.

    Raises DataError when a glob matches no file, a file cannot be read, a line of JSONL is broken,
    or there is no text in all of it. What was skipped or replaced is said in the result's `notes`.
    """
    reader = _Reader(data.text_key)
    if data.dataset is None:
        files = find_files(data.files)
        texts = (text for file in files for text in reader.documents(file))
    else:
        files = [data.dataset]
        texts = reader.rows(dataset_texts(data.dataset, data.split or "train", data.text_key))
    documents = list(_encode(texts, tokenizer))
    notes = reader.notes()
    if wordless := sum(not len(document) for document in documents):
        notes += (f"Skipped {counted(wordless, 'document')} of which no token is left.",)
    if wordless == len(documents):
        raise DataError(
            f"There is no text to train on: data.files matches {counted(len(files), 'file')}, such as "
            f"{files[0]}, with nothing in it; name files that hold text."
            if data.dataset is None
            else f"There is no text to train on: all rows of {data.dataset} are empty; name another dataset or split."
        )
    return PackedText.pack(
        documents,
        end_id=tokenizer.end_id,
        sequence_length=data.sequence_length,
        num_files=len(files),
        notes=notes,
    )


def find_files(globs: Sequence[str], key: str = "data.files") -> list[str]:
    """The files that the globs match: absolute, each once, sorted by name.

    `{stdlib}` stands for the folder of this Python's standard library. Raises DataError for a
    glob that matches no file, so that a misspelt one cannot drop text unseen.
    """
    stdlib = escape(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for pattern in globs:
        expanded = os.path.expanduser(pattern.replace("{stdlib}", stdlib))
        files = {os.path.abspath(path) for path in iglob(expanded, recursive=True) if os.path.isfile(path)}
        if not files:
            raise DataError(f"No file matches '{pattern}' of {key}, seen from {os.getcwd()}; correct the glob.")
        found |= files
    return sorted(found)


def glance(data: DataConfig, section: str) -> None:
    """Raise DataError for what a look at the first row of each file tells: a wrong glob, `text_key`, split or format.

    section: of the configuration, by which messages call it.
    """
    if data.dataset is not None:
        open_dataset(data.dataset, data.split or "train", data.text_key)
    reader = _Reader(data.text_key)
    for file in find_files(data.files, f"{section}.files"):
        reader.glance(file)


@dataclass
class _Reader:
    """Turns files into documents, and remembers what it had to skip or replace."""

    text_key: str
    empty_files: list[str] = field(default_factory=list)
    replaced_files: list[str] = field(default_factory=list)
    empty_lines: list[str] = field(default_factory=list)
    replaced_lines: list[str] = field(default_factory=list)

    def glance(self, file: str) -> None:
        """Raise DataError where a file cannot be read, or its first row has no text."""
        if file.lower().endswith(ENDINGS):
            next(table_texts(file, self.text_key), None)
            return
        with _opened(file) as opened:
            for number, line in enumerate(opened, start=1) if file.lower().endswith(".jsonl") else ():
                if line.strip():
                    self._value(f"{file}:{number}", line.decode("utf-8", errors="replace"))
                    return

    def documents(self, file: str) -> Iterator[str]:
        """The documents of one file that are not empty, in order."""
        if file.lower().endswith(ENDINGS):
            yield from self.rows(table_texts(file, self.text_key))
            return
        with _opened(file) as opened:
            raw = opened.read()
        if not raw.strip():
            self.empty_files.append(file)
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.replaced_files.append(file)
            text = raw.decode("utf-8", errors="replace")
        if file.lower().endswith(".jsonl"):
            yield from self._lines(file, text)
        else:
            yield text

    def rows(self, values: Iterable[tuple[str, Any]]) -> Iterator[str]:
        """The documents among the rows of a table that are not empty, in order."""
        for place, value in values:
            if value is None or (isinstance(value, str) and not value.strip()):
                self.empty_lines.append(place)
            elif not isinstance(value, str):
                raise DataError(
                    f"{place} has {value!r:.40} under '{self.text_key}', which is not a string; give text there."
                )
            else:
                yield value

    def _lines(self, file: str, text: str) -> Iterator[str]:
        # Not splitlines: JSON strings may hold the other line separators of Unicode as they are.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            document = self._value(f"{file}:{number}", line)
            if not document.strip():
                self.empty_lines.append(f"{file}:{number}")
                continue
            if _HALF_PAIR.search(document):
                self.replaced_lines.append(f"{file}:{number}")
            yield _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", document)

    def _value(self, place: str, line: str) -> str:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place} is not JSON ({error.msg} at column {error.colno}); give one object a line."
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{place} holds a JSON {type(value).__name__}; give one object a line.")
        if self.text_key not in value:
            keys = ", ".join(map(str, value)) or "none"
            raise DataError(
                f"{place} has no key '{self.text_key}' (it has {keys}); set data.text_key to the one with the text."
            )
        text = value[self.text_key]
        if not isinstance(text, str):
            raise DataError(
                f"{place} has {text!r:.40} under '{self.text_key}', which is not a string; give text there."
            )
        return text

    def notes(self) -> tuple[str, ...]:
        """A sentence for each kind of thing that was skipped or replaced."""
        said = (
            (self.empty_files, "{} empty and skipped", "file"),
            (self.replaced_files, "{} not UTF-8 all through; the bytes that are not were replaced by U+FFFD", "file"),
            (self.empty_lines, "{} without text and skipped", "line"),
            (self.replaced_lines, "{} with half a surrogate pair, replaced by U+FFFD", "line"),
        )
        return tuple(_note(places, sentence, what) for places, sentence, what in said if places)


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    try:
        with open(file, "rb") as opened:
            yield opened
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); make it readable or leave it out.") from error


def _note(places: list[str], sentence: str, what: str) -> str:
    number = f"1 {what} is" if len(places) == 1 else f"{len(places)} {what}s are"
    return f"{sentence.format(number)} ({', '.join(places[:3])}{', ...' if len(places) > 3 else ''})."


def _encode(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[NDArray[Any]]:
    """The tokens of each text, in order, a few million characters at a time."""
    waiting: list[str] = []
    characters = 0
    for text in texts:
        waiting.append(text)
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield from tokenizer.encode(waiting)
            waiting, characters = [], 0
    yield from tokenizer.encode(waiting)
