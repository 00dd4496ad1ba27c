"""The tensor bytes of a rank as ring x ulysses grows with the tokens of a rank kept the same.

    python -m benchmarks.memory [--tokens 256] [--hidden 512] [--layers 2] [--worlds 2 4 8] [--zero 0 3] [--out F]

What the figures mean: docs/benchmarks.md.
"""

import argparse
import gc
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import RECORDS, Record, table
from seqloom.fabric import Fabric
from seqloom.fabric.launch import run_local
from seqloom.model import build_model, parallelize
from seqloom.plan import Plan, fit, read_config
from seqloom.planner import at_rest_bytes
from seqloom.sequence import Batch
from seqloom.tensor import local
from seqloom.train import adamw, apply_gradients, compute_gradients


class TensorBytes(TorchDispatchMode):
    """Counts the bytes behind all tensors after every operation, each storage once; `most` is the highest count.

    Also those that autograd keeps, and the storages that FSDP2 empties while tensors of them live on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.most = 0
        kinds = (Tensor, torch.nn.Parameter)
        self._note(x for x in gc.get_objects() if type(x) in kinds and x.device.type != "meta")

    def _note(self, tensors: Iterable[Any]) -> bool:
        """Watch the storages of these tensors, too; whether one is new."""
        new = False
        for x in tensors:
            if isinstance(x, Tensor) and x.device.type != "meta":
                storage = local(x).untyped_storage()
                if storage._cdata not in self._storages or self._storages[storage._cdata].expired():
                    self._storages[storage._cdata], new = StorageWeakRef(storage), True
        return new

    def now(self) -> int:
        """Bytes behind the tensors that live."""
        total = 0
        for key, weak in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(weak.cdata)
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count."""
        made = func(*args, **(kwargs or {}))
        if self._note(tree_leaves((made, args, kwargs))):
            self.most = max(self.most, self.now())
        return made


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure what the command line asks for, write the record, print its page; returns where the page is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=512, help="the model's hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--worlds", type=int, nargs="+", default=(2, 4, 8), help="ring x ulysses")
    parser.add_argument("--zero", type=int, nargs="+", default=(0, 3), choices=range(4))
    parser.add_argument("--out", type=Path, default=RECORDS, help="the folder of the record")
    asked = parser.parse_args(arguments)
    if asked.hidden % 64 or min(asked.worlds) < 2:
        parser.error("give a hidden size that is a multiple of 64, and worlds of two ranks or more")
    settings = {"tokens_per_rank": asked.tokens, "hidden": asked.hidden, "layers": asked.layers, "dtype": "float32"}
    record = Record("memory", settings, timed=False)
    for zero in asked.zero:
        for world in asked.worlds:
            for ring in (d for d in range(1, world + 1) if world % d == 0):
                plan = Plan(ring=ring, ulysses=world // ring, zero=zero)
                found = run_local(world, rank_bytes, str(plan), asked.tokens, asked.hidden, asked.layers)
                record.rows += [
                    {"plan": str(plan), "zero": zero, "world": world, "rank": r, **x} for r, x in enumerate(found)
                ]
    page = record.write(page_body(record.rows), asked.out)
    print(page.read_text(encoding="utf-8"))
    return page


def rank_bytes(text: str, tokens: int, hidden: int, layers: int) -> dict[str, int]:
    """What one rank holds: after backward, at most in a step, and its weights, gradients and moments by the formula."""
    torch.set_num_threads(1)
    gc.collect()
    before = TensorBytes().now()  # of whoever ran in this process
    fabric = Fabric.build(Plan.parse(text))
    num_tokens = tokens * fabric.plan.replicas
    settings = fit(read_config("llama"), Plan(), num_tokens)
    settings |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": hidden // 64}
    settings |= {"num_key_value_heads": hidden // 64, "head_dim": 64, "vocab_size": 512, "num_hidden_layers": layers}
    model = build_model(settings)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    parallelize(model, fabric)
    optimizer = adamw(model, fabric, learning_rate=1e-3, weight_decay=0.1)
    random = torch.Generator().manual_seed(0)
    batch = Batch.from_tokens(torch.randint(512, (1, num_tokens), generator=random), None)
    rest, counter = 0, TensorBytes()
    for counted in (False, True):  # the first step makes the moments
        gc.collect()
        counter = TensorBytes()  # anew, to see the moments too
        with counter if counted else nullcontext():
            report = compute_gradients(model, [batch], fabric, precision="float32", chunk_tokens=64)
        rest = TensorBytes().now() - before
        apply_gradients(model, optimizer, report, clip=1.0)
    formula = at_rest_bytes(fabric.plan, shapes, zero_rank=fabric.zero.rank)
    fabric.close()
    return {"rest_bytes": rest, "most_bytes": counter.most - before, "formula_bytes": formula.total}


def page_body(rows: Sequence[dict[str, Any]]) -> str:
    """A table of plans: the fullest rank in MiB, and what is left beside weights, gradients and moments."""
    lines: list[list[object]] = []
    for plan in dict.fromkeys(row["plan"] for row in rows):
        mine = [row for row in rows if row["plan"] == plan]
        most, rest, formula = (max(row[f"{name}_bytes"] for row in mine) for name in ("most", "rest", "formula"))
        lines.append([plan, *(f"{number / 2**20:,.2f}" for number in (most, rest, formula))])
    return table(["plan", "MiB at most in a step", "MiB after backward", "P + G + O by the formula"], lines)


if __name__ == "__main__":
    main()
