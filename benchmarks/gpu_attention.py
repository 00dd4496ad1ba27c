"""What a ring's loop costs beside one fused call, on one GPU; errors of its kernels; work on packed documents.

    python -m benchmarks.gpu_attention [--parts loops errors documents] [--tokens 8192 65536] [--repeats 5] [--out F]
    python -m benchmarks.gpu_attention --device cpu --tokens small      # runs all of the program, measures nothing

Without a GPU it writes a record that says 'not measured'. What the figures mean: docs/benchmarks.md.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.documents import lengths
from benchmarks.emulation import Loop, Sizes, seconds, whole
from benchmarks.record import RECORDS, Record, table
from seqloom import Layout, Mask
from seqloom.attention.kernels import Call, choose, kernels_for
from seqloom.geometry import Span

RANKS = 8
LAYOUTS = ("zigzag", "contiguous")
DEGREES = (2, 4, 8)  # of the rings whose errors are shown
PARTS = ("loops", "errors", "documents")
RESULTS = ("out", "dq", "dk", "dv")
FORWARD_PAIR, BACKWARD_PAIR = 4, 10  # floating point operations for each visible pair, head and unit of width


@dataclass(frozen=True)
class Scale:
    """Heads, width and type of the model measured, and how many tokens the parts take."""

    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    error_tokens: int
    document_tokens: int


FULL = Scale(32, 8, 128, torch.bfloat16, error_tokens=4096, document_tokens=65_536)
SMALL = Scale(4, 2, 16, torch.bfloat16, error_tokens=128, document_tokens=1024)
SMALL_TOKENS = 64


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    asked = parse(arguments)
    small = asked.tokens == ["small"]
    scale, tokens = (SMALL, [SMALL_TOKENS]) if small else (FULL, [int(number) for number in asked.tokens])
    sizes = Sizes(0, scale.heads, scale.kv_heads, scale.width, scale.dtype, asked.device)
    about = {"ranks": RANKS, "heads": scale.heads, "kv_heads": scale.kv_heads, "width": scale.width}
    here = asked.device == "cpu" or torch.cuda.is_available()
    settings = {**about, "tokens_per_rank": tokens, "repeats": asked.repeats}
    record = Record("gpu_attention", settings, timed=here)
    if not here:
        page = record.write("Not measured: there is no CUDA GPU here.", asked.out)
    else:
        page = record.write("Nothing measured yet.", asked.out)
        for rows in parts(asked, scale, sizes, tokens):
            record.rows += rows
            page = record.write(tables(record.rows), asked.out)  # what is measured stays if a later part fails
    print(page.read_text(encoding="utf-8"))
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--tokens", nargs="+", default=["8192", "65536"], help="tokens of a rank, or `small`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program, with small")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each, after one that warms up")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.tokens != ["small"] and not all(number.isdecimal() and int(number) >= RANKS for number in asked.tokens):
        parser.error(f"--tokens {' '.join(asked.tokens)}: give `small`, or numbers of at least {RANKS}")
    if asked.repeats < 1:
        parser.error(f"--repeats {asked.repeats} measures nothing; give 1 or more")
    return asked


def parts(
    asked: argparse.Namespace, scale: Scale, sizes: Sizes, tokens: Sequence[int]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each part, one after the other; a part that fails says so in a row of its own."""
    runs: list[tuple[str, str, Callable[[], list[dict[str, Any]]]]] = []
    if "loops" in asked.parts:
        for number in tokens:
            here = replace(sizes, num_tokens=number * RANKS)
            runs += [
                ("loops", f"{kind}, {number} tokens", partial(loops, here, kind, asked.repeats)) for kind in LAYOUTS
            ]
    if "errors" in asked.parts:
        runs.append(("errors", "all", partial(errors, replace(sizes, num_tokens=scale.error_tokens))))
    if "documents" in asked.parts:
        here = replace(sizes, num_tokens=scale.document_tokens)
        runs.append(("documents", "all", partial(documents, here, asked.repeats)))
    for part, what, run in runs:
        try:
            yield run()
        except RuntimeError as error:  # out of memory, a kernel that refuses: the other parts are still worth having
            yield [{"part": part, "what": what, "failed": str(error).splitlines()[0]}]
        if asked.device == "cuda":
            torch.cuda.empty_cache()


