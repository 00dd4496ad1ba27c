"""Text to token ids: bytes, or any Hugging Face tokenizer kept in a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from seqloom.errors import DataError


class Tokenizer(Protocol):
    """What packing needs of a tokenizer.

    end_id: the token put after each document. vocab_size: every id is below it.
    """

    @property
    def end_id(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, as integers [its tokens], without start or end tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Write its files beside a model's, where it has any."""
        ...


@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8 as ids 0 to 255, and 256 for the end of a document.

    >>> ByteTokenizer().encode(["hé"])[0].tolist()
    [104, 195, 169]
    """

    end_id: int = 256
    vocab_size: int = 257

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The bytes of each text, [its bytes]."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def save(self, folder: Path) -> None:
        """Bytes need no files."""


@dataclass(frozen=True)
class FolderTokenizer:
    """A Hugging Face tokenizer; its end-of-text token ends each document.

    A text that spells out a special token encodes to it, as the tokenizer itself does.
    """

    inner: Any
    end_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The ids of each text, [its tokens]; no special tokens are added."""
        if not texts:
            return []
        # verbose=False: documents longer than the tokenizer's model_max_length are meant to be.
        ids = self.inner(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.int32) for row in ids]

    def save(self, folder: Path) -> None:
        """Write the tokenizer as `from_pretrained` reads it."""
        self.inner.save_pretrained(folder)


def load_tokenizer(source: str, *, model_vocab: int) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, or a folder.

    model_vocab: the rows of the model's embedding. Raises DataError where the folder holds no
    tokenizer, the tokenizer has no end token, or it makes ids that the model has no row for.
    """
    found = ByteTokenizer() if source == "bytes" else _from_folder(source)
    if found.vocab_size > model_vocab:
        raise DataError(
            f"The tokenizer '{source}' makes ids up to {found.vocab_size - 1}, "
            f"but the model's vocab_size is {model_vocab}; use a vocab_size of at least {found.vocab_size}."
        )
    return found


def _from_folder(source: str) -> FolderTokenizer:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to load, and bytes need none of it

    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"There is no folder '{source}'; give 'bytes' or the folder of a Hugging Face tokenizer.")
    try:
        # A model's config.json in the folder makes AutoTokenizer take the family's class, which may split text in
        # another way than tokenizer.json says; the file itself is what the user means.
        kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
        inner = kind.from_pretrained(folder, local_files_only=True)
    # What a broken folder raises depends on the file it breaks in; all of it means the same to the reader.
    except Exception as error:
        raise DataError(
            f"The folder '{source}' holds no tokenizer that transformers can read "
            f"({' '.join(str(error).split())[:200]}); it needs the files that save_pretrained of a tokenizer writes."
        ) from error
    if inner.eos_token_id is None:
        raise DataError(f"The tokenizer in '{source}' has no end-of-text token; set its eos_token and save it again.")
    # len() counts ids, which may leave gaps; what matters is the largest.
    return FolderTokenizer(inner, inner.eos_token_id, max(inner.get_vocab().values()) + 1)
