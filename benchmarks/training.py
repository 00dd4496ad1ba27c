"""Whole training steps of a Llama on CPU: seqloom's plans, torch's FSDP2 and DTensor composed by hand, and Trainer.

    python -m benchmarks.training [--ranks 2] [--tokens N ...] [--rows R] [--repeats 5] [--only ring] [--small]

All contenders run in one set of processes with one thread each, one after the other, round after round, so that a
disturbance hits all alike. What the figures mean: docs/benchmarks.md.
"""

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

from benchmarks.attention import ROUND, ratio
from benchmarks.record import RECORDS, Record, cores, table
from benchmarks.tensor import RETURNED, environment, status_bytes
from benchmarks.tensor_contenders import Prepared
from benchmarks.training_contenders import BASE, Step, contenders
from benchmarks.turns import ready, take_turns
from seqloom.fabric.launch import run_local

SMALL = Step(64, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=128, rows=4)
CHECKED = 3
"""Steps whose losses must agree before any is timed: the optimizer and the clip stand behind all but the first."""

ROUNDING = 2e-4
"""The largest relative error of a loss that passes for the rounding of float32, which AdamW magnifies."""

COLUMNS = {
    "wall s": "wall_seconds",
    "CPU s": "cpu_seconds",
    "tokens / CPU s": "tokens_per_cpu_second",
    "of one process": "of_one_process",
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    asked = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    found = [SMALL] if asked.small else [Step(tokens, rows=asked.rows) for tokens in asked.tokens]
    told = {"ranks": asked.ranks, "repeats": asked.repeats, "problems": [case.title for case in found]}
    record = Record("training", told)
    for case in found:
        print(f"{case.title} ...", flush=True)
        names = choose(asked.ranks, asked.only)
        said = run_local(asked.ranks, measure, case, names, asked.repeats, timeout_seconds=1800)
        skipped = {name: figures["skipped"] for name, figures in said[0].items() if "skipped" in figures}
        said = [{name: figures for name, figures in rank.items() if name not in skipped} for rank in said]
        agree(said[0], case.losses(CHECKED))
        peaks = {name: peaks_of(asked.ranks, case, name) for name in said[0]}
        record.rows += summarise(case, said, peaks)
        record.notes += [f"Skipped: {name}: {why}" for name, why in skipped.items()]
    record.doubt(max(row["others_share"] for row in record.rows), "during a contender's median round")
    page = record.write(pages(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with a sentence on what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), default=2, help="processes of all but the first two")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="of one sequence")
    parser.add_argument("--rows", type=int, default=4, help="sequences of a step")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after those that are checked")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="contenders whose name contains NAME")
    parser.add_argument("--small", action="store_true", help="tiny tensors, to see that it works; times mean nothing")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if wrong := [n for n in asked.tokens if n < asked.ranks or n % asked.ranks]:
        parser.error(f"--tokens {wrong[0]}: torch splits tokens evenly; give a multiple of {asked.ranks}")
    if asked.rows < asked.ranks or asked.rows % asked.ranks:
        parser.error(f"--rows {asked.rows}: FSDP2 splits rows evenly; give a multiple of {asked.ranks}")
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    known = [contender.name for contender in contenders(asked.ranks)]
    if missing := [part for part in asked.only if not any(part in name for name in known)]:
        parser.error(f"no contender's name contains '{missing[0]}'; they are {', '.join(known)}")
    return asked


def choose(ranks: int, only: Sequence[str]) -> list[str]:
    """The names to run: all, or those asked for beside the one process that every ratio needs."""
    return [c.name for c in contenders(ranks) if not only or c.name == BASE or any(part in c.name for part in only)]


def measure(case: Step, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """On each rank: the losses of every contender's first steps, and what it took in each round, keyed as ROUND."""

    def first_steps(prepared: Prepared) -> dict[str, Any]:
        found = [prepared.whole(prepared.run()) for _ in range(CHECKED)]
        return {"losses": [None if step is None else float(step["loss"]) for step in found]}

    return take_turns(contenders(distributed.get_world_size()), case, names, repeats, first_steps)


def agree(said: dict[str, dict[str, Any]], truth: Sequence[float]) -> None:
    """Raise AssertionError unless all contenders lose the same in every checked step: like is compared with like."""
    for name, figures in said.items():
        for step, (loss, true) in enumerate(zip(figures["losses"], truth, strict=True)):
            if not abs(loss - true) <= ROUNDING * true:
                raise AssertionError(f"{name} computes something else: step {step + 1} loses {loss}, not {true}")


def peaks_of(ranks: int, case: Step, name: str) -> list[int]:
    """`peak_bytes` of each rank."""
    with environment(RETURNED):
        return run_local(ranks, peak_bytes, case, name)


def peak_bytes(case: Step, name: str) -> int:
    """On each rank: how far two steps lift a fresh process above what it held before it made its model."""
    torch.set_num_threads(1)
    for _, prepared in ready(contenders(distributed.get_world_size()), SMALL, [name]):  # loads libraries
        assert isinstance(prepared, Prepared)
        prepared.run()
        prepared.close()
    gc.collect()
    before = status_bytes("VmRSS")
    for _, prepared in ready(contenders(distributed.get_world_size()), case, [name]):
        assert isinstance(prepared, Prepared)
        gc.collect()
        distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # making the model, whole at first, is no part of it
        for _ in range(2):
            prepared.run()
        lifted = status_bytes("VmHWM") - before
        prepared.close()
    return lifted


def summarise(
    case: Step, said: Sequence[dict[str, dict[str, Any]]], peaks: dict[str, list[int]]
) -> Iterator[dict[str, Any]]:
    """One row a contender, from what each rank said. Medians of rounds; ratios are taken round by round.

    A contender of one process has the processor time of that process alone.
    """

    def cpu_of(name: str) -> list[float]:
        ranks = said[:1] if said[0][name]["kind"] == "one" else said
        return [sum(seconds) for seconds in zip(*(s[name]["cpu_seconds"] for s in ranks), strict=True)]

    base, tokens = cpu_of(BASE), case.rows * case.tokens
    for name, first in said[0].items():
        rounds = {key: [s[name][key] for s in said] for key in ROUND}
        walls = [max(ranks) for ranks in zip(*rounds["wall_seconds"], strict=True)]
        cpu, alone = cpu_of(name), first["kind"] == "one"
        used = [sum(ranks) for ranks in zip(*rounds["cpu_seconds"], strict=True)]
        taken = zip(rounds["machine_seconds"][0], used, walls, strict=True)
        yield {
            "problem": case.title,
            "contender": name,
            "kind": first["kind"],
            "wall_seconds": median(walls),
            "cpu_seconds": median(cpu),
            "tokens_per_cpu_second": tokens / median(cpu),
            "of_one_process": ratio(base, cpu),
            "peak_bytes": peaks[name][0] if alone else max(peaks[name]),
            "losses": first["losses"],
            "others_share": median((machine - own) / (wall * cores()) for machine, own, wall in taken),
            "rounds_by_rank": rounds,
        }


def pages(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as one table for each problem."""
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines = [_line(row) for row in rows if row["problem"] == problem]
        parts += [f"## {problem}", table(["", *COLUMNS, "peak MiB a rank"], lines)]
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[object]:
    wall, cpu, tokens, share = (row[key] for key in COLUMNS.values())
    figures = [f"{wall:.3f}", f"{cpu:.3f}", f"{tokens:,.0f}", f"{share:.3f}"]
    return [row["contender"], *figures, f"{row['peak_bytes'] / 2**20:.1f}"]


if __name__ == "__main__":
    main()