def fused_seconds(sizes: Sizes, repeats: int) -> tuple[str, list[float], list[float]]:
    """The kernel that the loops use, and how long its causal call on the whole sequence takes forward and backward.

    Where the kernel refuses so many elements at once, the heads are done in two or four calls; the name says so.
    """
    for calls in (1, 2, 4):
        try:
            name, taken = _by_calls(sizes, repeats, calls)
        except RuntimeError:
            if calls == 4:
                raise
            continue
        break
    ahead, back = ([sum(parts) for parts in zip(*each, strict=True)] for each in zip(*taken, strict=True))
    return name if calls == 1 else f"{name}, {calls} calls", ahead, back


def _by_calls(sizes: Sizes, repeats: int, calls: int) -> tuple[str, list[tuple[list[float], list[float]]]]:
    """The kernel's name, and what each of so many calls takes forward and backward, each on its part of the heads."""
    call, taken = Call(sizes.width**-0.5, causal=True), []
    for q, k, v, dout in zip(*(x.chunk(calls, 1) for x in sizes.tensors), strict=True):
        kernel = choose(q, v, call)
        ahead = seconds(partial(kernel.forward, q, k, v, call), sizes.device, repeats)
        final = kernel.forward(q, k, v, call)
        back = seconds(partial(kernel.backward, dout, q, k, v, *final, call), sizes.device, repeats)
        taken.append((ahead, back))
    return kernel.name, taken


def loop_seconds(loop: Loop, repeats: int) -> tuple[list[float], list[float]]:
    """How long one rank's loop takes forward and backward."""
    ahead = seconds(loop.forward, loop.sizes.device, repeats)
    return ahead, seconds(partial(loop.backward, loop.forward()), loop.sizes.device, repeats)


def loops(sizes: Sizes, kind: str, repeats: int) -> list[dict[str, Any]]:
    """Part (a): the slowest rank's loop against one fused call over the whole sequence divided by the ranks."""
    name, ahead, back = fused_seconds(sizes, repeats)
    layout = Layout(kind, sizes.num_tokens, RANKS)
    taken = [loop_seconds(Loop(sizes, layout, rank, Mask()), repeats) for rank in range(RANKS)]
    forward = [median(rank[0]) for rank in taken]
    both = [median(rank[0]) + median(rank[1]) for rank in taken]
    return [
        {
            "part": "loops",
            "layout": kind,
            "tokens_per_rank": sizes.num_tokens // RANKS,
            "kernel": name,
            "fused_forward_seconds": median(ahead),
            "fused_both_seconds": median(ahead) + median(back),
            "slowest_forward_seconds": max(forward),
            "slowest_both_seconds": max(both),
            "forward_share": median(ahead) / (RANKS * max(forward)),
            "both_share": (median(ahead) + median(back)) / (RANKS * max(both)),
            "bound": 1.0 if kind == "zigzag" else RANKS / (2 * RANKS - 1),
            "rounds": {"fused": [ahead, back], "ranks": taken},
        }
    ]


def errors(sizes: Sizes) -> list[dict[str, Any]]:
    """Part (b): |error| / |truth| of every kernel that runs here, and of rings of several degrees, against float64."""
    truth = exact(sizes)
    call = Call(sizes.width**-0.5, causal=True)
    q, k, v, dout = sizes.tensors
    rows = []
    for kernel in kernels_for(sizes.device):
        said: dict[str, Any] = {"part": "errors", "what": f"kernel {kernel.name}"}
        reason = kernel.absent(q.device) or kernel.lacks(call, q, v)
        try:
            if reason is None:
                out, lse = kernel.forward(q, k, v, call)
                said["errors"] = relative((out, *kernel.backward(dout, q, k, v, out.to(q.dtype), lse, call)), truth)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        rows.append(said if reason is None else {**said, "failed": reason})
    for degree in DEGREES:
        layout = Layout("zigzag", sizes.num_tokens, degree)
        found = whole([Loop(sizes, layout, rank, Mask()) for rank in range(degree)])
        rows.append({"part": "errors", "what": f"ring of {degree}", "errors": relative(found, truth)})
    return rows


