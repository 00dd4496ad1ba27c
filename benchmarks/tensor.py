"""A Llama and an MLP forward and backward, one process against two with one thread each, under tensor parallelism.

    python -m benchmarks.tensor [--problems llama mlp] [--tokens N ...] [--repeats 5] [--only ring] [--small] [--out F]

seqloom's plans stand beside torch's parallelize_module and Megatron-core's linears. All contenders run in one pair of
processes, one after the other, round after round, so that a disturbance hits all alike. What the figures mean:
docs/benchmarks.md.
"""

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed

from benchmarks.attention import ROUND, ratio
from benchmarks.record import RECORDS, Record, cores, table
from benchmarks.sent import sent_by
from benchmarks.tensor_contenders import BASE, CEILING, OWN, RANKS, Contender, Prepared
from benchmarks.tensor_peers import PEERS
from benchmarks.tensor_problems import Llama, Mlp, Problem, Results
from benchmarks.turns import ready, take_turns
from seqloom.fabric.launch import run_local

ALL = {name: (*OWN[name], *PEERS[name]) for name in OWN}
TOKENS = {"llama": (1024, 2048), "mlp": (1024,)}
PROBLEMS: dict[str, type[Llama] | type[Mlp]] = {"llama": Llama, "mlp": Mlp}
SMALL: dict[str, Problem] = {
    "llama": Llama(64, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=128),
    "mlp": Mlp(64, width=64, inner=128),
}
WARM_TOKENS = 32  # of the run that loads libraries before memory is measured
ROUNDING = 1e-5
"""The largest relative error of a loss, output or gradient that passes for the rounding of float32."""

