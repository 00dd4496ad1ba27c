"""Text in columns: the same documents whatever keeps them, and a sentence where they cannot be had."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seqloom.errors import DataError
from seqloom.train.config import Config, DataConfig
from seqloom.train.data import load_text
from seqloom.train.packing import PackedText
from seqloom.train.prepare import prepare
from seqloom.train.tables import open_dataset
from seqloom.train.tokenizer import ByteTokenizer

TEXTS = ["one two", "", "three", None, "é four"]
MODEL = {"path": "llama", "config": {"vocab_size": 257}}


def read(**said: Any) -> PackedText:
    return load_text(DataConfig(sequence_length=8, **said), ByteTokenizer())


@pytest.fixture
def plain(tmp_path: Path) -> PackedText:
    """The same documents as files of their own."""
    for number, text in enumerate(text for text in TEXTS if text):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    return read(files=[f"{tmp_path}/*.txt"])


def test_tables_are_read_as_files_are(plain: PackedText, tmp_path: Path) -> None:
    """Catches rows lost, reordered or taken whole as bytes, in each form that datasets and Arrow write."""
    datasets = pytest.importorskip("datasets")
    import pyarrow

    table = datasets.Dataset.from_dict({"id": range(5), "said": TEXTS})
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"held": table}).save_to_disk(tmp_path / "splits")
    with pyarrow.OSFile(str(tmp_path / "b.ARROW"), "wb") as sink, pyarrow.ipc.new_file(sink, table.data.schema) as file:
        file.write_table(table.data.table)
    [streamed] = (tmp_path / "folder").glob("*.arrow")
    for said in (
        {"files": [str(tmp_path / "a.parquet")]},
        {"files": [str(tmp_path / "b.ARROW")]},
        {"files": [str(streamed)]},
        {"dataset": str(tmp_path / "folder")},
        {"dataset": str(tmp_path / "splits"), "split": "held"},
    ):
        found = read(text_key="said", **said)
        assert found.fingerprint == plain.fingerprint, said
        assert "2 lines are without text and skipped" in found.notes[0]


def complaint(folder: Path, **said: Any) -> str:
    """What `prepare` says of the text, before any process starts."""
    config = {
        "model": MODEL,
        "data": {"sequence_length": 8, **said},
        "train": {"steps": 1},
        "run": {"folder": str(folder / "run")},
    }
    with pytest.raises(DataError) as caught:
        prepare(Config.model_validate(config), resume=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_said_before_starting(tmp_path: Path) -> None:
    """Catches a missing split or column and a broken file met only by the ranks, or in other words."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"said": [3]})
    datasets.DatasetDict({"held": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    table.to_parquet(tmp_path / "numbers.parquet")
    splits = str(tmp_path / "splits")
    assert "has no split 'train' (it has held)" in complaint(tmp_path, dataset=splits)
    assert "has no column 'text' (it has said)" in complaint(tmp_path, dataset=splits, split="held")
    assert "it is not a folder that save_to_disk wrote" in complaint(tmp_path, dataset=str(tmp_path))
    assert "There is no folder './none/of/it'" in complaint(tmp_path, dataset="./none/of/it")
    assert "cannot be read as a table" in complaint(tmp_path, files=[str(tmp_path / "bad.parquet")])
    with pytest.raises(DataError, match="row 1 has 3 under 'said', which is not a string"):
        read(files=[str(tmp_path / "numbers.parquet")], text_key="said")


def test_a_wrong_key_of_lines_is_said_before_starting(tmp_path: Path) -> None:
    """Catches a key that the lines of a JSONL file lack, and a broken line, met only once the ranks read them."""
    (tmp_path / "a.jsonl").write_text('\n{"body": "x"}\n')
    (tmp_path / "b.JSONL").write_text("text\n")
    assert complaint(tmp_path, files=[str(tmp_path / "a.jsonl")]).endswith(
        "a.jsonl:2 has no key 'text' (it has body); set data.text_key to the one with the text."
    )
    assert "b.JSONL:1 is not JSON" in complaint(tmp_path, files=[str(tmp_path / "b.JSONL")])


def test_the_library_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError where the way out should stand."""
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr("seqloom.train.tables.find_spec", lambda name: None)
    assert complaint(tmp_path, dataset="x").startswith("data.dataset is 'x', which takes the library datasets, and it")
    assert "takes the library pyarrow" in complaint(tmp_path, files=[str(tmp_path / "a.parquet")])


def test_a_name_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name taken for a missing folder, and the hub's own error shown raw."""

    def load_dataset(name: str) -> Any:
        if name != "owner/name":
            raise ConnectionError("no\nnetwork")
        return {"train": SimpleNamespace(column_names=["text"])}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __spec__=1))
    assert open_dataset("owner/name", "train", "text").column_names == ["text"]
    with pytest.raises(
        DataError, match=r"not on the hub, or the hub cannot be reached \(ConnectionError: no network\)"
    ):
        open_dataset("other", "train", "text")
