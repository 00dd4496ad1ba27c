"""The data contract: tokens, labels shifted already, and where documents end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.errors import DataError
from seqloom.geometry import Mask

NO_LABEL = -100
"""The label of a position that predicts nothing, as torch's cross entropy ignores it."""


@dataclass(frozen=True)
class Batch:
    """One global micro-batch, the same on every rank.

    tokens: [rows, num_tokens], int64.
    labels: [rows, num_tokens], int64: what position i predicts, so the token at i + 1, or NO_LABEL.
        They are shifted here, before any split: a shard's last token has its label like any other.
    documents: for each row the lengths of the documents packed into it, or None for one document a row.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name, ids in (("tokens", self.tokens), ("labels", self.labels)):
            if ids.ndim != 2 or ids.dtype != torch.int64:
                raise DataError(
                    f"The {name} are {list(ids.shape)} in {ids.dtype}; give [rows, num_tokens] in torch.int64."
                )
        rows, num_tokens = self.tokens.shape
        if self.labels.shape != self.tokens.shape:
            raise DataError(f"Labels of shape {tuple(self.labels.shape)} do not fit tokens {tuple(self.tokens.shape)}.")
        if bool(((self.labels < 0) & (self.labels != NO_LABEL)).any()):
            raise DataError(f"A label is negative but not {NO_LABEL}; mark positions without a label by {NO_LABEL}.")
        if self.documents is None:
            return
        if len(self.documents) != rows:
            raise DataError(f"Document lengths are given for {len(self.documents)} rows, but the batch has {rows}.")
        for row, lengths in enumerate(self.documents):
            if sum(lengths) != num_tokens or min(lengths, default=0) < 1:
                raise DataError(
                    f"The document lengths of row {row} ({', '.join(map(str, lengths))}) sum to {sum(lengths)}; "
                    f"they must be positive and sum to the {num_tokens} tokens of the row."
                )

    @classmethod
    def from_tokens(cls, tokens: Tensor, documents: Sequence[Sequence[int]] | None = None) -> "Batch":
        """Make the labels: each token is the label of the one before it in its document."""
        lengths = None if documents is None else tuple(tuple(row) for row in documents)
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        batch = cls(tokens, labels, lengths)  # refuses lengths that do not fit, before they cut the labels
        for row, row_lengths in enumerate(lengths or ()):
            labels[row, torch.tensor(row_lengths).cumsum(0) - 1] = NO_LABEL
        return batch

    @property
    def num_tokens(self) -> int:
        """The length of each row."""
        return self.tokens.shape[1]

    @property
    def label_count(self) -> int:
        """How many positions of the whole batch predict a token."""
        return int((self.labels != NO_LABEL).sum())

    def mask(self, row: int) -> Mask:
        """Who sees whom in a row."""
        return Mask(documents=self.documents[row]) if self.documents else Mask()

    def positions(self) -> Tensor:
        """[rows, num_tokens]: the position of each token inside its document."""
        positions = torch.arange(self.num_tokens).repeat(len(self.tokens), 1)
        for row, lengths in enumerate(self.documents or ()):
            sizes = torch.tensor(lengths)
            positions[row] -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return positions
