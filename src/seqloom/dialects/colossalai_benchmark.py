"""Command lines of Colossal-AI's benchmark and training programs."""

from typing import Any

from seqloom.dialects.colossalai_gemini import gemini
from seqloom.dialects.colossalai_options import close, said_version
from seqloom.dialects.colossalai_plugin import hybrid
from seqloom.dialects.flags import CommandLine, said_world
from seqloom.dialects.ledger import Ledger
from seqloom.dialects.megatron_options import LAYOUT
from seqloom.dialects.models import by_name
from seqloom.dialects.translation import Draft, Translation, conclude
from seqloom.errors import DialectError

_SHORT = {
    "-c": "--config",
    "-p": "--plugin",
    "-b": "--batch_size",
    "-l": "--max_length",
    "-g": "--grad_checkpoint",
    "--use_grad_checkpoint": "--grad_checkpoint",
    "--max_len": "--max_length",
    "--micro_batch_size": "--batch_size",
    "--num_epochs": "--max_epochs",
}
_PLUGIN = {
    "tp_size": ("--tp",),
    "pp_size": ("--pp",),
    "sp_size": ("--sp",),
    "ep_size": ("--ep",),
    "zero_stage": ("--zero", "--zero_stage"),
    "pp_style": ("--pp_style",),
    "num_model_chunks": ("--n_chunks",),
    "microbatch_size": ("--mbs", "--microbatch_size"),
    "sequence_parallelism_mode": ("--sp_mode",),
    "extra_dp_size": ("--extra_dp",),
    "shard_param_frac": ("--shard_param_frac",),
    "offload_optim_frac": ("--offload_optim_frac",),
    "offload_param_frac": ("--offload_param_frac",),
    "precision": ("--mixed_precision",),
}
"""Arguments of the plugin, and the flags that give them."""

PLUGINS = ("gemini", "gemini_auto", "fsdp", "fsdp_cpu", "3d", "3d_cpu", "moe", "zero2", "zero2_cpu", "ddp")


def translate(
    line: CommandLine, *, world: int | None, version: str | None, keep_order: bool, title: str
) -> Translation:
    """The plan of a command line such as `benchmark.py -p 3d --tp 4`."""
    long = {_SHORT.get(name, name): value for name, value in line.options.items()}
    outer = Ledger(long)
    said_version(outer, version)
    program = line.program or title
    _no_other_system(outer)
    moe = "--ep" in long or any(word in program for word in ("deepseek", "mixtral"))
    plugin = outer.word("--plugin", PLUGINS, "3d" if moe else "gemini") or "3d"
    outer.mapped(f"The {plugin} plugin.", "--plugin")
    if "--plugin" not in long:
        outer.note("--plugin", "mapped", f"Not said: {plugin}, the program's default.")
    if "3d" in plugin or plugin == "moe":
        outer.no_effect(
            "It is for the gemini plugin.",
            "--shard_param_frac",
            "--offload_optim_frac",
            "--offload_param_frac",
            "--extra_dp",
        )
    if world is None and line.world is not None:
        verdict, why = said_world(line)
        outer.note("world", verdict, why, value=line.world)
    world = world if world is not None else line.world
    inner = Ledger(_arguments(outer, long, plugin, moe))
    draft = _draft(inner, plugin, world, version, moe)
    for note in inner.notes:
        flag = next((flag for flag in _PLUGIN.get(note.option, ()) if flag in long), note.option)
        outer.note(flag, note.verdict, note.why, value=note.value)
    outer.reasons += inner.reasons
    model = _finish(outer, draft, program, moe)
    close(outer)
    for name, value in line.launcher.items():
        outer.note(name, "no effect", "It is the launcher's.", value=getattr(value, "text", value))
    for other in line.others:
        outer.note(other, "no effect", "A program that the script starts without a launcher; its flags are not read.")
    for word in line.stray:
        outer.note(word, "no effect", "A word that belongs to no option.", value=word)
    for name, value in line.unused.items():
        outer.note(name, "no effect", "Set in the script, and not among the program's flags.", value=value)
    return conclude(outer, Draft(draft.plan, model, draft.train, draft.order, draft.peculiar), keep_order)


def _no_other_system(outer: Ledger) -> None:
    """Refuse the flags of Megatron-LM, none of which a program of Colossal-AI has."""
    if theirs := [name for name in LAYOUT if name in outer and name not in ("--zero-stage",)]:
        raise DialectError(f"{theirs[0]} is a flag of Megatron-LM and its kin; use `seqloom translate megatron`.")


def _draft(inner: Ledger, plugin: str, world: int | None, version: str | None, moe: bool) -> Draft:
    if plugin.startswith("gemini"):
        return gemini(inner, world)
    draft = hybrid(inner, world, version, moe=moe or plugin == "moe")
    if plugin.startswith("fsdp"):
        draft = Draft({**draft.plan, "zero": 3, "offload": plugin.endswith("cpu")}, None, draft.train)
    return draft


