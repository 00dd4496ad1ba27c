"""The memory that a mask takes on all ring ranks together, beside masks that are stored.

    python -m benchmarks.mask_memory [--tokens 8192 32768 131072] [--ranks 8] [--out F]

What the figures mean: docs/benchmarks.md.
"""

import argparse
import gc
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RECORDS, Record, table
from seqloom import Layout, Mask
from seqloom.fabric import Axis, Meter
from seqloom.geometry import even_bounds
from seqloom.sequence import SequenceShard

DOCUMENTS = (1, 4, 16, 64, 256)
COMPRESSED_BYTES = 2048 * 2048  # the fixed uint8 mask that fused kernels on other devices take
OTHERS = {"window 4,096": {"window": 4096}, "prefix 1,024": {"prefix": 1024}, "not causal": {"causal": False}}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=(8192, 32_768, 131_072), help="lengths of the row")
    parser.add_argument("--ranks", type=int, default=8, help="ring ranks, all of whose tiles are counted")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.ranks < 1 or min(asked.tokens) < max(2 * asked.ranks, *DOCUMENTS):
        parser.error(f"give at least one rank, and rows of {max(DOCUMENTS)} tokens and two for each rank")
    record = Record(
        "mask_memory", {"tokens": list(asked.tokens), "ranks": asked.ranks, "layout": "zigzag"}, timed=False
    )
    for num_tokens in asked.tokens:
        record.rows += rows(num_tokens, asked.ranks)
    page = record.write(page_body(record.rows, asked.ranks), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def rows(num_tokens: int, ranks: int) -> Iterator[dict[str, Any]]:
    """What each mask takes for one length."""
    masks = {
        f"{count} document{'s'[: count > 1]}": {"documents": even_lengths(num_tokens, count)} for count in DOCUMENTS
    }
    for name, rule in (masks | OTHERS).items():
        yield {"tokens": num_tokens, "mask": name, **measure(rule, num_tokens, ranks)}


def even_lengths(num_tokens: int, count: int) -> tuple[int, ...]:
    """So many documents of the same length, but for a token."""
    bounds = even_bounds(num_tokens, count)
    return tuple(stop - start for start, stop in pairwise(bounds))


def measure(rule: dict[str, Any], num_tokens: int, ranks: int) -> dict[str, int]:
    """Bytes that stay in Python's objects, the most there were of them, and bytes in tensors; all ranks together."""
    shards_of({}, 2 * ranks, ranks)  # what a first call imports and caches is no mask
    gc.collect()
    gc.freeze()  # from here on the collector lists new objects only
    tracemalloc.start()
    shards = shards_of(rule, num_tokens, ranks)
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensors = tensor_bytes()
    gc.unfreeze()
    tiles = sum(len(group.tiles) for shard in shards for owner in shard.work() for group in owner)
    return {"python_bytes": kept, "python_peak_bytes": peak, "tensor_bytes": tensors, "tiles": tiles}


def shards_of(rule: dict[str, Any], num_tokens: int, ranks: int) -> list[SequenceShard]:
    """The shard of every ring rank, each with the mask of its own and its tiles cut."""
    shards = []
    for rank in range(ranks):
        ring, alone = Axis("ring", rank, ranks, None, Meter()), Axis("alone", 0, 1, None, Meter())
        layout = Layout("zigzag", num_tokens, ranks)
        shards.append(SequenceShard((Mask(**rule),), layout, ring, alone, ring, alone, "ring"))
        shards[-1].work()
    return shards


def tensor_bytes() -> int:
    """What the tensors that the collector lists hold, each storage once."""
    kinds = (torch.Tensor, torch.nn.Parameter)  # not those of shapes alone, which libraries keep
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in kinds and x.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def page_body(found: Sequence[dict[str, Any]], ranks: int) -> str:
    """A table of masks by lengths, in KiB for all ranks together."""
    lengths = list(dict.fromkeys(row["tokens"] for row in found))
    by = {(row["mask"], row["tokens"]): row for row in found}
    lines: list[list[object]] = []
    for name in dict.fromkeys(row["mask"] for row in found):
        mine = [by[name, tokens] for tokens in lengths]
        lines.append(
            [name, *(f"{(row['python_bytes'] + row['tensor_bytes']) / 1024:,.0f}" for row in mine), mine[-1]["tiles"]]
        )
    lines += [
        ["dense uint8 mask, one copy", *(f"{tokens**2 // 1024:,}" for tokens in lengths), None],
        ["2,048 x 2,048 compressed mask, one copy", *[f"{COMPRESSED_BYTES // 1024:,}"] * len(lengths), None],
    ]
    head = [f"KiB, {ranks} ranks together", *(f"{tokens:,} tokens" for tokens in lengths), "tiles"]
    return table(head, lines)


if __name__ == "__main__":
    main()
