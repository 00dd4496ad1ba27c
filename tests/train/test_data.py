"""Text to packed sequences: nothing lost, nothing leaked, the same everywhere."""

import json
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqloom.errors import DataError
from seqloom.train.config import DataConfig
from seqloom.train.data import find_files, load_text
from seqloom.train.packing import PackedText, order
from seqloom.train.tokenizer import ByteTokenizer, load_tokenizer

END = 256


def pack(documents: Sequence[Sequence[int]], length: int) -> PackedText:
    return PackedText.pack([np.asarray(d, dtype=np.int32) for d in documents], end_id=END, sequence_length=length)


def load(folder: Path, *globs: str, length: int = 8, text_key: str = "text") -> PackedText:
    files = [str(folder / pattern) for pattern in globs or ("*",)]
    return load_text(DataConfig(files=files, sequence_length=length, text_key=text_key), ByteTokenizer())


def text_of(packed: PackedText) -> list[str]:
    """The documents as text, read back from the stream."""
    pieces = np.split(packed.tokens[: packed.num_tokens], packed.ends[:-1])
    assert all(piece[-1] == END for piece in pieces)
    return [bytes(piece[:-1].tolist()).decode("utf-8") for piece in pieces]


class TestPacking:
    """Documents laid end to end and cut."""

    def test_by_hand(self) -> None:
        """Catches labels shifted by one, bounds off by one, and a label lost at a sequence's edge."""
        packed = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], 5)
        batch = packed.batch(range(packed.num_sequences))
        assert batch.tokens.tolist() == [[1, 2, 3, END, 4], [5, END, 6, 7, 8], [9, END, END, END, END]]
        assert batch.labels.tolist() == [
            [2, 3, END, -100, 5],  # 4 keeps its label 5, which is in the next sequence
            [END, -100, 7, 8, 9],
            [END, -100, -100, -100, -100],
        ]
        assert batch.documents == ((4, 1), (2, 3), (2, 3))
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64

    def test_document_that_ends_at_an_edge(self) -> None:
        """Catches an empty document at the start of a row, and a label that reaches into the next document."""
        batch = pack([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10]], 4).batch([0, 1, 2])
        assert batch.documents == ((4,), (4,), (4,))
        assert batch.labels.tolist() == [[2, 3, END, -100], [5, 6, 7, 8], [9, 10, END, -100]]

    @given(
        st.lists(st.lists(st.integers(0, 255), max_size=17), min_size=1, max_size=9).filter(any),
        st.integers(1, 12),
    )
    def test_every_token_predicts_the_next_of_its_document(self, documents: list[list[int]], length: int) -> None:
        """Catches lost or doubled tokens, labels across documents, and labels lost at edges, for any lengths."""
        packed = pack(documents, length)
        batch = packed.batch(range(packed.num_sequences))
        kept = [[*document, END] for document in documents if document]
        stream = [token for document in kept for token in document]
        labels = [label for document in kept for label in [*document[1:], -100]]
        padding = packed.num_sequences * length - len(stream)
        assert 0 <= padding < length
        assert batch.tokens.flatten().tolist() == stream + [END] * padding
        assert batch.labels.flatten().tolist() == labels + [-100] * padding
        # Bounds: those of the documents, those of the rows, and nothing else.
        ends = set(np.cumsum([len(document) for document in kept]).tolist())
        rows = set(range(length, packed.num_sequences * length + 1, length))
        assert batch.documents is not None
        assert set(np.cumsum([n for row in batch.documents for n in row]).tolist()) == ends | rows

    @given(st.permutations(range(7)))
    def test_rows_do_not_depend_on_the_batch(self, indices: list[int]) -> None:
        """Catches rows that depend on their neighbours, such as labels taken from the next row of the batch."""
        packed = pack([range(10), range(3), range(20, 40)], 5)
        assert packed.num_sequences == 8
        batch = packed.batch(indices)
        for row, index in enumerate(indices):
            alone = packed.batch([index])
            assert alone.tokens.tolist() == [batch.tokens[row].tolist()]
            assert alone.labels.tolist() == [batch.labels[row].tolist()]
            assert alone.documents == (batch.documents or ())[row : row + 1]

    def test_sequence_without_labels(self) -> None:
        """Catches a row of nothing but a cut-off end token that fails or invents labels."""
        batch = pack([[1, 2, 3]], 3).batch([1])
        assert batch.label_count == 0
        assert batch.documents == ((1, 2),)

    def test_no_such_sequence(self) -> None:
        """Catches numpy's reading of -1 as the last row."""
        packed = pack([[1, 2, 3]], 2)
        for index in (-1, 2):
            with pytest.raises(IndexError, match="numbered 0 to 1"):
                packed.batch([index])

    def test_unigram_entropy_by_hand(self) -> None:
        """Catches bits for nats, and counting first tokens or filling, which are no labels."""
        # Labels: 7, 7, END of the first document and 8, END of the second: shares 2/5, 1/5, 2/5.
        packed = pack([[1, 7, 7], [2, 8]], 16)
        assert packed.unigram_entropy == pytest.approx(-(0.4 * log(0.4) * 2 + 0.2 * log(0.2)), rel=1e-12)

    @given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(1, 7))
    def test_unigram_entropy_is_of_the_labels(self, documents: list[list[int]], length: int) -> None:
        """Catches an entropy of other tokens than those the loss is taken over."""
        packed = pack(documents, length)
        labels = packed.batch(range(packed.num_sequences)).labels.flatten().numpy()
        shares = np.unique(labels[labels != -100], return_counts=True)[1] / (labels != -100).sum()
        assert packed.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-12)

    def test_unigram_entropy_is_counted_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Catches tokens lost or doubled between the parts that are counted one after another."""
        documents = [[1, 2, 3, 1], [5], [2, 2, 7]]
        whole = pack(documents, 4).unigram_entropy
        for size in (1, 2, 3, 5, 11):
            monkeypatch.setattr("seqloom.train.packing._COUNTED_TOKENS", size)
            assert pack(documents, 4).unigram_entropy == pytest.approx(whole, rel=1e-12)

    def test_fingerprint_tells_texts_apart(self) -> None:
        """Catches resuming on other text, or other bounds as if they were the same."""
        same = [pack([[1, 2], [3]], 4).fingerprint for _ in range(2)]
        others = [pack([[1, 2], [4]], 4), pack([[1, 2, END, 3]], 4), pack([[3], [1, 2]], 4)]
        assert same[0] == same[1] == pack([[1, 2], [3]], 5).fingerprint  # a curriculum changes the length
        assert len({same[0], *(other.fingerprint for other in others)}) == 4

    def test_arrays_cannot_be_written(self) -> None:
        """Catches a batch that shares memory with the text, which training could then change."""
        packed = pack([[1, 2, 3]], 4)
        packed.batch([0]).tokens.zero_()
        assert packed.batch([0]).tokens.tolist() == [[1, 2, 3, END]]
        with pytest.raises(ValueError, match="read-only"):
            packed.tokens[0] = 9

    def test_no_tokens(self) -> None:
        """Catches an empty stream that fails later, in the middle of a step."""
        with pytest.raises(DataError, match="every document is empty"):
            pack([[], []], 4)


class TestOrder:
    """Which sequences come next."""

    @given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 4))
    def test_each_epoch_is_a_permutation(self, seed: int, num_sequences: int, epoch: int) -> None:
        """Catches drawing with replacement and epochs that start off their edge."""
        visits = order(seed, num_sequences, epoch * num_sequences, num_sequences)
        assert sorted(visits.tolist()) == list(range(num_sequences))

    @given(st.integers(1, 13), st.lists(st.integers(1, 9), min_size=1, max_size=8))
    def test_any_cut_gives_the_same_visits(self, num_sequences: int, counts: list[int]) -> None:
        """Catches an order that depends on the batch size or on where a run was resumed, epoch ends included."""
        whole = order(3, num_sequences, 0, sum(counts)).tolist()
        position, parts = 0, []
        for count in counts:
            parts += order(3, num_sequences, position, count).tolist()
            position += count
        assert parts == whole
        assert len(whole) == sum(counts)

    def test_seeds_and_epochs_differ(self) -> None:
        """Catches an order that ignores its seed, repeats itself every epoch, or never shuffles."""
        seen = [tuple(order(seed, 50, epoch * 50, 50).tolist()) for seed in (0, 1) for epoch in (0, 1)]
        assert len({*seen, tuple(range(50))}) == 5

    def test_order_is_the_same_for_ever(self) -> None:
        """Catches a change of generator: a checkpoint's position would then point at other text."""
        assert order(0, 6, 4, 6).tolist() == FROZEN_ORDER


