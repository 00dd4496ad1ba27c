"""MindFormers' newer YAML: the `parallelism` section."""

from typing import Any

from seqloom.dialects.context import axes
from seqloom.dialects.ledger import Ledger
from seqloom.dialects.mindformers_pipeline import newer_schedule
from seqloom.dialects.translation import MOST_RANKS
from seqloom.errors import counted

METHODS = ("colossal", "ulysses", "hybrid")
_P = "parallelism."


def pynative(ledger: Ledger, world: int | None) -> dict[str, Any]:
    """Fields of a plan by `parallelism`; data parallelism is what is left of the world unless it is said."""
    tensor = ledger.whole(_first(ledger, "tensor_parallel", "tensor_parallel_degree"), most=MOST_RANKS)
    pipeline = ledger.whole(_first(ledger, "pipeline_parallel", "pipeline_parallel_degree"), most=MOST_RANKS)
    context = ledger.whole(_P + "context_parallel", most=MOST_RANKS)
    ledger.mapped(f"tensor={tensor}.", _first(ledger, "tensor_parallel", "tensor_parallel_degree"))
    ledger.mapped(f"pipeline={pipeline}.", _first(ledger, "pipeline_parallel", "pipeline_parallel_degree"))
    ledger.mapped(
        f"{context} ranks share a sequence." if context > 1 else "Each sequence is whole.", _P + "context_parallel"
    )
    data = _data(ledger, world, tensor * pipeline * context)
    fields: dict[str, Any] = {"data": data, "tensor": tensor, "pipeline": pipeline} | _context(ledger, context)
    fields |= newer_schedule(ledger, pipeline)
    fields["sequence_parallel"] = True
    _sequence_parallel(ledger, tensor)
    fields["zero"] = 3 if data * context > 1 else 0
    if ledger.flag(_P + "cpu_offload"):
        fields["offload"] = True
    ledger.each(
        "changed" if "offload" in fields else "mapped",
        _OFFLOAD if "offload" in fields else "Off.",
        (_P + "cpu_offload",),
    )
    if _P + "data_parallel_shard" not in ledger and fields["zero"]:
        why = "data_parallel_shard is not said: -1, their default, shares parameters out over data x context."
        ledger.note("zero", "mapped", f"zero=3: {why}")
    fields["zero_replicas"] = ledger.whole(_P + "data_parallel_replicate") if fields["zero"] else 1
    expert = ledger.whole(_P + "expert_parallel")
    ledger.mapped(f"expert={expert}.", _P + "expert_parallel")
    if expert > 1:
        ranks = data * context * tensor
        if ranks % expert:
            ledger.refuse(
                _P + "expert_parallel",
                f"expert_parallel {expert} does not divide {counted(ranks, 'rank')}; use a divisor.",
            )
        fields |= {"expert": expert, "expert_tensor": 1}
    return fields


_OFFLOAD = "offload=true: parameters, gradients and the optimizer's state wait in host memory."


def _sequence_parallel(ledger: Ledger, tensor: int) -> None:
    """Nothing reads their switch: tensor parallelism alone brings it."""
    name = _P + "sequence_parallel"
    if tensor == 1:
        ledger.no_effect("There is one tensor rank.", name)
    elif name in ledger and ledger.flag(name):
        ledger.mapped("sequence_parallel=true.", name)
    else:
        why = "Nothing there reads it: tensor_parallel above 1 splits tokens between its linears, and so it is here."
        ledger.changed(why, name)


def _first(ledger: Ledger, *names: str) -> str:
    return next((_P + name for name in names if _P + name in ledger), _P + names[0])


def _data(ledger: Ledger, world: int | None, size: int) -> int:
    """data_parallel_shard x data_parallel_replicate; -1 is what is left of the world."""
    shard, repeat = _P + "data_parallel_shard", _P + "data_parallel_replicate"
    asked = ledger.whole(shard, -1, least=-1)
    times = ledger.whole(repeat)
    if asked == 0:
        ledger.refuse(shard, "data_parallel_shard is 0; it is -1 for what is left of the world, or 1 or more.")
    given = asked if asked > 0 else 0
    ledger.mapped("zero=3 over data_parallel_shard x context_parallel.", shard)
    ledger.mapped(f"zero_replicas={times}: groups that repeat the shards.", repeat)
    if given:
        product = given * times * size
        if world is not None and world != product:
            ledger.refuse(
                "device_num",
                f"device_num {world} must be data {given * times} x tensor x pipeline x context {size} = "
                f"{product}; change one.",
            )
        return given * times
    if world is None:
        ledger.note(
            "device_num",
            "changed",
            f"The file does not say how many processes there are; taken as {size * times}. Give --world.",
        )
        return times
    if world % (size * times):
        said = "tensor x pipeline x context" + (" x data_parallel_replicate" if times > 1 else "")
        lower = max(1, world // (size * times)) * size * times
        ledger.refuse("device_num", f"device_num {world} is no multiple of {said} = {size * times}; use {lower}.")
    return max(1, world // (size * times)) * times


def _context(ledger: Ledger, context: int) -> dict[str, Any]:
    name, degree = _P + "context_parallel_method", _P + "ulysses_degree_in_cp"
    method = ledger.word(name, METHODS, "colossal")
    ledger.no_effect("It overlaps communication; the result is the same.", _P + "context_parallel_async")
    if context == 1:
        ledger.no_effect("context_parallel is 1.", name, degree)
        return axes()
    given = ledger.whole(degree, 0)
    if method == "ulysses":
        if given not in (0, context):
            ledger.refuse(
                degree,
                f"ulysses_degree_in_cp {given} must be context_parallel {context} with the method ulysses; leave "
                "it out.",
            )
        found = axes(1, context)
    elif method == "hybrid":
        if given == 0:
            ledger.refuse(
                name,
                "The method hybrid needs ulysses_degree_in_cp, and it is not said; give a divisor of "
                f"context_parallel {context}.",
            )
            return axes(context)
        if context % given:
            ledger.refuse(
                degree,
                f"context_parallel {context} is not divisible by ulysses_degree_in_cp {given}; use a divisor of "
                f"{context}.",
            )
            return axes(context)
        if given in (1, context):
            ledger.note(degree, "changed", "Refused there, where it lies between 1 and context_parallel.")
        found = axes(context // given, given, exchange="gather", layout="contiguous")
    else:
        ledger.no_effect("It is for the method hybrid.", degree)
        found = axes(context, exchange="gather", layout="contiguous")
    ledger.note(
        name, "mapped", f"ulysses {found['ulysses']} x {found['ring']} outer ranks, which gather keys and values."
    )
    ledger.mapped(f"ulysses={found['ulysses']}.", degree)
    return found
