"""Proof that tensor parallelism's transfers travel while it computes: a trace, and what overlapping gains.

    python -m benchmarks.tensor_overlap [--tokens 1024] [--repeats 20] [--small] [--out FOLDER]

The MLP of `benchmarks.tensor` on two processes under tensor=2. The trace shows when each block of a transfer was posted
and when its bytes lay in this rank's memory, beside the products of the backward pass: docs/benchmarks.md.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, distributed

from benchmarks.attention import ROUND, ratio, rotated, timed
from benchmarks.record import RECORDS, Record, cores, table
from benchmarks.tensor_contenders import OWN, RANKS
from benchmarks.tensor_problems import Mlp
from seqloom.fabric import Pending, collectives
from seqloom.fabric.launch import run_local
from seqloom.tensor import linear

MODES = {"overlap": "seqloom tp+sp", "no overlap": "seqloom tp+sp, no overlap"}
"""Names of the two ways and the contenders they are."""

SMALL = Mlp(64, width=64, inner=128)
SAMPLES = 64
"""Places of a block that are looked at, its first and its last element among them."""

PAUSE = 5e-5  # seconds between two looks
TRACES = 5
DX, DW, SCATTER, GATHER = "input gradient", "weight gradient", "reduce-scatter", "all-gather"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, write the trace and the record, print the page; returns where the page is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensor_overlap", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024, help="of the MLP")
    parser.add_argument("--repeats", type=int, default=20, help="measured rounds, after one that warms up")
    parser.add_argument("--small", action="store_true", help="tiny tensors, to see that it works; times mean nothing")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record and the trace")
    asked = parser.parse_args(arguments)
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    os.environ["OMP_NUM_THREADS"] = "1"
    case = SMALL if asked.small else Mlp(asked.tokens)
    record = Record("tensor_overlap", {"ranks": RANKS, "repeats": asked.repeats, "problem": case.title})
    said = run_local(RANKS, measure, case, asked.repeats, timeout_seconds=1800)
    record.rows += summarise(said)
    record.doubt(max(row["others_share"] for row in record.rows), "during the median round")
    page = record.write(body(case, record.rows), asked.out)
    trace = page.with_name(f"{page.stem}-trace.json")
    trace.write_text(
        json.dumps({"traceEvents": list(chrome_events(said)), "displayTimeUnit": "ms"}) + "\n", encoding="utf-8"
    )
    print(page.read_text(encoding="utf-8"))
    return page


@dataclass
class Event:
    """Something this rank did or waited for: seconds of the clock that all processes share.

    kind: `compute`, `post`, `transfer` or `wait`. Of a transfer first_byte: when the first of it had arrived;
    arrived_by: when a wait for it ended, which a look may come after.
    """

    kind: str
    name: str
    start: float
    stop: float
    first_byte: float | None = None
    arrived_by: float = inf
    num_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From start to stop."""
        return self.stop - self.start

    def beside(self, other: "Event") -> float:
        """Seconds in which both were under way."""
        return max(0.0, min(self.stop, other.stop) - max(self.start, other.start))


class _Watched:
    """A transfer under way, and some places of the blocks it fills, all of them NaN at first."""

    def __init__(self, event: Event, blocks: Sequence[Tensor]) -> None:
        self.event = event
        # Views: they show what is there when they are read.
        self.flat = [block.detach().numpy().reshape(-1) for block in blocks]
        self.places = [np.linspace(0, flat.size - 1, SAMPLES).astype(int) for flat in self.flat]

    def ended(self) -> bool:
        """Whether all has arrived; notes when, and when the first of it had."""
        empty = [np.isnan(flat[places]) for flat, places in zip(self.flat, self.places, strict=True)]
        now = min(time.perf_counter(), self.event.arrived_by)
        if self.event.first_byte is None and not all(block.all() for block in empty):
            self.event.first_byte = now
        self.event.stop = now
        return not any(block.any() for block in empty)


