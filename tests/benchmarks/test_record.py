"""The records that the programs write."""

import json
import os
import socket
from pathlib import Path

from benchmarks.record import Record, command_line, table


def test_the_command_can_be_typed_again() -> None:
    """Catches a record whose command holds a folder of one machine or lacks an option."""
    said = ["/somewhere/benchmarks/attention.py", "--tokens", "4096", "--out", "/somewhere/else", "--repeats", "3"]
    assert command_line(said) == "python -m benchmarks.attention --tokens 4096 --repeats 3"
    assert command_line([said[0], "--out=/somewhere", "--repeats=3"]) == "python -m benchmarks.attention --repeats=3"


def test_a_record_says_where_it_comes_from(tmp_path: Path) -> None:
    """Catches a record without date, machine, versions or raw figures, and one that names the host or a path."""
    record = Record("trial", {"tokens": [4]}, rows=[{"wall_seconds": 1.5}], timed=False)
    page = record.write("the table", tmp_path / "records")
    text = page.read_text(encoding="utf-8")
    kept = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert page.name == f"{record.written[:10]}-trial.md"
    assert kept["rows"] == [{"wall_seconds": 1.5}]
    assert kept["settings"] == {"tokens": [4]}
    assert {"torch", "seqloom", "python"} <= set(kept["versions"])
    assert kept["machine"]["cores"] >= 1
    assert "the table" in text and record.command in text and kept["machine"]["cpu"] in text
    assert os.getcwd() not in text + json.dumps(kept)
    assert socket.gethostname() not in json.dumps(kept["machine"])


def test_a_busy_machine_is_said() -> None:
    """Catches times of a shared machine that are handed on as if it had been quiet."""
    record = Record("trial", {}, timed=False)
    record.doubt(0.01, "meanwhile")
    record.doubt(None, "meanwhile")
    assert record.notes == []
    record.doubt(0.4, "meanwhile")
    assert "40% of the processors meanwhile" in record.notes[0]


def test_tables() -> None:
    """Catches a column too few, and a missing figure that reads as a figure."""
    lines = table(["a", "b"], [[1, None], ["x", 0.5]]).splitlines()
    assert lines == ["| a | b |", "|---|---|", "| 1 | - |", "| x | 0.5 |"]