def exact(sizes: Sizes) -> list[Tensor]:
    """out, dq, dk, dv in float64, by the definition, one group of heads after the other."""
    q, k, v, dout = (x.double() for x in sizes.tensors)
    n, group = sizes.num_tokens, sizes.heads // sizes.kv_heads
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    found: list[list[Tensor]] = []
    for head in range(sizes.kv_heads):
        mine = slice(head * group, (head + 1) * group)
        leaves = [x.detach().requires_grad_() for x in (q[:, mine], k[:, head : head + 1], v[:, head : head + 1])]
        scores = (leaves[0] @ leaves[1].transpose(-1, -2) * sizes.width**-0.5).masked_fill(hidden, float("-inf"))
        out = scores.softmax(-1) @ leaves[2]
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout[:, mine])])
    return [torch.cat(heads, 1) for heads in zip(*found, strict=True)]


def relative(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """|error| / |truth| of out, dq, dk and dv."""
    pairs = zip(RESULTS, found, truth, strict=True)
    return {name: float((x.double() - true).norm() / true.norm()) for name, x, true in pairs}


def documents(sizes: Sizes, repeats: int) -> list[dict[str, Any]]:
    """Part (c): which part of the fused causal call's rate goes into visible pairs of packed documents."""
    name, ahead, back = fused_seconds(sizes, repeats)
    mask, row_span = Mask(documents=lengths(sizes.num_tokens, seed=0)), Span(0, sizes.num_tokens)
    useful, everything = (each.area([row_span], [row_span]) for each in (mask, Mask()))

    def row(what: str, seconds_taken: float, pairs: int) -> dict[str, Any]:
        rate = everything / (median(ahead) + median(back))
        work = pairs * sizes.heads * sizes.width * (FORWARD_PAIR + BACKWARD_PAIR)
        return {
            "part": "documents",
            "what": what,
            "documents": len(mask.documents or ()),
            "kernel": name,
            "both_seconds": seconds_taken,
            "useful_tflops": work / seconds_taken / 1e12,
            "useful_share": pairs / seconds_taken / rate,
        }

    rows = [row("one causal call, documents not told apart", median(ahead) + median(back), useful)]
    for kind, ring in (("contiguous", 1), ("zigzag", RANKS), ("balanced", RANKS)):
        layout = Layout(kind, sizes.num_tokens, ring, masks=(mask,))
        taken = [loop_seconds(Loop(sizes, layout, rank, mask), repeats) for rank in range(ring)]
        slowest = max(median(rank[0]) + median(rank[1]) for rank in taken)
        what = "one rank, tile by tile" if ring == 1 else f"slowest of {ring} ranks, {kind}"
        rows.append(row(what, slowest, useful // ring))
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each part there are rows of."""
    shown = {"loops": _loops_table, "errors": _errors_table, "documents": _documents_table}
    by = {part: [row for row in rows if row["part"] == part] for part in shown}
    failed = [f"Failed: {row['part']}, {row['what']}: {row['failed']}" for row in rows if "failed" in row]
    good = {part: [row for row in mine if "failed" not in row] for part, mine in by.items()}
    return "\n\n".join([*(f"## {part}\n\n{shown[part](mine)}" for part, mine in good.items() if mine), *failed])


def _loops_table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["layout", "tokens a rank", "kernel", "fused / P ms", "slowest ms", "forward", "forward + backward", "bound"]
    lines = [
        [
            row["layout"],
            f"{row['tokens_per_rank']:,}",
            row["kernel"],
            f"{1000 * row['fused_both_seconds'] / RANKS:.2f}",
            f"{1000 * row['slowest_both_seconds']:.2f}",
            *(f"{row[key]:.3f}" for key in ("forward_share", "both_share", "bound")),
        ]
        for row in rows
    ]
    return table(head, lines)


def _errors_table(rows: Sequence[dict[str, Any]]) -> str:
    return table(["", *RESULTS], [[row["what"], *(f"{row['errors'][name]:.2e}" for name in RESULTS)] for row in rows])


def _documents_table(rows: Sequence[dict[str, Any]]) -> str:
    head = [f"{rows[0]['documents']} documents", "forward + backward ms", "useful TFLOP/s", "useful share"]
    keys = ("useful_tflops", "useful_share")
    return table(
        head, [[row["what"], f"{1000 * row['both_seconds']:.2f}", *(f"{row[k]:.3f}" for k in keys)] for row in rows]
    )


if __name__ == "__main__":
    main()
