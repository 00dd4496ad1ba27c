"""The data contract: tokens, labels shifted already, where documents end, and who may see whom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqloom.errors import DataError, counted
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
    padding: for each row the numbers of those documents that are padding.
    rule: what holds inside a document, for every row: causal, window, prefix, allowed.
    first_row: the number of the first row in the order of the run's data, counted on from batch to batch,
        and seed: what dropout draws from besides positions, so that each row draws afresh, whatever the
        plan and the batch size. A model that drops out asks for first_row; others do without.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[tuple[int, ...], ...] | None = None
    padding: tuple[tuple[int, ...], ...] | None = None
    rule: Mask = Mask()
    first_row: int | None = None
    seed: int = 0

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
        if self.rule.documents is not None:
            raise DataError("The rule of a batch holds for every row; name the documents of each row in `documents`.")
        for name, rows_of in (("documents", self.documents), ("padding", self.padding)):
            plain = rows_of is None or (
                isinstance(rows_of, tuple)
                and all(isinstance(row, tuple) and all(type(number) is int for number in row) for row in rows_of)
            )
            if not plain:
                raise DataError(
                    f"The {name} are no tuple of tuples of whole numbers, one a row; from_tokens takes lists."
                )
        if self.documents is None:
            if self.padding is not None:
                raise DataError("Padding is named by document, but no documents are; from_tokens finds both.")
            return
        if self.padding is not None and len(self.padding) != rows:
            raise DataError(f"Padding is given for {counted(len(self.padding), 'row')}, but the batch has {rows}.")
        if len(self.documents) != rows:
            raise DataError(
                f"Document lengths are given for {counted(len(self.documents), 'row')}, but the batch has {rows}."
            )
        for row, lengths in enumerate(self.documents):
            if sum(lengths) != num_tokens or min(lengths, default=0) < 1:
                raise DataError(
                    f"The document lengths of row {row} ({', '.join(map(str, lengths))}) sum to {sum(lengths)}; "
                    f"they must be positive and sum to the {counted(num_tokens, 'token')} of the row."
                )

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor,
        documents: Sequence[Sequence[int]] | None = None,
        *,
        attention_mask: Tensor | None = None,
        rule: Mask = Mask(),
        first_row: int | None = None,
        seed: int = 0,
    ) -> "Batch":
        """Make the labels: each token is the label of the one before it in its document.

        attention_mask: [rows, num_tokens], 0 where a token is padding, before or after each document's
        tokens; padding has no labels, sees nothing and is not seen. The rest as in `Batch`.
        """
        lengths = None if documents is None else tuple(tuple(row) for row in documents)
        labels = torch.full_like(tokens, NO_LABEL)
        labels[:, :-1] = tokens[:, 1:]
        # Made before the labels are cut, since it refuses lengths that do not fit.
        batch = cls(tokens, labels, lengths, None, rule, first_row, seed)
        if attention_mask is not None:
            batch = replace(batch, **_padded(attention_mask, batch))
        for row, row_lengths in enumerate(batch.documents or ()):
            labels[row, torch.tensor(row_lengths).cumsum(0) - 1] = NO_LABEL
            if batch.padding and batch.padding[row]:
                labels[row][attention_mask[row].cpu() == 0] = NO_LABEL
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
        if self.documents is None:
            return self.rule
        return replace(self.rule, documents=self.documents[row], padding=self.padding[row] if self.padding else ())

    def positions(self) -> Tensor:
        """[rows, num_tokens]: the position of each token inside its document."""
        positions = torch.arange(self.num_tokens).repeat(len(self.tokens), 1)
        for row, lengths in enumerate(self.documents or ()):
            sizes = torch.tensor(lengths)
            positions[row] -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return positions


def _padded(attention_mask: Tensor, batch: Batch) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The documents of a batch cut at its padding, and which of the pieces are padding."""
    if attention_mask.shape != batch.tokens.shape:
        raise DataError(
            f"The attention_mask is {list(attention_mask.shape)}, but the tokens are {list(batch.tokens.shape)}; give "
            "one 0 or 1 a token, and any other mask as Batch(rule=Mask(...))."
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise DataError(
            "The attention_mask holds other numbers than 0 and 1; give 1 for a token, 0 for padding, and name packed "
            "documents by their lengths."
        )
    documents, padding = [], []
    for row, kept in enumerate((attention_mask != 0).cpu()):
        pieces: list[int] = []
        blank: list[int] = []
        for part in kept.split(list(batch.documents[row]) if batch.documents else [batch.num_tokens]):
            held = part.nonzero().flatten().tolist()
            first, stop = (held[0], held[-1] + 1) if held else (len(part), len(part))
            if stop - first != len(held):
                raise DataError(
                    f"Row {row} of the attention_mask has padding in the midst of a document; put it before or after "
                    "the tokens, or forbid those positions by Batch(rule=Mask(allowed=...))."
                )
            for size, is_padding in ((first, True), (stop - first, False), (len(part) - stop, True)):
                if size:
                    blank += [len(pieces)] * is_padding
                    pieces.append(size)
        documents.append(tuple(pieces))
        padding.append(tuple(blank))
    return {"documents": tuple(documents), "padding": tuple(padding)}
