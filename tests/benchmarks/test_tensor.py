"""`benchmarks.tensor` and `benchmarks.tensor_overlap`: what they compare, count and conclude; no timings."""

import json
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from benchmarks import tensor, tensor_overlap
from benchmarks.sent import Sent
from benchmarks.tensor import ALL, SMALL, agree, choose, errors, main, parse, summarise
from benchmarks.tensor_contenders import BASE, CEILING
from benchmarks.tensor_overlap import DW, DX, GATHER, SCATTER, Event, hidden_share
from benchmarks.tensor_problems import Mlp
from pool import Pool
from seqloom.fabric.launch import run_local

MEGATRON = {"Megatron-core tp", "Megatron-core tp+sp"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "1023"], "multiple of 2"),
        (["--small", "--tokens", "64"], "leave one of the two out"),
        (["--repeats", "0"], "measures nothing"),
        (["--only", "picotron"], "no contender's name contains 'picotron'"),
        (["--problems", "llama", "--only", "Megatron"], "no contender's name contains 'Megatron'"),
        (["--problems", "bert"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an argument that is accepted and then ignored, or that fails minutes later."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert why in capsys.readouterr().err


def test_ratios_keep_what_they_need() -> None:
    """Catches a choice of contenders without the one process and the ceiling that its ratios are over."""
    assert choose(SMALL["mlp"], ["torch tp+sp"]) == [BASE, CEILING, "torch tp+sp"]
    assert choose(SMALL["llama"], []) == [contender.name for contender in ALL["llama"]]


@pytest.mark.parametrize("problem", list(ALL))
def test_every_contender_computes_the_same(pool: Pool, problem: str) -> None:
    """Catches a contender timed on other work than the rest, and a meter that says less than was sent."""
    case = SMALL[problem]
    said = pool.run(2, tensor.measure, case, choose(case, []), 1)
    missing = {name for name, figures in said[0].items() if "skipped" in figures}
    assert missing <= (set() if find_spec("megatron") else MEGATRON)
    said = [{name: rank[name] for name in rank if name not in missing} for rank in said]
    agree(said)
    for name, first in said[0].items():
        assert (first["errors"] is None) == (name == CEILING)
        assert (first["sent_bytes"] > 0) == (name not in (BASE, CEILING))
        assert len(first["wall_seconds"]) == 1
        if first["errors"]:
            assert max(first["errors"].values()) > 1e-9  # a float64 truth compared with itself is 0
    assert said[1][BASE]["errors"] is None and said[1]["seqloom tp"]["errors"]
    # Gathering inputs again is what keeping them saves: here once for each column-wise linear and the head.
    assert said[0]["seqloom tp+sp"]["sent_bytes"] > said[0]["seqloom tp+sp, kept"]["sent_bytes"]


def test_disagreement_is_told() -> None:
    """Catches a record of contenders that do different work: wrong, missing and infinite results all stop it."""
    right = {"x": torch.ones(4)}
    for off in (errors({"x": torch.full((4,), 0.5)}, right), {"x": float("nan")}):
        with pytest.raises(AssertionError, match="seqloom tp computes something else: its x"):
            agree([{"seqloom tp": {"errors": off}}])
    with pytest.raises(AssertionError, match="without a counterpart"):
        errors({}, right)
    agree([{"seqloom tp": {"errors": errors({"x": right["x"] * (1 + 1e-6)}, right)}, CEILING: {"errors": None}}])


def _counted() -> list[tuple[str, Fraction]]:
    """Bytes by collective, of 8 floats each."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    eight, wide = torch.ones(8), torch.ones(8 * world)
    neighbours = [
        distributed.P2POp(distributed.isend, eight, (rank + 1) % world),
        distributed.P2POp(distributed.irecv, torch.ones(8), (rank - 1) % world),
    ]
    calls: dict[str, Any] = {
        "all-reduce": lambda: distributed.all_reduce(eight.clone()),
        "all-gather": lambda: distributed.all_gather([torch.ones(8) for _ in range(world)], eight),
        "reduce-scatter": lambda: distributed.reduce_scatter_tensor(torch.ones(8), wide),
        "message": lambda: [work.wait() for work in distributed.batch_isend_irecv(neighbours)],
        "barrier": distributed.barrier,
    }
    found = []
    for name, call in calls.items():
        with Sent(world) as counted:
            call()
        found.append((name, counted.bytes))
    with Sent(world), pytest.raises(NotImplementedError, match="broadcast"):
        distributed.broadcast(eight, 0)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_sent_is_counted(pool: Pool) -> None:
    """Catches a collective counted twice, not at all, or as if every byte left the rank."""
    for found in pool.run(3, _counted):
        assert dict(found) == {
            "all-reduce": Fraction(4, 3) * 32,
            "all-gather": 64,
            "reduce-scatter": 64,
            "message": 32,
            "barrier": 0,
        }


def test_memory_is_that_of_the_run() -> None:
    """Catches a peak that is never reset, and one that leaves out what backward needs."""
    case = Mlp(tokens=8192, width=64, inner=1024)
    at_least = 2 * case.tokens * case.inner // 2 * 4  # what GELU reads and gives
    for peak in run_local(2, tensor.peak_bytes, case, "seqloom tp+sp"):  # fresh ones, as the program has: no old pages
        assert at_least <= peak < 4 * at_least


def _rank(kind: str, walls: list[float], cpu: list[float], sent: int, off: float) -> dict[str, Any]:
    rounds = {"wall_seconds": walls, "cpu_seconds": cpu, "machine_seconds": cpu}
    return {"kind": kind, "sent_bytes": sent, "errors": {"x": off}, **rounds}


def test_figures_come_from_the_slowest_rank() -> None:
    """Catches the mean or the first rank's time, one process counted as two, and ratios across rounds."""
    names = {BASE: "one", CEILING: "ceiling", "x": "ours"}
    walls = ({BASE: [8.0, 16.0], CEILING: [4.0, 8.0], "x": [3.0, 6.0]},)
    walls += ({BASE: [0.0, 0.0], CEILING: [2.0, 4.0], "x": [5.0, 10.0]},)
    said = [
        {name: _rank(kind, rank[name], [3.0, 3.0], number, 1e-7 * number) for name, kind in names.items()}
        for number, rank in enumerate(walls)
    ]
    one, ceiling, x = summarise(SMALL["mlp"], said, dict.fromkeys(names, 7))
    assert (one["efficiency"], one["of_ceiling"]) == (1.0, None)
    assert (ceiling["efficiency"], ceiling["of_ceiling"]) == (1.0, 1.0)
    assert (x["wall_seconds"], x["cpu_seconds"], x["peak_bytes"], x["sent_bytes"]) == (7.5, 6.0, 7, 1)
    assert x["efficiency"] == pytest.approx(0.8) and x["of_ceiling"] == pytest.approx(0.8)
    assert (x["fastest_seconds"], x["fastest_of_ceiling"], x["errors"]) == (5.0, 0.8, {"x": 1e-7})


def test_the_record(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a program that stops between measuring and writing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tensor, "run_local", lambda world, work, *args, **_: pool.run(world, work, *args))
    arguments = ["--small", "--problems", "mlp", "--repeats", "2", "--only", "torch tp+sp"]
    page = main([*arguments, "--out", str(tmp_path)])
    rows = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert [row["contender"] for row in rows] == [BASE, CEILING, "torch tp+sp"]
    assert all(len(rank) == 2 for row in rows for rank in row["rounds_by_rank"]["wall_seconds"])
    assert f"## {SMALL['mlp'].title}" in page.read_text(encoding="utf-8")


TRACE = [
    Event("compute", DX, 0.0, 1.0),
    Event("transfer", SCATTER, 1.0, 3.0),
    Event("compute", DW, 1.5, 2.5),
    Event("transfer", GATHER, 3.0, 4.0),
    Event("compute", DX, 3.0, 4.0),
    Event("compute", DW, 4.0, 5.0),  # of a linear whose input gradient stays
    Event("transfer", SCATTER, 5.0, 6.0),  # an output's, which nothing hides
]


def test_overlap_is_of_the_input_gradient_alone() -> None:
    """Catches transfers counted as hidden that are not the input gradient's, and hidden time beyond the product."""
    assert hidden_share([TRACE]) == 0.5
    late = [*TRACE[:2], Event("compute", DW, 3.0, 4.0)]
    assert hidden_share([late, late, TRACE]) == 0.0


def test_the_overlap_program(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace without transfers or products, one of another order, and stand-ins that outlive it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tensor_overlap, "run_local", lambda world, work, *args, **_: pool.run(world, work, *args))
    page = tensor_overlap.main(["--small", "--repeats", "1", "--out", str(tmp_path)])
    rows = {row["mode"]: row for row in json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["rows"]}
    assert rows["no overlap"]["hidden_share_by_rank"] == [0.0, 0.0]
    trace = json.loads(page.with_name(f"{page.stem}-trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert sorted(names.values()) == ["no overlap, rank 0", "no overlap, rank 1", "overlap, rank 0", "overlap, rank 1"]
    for process, name in names.items():
        mine = [event for event in trace if event["pid"] == process and event["ph"] == "X"]
        order = [event["name"] for event in mine if event["tid"] in ("compute", "wait")]
        order = [step for step in order if step not in ("wait for all-gather", "wait for all-reduce")]
        # Of the column-wise linear: dx is waited for at once, or after the weight gradient.
        arrived = "wait for reduce-scatter"
        assert order[-3:] == ([DX, DW, arrived] if name.startswith("overlap") else [DX, arrived, DW])
        moved = [event for event in mine if event["tid"] == "transfer"]
        assert [event["name"] for event in moved] == [GATHER, SCATTER, GATHER, GATHER, SCATTER]
        assert {event["args"]["bytes"] for event in moved} == {32 * 64 * 4}
