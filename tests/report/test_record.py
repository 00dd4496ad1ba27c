"""Reading a run folder: what is broken is named, with the file and the line."""

import json
from typing import Any

import pytest

from seqloom.errors import DataError
from seqloom.report import write_report
from seqloom.report.record import read_folder


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_missing_file_is_named(make_run: Any, name: str) -> None:
    """Catches a traceback, or an empty page, where training has not written its files."""
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(DataError, match=name):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("line", ['{"step": 17, "loss"', '{"step": 17}', "[]", '{"step": "17"}'])
def test_a_broken_metrics_line_is_numbered(make_run: Any, line: str) -> None:
    """Catches a broken line that is skipped in silence or reported without its place."""
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:16], line, *lines[17:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 17 "):
        read_folder(folder)


def test_no_steps_is_an_error(make_run: Any) -> None:
    """Catches a report of a run that has done nothing."""
    folder = make_run()
    (folder / "metrics.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no step"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": "rings=2"}, "rings"),
        ({"world_size": 3}, "3 processes"),
        ({"num_tokens": "4096"}, "num_tokens"),
        ({"dtype": "int8"}, "dtype"),
        ({"model": {}}, "model_type"),
    ],
)
def test_a_run_that_contradicts_itself_is_refused(make_run: Any, change: dict[str, Any], said: str) -> None:
    """Catches figures drawn for a plan, world or model that did not run."""
    folder = make_run()
    run = json.loads((folder / "run.json").read_text()) | change
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match=said) as raised:
        read_folder(folder)
    assert "run.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", '{"plan": "ring=2"}', ""])
def test_a_broken_verify_is_not_a_missing_one(make_run: Any, text: str) -> None:
    """Catches a truncated verify.json shown as 'not verified yet'."""
    folder = make_run()
    (folder / "verify.json").write_text(text)
    with pytest.raises(DataError, match=r"verify\.json"):
        read_folder(folder)


def test_steps_done_again_after_a_resume_count_once(make_run: Any) -> None:
    """Catches a curve that runs backwards, or tokens counted twice, where a killed run was resumed."""
    folder = make_run(steps=10)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    again = [json.dumps(json.loads(line) | {"loss": 9.0}) for line in lines[5:]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:8], *again]))
    steps = read_folder(folder).steps
    assert [step.step for step in steps] == list(range(1, 11))
    assert [step.loss == 9.0 for step in steps] == [False] * 5 + [True] * 5
