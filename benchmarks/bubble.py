"""The share of a step that pipeline ranks wait, with stage work replaced by timed waits, beside the formula.

    python -m benchmarks.bubble [--ranks 4] [--micro-batches 4 8] [--schedules zbv ...] [--seconds 0.02] [--out F]

A stage waits `seconds` forward, and as long in backward for its input and for its weights; a rank's stages share its
work. What is measured is one step from a barrier to the end of its last rank, less its work.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import RECORDS, Record, table
from seqloom.fabric import Fabric, all_reduce_, barrier
from seqloom.fabric.launch import run_local
from seqloom.fabric.pipeline import run_stages
from seqloom.plan import Plan, stages_of
from seqloom.planner import bubble_share

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zbv")


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class Waiting(nn.Module):
    """A stage that waits: `seconds` forward, `seconds` for the gradient of its input, `seconds` for its weight's."""

    def __init__(self, seconds: float, last: bool) -> None:
        super().__init__()
        self.seconds, self.last = seconds, last
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *received: Tensor, micro: Tensor) -> Tensor:
        """[1], or a scalar on the last stage."""
        x = received[0] if received else torch.ones(1, requires_grad=True)
        out = _Wait.apply(x, self.seconds, self.seconds) * _Wait.apply(self.weight, 0.0, self.seconds)
        return out.sum() if self.last else out


def step_seconds(text: str, micro_batches: int, seconds: float, rounds: int) -> float:
    """The median time of a step, its slowest rank's; every rank calls it."""
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    each = seconds * plan.pipeline / plan.num_stages
    stages = {number: Waiting(each, number == plan.num_stages - 1) for number in stages_of(plan, fabric.pipeline.rank)}
    found = []
    for _ in range(rounds + 1):
        barrier(fabric.world)
        started = time.perf_counter()
        run_stages(
            stages,
            fabric.pipeline,
            fabric.device,
            schedule=plan.schedule,
            num_stages=plan.num_stages,
            micro_batches=micro_batches,
            passed=torch.empty(1, device="meta"),
        )
        took = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        found.append(all_reduce_(took, fabric.world, "max").item())
    return median(found[1:])


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bubble", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="ranks of the pipeline")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=(4, 8), help="micro-batches of a step")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES, help="orders of a step")
    parser.add_argument("--seconds", type=float, default=0.02, help="a third of a rank's work on a micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="steps, of which the median counts")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    settings = {name: getattr(asked, name) for name in ("ranks", "seconds", "rounds")}
    record = Record("bubble", {**settings, "micro_batches": list(asked.micro_batches)}, timed=True)
    for schedule in asked.schedules:
        plan = replace(Plan(pipeline=asked.ranks), schedule=schedule)
        for count in asked.micro_batches:
            took = run_local(asked.ranks, step_seconds, str(plan), count, asked.seconds, asked.rounds)[0]
            share = 1 - 3 * count * asked.seconds / took
            record.rows.append(
                {"schedule": schedule, "micro_batches": count, "share": share, "formula": bubble_share(plan, count)}
            )
    page = record.write(page_body(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def page_body(found: Sequence[dict[str, Any]]) -> str:
    """A table of measured and computed shares, and how far they are apart."""
    head = ["schedule", "micro-batches", "waited, measured", "waited, by the formula", "ratio"]
    return table(
        head,
        [
            [
                r["schedule"],
                r["micro_batches"],
                f"{r['share']:.4f}",
                f"{r['formula']:.4f}",
                f"{r['share'] / r['formula']:.3f}",
            ]
            for r in found
        ],
    )


if __name__ == "__main__":
    main()