FROZEN_ORDER = [4, 5, 4, 5, 1, 2]


class TestFiles:
    """Which files are read, and in what order."""

    def test_order_depends_on_names_alone(self, tmp_path: Path) -> None:
        """Catches directory order, the order of globs, and a file read twice because two globs match it."""
        for name in ("b.txt", "a.txt", "c/d.txt", "c/a.md"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        expected = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c/d.txt")]
        assert find_files([f"{tmp_path}/**/*.txt"]) == expected
        assert find_files([f"{tmp_path}/c/*.txt", f"{tmp_path}/c/../*.txt", f"{tmp_path}/b*"]) == expected
        assert text_of(load(tmp_path, "**/*.txt")) == ["a.txt", "b.txt", "c/d.txt"]

    def test_every_glob_must_match(self, tmp_path: Path) -> None:
        """Catches a misspelt glob that drops its text unseen because another one matches; a folder is no file."""
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "folder.md").mkdir()
        with pytest.raises(DataError, match=r"No file matches '.*\*\.md' of data\.files"):
            find_files([f"{tmp_path}/*.txt", f"{tmp_path}/*.md"])

    def test_standard_library(self) -> None:
        """Catches a `{stdlib}` that is not expanded."""
        files = find_files(["{stdlib}/*.py"])
        assert Path(json.__file__).parents[1] / "abc.py" in [Path(file) for file in files]

    def test_standard_library_in_an_odd_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Catches brackets in the folder's own name being read as part of the glob."""
        odd = tmp_path / "py[3]"
        odd.mkdir()
        (odd / "abc.py").write_text("a")
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(odd))
        assert find_files(["{stdlib}/*.py"]) == [str(odd / "abc.py")]

    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Catches `~` taken for the name of a folder."""
        (tmp_path / "a.txt").write_text("a")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_files(["~/*.txt"]) == [str(tmp_path / "a.txt")]


class TestReading:
    """Files to documents."""

    def test_loading_twice_is_identical(self, tmp_path: Path) -> None:
        """Catches any dependence on hash seeds, time or file order: ranks must read the same stream."""
        for number in range(20):
            (tmp_path / f"{number}.txt").write_text("word " * (number % 7) + str(number))
        first, second = load(tmp_path), load(tmp_path)
        assert np.array_equal(first.tokens, second.tokens)
        assert np.array_equal(first.ends, second.ends)
        assert (first.num_files, first.num_documents, first.notes) == (20, 20, ())

    def test_tokenising_in_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Catches documents lost, doubled or reordered between the parts handed to the tokenizer."""
        for number, text in enumerate(texts := ["ab", "c", "defgh", "i", "jk"]):
            (tmp_path / f"{number}.txt").write_text(text)
        for characters in (1, 3, 100):
            monkeypatch.setattr("seqloom.train.data._ENCODE_CHARACTERS", characters)
            assert text_of(load(tmp_path)) == texts

    def test_text_survives(self, tmp_path: Path) -> None:
        """Catches newline translation, stripping and lost characters beyond ASCII."""
        for number, text in enumerate(texts := [" a\r\nb\n", "naïve 雪 🎿\u2028x", "\ufeffmark"]):
            (tmp_path / f"{number}.txt").write_bytes(text.encode("utf-8"))
        packed = load(tmp_path)
        assert text_of(packed) == texts
        assert packed.num_tokens == sum(len(text.encode("utf-8")) + 1 for text in texts)

    def test_not_utf8_is_replaced_and_said(self, tmp_path: Path) -> None:
        """Catches a crash, or bytes replaced in silence."""
        (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
        (tmp_path / "plain.txt").write_text("ok")
        packed = load(tmp_path)
        assert text_of(packed) == ["caf\ufffd", "ok"]
        assert packed.notes == (
            f"1 file is not UTF-8 all through; the bytes that are not were replaced by U+FFFD ({tmp_path}/latin.txt).",
        )

    def test_empty_files_are_skipped_and_said(self, tmp_path: Path) -> None:
        """Catches documents of a lone end token, and files dropped in silence."""
        for name in "abcd":
            (tmp_path / name).write_text(" \n" if name == "b" else "")
        (tmp_path / "full").write_text("text")
        packed = load(tmp_path)
        assert text_of(packed) == ["text"]
        places = ", ".join(str(tmp_path / name) for name in "abc")
        assert packed.notes == (f"4 files are empty and skipped ({places}, ...).",)
        assert (packed.num_files, packed.num_documents) == (5, 1)

    def test_all_empty(self, tmp_path: Path) -> None:
        """Catches a run on no text at all."""
        (tmp_path / "a.txt").write_text("")
        (tmp_path / "b.jsonl").write_text('\n{"text": ""}\n')
        with pytest.raises(
            DataError, match=r"There is no text to train on: data.files matches 2 files, .*a\.txt, with nothing"
        ):
            load(tmp_path)

    def test_unreadable_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Catches a file that is skipped because it cannot be opened."""
        (tmp_path / "a.txt").write_text("a")

        def refuse(*_: Any, **__: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(DataError, match=r"a\.txt cannot be read \(Permission denied\)"):
            load(tmp_path)


class TestJsonl:
    """A document a line."""

    def test_documents(self, tmp_path: Path) -> None:
        """Catches lines joined or split at U+2028, blank lines counted, and the wrong key read."""
        texts = ["one", "two\nlines", "snow\u2028man", "last"]
        lines = [json.dumps({"body": text, "text": "no"}, ensure_ascii=False) for text in texts]
        (tmp_path / "a.JSONL").write_text("\n".join([*lines[:2], "", "  ", *lines[2:]]), encoding="utf-8")
        packed = load(tmp_path, text_key="body")
        assert text_of(packed) == texts
        assert (packed.num_files, packed.num_documents, packed.notes) == (1, 4, ())

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "x"', r"a\.jsonl:3 is not JSON \(.* at column \d+\); give one object a line\."),
            ('["text"]', r"a\.jsonl:3 holds a JSON list; give one object a line\."),
            ('{"txt": "x", "id": 1}', r"a\.jsonl:3 has no key 'text' \(it has txt, id\); set data\.text_key"),
            ("{}", r"a\.jsonl:3 has no key 'text' \(it has none\)"),
            ('{"text": 5}', r"a\.jsonl:3 has 5 under 'text', which is not a string"),
            ('{"text": null}', r"a\.jsonl:3 has None under 'text', which is not a string"),
        ],
    )
    def test_broken_lines_are_located(self, tmp_path: Path, line: str, message: str) -> None:
        """Catches a broken line that is skipped, or reported without its file, number and key."""
        (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
        with pytest.raises(DataError, match=message):
            load(tmp_path)

    def test_empty_text_and_half_pairs_are_said(self, tmp_path: Path) -> None:
        """Catches a crash on the half surrogate pairs that JSON can spell, and empty lines dropped in silence."""
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a\\ud83dz"}\n{"text": "\\ud83c\\udfbf"}\n')
        packed = load(tmp_path)
        assert text_of(packed) == ["a\ufffdz", "🎿"]
        assert packed.notes == (
            f"1 line is without text and skipped ({tmp_path}/a.jsonl:1).",
            f"1 line is with half a surrogate pair, replaced by U+FFFD ({tmp_path}/a.jsonl:2).",
        )


class TestTokenizers:
    """Bytes, and a Hugging Face tokenizer in a folder."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A tokenizer of whole words that puts a start token before each text, as Llama's does."""
        return save_words(tmp_path / "words", eos_token="</s>")

    def test_bytes(self) -> None:
        """Catches ids outside 0 to 255 and an end id that is a byte."""
        tokenizer = load_tokenizer("bytes", model_vocab=257)
        assert [row.tolist() for row in tokenizer.encode(["aé", "", "\0\x7f"])] == [[97, 195, 169], [], [0, 127]]
        assert (tokenizer.end_id, tokenizer.vocab_size) == (256, 257)

    def test_folder(self, folder: Path) -> None:
        """Catches start tokens added to documents, and an end token that is not the tokenizer's own."""
        tokenizer = load_tokenizer(str(folder), model_vocab=7)
        assert [row.tolist() for row in tokenizer.encode(["red green", "blue", ""])] == [[3, 4], [5], []]
        assert (tokenizer.end_id, tokenizer.vocab_size) == (1, 6)

    def test_folder_packs(self, folder: Path, tmp_path: Path) -> None:
        """Catches an end id or a batch order that packing takes from elsewhere; text of no tokens is said."""
        for name, text in {"a.txt": "red green red", "b.txt": "\u00ad", "c.txt": "blue"}.items():
            (tmp_path / name).write_text(text)
        data = DataConfig(files=[f"{tmp_path}/*.txt"], sequence_length=4, tokenizer=str(folder))
        packed = load_text(data, load_tokenizer(data.tokenizer, model_vocab=6))
        assert packed.batch([0, 1]).tokens.tolist() == [[3, 4, 3, 1], [5, 1, 1, 1]]
        assert packed.batch([0, 1]).labels.tolist() == [[4, 3, 1, -100], [1, -100, -100, -100]]
        assert packed.notes == ("Skipped 1 document of which no token is left.",)

    def test_no_end_token(self, tmp_path: Path) -> None:
        """Catches documents that would run into each other."""
        folder = save_words(tmp_path / "endless")
        with pytest.raises(DataError, match=r"has no end-of-text token; set its eos_token"):
            load_tokenizer(str(folder), model_vocab=99)

    def test_model_too_small(self, folder: Path) -> None:
        """Catches ids beyond the model's embedding, which fail deep inside a step."""
        with pytest.raises(DataError, match=r"ids up to 5, but the model's vocab_size is 5; .* at least 6"):
            load_tokenizer(str(folder), model_vocab=5)
        with pytest.raises(DataError, match=r"'bytes' makes ids up to 256, but the model's vocab_size is 96"):
            load_tokenizer("bytes", model_vocab=96)

    def test_no_tokenizer_there(self, tmp_path: Path) -> None:
        """Catches a search on the network, and tracebacks from inside transformers."""
        with pytest.raises(DataError, match="There is no folder"):
            load_tokenizer(str(tmp_path / "nothing"), model_vocab=99)
        with pytest.raises(DataError, match="holds no tokenizer that transformers can read"):
            load_tokenizer(str(tmp_path), model_vocab=99)


def save_words(folder: Path, **special: str) -> Path:
    """Save a tokenizer of the words red, green and blue, with a start token in its template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "red": 3, "green": 4, "blue": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Replace("\u00ad", "")
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    saved = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>", **special)
    saved.save_pretrained(folder)
    return folder
