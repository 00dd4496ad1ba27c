"""`benchmarks.training`: what it compares and concludes; no timings."""

from importlib.util import find_spec
from typing import Any

import pytest

from benchmarks.attention import ROUND
from benchmarks.training import CHECKED, SMALL, agree, choose, measure, pages, parse, summarise
from benchmarks.training_contenders import BASE, contenders
from pool import Pool

TRAINER = "Hugging Face Trainer, one process"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tokens", "1023"], "multiple of 2"),
        (["--ranks", "4", "--rows", "6"], "multiple of 4"),
        (["--repeats", "0"], "measures nothing"),
        (["--only", "picotron"], "no contender's name contains 'picotron'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an argument that is accepted and then ignored, or that fails minutes later."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert why in capsys.readouterr().err


def held_together(pool: Pool, ranks: int, only: list[str]) -> list[dict[str, dict[str, Any]]]:
    """What each rank says of one round, the first rank's losses checked against float64."""
    said = pool.run(ranks, measure, SMALL, choose(ranks, only), 1)
    skipped = {name for name, figures in said[0].items() if "skipped" in figures}
    assert skipped == (set() if find_spec("accelerate") else {TRAINER} & set(said[0]))
    said = [{name: rank[name] for name in rank if name not in skipped} for rank in said]
    agree(said[0], SMALL.losses(CHECKED))
    return said


def test_every_contender_takes_the_same_steps(pool: Pool) -> None:
    """Catches a contender without its clip or optimizer, with other rows or labels, and figures of idle ranks."""
    said = held_together(pool, 2, [])
    assert BASE in said[0] and all(len(said[1][name]["wall_seconds"]) == 1 for name in said[1])
    said = [
        {name: {**rank[name], **{key: [number + 1.0] for key in ROUND}} for name in rank}
        for number, rank in enumerate(said)
    ]
    rows = list(summarise(SMALL, said, {name: [2**20, 2**21] for name in said[0]}))
    for row in rows:
        alone = row["kind"] == "one"
        assert (row["cpu_seconds"], row["wall_seconds"]) == (1.0 if alone else 3.0, 2.0)
        assert row["peak_bytes"] == (2**20 if alone else 2**21)
        assert row["tokens_per_cpu_second"] == 256 / row["cpu_seconds"]
        assert row["of_one_process"] == pytest.approx(1 / row["cpu_seconds"])
    assert pages(rows).count("\n|") == len(rows) + 2


def test_one_process_is_ours_too(pool: Pool) -> None:
    """Catches Trainer's one process beside two of ours only."""
    assert set(held_together(pool, 1, [])[0]) - {TRAINER} == {BASE, "seqloom data=1"}


@pytest.mark.sweep
def test_four_ranks_take_the_same_steps(pool: Pool) -> None:
    """Catches plans and meshes of two axes that compute something else."""
    assert set(held_together(pool, 4, [])[0]) <= {contender.name for contender in contenders(4)}


def test_disagreement_is_told() -> None:
    """Catches a record of contenders that do different work."""
    with pytest.raises(AssertionError, match=r"x computes something else: step 2 loses 1\.1, not 1\.0"):
        agree({"x": {"losses": [2.0, 1.1]}}, [2.0, 1.0])
    with pytest.raises(AssertionError, match="step 1 loses nan"):
        agree({"x": {"losses": [float("nan")]}}, [2.0])
