"""What Megatron-style flags say of batches, ZeRO, recomputation and the schedule."""

import json
from pathlib import Path
from typing import Any

from seqloom.dialects.flags import CommandLine
from seqloom.dialects.ledger import Ledger, as_whole, flatten, plain
from seqloom.dialects.megatron_options import SCHEDULE
from seqloom.errors import DialectError

CONFIG = "--deepspeed_config"


def training(ledger: Ledger, data: int, length: int | None, pipeline: int) -> dict[str, Any]:
    """`train` of a translation."""
    ledger.mapped("train.sequence_length.", "--seq-length")
    micro = ledger.whole("--micro-batch-size", 0) or None
    batch = ledger.whole("--global-batch-size", 0) or (micro * data if micro else None)
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
    if micro and "--global-batch-size" not in ledger:
        ledger.note(
            "--global-batch-size", "mapped", f"Not said: micro-batch {micro} x data {data} = {batch}, as there."
        )
    ramp = _ramp_up(ledger, batch, (micro or 1) * data)
    schedule = {key: _number(ledger, name) for name, key in SCHEDULE.items() if name in ledger}
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
    for name in ("--bf16", "--fp16"):
        if ledger.flag(name):
            ledger.mapped(f"train.precision={name[2:]}.", "--bf16", "--fp16")
            return name[2:]
    ledger.mapped("train.precision.", "deepspeed_config.bf16.enabled", "deepspeed_config.fp16.enabled")
    config = ledger.get("deepspeed_config.bf16.enabled"), ledger.get("deepspeed_config.fp16.enabled")
    return "bf16" if config[0] is True else "fp16" if config[1] is True else "float32"


_OLD_FULL = ("--checkpoint-activations", "--deepspeed-activation-checkpointing", "--recompute-full")


def recomputation(ledger: Ledger) -> dict[str, Any]:
    """recompute and activations of a plan, with their notes."""
    recompute, why = _recompute(ledger)
    verdict = "changed" if why.startswith("Megatron's selective") else "mapped"
    names = ("--recompute-granularity", "--recompute-method", "--recompute-num-layers", "--recompute-activations")
    ledger.each("changed" if verdict == "changed" else "mapped", why, (*names, *_OLD_FULL))
    ledger.no_effect(
        "It is for full recomputation in an older form, whole layers one at a time.", "--checkpoint-num-layers"
    )
    found: dict[str, Any] = {"recompute": recompute}
    for name in ("--distribute-saved-activations", "--distribute-checkpointed-activations"):
        if not ledger.flag(name):
            continue
        if recompute == "none":
            ledger.refuse(
                name, f"{name} distributes what recomputation keeps, and there is none; ask for full recomputation."
            )
        else:
            found["activations"] = "partitioned"
            ledger.mapped("activations=partitioned.", name)
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


def zero(ledger: Ledger, line: CommandLine, folder: Path | None) -> dict[str, Any]:
    """zero and offload of a plan."""
    _read_config(ledger, line, folder)
    stage, found = 0, {}
    if ledger.flag("--use-distributed-optimizer"):
        stage = 1
        ledger.mapped("zero=1: the optimizer's state is shared out over data x context.", "--use-distributed-optimizer")
    for name in ("--use-torch-fsdp2", "--use-megatron-fsdp", "--use-custom-fsdp"):
        if ledger.flag(name):
            strategies = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
            named = ledger.word("--data-parallel-sharding-strategy", tuple(strategies), "optim_grads_params")
            stage = strategies[named or "optim_grads_params"]
            ledger.mapped(f"zero={stage}.", name, "--data-parallel-sharding-strategy")
    if ledger.flag("--deepspeed"):
        stage = _deepspeed_stage(ledger)
    else:
        ledger.no_effect("It counts only with --deepspeed.", "--zero-stage", CONFIG)
    offload = ("--cpu-optimizer", "--optimizer-cpu-offload", "--offload-optimizer", "--cpu-offload")
    config = [name for name in ledger.given if name.startswith("deepspeed_config.") and name.endswith(".device")]
    if any(ledger.flag(name) for name in offload) or any(ledger.get(name) in ("cpu", "nvme") for name in config):
        found["offload"] = True
        ledger.changed(
            "offload=true: the optimizer's state waits in host memory, and so do parameters and gradients.",
            *offload,
            *config,
        )
    return {"zero": stage, **found}


def _deepspeed_stage(ledger: Ledger) -> int:
    """The stage of the JSON where it is there, since DeepSpeed reads it there; else --zero-stage."""
    inside, flag = "deepspeed_config.zero_optimization.stage", "--zero-stage"
    if inside in ledger:
        stage = ledger.whole(inside, 0, least=0, most=3)
        ledger.mapped(f"zero={stage}: DeepSpeed reads the stage here.", inside)
        given = ledger.number(flag)
        if flag in ledger and given != stage:
            ledger.note(flag, "no effect", f"The DeepSpeed configuration says stage {stage}, and that counts.")
        else:
            ledger.mapped("As in the DeepSpeed configuration.", flag)
        return stage
    given = ledger.number(flag, 1.0)
    if given not in (0, 1, 2, 3):
        ledger.refuse(flag, f"{flag} is {given}; it is 0, 1, 2 or 3.")
        return 0
    if flag not in ledger:
        ledger.note(flag, "mapped", "Not said: stage 1, the default of Megatron-DeepSpeed.")
    ledger.mapped(f"zero={int(given)}.", flag)
    return int(given)


def _read_config(ledger: Ledger, line: CommandLine, folder: Path | None) -> None:
    """Add the options of a DeepSpeed configuration, where it is there."""
    name = CONFIG if CONFIG in ledger else "--deepspeed-config"
    if name not in ledger:
        return
    path = ledger.get(name)
    text = line.files.get(path) if isinstance(path, str) else None
    if text is None and isinstance(path, str) and path:
        text = _text_of(path, folder)
    if text is None:
        ledger.note(
            name, "changed", "There is no such file here; --zero-stage counts, which DeepSpeed itself would not read."
        )
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        ledger.refuse(name, f"The DeepSpeed configuration {path} is not readable as JSON ({error}).")
        return
    if not isinstance(values, dict):
        ledger.refuse(name, f"The DeepSpeed configuration {path} holds no section; give a JSON object.")
        return
    ledger.note(name, "mapped", "Read as DeepSpeed would.")
    try:
        ledger.given |= dict(flatten({"deepspeed_config": values}))
    except DialectError as error:
        ledger.refuse(name, str(error))


def _text_of(path: str, folder: Path | None) -> str | None:
    """The text of a file that the settings name, None where it cannot be read."""
    try:
        file = Path(path) if Path(path).is_absolute() else (folder or Path()) / path
        if file.is_file() and file.stat().st_size < 1_000_000:
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    return None
