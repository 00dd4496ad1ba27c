"""Batches: labels, positions and documents."""

from typing import Any

import pytest
import torch

from seqloom.errors import DataError
from seqloom.geometry import Mask
from seqloom.sequence import NO_LABEL, Batch

X = NO_LABEL


def tokens(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_labels_are_the_next_tokens() -> None:
    """Catches a second shift, the token itself as its label, or a row's first token as the label of the row before."""
    batch = Batch.from_tokens(tokens([5, 6, 7, 8], [1, 2, 3, 4]))
    assert batch.labels.tolist() == [[6, 7, 8, X], [2, 3, 4, X]]
    assert (batch.label_count, batch.num_tokens, batch.documents) == (6, 4, None)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_no_label_crosses_a_document() -> None:
    """Catches a document that is asked to predict the next one's first token, in one row but not the other."""
    batch = Batch.from_tokens(tokens([5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6]), [[1, 2, 3], [4, 2]])
    assert batch.labels.tolist() == [[X, 7, X, 9, 10, X], [2, 3, 4, X, 6, X]]
    assert batch.label_count == 7
    assert batch.documents == ((1, 2, 3), (4, 2))


@pytest.mark.parametrize("lengths", [[1] * 4, [3, 1], [1, 3], [4]])
def test_every_document_loses_one_label(lengths: list[int]) -> None:
    """Catches an off-by-one at single tokens and at the ends of the row: tokens less documents are labels."""
    batch = Batch.from_tokens(tokens([5, 6, 7, 8]), [lengths])
    assert batch.label_count == 4 - len(lengths)


def test_positions_restart() -> None:
    """Catches positions that run on through documents, or restart one too late."""
    batch = Batch.from_tokens(tokens([0] * 6, [0] * 6), [[1, 2, 3], [6]])
    assert batch.positions().tolist() == [[0, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert Batch.from_tokens(tokens([0] * 3, [0] * 3)).positions().tolist() == [[0, 1, 2]] * 2


def test_masks_are_of_the_row() -> None:
    """Catches one row's mask used for all."""
    batch = Batch.from_tokens(tokens([0] * 3, [0] * 3), [[1, 2], [2, 1]])
    assert [batch.mask(row).visible(1, 0) for row in (0, 1)] == [False, True]
    assert [batch.mask(row).visible(2, 1) for row in (0, 1)] == [True, False]
    assert Batch.from_tokens(tokens([0] * 3)).mask(0).visible(2, 0)


def test_labels_may_be_given() -> None:
    """Catches labels that are remade: a prompt without labels keeps none."""
    given = tokens([X, X, 8, X])
    batch = Batch(tokens([5, 6, 7, 8]), given, ((4,),))
    assert batch.label_count == 1 and batch.labels is given


def test_from_tokens_leaves_the_tokens_alone() -> None:
    """Catches labels written into the tokens' memory."""
    given = tokens([5, 6, 7, 8])
    batch = Batch.from_tokens(given, [[2, 2]])
    assert given.tolist() == [[5, 6, 7, 8]] == batch.tokens.tolist()


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([[2, 1], [4]], r"row 0 \(2, 1\) sum to 3"),
        ([[4], [2, 3]], r"row 1 \(2, 3\) sum to 5"),
        ([[4], [5, -1]], r"row 1 \(5, -1\).*must be positive"),
        ([[4], [4, 0]], r"row 1 \(4, 0\).*must be positive"),
        ([[4], []], r"row 1 \(\) sum to 0"),
        ([[4]], "for 1 row, but the batch has 2"),
        ([[4], [4], [4]], "for 3 rows, but the batch has 2"),
    ],
)
def test_malformed_documents(documents: list[list[int]], said: str) -> None:
    """Catches bounds that quietly cut elsewhere, and messages that do not name the row."""
    with pytest.raises(DataError, match=said):
        Batch.from_tokens(tokens([5, 6, 7, 8], [1, 2, 3, 4]), documents)


def test_labels_of_another_shape() -> None:
    """Catches labels that broadcast."""
    with pytest.raises(DataError, match=r"Labels of shape \(1, 3\) do not fit tokens \(1, 4\)"):
        Batch(tokens([5, 6, 7, 8]), tokens([6, 7, 8]))


def test_a_stray_negative_label_is_refused() -> None:
    """Catches a label that the divisor counts and the loss skips: the loss came out too small."""
    tokens = torch.arange(8)[None]
    with pytest.raises(DataError, match="negative but not -100"):
        Batch(tokens, torch.full_like(tokens, -1))


@pytest.mark.parametrize("tokens", [torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int32)])
def test_tokens_are_rows_of_int64(tokens: torch.Tensor) -> None:
    """Catches one sequence without its row, or ids of another type, that fail far from here."""
    with pytest.raises(DataError, match=r"give \[rows, num_tokens\] in torch.int64"):
        Batch(tokens, tokens)


def test_padding_of_an_attention_mask() -> None:
    """Catches padding with labels, positions that count it, and a pad token that a document sees."""
    given = tokens([5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 1])
    kept = tokens([0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0])
    batch = Batch.from_tokens(given, attention_mask=kept)
    assert batch.documents == ((2, 4), (4, 2), (6,))
    assert batch.padding == ((0,), (1,), (0,))
    assert batch.labels.tolist() == [
        [-100, -100, 8, 9, 1, -100],
        [6, 7, 8, -100, -100, -100],
        [-100] * 6,
    ]
    assert batch.positions()[0].tolist() == [0, 1, 0, 1, 2, 3]
    assert not batch.mask(0).visible(3, 1) and not batch.mask(0).visible(1, 0) and batch.mask(0).visible(3, 2)
    assert not batch.mask(1).visible(4, 4)


def test_padding_inside_packed_documents() -> None:
    """Catches padding looked for at the ends of the row only."""
    batch = Batch.from_tokens(
        tokens([1, 2, 3, 4, 5, 6, 7]), [[3, 4]], attention_mask=tokens([1, 1, 0, 0, 1, 1, 1]), rule=Mask(window=2)
    )
    assert batch.documents == ((2, 1, 1, 3),)
    assert batch.padding == ((1, 2),)
    assert batch.mask(0) == Mask(window=2, documents=(2, 1, 1, 3), padding=(1, 2))
    assert batch.labels.tolist() == [[2, -100, -100, -100, 6, 7, -100]]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([[1, 0, 1, 1]], "in the midst of a document"),
        ([[1, 1, 2, 2]], "other numbers than 0 and 1"),
        ([[0.0, 0.0, -1e9, -1e9]], "other numbers than 0 and 1"),
        ([[1, 1, 1]], r"is \[1, 3\], but the tokens are \[1, 4\]"),
    ],
)
def test_masks_that_are_no_padding(kept: list[list[int]], said: str) -> None:
    """Catches a hole closed in silence, and a dense mask read as one row."""
    with pytest.raises(DataError, match=said):
        Batch.from_tokens(tokens([1, 2, 3, 4]), attention_mask=torch.tensor(kept))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rule": Mask(documents=(4,))}, "holds for every row"),
        ({"padding": ((0,),)}, "named by document"),
        ({"documents": ((4,),), "padding": ((0,), (0,))}, "for 2 rows"),
        ({"documents": [[4]]}, "no tuple of tuples"),
        ({"documents": ((4.0,),)}, "no tuple of tuples"),
    ],
)
def test_rules_that_do_not_fit(fields: dict[str, Any], said: str) -> None:
    """Catches documents said twice, and padding without the documents it numbers."""
    given = tokens([1, 2, 3, 4])
    with pytest.raises(DataError, match=said):
        Batch(given, given, **fields)
