"""What Megatron-style flags say of batches, ZeRO, recomputation and the schedule."""

from collections.abc import Mapping
from typing import Any

from seqloom.dialects.ledger import Ledger, as_whole, plain
from seqloom.dialects.megatron_deepspeed import agreed, schedule_of
from seqloom.dialects.megatron_options import SCHEDULE


def training(ledger: Ledger, data: int, length: int | None, pipeline: int) -> dict[str, Any]:
    """`train` of a translation."""
    ledger.mapped("train.sequence_length.", "--seq-length")
    micro = agreed(ledger, "--micro-batch-size", "train_micro_batch_size_per_gpu")
    asked = agreed(ledger, "--global-batch-size", "train_batch_size")
    times = agreed(ledger, None, "gradient_accumulation_steps")
    batch = asked or (micro * data * (times or 1) if micro else None)
    if micro and batch and times and micro * data * times != batch:
        ledger.refuse(
            "deepspeed_config.gradient_accumulation_steps",
            f"micro-batch {micro} x data {data} x gradient_accumulation_steps {times} is not the batch of {batch}; "
            "make them equal.",
        )
    ledger.mapped(f"Rows of a micro-batch on each of {data} data ranks.", "--micro-batch-size")
    ledger.mapped("train.batch.", "--global-batch-size")
    accumulate = None
    if micro and batch:
        accumulate = batch // (micro * data)
        if batch % (micro * data):
            ledger.refuse(
                "--global-batch-size",
                f"--global-batch-size {batch} is no multiple of --micro-batch-size {micro} x data {data} = "
                f"{micro * data}; "
                "use one.",
            )
    if micro and asked is None and times is None:
        ledger.note(
            "--global-batch-size", "mapped", f"Not said: micro-batch {micro} x data {data} = {batch}, as there."
        )
    ramp = _ramp_up(ledger, batch, (micro or 1) * data)
    inside = schedule_of(ledger)
    given = [name for name in SCHEDULE if name in ledger and not ledger.noted(name)]
    schedule = {SCHEDULE[name]: _number(ledger, name) for name in given} | inside
    if {"--lr-warmup-fraction", "--lr-warmup-iters"} <= set(ledger.given) and ledger.number("--lr-warmup-iters"):
        ledger.refuse(
            "--lr-warmup-iters", "--lr-warmup-iters and --lr-warmup-fraction are both given; leave one of them out."
        )
    return {
        "sequence_length": length,
        "micro_batch": micro,
        "accumulate": accumulate,
        "global_batch": batch,
        "ramp_up": ramp,
        "recompute": _recompute(ledger)[0],
        "precision": _precision(ledger),
        "schedule": schedule,
    }


def _number(ledger: Ledger, name: str) -> Any:
    """A value of the schedule as a number where it is one."""
    value = ledger.get(name)
    whole = as_whole(value)
    if whole is not None:
        ledger.mapped(f"train.schedule.{SCHEDULE[name]}.", name)
        return whole
    try:
        number: Any = plain(float(value))
    except (TypeError, ValueError):
        number = plain(value)
    ledger.mapped(f"train.schedule.{SCHEDULE[name]}.", name)
    return number


def _ramp_up(ledger: Ledger, batch: int | None, step: int) -> dict[str, int] | None:
    """--rampup-batch-size START INCREMENT SAMPLES."""
    name = "--rampup-batch-size"
    given = ledger.get(name)
    if given is None:
        return None
    numbers = [as_whole(each) for each in given] if isinstance(given, list) else []
    if len(numbers) != 3 or any(number is None or number < 1 for number in numbers):
        ledger.refuse(name, f"{name} takes three whole numbers above 0: START INCREMENT SAMPLES.")
        return None
    start, increment, samples = (number or 1 for number in numbers)
    if batch is None:
        ledger.refuse(name, f"{name} needs --global-batch-size, up to which the batch grows; give it.")
    elif start > batch or (batch - start) % increment:
        ledger.refuse(
            name,
            f"--global-batch-size {batch} is not reached from {start} in steps of {increment}; make the rest a "
            "multiple.",
        )
    elif start % step or increment % step:
        ledger.refuse(
            name,
            f"A batch of {start} that grows by {increment} is not always a multiple of micro-batch x data = {step}.",
        )
    elif "--train-iters" in ledger:
        ledger.changed(
            "Refused there beside --train-iters, since ramping up counts samples; here the steps after it count too.",
            name,
        )
    ledger.mapped(
        f"The batch grows from {start} by {increment} to {batch} over {samples:,} samples. Newest Megatron-LM "
        "parses it and "
        "ignores it; here it counts, as in the releases that scripts with it were written for.",
        name,
    )
    return {"start": start, "increment": increment, "samples": samples}


