"""How evenly the layouts spread attention over heavy-tailed packed documents. No torch, exact integers.

    python -m benchmarks.balance [--tokens 65536] [--ranks 8] [--seeds 10] [--out F]

What the figures mean: docs/benchmarks.md.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.documents import MEDIAN, SIGMA, lengths
from benchmarks.record import RECORDS, Record, table
from seqloom import Layout, Mask
from seqloom.geometry import total

KINDS = ("balanced", "zigzag", "striped", "contiguous")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compute what the command line asks for, write the record, print its page; returns where the page is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of a row")
    parser.add_argument("--ranks", type=int, default=8, help="ring ranks")
    parser.add_argument("--seeds", type=int, default=10, help="how many rows of documents")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.seeds < 1 or asked.ranks < 1 or asked.tokens < 2 * asked.ranks:
        parser.error("give at least one seed, one rank and two tokens for each rank")
    settings = {"tokens": asked.tokens, "ranks": asked.ranks, "median": MEDIAN, "sigma": SIGMA}
    record = Record("balance", settings, timed=False)
    for seed in range(asked.seeds):
        record.rows += rows(asked.tokens, asked.ranks, seed)
    page = record.write(tables(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def rows(num_tokens: int, ring: int, seed: int) -> Iterator[dict[str, Any]]:
    """What each layout makes of one row of documents."""
    mask = Mask(documents=lengths(num_tokens, seed))
    for kind in KINDS:
        layout = Layout(kind, num_tokens, ring, masks=(mask,))
        tokens = [total(spans) for spans in layout.ring_spans]
        tiles = [
            sum(len(list(tile.pieces())) for keys in layout.ring_spans for tile in mask.tiles(queries, keys))
            for queries in layout.ring_spans
        ]
        yield {
            "seed": seed,
            "documents": len(mask.documents or ()),
            "layout": kind,
            "imbalance": layout.imbalance(mask),
            "work": list(layout.work(mask)),
            "tokens_spread": max(tokens) - min(tokens),
            "kernel_calls": max(tiles),
        }


def tables(found: Sequence[dict[str, Any]]) -> str:
    """Most work of any rank over the mean, row of documents by row of documents, and what it costs."""
    seeds = dict.fromkeys(row["seed"] for row in found)
    by = {(row["seed"], row["layout"]): row for row in found}
    lines: list[list[object]] = [
        [
            f"seed {seed}, {by[seed, KINDS[0]]['documents']} documents",
            *(f"{by[seed, k]['imbalance']:.3f}" for k in KINDS),
        ]
        for seed in seeds
    ]
    columns = {kind: [row for row in found if row["layout"] == kind] for kind in KINDS}
    lines += [
        ["mean", *(f"{mean(row['imbalance'] for row in columns[k]):.3f}" for k in KINDS)],
        ["worst", *(f"{max(row['imbalance'] for row in columns[k]):.3f}" for k in KINDS)],
        ["tokens, most - fewest", *(max(row["tokens_spread"] for row in columns[k]) for k in KINDS)],
        ["kernel calls of a rank, at most", *(max(row["kernel_calls"] for row in columns[k]) for k in KINDS)],
    ]
    return table(["attention work, most of any rank / mean", *KINDS], lines)


if __name__ == "__main__":
    main()