COLUMNS = {
    "wall s": "wall_seconds",
    "CPU s": "cpu_seconds",
    "efficiency": "efficiency",
    "of ceiling": "of_ceiling",
    "fastest s": "fastest_seconds",
    "of ceiling, fastest": "fastest_of_ceiling",
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give freed memory back at once, so that what is resident is what is held."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    asked = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    record = Record("tensor", {"ranks": RANKS, "repeats": asked.repeats, "problems": [c.title for c in cases(asked)]})
    for case in cases(asked):
        print(f"{case.title} ...", flush=True)
        chosen = choose(case, asked.only)
        said = run_local(RANKS, measure, case, chosen, asked.repeats, timeout_seconds=1800)
        skipped = {name: figures["skipped"] for name, figures in said[0].items() if "skipped" in figures}
        said = [{name: figures for name, figures in rank.items() if name not in skipped} for rank in said]
        agree(said)
        peaks = {name: peak(case, name) for name in said[0]}
        record.rows += summarise(case, said, peaks)
        record.notes += [f"Skipped: {name}: {why}" for name, why in skipped.items()]
    record.doubt(max(row["others_share"] for row in record.rows), "during a contender's median round")
    page = record.write(pages(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with a sentence on what cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor", description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=list(ALL), default=list(ALL), help="what is computed")
    parser.add_argument("--tokens", type=int, nargs="+", help="of one row; by default 1024 and, of the llama, 2048")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="contenders whose name contains NAME")
    parser.add_argument("--small", action="store_true", help="tiny tensors, to see that it works; times mean nothing")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.small and asked.tokens:
        parser.error("--small has tokens of its own; leave one of the two out")
    if wrong := [n for n in asked.tokens or () if n < RANKS or n % RANKS]:
        parser.error(f"--tokens {wrong[0]}: torch and Megatron-core split tokens evenly; give a multiple of {RANKS}")
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    known = [contender.name for name in asked.problems for contender in ALL[name]]
    if missing := [part for part in asked.only if not any(part in name for name in known)]:
        parser.error(f"no contender's name contains '{missing[0]}'; they are {', '.join(dict.fromkeys(known))}")
    return asked


def cases(asked: argparse.Namespace) -> list[Problem]:
    """Every problem that is asked for, at each number of tokens."""
    if asked.small:
        return [SMALL[name] for name in asked.problems]
    return [PROBLEMS[name](tokens) for name in asked.problems for tokens in asked.tokens or TOKENS[name]]


def contenders(case: Problem) -> tuple[Contender, ...]:
    """Who computes this problem."""
    return ALL["llama" if isinstance(case, Llama) else "mlp"]


def choose(case: Problem, only: Sequence[str]) -> list[str]:
    """The names to run: all, or those asked for beside one process and the ceiling, which every ratio needs."""
    return [
        c.name
        for c in contenders(case)
        if not only or c.kind in ("one", "ceiling") or any(part in c.name for part in only)
    ]


def measure(case: Problem, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """On each rank: what every contender took in each round, under the keys of ROUND, sent, and how far it is off."""
    truth = case.truth()
    return take_turns(contenders(case), case, names, repeats, lambda prepared: first_run(prepared, truth))


def first_run(prepared: Prepared, truth: Results) -> dict[str, Any]:
    """What one run sends, and the relative error of each of its results, None where it has none to compare."""
    found: list[Results | None] = []
    before = prepared.metered() if prepared.metered else 0
    sent = sent_by(lambda: found.append(prepared.run()), RANKS)
    metered = prepared.metered() - before if prepared.metered else sent
    if metered != sent:
        raise AssertionError(f"seqloom's meter says {metered} bytes, but {sent} were sent")
    whole = prepared.whole(found[0])
    return {"sent_bytes": sent, "errors": None if whole is None else errors(whole, truth)}


def errors(found: Results, truth: Results) -> dict[str, float]:
    """|found - truth| / |truth| of each result, all of which must be there."""
    if found.keys() != truth.keys():
        raise AssertionError(f"results without a counterpart: {sorted(found.keys() ^ truth.keys())}")
    return {name: float((found[name].double() - true).norm() / true.norm()) for name, true in truth.items()}


def agree(said: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Raise AssertionError unless all contenders computed the same but for rounding: like is compared with like."""
    for name, off in ((name, rank[name]["errors"]) for rank in said for name in rank):
        worst = max(off, key=off.get) if off else None
        if worst and not off[worst] <= ROUNDING:
            raise AssertionError(f"{name} computes something else: its {worst} is off by {off[worst]:.1e}")


def peak(case: Problem, name: str) -> int:
    """`peak_bytes` of the rank where it is most."""
    with environment(RETURNED):
        return max(run_local(RANKS, peak_bytes, case, name))


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """While entered, processes start with these variables."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_bytes(case: Problem, name: str) -> int:
    """On each rank: how far one run lifts the resident memory of a fresh process above its weights and inputs."""
    torch.set_num_threads(1)
    for size in (case.few(WARM_TOKENS), case):
        for _, prepared in ready(contenders(size), size, [name]):
            assert isinstance(prepared, Prepared)
            gc.collect()
            distributed.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            before = status_bytes("VmRSS")
            results = prepared.run()
            lifted = status_bytes("VmHWM") - before
            del results
            prepared.close()
    return lifted


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def summarise(
    case: Problem, said: Sequence[dict[str, dict[str, Any]]], peaks: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """One row a contender, from what each rank said. Medians of rounds; ratios are taken round by round."""
    walls = {
        name: [max(ranks) for ranks in zip(*(s[name]["wall_seconds"] for s in said), strict=True)] for name in said[0]
    }
    for name, first in said[0].items():
        rounds = {key: [s[name][key] for s in said] for key in ROUND}
        cpu = [sum(ranks) for ranks in zip(*rounds["cpu_seconds"], strict=True)]
        several = first["kind"] != "one"
        taken = zip(rounds["machine_seconds"][0], cpu, walls[name], strict=True)
        yield {
            "problem": case.title,
            "tokens": case.tokens,
            "contender": name,
            "kind": first["kind"],
            "wall_seconds": median(walls[name]),
            "cpu_seconds": median(cpu),
            "efficiency": ratio(walls[BASE], walls[name]) / (RANKS if several else 1),
            "of_ceiling": ratio(walls[CEILING], walls[name]) if several else None,
            "fastest_seconds": min(walls[name]),
            "fastest_of_ceiling": min(walls[CEILING]) / min(walls[name]) if several else None,
            "sent_bytes": max(s[name]["sent_bytes"] for s in said),
            "peak_bytes": peaks[name],
            "errors": worst([s[name]["errors"] for s in said]),
            "others_share": median((machine - own) / (wall * cores()) for machine, own, wall in taken),
            "rounds_by_rank": rounds,
        }


def worst(off: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """Each result's largest error over ranks; None where no rank has any."""
    held = [rank for rank in off if rank is not None]
    return {name: max(rank[name] for rank in held) for name in held[0]} if held else None


def pages(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as one table for each problem."""
    head = ["", *COLUMNS, "sent MiB", "peak MiB", "largest error"]
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        parts += [f"## {problem}", table(head, [_line(row) for row in rows if row["problem"] == problem])]
    return "\n\n".join(parts)


def _line(row: dict[str, Any]) -> list[object]:
    figures = [None if row[key] is None else f"{row[key]:.3f}" for key in COLUMNS.values()]
    sizes = [f"{row[key] / 2**20:.1f}" for key in ("sent_bytes", "peak_bytes")]
    return [row["contender"], *figures, *sizes, None if row["errors"] is None else f"{max(row['errors'].values()):.1e}"]


if __name__ == "__main__":
    main()
