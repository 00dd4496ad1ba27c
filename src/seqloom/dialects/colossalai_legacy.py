"""Colossal-AI's first configuration files: parallel = dict(pipeline=..., tensor=dict(size=..., mode=...))."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from seqloom.dialects.colossalai_options import close, said_version
from seqloom.dialects.colossalai_plugin import data_degree
from seqloom.dialects.context import axes
from seqloom.dialects.ledger import Ledger, Unread, flatten, shown
from seqloom.dialects.literals import Source
from seqloom.dialects.translation import Draft, Translation, conclude
from seqloom.errors import counted

MODES = ("1d", "2d", "2.5d", "3d", "sequence")
ORDER = ("tensor", "ulysses", "ring", "pipeline", "data")
"""Their rank order: data outermost, pipeline next."""


def settings(source: Source) -> dict[str, Any] | None:
    """The settings of a file by dotted name, None where it has no `parallel`.

    They are its top-level names, or the keys of a dict that is assigned there and holds `parallel`.
    """
    named = {name: source.value(value) for name, value in source.assignments()}
    doubt = {name: Unread(name, "it is changed after it is made, and no file is run here") for name in source.changed}
    for name, value in named.items():
        if isinstance(value, dict) and "parallel" in value:
            inner = dict.fromkeys(value, doubt[name]) if name in doubt else value
            named = {**{key: other for key, other in named.items() if other is not value}, **inner}
            break
    named |= {name: doubt[name] for name in named if name in doubt}
    return dict(flatten(named)) if "parallel" in named else None


def translate(
    given: Mapping[str, Any], *, world: int | None, keep_order: bool, version: str | None = None
) -> Translation:
    """The plan of such settings; `data` counts for nothing there, and is what is left of the world."""
    ledger = Ledger(given)
    said_version(ledger, version)
    if "parallel" in ledger and not isinstance(given["parallel"], Unread) and given["parallel"] not in (None, {}):
        ledger.refuse(
            "parallel", f"parallel is {shown(given['parallel'])}; write it as dict(pipeline=..., tensor=dict(...))."
        )
    ledger.get("parallel")
    pipeline = _pipeline(ledger)
    fields, size = _tensor(ledger)
    data = data_degree(ledger, world, size * pipeline, f"pipeline {pipeline} x tensor {size}")
    for name in ("parallel.data", "parallel.data.size"):
        ledger.no_effect(f"Their reader ignores it; data={data} is what pipeline and tensor leave of the world.", name)
    fields |= {"pipeline": pipeline, "data": data}
    if zero := [name for name in given if name.startswith("zero.")]:
        fields["zero"] = 3
        places = [name for name in zero if name.rpartition(".")[2] in ("tensor_placement_policy", "device")]
        if hosted := [name for name in places if given[name] in ("cpu", "auto")]:
            fields["offload"] = True
            ledger.changed(
                "offload=true: parameters, gradients and the optimizer's state wait in host memory.", *hosted
            )
        rest = [name for name in zero if name not in hosted]
        ledger.mapped("zero=3: their `zero` section shares out parameters too.", *rest)
    recompute = next((name for name in given if name.endswith("checkpoint") and given[name] is True), None)
    if recompute:
        fields["recompute"] = "full"
        ledger.mapped("recompute=full.", recompute)
    train = _train(ledger, data, "full" if recompute else "none")
    close(
        ledger, "Not read here: it enters neither the plan nor `train`, and what it changes there is not carried over."
    )
    return conclude(ledger, Draft(fields, None, train, ORDER), keep_order)


def _pipeline(ledger: Ledger) -> int:
    name = "parallel.pipeline.size" if "parallel.pipeline.size" in ledger else "parallel.pipeline"
    degree = ledger.whole(name)
    ledger.mapped(f"pipeline={degree}.", name)
    return degree


def _tensor(ledger: Ledger) -> tuple[dict[str, Any], int]:
    """The fields of the tensor section, and how many ranks it takes."""
    bare = ledger.get("parallel.tensor")
    if bare is not None and bare != {}:
        ledger.refuse(
            "parallel.tensor", f"parallel.tensor is {shown(bare)}, which fails there; write dict(size=..., mode=...)."
        )
    size = ledger.whole("parallel.tensor.size")
    mode = ledger.word("parallel.tensor.mode", MODES)
    depth = ledger.whole("parallel.tensor.depth")
    for name in [name for name in ledger.given if name.startswith("parallel.tensor.")]:
        if name.rpartition(".")[2] not in ("size", "mode", "depth"):
            ledger.refuse(name, f"{name} is no key of theirs; a tensor section has size, mode and, for 2.5d, depth.")
    if "parallel.tensor.depth" in ledger and mode != "2.5d":
        ledger.refuse("parallel.tensor.depth", f"depth belongs to mode 2.5d, not {mode}; leave it out.")
        return {}, size
    ledger.mapped(f"{counted(size, 'rank')}.", "parallel.tensor.size")
    if mode is None or (mode == "1d" and size == 1):
        ledger.mapped("No tensor parallelism.", "parallel.tensor.mode")
        if size > 1 and "parallel.tensor.mode" not in ledger:
            ledger.note("parallel.tensor.mode", "changed", "Not said: taken as 1d.")
        return {"tensor": size, "sequence_parallel": size == 1}, size
    if mode == "sequence":
        ledger.mapped(
            f"ring={size} exchange=rsa: ring self-attention, with whole weights on each rank.", "parallel.tensor.mode"
        )
        return axes(size, exchange="rsa", layout="contiguous"), size
    if mode == "1d":
        ledger.mapped("tensor_kind=1d without sequence parallelism.", "parallel.tensor.mode")
        return {"tensor": size, "sequence_parallel": False}, size
    return _grid(ledger, mode, size, depth), size


def _grid(ledger: Ledger, mode: str, size: int, depth: int) -> dict[str, Any]:
    """The fields of a grid, or a refusal with the equation that does not hold."""
    name = "parallel.tensor.size"
    if size == 1:
        ledger.mapped("One rank.", "parallel.tensor.mode", "parallel.tensor.depth")
        return {}
    if mode == "3d":
        side = round(size ** (1 / 3))
        if side**3 != size:
            ledger.refuse(
                name, f"3d takes size = q x q x q, and {size} is no cube; use {side**3} or {(side + 1) ** 3}."
            )
        ledger.mapped(f"{side} x {side} x {side}.", "parallel.tensor.mode")
        return {"tensor": size, "tensor_kind": "3d"}
    side = isqrt(size // depth)
    if side * side * depth != size:
        times = f" x depth {depth}" if mode == "2.5d" else ""
        ledger.refuse(
            name,
            f"{mode} takes size = q x q{times}, and {size} is not; use {max(1, side) ** 2 * depth} or "
            f"{(side + 1) ** 2 * depth}.",
        )
    ledger.mapped(
        f"{f'{depth} x ' if mode == '2.5d' else ''}{side} x {side}.", "parallel.tensor.mode", "parallel.tensor.depth"
    )
    if mode == "2.5d" and depth == 1:
        return {"tensor": size, "tensor_kind": "2.5d"}
    return {"tensor": size, "tensor_kind": mode, "depth": depth}


def _train(ledger: Ledger, data: int, recompute: str) -> dict[str, Any]:
    micros, steps = ledger.whole("NUM_MICRO_BATCHES"), ledger.whole("gradient_accumulation")
    ledger.mapped("Micro-batches that a batch is cut into.", "NUM_MICRO_BATCHES")
    ledger.mapped("Batches of a step.", "gradient_accumulation")
    batch = ledger.whole("BATCH_SIZE", 0) or None if "BATCH_SIZE" in ledger else None
    ledger.mapped(f"Rows of a batch on each of {data} data ranks.", "BATCH_SIZE")
    length = next((name for name in ("SEQ_LENGTH", "SEQ_LEN", "SEQUENCE_LENGTH") if name in ledger), "SEQ_LENGTH")
    tokens = ledger.whole(length, 0) or None if isinstance(ledger.given.get(length), int) else None
    ledger.mapped("train.sequence_length.", length)
    half = [name for name in ledger.given if name.partition(".")[0] == "fp16"]
    on = [name for name in half if not (name == "fp16" and ledger.given[name] in (None, False))]
    ledger.mapped("train.precision=fp16.", *on)
    ledger.no_effect("Off.", *half)
    schedule = {"clip": ledger.number("clip_grad_norm")} if ledger.given.get("clip_grad_norm") is not None else {}
    if ledger.given.get("seed") is not None:
        schedule["seed"] = ledger.whole("seed", least=0)
    if ledger.given.get("NUM_EPOCHS") is not None:
        schedule["epochs"] = ledger.whole("NUM_EPOCHS")
        ledger.mapped("train.schedule.epochs.", "NUM_EPOCHS")
    said = {"NUM_MICRO_BATCHES", "gradient_accumulation"} & set(ledger.given)
    return {
        "sequence_length": tokens,
        "micro_batch": max(1, batch // micros) if batch else None,
        "accumulate": micros * steps if said else None,
        "global_batch": batch * data * steps if batch else None,
        "ramp_up": None,
        "recompute": recompute,
        "precision": "fp16" if on else "float32",
        "schedule": schedule,
    }