class Tracer:
    """Records one rank's run of seqloom's linear, by standing in for some of its functions.

    Buffers that will be received into are filled with NaN, and a thread looks when that gives way to numbers: what it
    sees is bytes in memory, whatever a library says of the state of a transfer (gloo's receives count as ended
    only once they are waited for).
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._moving = ""
        self._posted_by: dict[int, tuple[Any, Event]] = {}
        self._watching: SimpleQueue[_Watched | None] = SimpleQueue()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While entered, what runs in this process is recorded; at the end all that was posted has arrived."""
        stand_ins = {
            (linear, "products"): self._computed(linear.products, DX),
            (linear, "weight_gradient"): self._computed(linear.weight_gradient, DW),
            (linear, "start_scatter"): self._moved(linear.start_scatter, SCATTER),
            (linear, "start_gather"): self._moved(linear.start_gather, GATHER),
            (collectives, "_start_messages"): self._posted(collectives._start_messages),
            (Pending, "wait"): self._waited(Pending.wait),
        }
        watcher = threading.Thread(target=self._watch, daemon=True)
        with ExitStack() as stack:
            for (home, name), function in stand_ins.items():
                stack.enter_context(patch.object(home, name, function))
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(self._watching.put, None)
            yield

    def _watch(self) -> None:
        under_way: list[_Watched] = []
        going_on = True
        while going_on or under_way:
            while (going_on and not under_way) or not self._watching.empty():
                one = self._watching.get()
                going_on = going_on and one is not None
                under_way += [one] if one is not None else []
            under_way = [one for one in under_way if not one.ended()]
            time.sleep(PAUSE)

    def _timed(self, kind: str, name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = call()
        self.events.append(Event(kind, name, start, time.perf_counter()))
        return made

    def _computed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return lambda *args: self._timed("compute", name, lambda: function(*args))

    def _waited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(pending: Pending) -> Any:
            arrived = self._timed("wait", f"wait for {pending.what}", lambda: function(pending))
            if posted := self._posted_by.pop(id(pending.works), None):
                posted[1].arrived_by = self.events[-1].stop
            return arrived

        return wait

    def _moved(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def start(x: Tensor, move: Any) -> Any:
            self._moving = name
            return function(x, move)

        return start

    def _posted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def start(leaving: Any, arriving: Mapping[int, Sequence[Tensor]], *rest: Any, **named: Any) -> Any:
            blocks = [block for given in arriving.values() for block in given if block.numel()]
            for block in blocks:
                block.fill_(float("nan"))
            works = self._timed("post", f"post {self._moving}", lambda: function(leaving, arriving, *rest, **named))
            event = Event("transfer", self._moving, self.events[-1].start, inf)
            event.num_bytes = sum(block.nbytes for block in blocks)
            self.events.append(event)
            self._posted_by[id(works)] = works, event  # held, so that no other list gets its id
            self._watching.put(_Watched(event, blocks))
            return works

        return start


def measure(case: Mlp, repeats: int) -> dict[str, dict[str, Any]]:
    """On each rank and for each mode: seconds of every round, under the keys of ROUND, and the events of each trace."""
    torch.set_num_threads(1)
    contenders = {contender.name: contender for contender in OWN["mlp"]}
    ready = {mode: contenders[name].prepare(case) for mode, name in MODES.items()}
    said: dict[str, dict[str, Any]] = {mode: {key: [] for key in (*ROUND, "traces")} for mode in MODES}
    for number in range(-1, repeats):
        for mode in rotated(list(ready), number):
            for key, value in zip(ROUND, timed(ready[mode]), strict=True):
                said[mode][key] += [value] if number >= 0 else []  # the first round warms up
    for _ in range(TRACES):
        for mode, prepared in ready.items():
            tracer = Tracer()
            distributed.barrier()
            with tracer.tracing():
                prepared.run()
            said[mode]["traces"].append(tracer.events)
    for prepared in ready.values():
        prepared.close()
    return said


def pairs(events: Sequence[Event]) -> Iterator[tuple[Event, Event]]:
    """Each reduce-scatter of an input gradient with the weight gradient that is computed next."""
    ordered = sorted(events, key=lambda event: event.start)
    before: Event | None = None
    scatter: Event | None = None
    for event in ordered:
        if event.kind == "transfer" and event.name == SCATTER and before is not None and before.name == DX:
            scatter = event
        if event.kind == "compute":
            if event.name == DW and scatter is not None:
                yield scatter, event
                scatter = None
            before = event


def hidden_share(traces: Sequence[Sequence[Event]]) -> float:
    """Of the time that input gradients travel, the share in which a weight gradient was computed; median of traces."""
    found = [list(pairs(events)) for events in traces]
    return median(sum(s.beside(w) for s, w in each) / sum(s.seconds for s, _ in each) for each in found)


def summarise(said: Sequence[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One row a mode, from what each rank said."""
    walls = {
        mode: [max(ranks) for ranks in zip(*(s[mode]["wall_seconds"] for s in said), strict=True)] for mode in MODES
    }
    for mode in MODES:
        rounds = {key: [s[mode][key] for s in said] for key in ROUND}
        cpu = [sum(ranks) for ranks in zip(*rounds["cpu_seconds"], strict=True)]
        taken = zip(rounds["machine_seconds"][0], cpu, walls[mode], strict=True)
        both = [list(pairs(events)) for s in said for events in s[mode]["traces"]]
        yield {
            "mode": mode,
            "wall_seconds": median(walls[mode]),
            "cpu_seconds": median(cpu),
            "of_no_overlap": ratio(walls[mode], walls["no overlap"]),
            "transfer_seconds": median(scatter.seconds for each in both for scatter, _ in each),
            "weight_gradient_seconds": median(product.seconds for each in both for _, product in each),
            "hidden_share_by_rank": [hidden_share(s[mode]["traces"]) for s in said],
            "others_share": median((machine - own) / (wall * cores()) for machine, own, wall in taken),
            "rounds_by_rank": rounds,
        }


def chrome_events(said: Sequence[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The last trace of each mode in the format of Chrome's tracing, a process for each rank and mode."""
    for number, mode in enumerate(MODES):
        last = [s[mode]["traces"][-1] for s in said]
        origin = min(event.start for events in last for event in events)
        for rank, events in enumerate(last):
            process = number * len(said) + rank
            yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{mode}, rank {rank}"}}
            for event in sorted(events, key=lambda event: event.start):
                shown: dict[str, Any] = {"name": event.name, "ph": "X", "pid": process, "tid": event.kind}
                shown |= {"ts": round((event.start - origin) * 1e6, 1), "dur": round(event.seconds * 1e6, 1)}
                if event.first_byte is not None:
                    arrived = round((event.first_byte - origin) * 1e6, 1)
                    shown["args"] = {"bytes": event.num_bytes, "first bytes arrived by": arrived}
                yield shown


def body(case: Mlp, rows: Sequence[dict[str, Any]]) -> str:
    """The page's table."""
    head = ["", "wall s", "CPU s", "of no overlap", "transfer ms", "weight gradient ms", "hidden, by rank"]
    lines = [
        [
            row["mode"],
            *(f"{row[key]:.3f}" for key in ("wall_seconds", "cpu_seconds", "of_no_overlap")),
            *(f"{row[key] * 1000:.2f}" for key in ("transfer_seconds", "weight_gradient_seconds")),
            ", ".join(f"{share:.2f}" for share in row["hidden_share_by_rank"]),
        ]
        for row in rows
    ]
    return f"## {case.title}\n\n{table(head, lines)}"


if __name__ == "__main__":
    main()
