"""Attention forward and backward, one process against two with one thread each, beside the ceiling and the peers.

    python -m benchmarks.attention [--tokens 4096 8192] [--kv-heads 8 2] [--repeats 5] [--only ring] [--out F]

All contenders run in one pair of processes, one after the other, round after round, so that a disturbance hits all
alike. What the figures mean: docs/benchmarks.md.
"""

import argparse
import os
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed

from benchmarks.contenders import OWN, RANKS, Case, Contender, Prepared, Results, Unavailable, fused, heads_first
from benchmarks.peers import PEERS
from benchmarks.record import RECORDS, Record, busy_seconds, cores, table
from seqloom.fabric.launch import run_local

HEADS, WIDTH = 8, 64
TOKENS, KV_HEADS = (2048, 4096, 8192, 16384), (8, 2)
WARM_TOKENS = 256  # of the run that loads libraries before memory is measured
BASE, CEILING = "one process", "ceiling, tokens split"
ALL = (*OWN, *PEERS)
RESULTS = ("out", "dq", "dk", "dv")
COLUMNS = {
    "wall s": "wall_seconds",
    "CPU s": "cpu_seconds",
    "efficiency": "efficiency",
    "of ceiling": "of_ceiling",
    "fastest s": "fastest_seconds",
    "of ceiling, fastest": "fastest_of_ceiling",
    "peak MiB": "peak_bytes",
}
ROUND = ("wall_seconds", "cpu_seconds", "machine_seconds")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    asked = parse(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    chosen = choose(asked.only)
    record = Record("attention", {"heads": HEADS, "width": WIDTH, "ranks": RANKS, **settings(asked)})
    skipped: dict[str, str] = {}
    for kv_heads in asked.kv_heads:
        for tokens in asked.tokens:
            case = Case(tokens, HEADS, kv_heads, WIDTH)
            print(f"{tokens} tokens, {kv_heads} kv heads ...", flush=True)
            said = run_local(RANKS, measure, case, chosen, asked.repeats, timeout_seconds=1800)
            skipped |= {name: figures["skipped"] for name, figures in said[0].items() if "skipped" in figures}
            names = [name for name, figures in said[0].items() if "skipped" not in figures]
            peaks = {name: max(run_local(RANKS, peak_bytes, case, name)) for name in names}
            record.rows += summarise(case, [{name: figures[name] for name in names} for figures in said], peaks)
    record.doubt(max(row["others_share"] for row in record.rows), "during a contender's median round")
    record.notes += [f"Skipped: {name}: {why}" for name, why in skipped.items()]
    page = record.write(pages(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with a sentence on what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="lengths of the sequence")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=KV_HEADS, help=f"key/value heads, of {HEADS}")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="contenders whose name contains NAME")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if wrong := [n for n in asked.tokens if n < 2 * RANKS or n % (2 * RANKS)]:
        parser.error(f"--tokens {wrong[0]} cannot be dealt evenly to all contenders; give a multiple of {2 * RANKS}")
    if wrong := [n for n in asked.kv_heads if n < RANKS or HEADS % n]:
        parser.error(f"--kv-heads {wrong[0]}: every contender takes only divisors of {HEADS} from {RANKS} up")
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    if missing := [part for part in asked.only if not any(part in contender.name for contender in ALL)]:
        parser.error(f"no contender's name contains '{missing[0]}'; they are {', '.join(c.name for c in ALL)}")
    return asked


