"""One stream of tokens cut into sequences of one length, with the bounds of its documents.

    stream     a a a E b b E c c c c E          E ends each document
    labels     a a E - b E - c c c E -          the next token of the stream; none (-) across documents
    sequences  [a a a E b] [b E c c c] [c E . . .]

A document cut by the edge of a sequence goes on as a document of its own in the next sequence, and
the last position before the edge keeps its label, so no label is lost to the cutting. What the
last sequence lacks is filled with end tokens that have no labels.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seqloom.errors import DataError
from seqloom.sequence import NO_LABEL, Batch

_COUNTED_TOKENS = 1 << 22  # tokens counted at once: numpy makes them twice as wide to count them


@dataclass(frozen=True, eq=False)
class PackedText:
    """Documents packed into sequences; rows are made when they are asked for.

    tokens: int32 [num_sequences x sequence_length], the stream and its filling.
    ends: int64 [num_documents], where in the stream each document ends, its end token included.
    num_files: files the documents came from.
    notes: sentences about what was skipped or replaced in reading.
    """

    tokens: NDArray[np.int32]
    ends: NDArray[np.int64]
    sequence_length: int
    num_files: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def pack(
        cls,
        documents: Sequence[NDArray[Any]],
        *,
        end_id: int,
        sequence_length: int,
        num_files: int = 0,
        notes: tuple[str, ...] = (),
    ) -> "PackedText":
        """Lay documents [its tokens] end to end, each followed by `end_id`.

        Raises DataError when no document holds a token.
        """
        documents = [document for document in documents if len(document)]
        if not documents:
            raise DataError("There is no text to train on: every document is empty; name files that hold text.")
        ends = np.cumsum([len(document) + 1 for document in documents], dtype=np.int64)
        tokens = np.full(-(-ends[-1] // sequence_length) * sequence_length, end_id, dtype=np.int32)
        for document, end in zip(documents, ends, strict=True):
            tokens[end - 1 - len(document) : end - 1] = document
        tokens.setflags(write=False)
        ends.setflags(write=False)
        return cls(tokens, ends, sequence_length, num_files, notes)

    @property
    def num_sequences(self) -> int:
        """Sequences there are, the last one possibly filled up."""
        return len(self.tokens) // self.sequence_length

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, end tokens included and filling excluded."""
        return int(self.ends[-1])

    @property
    def num_documents(self) -> int:
        """Documents of the stream, before sequences cut them."""
        return len(self.ends)

    @cached_property
    def unigram_entropy(self) -> float:
        """Nats a label takes when only how often each token occurs is known.

        The loss of the best model that looks at nothing: one that learns from its context falls below.
        """
        counts = np.zeros(int(self.tokens.max()) + 1, dtype=np.int64)
        for start in range(0, self.num_tokens, _COUNTED_TOKENS):
            counted = self.tokens[start : min(start + _COUNTED_TOKENS, self.num_tokens)]
            counts += np.bincount(counted, minlength=len(counts))
        # Every token of a document but its first is a label.
        counts -= np.bincount(self.tokens[np.concatenate([[0], self.ends[:-1]])], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of the stream and the bounds in it, whatever the length of sequences."""
        whole = zlib.crc32(self.tokens[: self.num_tokens].data)
        return zlib.crc32(self.ends.data, whole)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The sequences of these numbers as the rows of one batch, labels shifted already."""
        for index in indices:
            if not 0 <= index < self.num_sequences:
                raise IndexError(f"there is no sequence {index}; they are numbered 0 to {self.num_sequences - 1}")
        rows = [self._row(int(index)) for index in indices]
        return Batch(
            tokens=torch.from_numpy(np.stack([tokens for tokens, _, _ in rows])),
            labels=torch.from_numpy(np.stack([labels for _, labels, _ in rows])),
            documents=tuple(documents for _, _, documents in rows),
        )

    def _row(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[int, ...]]:
        """Tokens and labels [sequence_length], and the lengths of the documents in the row."""
        start, stop = index * self.sequence_length, (index + 1) * self.sequence_length
        labels = np.full(self.sequence_length, NO_LABEL, dtype=np.int64)
        following = self.tokens[start + 1 : stop + 1]
        labels[: len(following)] = following
        first, last = np.searchsorted(self.ends, [start, stop], side="right")
        inside = self.ends[first:last]  # document ends in (start, stop]
        labels[inside - 1 - start] = NO_LABEL
        if stop > self.num_tokens:
            labels[max(self.num_tokens - start, 0) :] = NO_LABEL
        bounds = sorted({start, *inside.tolist(), stop})
        return self.tokens[start:stop].astype(np.int64), labels, tuple(np.diff(bounds).tolist())


def order(seed: int, num_sequences: int, position: int, count: int) -> NDArray[np.int64]:
    """The numbers of the next `count` sequences once `position` have been consumed.

    count is at least 1. Every epoch visits each sequence once, in an order of its own that depends on the seed and the
    epoch alone: not on the plan, the batch size, or where a run was stopped.

    >>> whole = order(7, 5, 0, 12).tolist()
    >>> sorted(whole[:5]), whole[3:] == order(7, 5, 3, 9).tolist()
    ([0, 1, 2, 3, 4], True)
    """
    epochs = range(position // num_sequences, -(-(position + count) // num_sequences))
    # Sorting raw 64-bit draws: numpy keeps its bit streams the same in all versions, not its shuffles.
    draws = (np.random.PCG64([seed, epoch]).random_raw(num_sequences) for epoch in epochs)
    visits = np.concatenate([np.argsort(draw, kind="stable") for draw in draws])
    skipped = position % num_sequences
    return visits[skipped : skipped + count]