def _arguments(outer: Ledger, long: dict[str, Any], plugin: str, moe: bool) -> dict[str, Any]:
    """What the program hands to the plugin."""
    found: dict[str, Any] = {"tp_size": 1, "pp_size": 1, "precision": "bf16"}
    if plugin in ("zero2", "zero2_cpu", "ddp") or plugin.startswith("fsdp"):
        outer.no_effect(f"The {plugin} plugin takes none.", *(f for flags in _PLUGIN.values() for f in flags))
        return {**found, "zero_stage": 2 if plugin.startswith("zero2") else 0, "cpu_offload": plugin.endswith("_cpu")}
    for argument, flags in _PLUGIN.items():
        for flag in flags:
            if flag in long:
                found[argument] = long[flag]
    if plugin.startswith("gemini"):
        found = {
            name: value
            for name, value in found.items()
            if name not in ("pp_size", "sp_size", "sequence_parallelism_mode")
        }
        found["enable_tensor_parallelism"] = True
        if plugin == "gemini_auto":
            found["placement_policy"] = "auto"
        outer.no_effect(
            "The gemini plugin takes none.", "--pp", "--sp", "--sp_mode", "--zero", "--pp_style", "--n_chunks", "--mbs"
        )
        return {
            name: value
            for name, value in found.items()
            if name not in ("pp_style", "num_model_chunks", "zero_stage", "microbatch_size")
        }
    found.setdefault("sp_size", 1)
    found.setdefault("microbatch_size", 1)
    if moe:
        found.setdefault("ep_size", 1)
        found.setdefault("zero_stage", 1)
    asked = outer.flag("--enable_sequence_parallelism")
    if asked or outer.whole("--sp") > 1:
        found |= {"enable_sequence_parallelism": True}
        found.setdefault("sequence_parallelism_mode", "all_to_all")
    elif "--sp_mode" in long:
        why = "The program turns sequence parallelism on only where --sp is above 1; it stays off."
        outer.note("--sp_mode", "no effect", why)
    outer.mapped("On.", "--enable_sequence_parallelism")
    if plugin == "3d_cpu":
        found["cpu_offload"] = True
    return found


_DEFAULTS: dict[str, Any] = {"--config": "7b", "--batch_size": 2, "--max_length": 4096}
"""What Llama's benchmark takes where nothing is said; those of the MoE models differ in two."""


def _defaults(outer: Ledger, program: str, moe: bool) -> dict[str, Any]:
    """What the benchmark program takes where nothing is said; nothing for any other program."""
    if program.rpartition("/")[2] != "benchmark.py":
        return {}
    found = {name: value for name, value in _DEFAULTS.items() if name not in outer}
    found |= {name: value for name, value in (("--config", "100m"), ("--batch_size", 1)) if moe and name in found}
    for name, value in found.items():
        outer.note(name, "mapped", f"Not said: {value}, the program's default.", value=value)
    return found


def _schedule(outer: Ledger, train: dict[str, Any], tensor: int) -> None:
    """What training programs say beside the plugin: rates, accumulation, adapters."""
    flags = {"--lr": "learning_rate", "--weight_decay": "weight_decay", "--grad_clip": "clip", "--max_epochs": "epochs"}
    for flag, key in flags.items():
        if (value := outer.number(flag)) is not None:
            train["schedule"][key] = int(value) if key == "epochs" else value
            outer.mapped(f"train.schedule.{key}.", flag)
    for flag in ("--lora_rank", "--enable_lora"):
        on = bool(outer.get(flag)) and str(outer.get(flag)) not in ("0", "false", "False")
        if on and tensor > 1:
            outer.refuse(flag, f"LoRA with a tensor degree of {tensor} is refused there; use --tp 1.")
        outer.each(
            "changed" if on else "no effect",
            "There are no adapters; all weights are trained." if on else "Off.",
            (flag,),
        )


def _finish(outer: Ledger, draft: Draft, program: str, moe: bool) -> dict[str, Any] | None:
    """Batch, length and model."""
    data, train = draft.plan["data"], draft.train
    taken = _defaults(outer, program, moe)
    _schedule(outer, train, draft.plan.get("tensor", 1))
    batch = taken.get("--batch_size") or outer.whole("--batch_size", 0) or None
    train["sequence_length"] = taken.get("--max_length") or outer.whole("--max_length", 0) or None
    outer.mapped("train.sequence_length.", "--max_length")
    if batch:
        micro = train.get("micro_batch") if draft.plan.get("pipeline", 1) > 1 else None
        train["micro_batch"], train["accumulate"] = micro or batch, max(1, batch // (micro or batch))
        several = outer.whole("--accumulation_steps")
        train["accumulate"] *= several
        train["global_batch"] = batch * data * several
        outer.mapped(f"Rows on each of {data} data ranks: a batch of {batch * data * several}.", "--batch_size")
        outer.mapped("Micro-batches of a step.", "--accumulation_steps")
    if outer.flag("--grad_checkpoint"):
        train["recompute"] = "full"
        draft.plan["recompute"] = "full"  # type: ignore[index]
        outer.mapped("recompute=full.", "--grad_checkpoint")
    if outer.flag("--custom-ckpt"):
        outer.changed(
            "Their numbers of recomputed layers are of one model on four stages; write recompute= and stages=.",
            "--custom-ckpt",
        )
    value = taken.get("--config") or outer.get("--config")
    name = value if isinstance(value, str) else None
    family = "deepseek" if "deepseek" in program else "mixtral" if "mixtral" in program else "llama2"
    found = by_name(name or "") or by_name(f"{family}-{name}") if name else None
    if found:
        outer.mapped(f"Known as {found[0]}.", "--config")
        return found[1]
    if name:
        outer.note("--config", "changed", "Not a model that is known here; give its configuration.", value=name)
    return None