def settings(asked: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, as the record keeps it."""
    return {"tokens": list(asked.tokens), "kv_heads": list(asked.kv_heads), "repeats": asked.repeats}


def choose(only: Sequence[str]) -> list[str]:
    """The names to run: all, or those asked for beside one process and the ceilings, which every ratio needs."""
    return [c.name for c in ALL if not only or c.kind in ("one", "ceiling") or any(part in c.name for part in only)]


def _ready(case: Case, names: Sequence[str]) -> Iterator[tuple[Contender, Prepared | str]]:
    for contender in ALL:
        if contender.name in names:
            try:
                yield contender, contender.prepare(case)
            except Unavailable as reason:
                yield contender, str(reason)


def measure(case: Case, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """On each rank: what every contender took in each round, under the keys of ROUND, and error_squares."""
    torch.set_num_threads(1)
    said: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    for contender, prepared in _ready(case, names):
        if isinstance(prepared, str):
            said[contender.name] = {"skipped": prepared}
        else:
            said[contender.name] = {"kind": contender.kind, **{key: [] for key in ROUND}}
            ready[contender.name] = prepared
    truth = reference(case)
    for name, prepared in ready.items():  # the round that warms up
        said[name]["error_squares"] = error_squares(prepared, prepared.run(), truth)
    del truth
    for number in range(repeats):
        for name in rotated(list(ready), number):
            for key, value in zip(ROUND, timed(ready[name]), strict=True):
                said[name][key].append(value)
    for prepared in ready.values():
        prepared.close()
    return said


def rotated(names: list[str], by: int) -> list[str]:
    """The names, beginning elsewhere each time: what a contender leaves behind meets another neighbour."""
    by %= len(names)
    return names[by:] + names[:by]


def timed(prepared: Prepared) -> tuple[float, float, float]:
    """One run on this rank, in seconds: by its clock, of processor for all its threads, of all processors for all."""
    before, busy = _processor_seconds(), busy_seconds()
    distributed.barrier()
    start = time.perf_counter()
    results = prepared.run()
    wall = time.perf_counter() - start
    del results
    distributed.barrier()  # what is still being sent belongs to this run
    return wall, _processor_seconds() - before, (busy_seconds() or 0.0) - (busy or 0.0)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def reference(case: Case) -> list[Tensor]:
    """out, dq, dk, dv of the whole sequence in float64."""
    *leaves, dout = case.tensors(torch.float64)
    leaves = [x.requires_grad_() for x in leaves]
    out = fused(*heads_first(*leaves))
    grads = torch.autograd.grad(out, leaves, heads_first(dout)[0])
    return [out.detach(), *heads_first(*grads)]


def error_squares(prepared: Prepared, results: Results | None, truth: list[Tensor]) -> list[tuple[float, float]] | None:
    """|error|^2 and |truth|^2 of out, dq, dk, dv over what this rank holds; None if it holds nothing."""
    if results is None:
        return None
    held = torch.cat([torch.arange(*span) for span in prepared.spans])
    part, parts = prepared.heads
    squares = []
    for found, whole in zip(results, truth, strict=True):
        true = whole.chunk(parts, 1)[part].index_select(2, held)
        squares.append((float((found.detach().double() - true).square().sum()), float(true.square().sum())))
    return squares


def peak_bytes(case: Case, name: str) -> int:
    """On each rank: how far one run lifts the resident memory of a fresh process above its inputs."""
    torch.set_num_threads(1)
    small = Case(WARM_TOKENS, case.heads, case.kv_heads, case.width)
    for size in (small, case):
        for _, prepared in _ready(size, [name]):
            assert isinstance(prepared, Prepared)
            distributed.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            before = _status_bytes("VmRSS")
            results = prepared.run()
            peak = _status_bytes("VmHWM") - before
            del results
            prepared.close()
    return peak


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def summarise(case: Case, said: Sequence[dict[str, dict[str, Any]]], peaks: dict[str, int]) -> Iterator[dict[str, Any]]:
    """One row a contender, from what each rank said. Medians of rounds; ratios are taken round by round."""
    walls = {
        name: [max(ranks) for ranks in zip(*(s[name]["wall_seconds"] for s in said), strict=True)] for name in said[0]
    }
    for name, first in said[0].items():
        rounds = {key: [s[name][key] for s in said] for key in ROUND}
        cpu = [sum(ranks) for ranks in zip(*rounds["cpu_seconds"], strict=True)]
        ranks = 1 if first["kind"] == "one" else RANKS
        taken = zip(rounds["machine_seconds"][0], cpu, walls[name], strict=True)
        yield {
            "tokens": case.tokens,
            "kv_heads": case.kv_heads,
            "contender": name,
            "kind": first["kind"],
            "wall_seconds": median(walls[name]),
            "cpu_seconds": median(cpu),
            "efficiency": ratio(walls[BASE], walls[name]) / ranks,
            "of_ceiling": ratio(walls[CEILING], walls[name]) if ranks > 1 else None,
            "fastest_seconds": min(walls[name]),
            "fastest_of_ceiling": min(walls[CEILING]) / min(walls[name]) if ranks > 1 else None,
            "others_share": median((machine - own) / (wall * cores()) for machine, own, wall in taken),
            "peak_bytes": peaks[name],
            "errors": relative_errors([s[name]["error_squares"] for s in said]),
            "rounds_by_rank": rounds,
        }


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of what one took over what the other took in the same round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def relative_errors(squares: Sequence[list[tuple[float, float]] | None]) -> dict[str, float] | None:
    """|error| / |truth| of each result over all ranks."""
    held = [rank for rank in squares if rank is not None]
    if not held:
        return None
    sums = [[sum(column) for column in zip(*ranks, strict=True)] for ranks in zip(*held, strict=True)]
    return {name: (error / truth) ** 0.5 for name, (error, truth) in zip(RESULTS, sums, strict=True)}


def pages(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as one table for each number of key/value heads and tokens."""
    head = ["", *COLUMNS, *(f"error {name}" for name in RESULTS)]
    parts = []
    for kv_heads, tokens in dict.fromkeys((row["kv_heads"], row["tokens"]) for row in rows):
        mine = [row for row in rows if (row["kv_heads"], row["tokens"]) == (kv_heads, tokens)]
        parts += [f"## {tokens:,} tokens, {HEADS} query and {kv_heads} key/value heads", table(head, map(_line, mine))]
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[object]:
    figures = [None if row[key] is None else f"{row[key]:.3f}" for key in list(COLUMNS.values())[:-1]]
    errors = [None if row["errors"] is None else f"{row['errors'][name]:.1e}" for name in RESULTS]
    return [row["contender"], *figures, round(row["peak_bytes"] / 2**20), *errors]


if __name__ == "__main__":
    main()
