"""ZeRO as Megatron-style flags and a DeepSpeed configuration beside them say it, and what else that file holds."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqloom.dialects.deepspeed_schedule import optimizer, scheduler
from seqloom.dialects.flags import CommandLine
from seqloom.dialects.ledger import Ledger, Unread, Verdict, flatten
from seqloom.errors import DialectError, counted

CONFIG = "--deepspeed_config"
_INSIDE = "deepspeed_config."
_HARMLESS = re.compile(
    r"steps_per_print|wall_clock_breakdown|dump_state|memory_breakdown|.*bucket_size|zero_allow_untested_optimizer|"
    r"activation_checkpointing\.(number_checkpoints|contiguous_memory_optimization|synchronize_checkpoint_boundary|"
    r"profile)|"
    r"(tensorboard|wandb|csv_monitor|comms_logger|flops_profiler)\b.*|"
    r"zero_optimization\.(overlap_comm|contiguous_gradients|reduce_scatter|allgather_partitions|round_robin_gradients|"
    r"sub_group_size|stage3_.*|offload_(param|optimizer)\..*)"
)


def agreed(ledger: Ledger, flag: str | None, inside: str) -> int | None:
    """The whole number of a flag and of the DeepSpeed configuration, which must be the same."""
    name = _INSIDE + inside
    given = ledger.whole(flag, 0) or None if flag else None
    if name not in ledger or ledger.get(name) == "auto":
        return given
    found = ledger.whole(name)
    if flag and given not in (None, found):
        ledger.refuse(name, f"{inside} {found} of the DeepSpeed configuration is not {flag} {given}; make them equal.")
    ledger.mapped("It enters the batch.", name)
    return found


def schedule_of(ledger: Ledger) -> dict[str, Any]:
    """What the DeepSpeed configuration says of `train.schedule`."""
    found = optimizer(ledger)
    found |= scheduler(ledger, found.get("learning_rate"))
    clip, power = _INSIDE + "gradient_clipping", _INSIDE + "fp16.initial_scale_power"
    if ledger.given.get(clip) == "auto":
        ledger.changed("Left to the program, which is not read; --clip-grad counts.", clip)
    elif clip in ledger and (value := ledger.number(clip)) is not None:
        found["clip"] = value
        ledger.mapped("train.schedule.clip: DeepSpeed clips by this.", clip)
        if "--clip-grad" in ledger and ledger.number("--clip-grad") != value:
            ledger.no_effect(f"The DeepSpeed configuration clips at {value}, and that counts.", "--clip-grad")
    elif _is_read(ledger) and clip not in ledger:
        found["clip"] = 0.0
        ledger.note(clip, "mapped", "Not said: DeepSpeed does not clip.")
        ledger.no_effect("DeepSpeed clips by gradient_clipping of its configuration, and none is said.", "--clip-grad")
    if power in ledger:
        found["initial_loss_scale"] = 2 ** ledger.whole(power, 16, least=0, most=64)
        ledger.mapped("train.schedule.initial_loss_scale.", power)
    if (window := _INSIDE + "fp16.loss_scale_window") in ledger:
        found["loss_scale_window"] = ledger.whole(window)
        ledger.mapped("train.schedule.loss_scale_window.", window)
    if ledger.given.get(scale := _INSIDE + "fp16.loss_scale") == 0:
        ledger.mapped("A scale that grows and shrinks, as here.", scale)
    return found


def unread(name: str) -> tuple[Verdict, str]:
    """The verdict and reason of an option that nothing has read."""
    inside = name.removeprefix(_INSIDE)
    if inside != name and _HARMLESS.fullmatch(inside):
        return "no effect", "It is DeepSpeed's own memory, messages or reports; the result is the same."
    return "changed", "Not read here: it does not enter the plan, and what it changes there is not carried over."


def zero(ledger: Ledger, fields: Mapping[str, Any]) -> dict[str, Any]:
    """zero, its groups and offload of a plan whose degrees are `fields`."""
    stage, found = 0, {}
    if ledger.flag("--deepspeed"):
        ledger.no_effect("With --deepspeed the ZeRO stage of DeepSpeed counts.", "--use-distributed-optimizer")
    elif ledger.flag("--use-distributed-optimizer"):
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
    devices = [name for name in ledger.given if name.startswith(_INSIDE) and name.endswith(".device")]
    config = [name for name in devices if ledger.get(name) in ("cpu", "nvme")]
    if any(ledger.flag(name) for name in offload) or config:
        found["offload"] = True
        ledger.changed(
            "offload=true: the optimizer's state waits in host memory, and so do parameters and gradients.",
            *(name for name in offload if ledger.flag(name)),
            *config,
        )
    ledger.no_effect("Nothing waits there.", *(name for name in devices if name not in config))
    found |= _groups(ledger, fields, stage)
    return {"zero": stage, **found}


def _groups(ledger: Ledger, fields: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """Groups that repeat the shares: MiCS, or several instances of the distributed optimizer."""
    ranks = fields.get("data", 1) * fields.get("ring", 1) * fields.get("ulysses", 1)
    shard, instances = _INSIDE + "zero_optimization.mics_shard_size", "--num-distributed-optimizer-instances"
    name = shard if shard in ledger and ledger.get(shard) != -1 else instances
    if name not in ledger or not stage:
        ledger.no_effect("Nothing is shared out, or among all.", shard, instances)
        return {}
    given = ledger.whole(name)
    if ranks % given:
        ledger.refuse(
            name, f"{name} {given} does not divide {counted(ranks, 'rank')} that share; use a divisor of {ranks}."
        )
        return {}
    groups = ranks // given if name == shard else given
    ledger.mapped(f"zero_replicas={groups}: groups that repeat the shares.", name)
    return {"zero_replicas": groups}


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
    if _is_read(ledger):
        ledger.note(inside, "mapped", "Not said: stage 0, DeepSpeed's default.")
        ledger.changed("The DeepSpeed configuration counts, and it names no stage: 0, its default.", flag)
        return 0
    given = ledger.number(flag, 1.0)
    if given not in (0, 1, 2, 3):
        ledger.refuse(flag, f"{flag} is {given}; it is 0, 1, 2 or 3.")
        return 0
    if flag not in ledger:
        ledger.note(flag, "mapped", "Not said: stage 1, the default of Megatron-DeepSpeed.")
    ledger.mapped(f"zero={int(given)}.", flag)
    return int(given)


def read_config(ledger: Ledger, line: CommandLine, folder: Path | None) -> None:
    """Add the options of a DeepSpeed configuration, where it is there."""
    name = CONFIG if CONFIG in ledger else "--deepspeed-config"
    if name not in ledger or not ledger.flag("--deepspeed"):
        return
    given = ledger.given[name]
    path = given.text if isinstance(given, Unread) and given.text in line.files else ledger.get(name)
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


def _is_read(ledger: Ledger) -> bool:
    """Whether a DeepSpeed configuration was there."""
    return any(name.partition(".")[0] == "deepspeed_config" for name in ledger.given)


def _text_of(path: str, folder: Path | None) -> str | None:
    """The text of a file that the settings name, None where it cannot be read."""
    try:
        file = Path(path) if Path(path).is_absolute() else (folder or Path()) / path
        if file.is_file() and file.stat().st_size < 1_000_000:
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    return None