def _precision(ledger: Ledger) -> str:
    """The one that a flag or the DeepSpeed configuration switches on; several are refused, as there."""
    inside = "deepspeed_config.{}.enabled"
    on = [kind for kind in ("bf16", "fp16") if ledger.flag(f"--{kind}") or ledger.flag(inside.format(kind))]
    names = [name for kind in ("bf16", "fp16") for name in (f"--{kind}", inside.format(kind))]
    found = on[0] if on else "float32"
    if len(on) > 1:
        ledger.refuse(
            next(name for name in names[2:] if ledger.flag(name)), "bf16 and fp16 are both switched on; choose one."
        )
        return found
    for name in names:
        ledger.mapped(f"train.precision={found}." if ledger.flag(name) else "It is off.", name)
    return found


_OLD_FULL = ("--checkpoint-activations", "--deepspeed-activation-checkpointing", "--recompute-full")


_PARTITIONED = ("--distribute-saved-activations", "--distribute-checkpointed-activations")
_DEEPSPEED_KEPT = {
    "--partition-activations": "partitioned",
    "--checkpoint-in-cpu": "offloaded",
    "deepspeed_config.activation_checkpointing.partition_activations": "partitioned",
    "deepspeed_config.activation_checkpointing.cpu_checkpointing": "offloaded",
}
"""Where DeepSpeed keeps what recomputation starts from, if --deepspeed-activation-checkpointing is on."""


def recomputation(ledger: Ledger, fields: Mapping[str, Any]) -> dict[str, Any]:
    """recompute and activations of a plan whose degrees are `fields`, with their notes."""
    recompute, why = _recompute(ledger)
    verdict = "changed" if why.startswith("Megatron's selective") else "mapped"
    names = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-activations")
    ledger.each("changed" if verdict == "changed" else "mapped", why, (*names, *_OLD_FULL))
    ledger.no_effect(
        "It is for full recomputation in an older form, whole layers one at a time.", "--checkpoint-num-layers"
    )
    asked = [name for name in _PARTITIONED if ledger.flag(name)]
    if asked and recompute == "none":
        ledger.refuse(
            asked[0],
            f"{asked[0]} distributes what recomputation keeps, and there is none; ask for full recomputation.",
        )
    kept = dict.fromkeys(asked, "partitioned")
    for name, word in _DEEPSPEED_KEPT.items():
        if name not in ledger or not ledger.flag(name):
            ledger.no_effect("Off.", name)
        elif recompute == "none":
            ledger.no_effect("Nothing is computed again, so nothing is kept for it.", name)
        else:
            kept[name] = word
    return {"recompute": recompute} | _kept(ledger, fields, kept)


def _kept(ledger: Ledger, fields: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, Any]:
    """Where what recomputation starts from is kept, as each of the options asked for says."""
    whole = "There is one tensor rank." if fields.get("tensor", 1) == 1 else ""
    if not whole and (fields.get("sequence_parallel") or fields.get("tensor_kind", "1d") != "1d"):
        whole = "Tokens are split over the tensor ranks already."
    found = {"activations": "offloaded"} if "offloaded" in asked.values() else {}
    for name, word in asked.items():
        if word == "partitioned" and whole:
            ledger.no_effect(f"{whole} Each keeps its own part.", name)
        elif word == "partitioned" and found.get("activations") == "offloaded":
            ledger.changed("activations=offloaded, as another option asks: each rank's go to host memory whole.", name)
        else:
            found["activations"] = word
            ledger.mapped(f"activations={word}.", name)
    return found


def _recompute(ledger: Ledger) -> tuple[str, str]:
    """The word of a plan, and why."""
    granularity = ledger.word("--recompute-granularity", ("full", "selective"))
    if granularity == "full":
        method = ledger.word("--recompute-method", ("uniform", "block"), "uniform")
        layers = ledger.whole("--recompute-num-layers", 1, most=99_999)
        found = f"full:{method}:{layers}"
        return found, f"recompute={found}."
    if any(ledger.flag(name) for name in _OLD_FULL):
        return "full", "recompute=full: each layer is computed again in backward."
    if granularity == "selective" or ledger.flag("--recompute-activations"):
        return "none", (
            "Megatron's selective recomputes the matrix of scores in backward; seqloom's attention never keeps it, "
            "so this "
            "is recompute=none here (recompute=selective is the opposite: all but attention)."
        )
    return "none", "Without --recompute-granularity full there is nothing to do."
