"""`benchmarks.attention`: its arguments, what it compares, and its arithmetic on the figures; no timings."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention
from benchmarks.attention import choose, main, parse, ratio, relative_errors, rotated, summarise
from benchmarks.contenders import OWN, Case
from pool import Pool

CASE = Case(tokens=64, heads=8, kv_heads=2, width=16)
HERE = [*(contender.name for contender in OWN), "torch ring, all-gather", "torch ring, all-to-all"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "4098"], "multiple of 4"),
        (["--kv-heads", "1"], "divisors of 8"),
        (["--kv-heads", "3"], "divisors of 8"),
        (["--repeats", "0"], "measures nothing"),
        (["--only", "megatron"], "no contender's name contains 'megatron'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an argument that is accepted and then ignored, or that fails minutes later."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert why in capsys.readouterr().err


def test_ratios_keep_what_they_need() -> None:
    """Catches a choice of contenders without the one process and the ceiling that its ratios are over."""
    assert choose(["torch"]) == [*(c.name for c in OWN if c.kind != "ours"), *HERE[-2:]]
    assert set(choose([])) >= set(HERE)


def test_every_contender_computes_the_same(pool: Pool) -> None:
    """Catches a contender timed on other work than the rest: a wrong mask, scale, split or gradient."""
    said = pool.run(2, attention.measure, CASE, HERE, 1)
    assert set(said[0]) == set(HERE)
    for name, first in said[0].items():
        errors = relative_errors([rank[name]["error_squares"] for rank in said])
        if name == attention.CEILING:
            assert errors is None
            continue
        assert errors is not None and set(errors) == {"out", "dq", "dk", "dv"}
        assert 1e-9 < max(errors.values()) < 2e-6, name
        assert len(first["wall_seconds"]) == 1


def test_errors_are_told_apart_from_agreement() -> None:
    """Catches an error that is lost when ranks are put together: half of the values missing is an error of 0.7."""
    right, wrong = [(0.0, 4.0)] * 4, [(4.0, 4.0)] * 4
    errors = relative_errors([right, wrong, None])
    assert errors is not None
    assert errors["dk"] == pytest.approx(0.5**0.5)


def test_memory_is_that_of_the_run(pool: Pool) -> None:
    """Catches a peak that is never reset, and one that leaves out the output and the gradients."""
    case = Case(tokens=2048, heads=8, kv_heads=8, width=64)
    at_least = 4 * case.tokens // 2 * case.heads * case.width * 4
    for peak in pool.run(2, attention.peak_bytes, case, "seqloom ring"):
        assert at_least <= peak < 12 * at_least


def _rank(kind: str, walls: list[float], cpu: list[float]) -> dict[str, Any]:
    rounds = {"wall_seconds": walls, "cpu_seconds": cpu, "machine_seconds": cpu}
    return {"kind": kind, "error_squares": [(1e-12, 1.0)] * 4, **rounds}


def test_figures_come_from_the_slowest_rank() -> None:
    """Catches the mean or the first rank's time, one process counted as two, and ratios across rounds."""
    names = {"one process": "one", "ceiling, tokens split": "ceiling", "x": "ours"}
    walls = ({"one process": [8.0, 16.0], "ceiling, tokens split": [4.0, 8.0], "x": [3.0, 6.0]},)
    walls += ({"one process": [0.0, 0.0], "ceiling, tokens split": [2.0, 4.0], "x": [5.0, 10.0]},)
    said = [{name: _rank(kind, rank[name], [3.0, 3.0]) for name, kind in names.items()} for rank in walls]
    one, ceiling, x = summarise(CASE, said, dict.fromkeys(names, 7))
    assert (one["efficiency"], one["of_ceiling"]) == (1.0, None)
    assert (ceiling["efficiency"], ceiling["of_ceiling"]) == (1.0, 1.0)
    assert (x["wall_seconds"], x["cpu_seconds"], x["peak_bytes"]) == (7.5, 6.0, 7)
    assert x["efficiency"] == pytest.approx(0.8) and x["of_ceiling"] == pytest.approx(0.8)
    assert (x["fastest_seconds"], x["fastest_of_ceiling"]) == (5.0, 0.8)
    assert x["errors"] == pytest.approx(dict.fromkeys(("out", "dq", "dk", "dv"), 1e-6))


def test_rounds_begin_elsewhere() -> None:
    """Catches rounds in which one contender always follows the same other."""
    assert [rotated(["a", "b", "c"], by) for by in (0, 1, 4)] == [["a", "b", "c"], ["b", "c", "a"], ["b", "c", "a"]]
    assert ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0


def test_the_record(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a program that stops between measuring and writing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(attention, "run_local", lambda world, work, *args, **_: pool.run(world, work, *args))
    arguments = ["--tokens", "64", "128", "--kv-heads", "8", "2", "--repeats", "2", "--only", "seqloom ring"]
    page = main([*arguments, "--out", str(tmp_path)])
    rows = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    measured = {(row["tokens"], row["kv_heads"], row["contender"]) for row in rows}
    assert measured == {(n, h, name) for n in (64, 128) for h in (8, 2) for name in (*HERE[:3], "seqloom ring")}
    assert all(len(rank) == 2 for row in rows for rank in row["rounds_by_rank"]["wall_seconds"])
    assert "## 128 tokens, 8 query and 2 key/value heads" in page.read_text(encoding="utf-8")
