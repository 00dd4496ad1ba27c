"""Megatron-LM, MindSpeed, AscendSpeed and Megatron-DeepSpeed: launch flags as a plan."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seqloom.dialects.context import check_heads
from seqloom.dialects.flags import CommandLine, from_text, from_words, said_world
from seqloom.dialects.ledger import Ledger, Verdict, as_whole, shown
from seqloom.dialects.megatron_context import context_axes, sequence_ranks
from seqloom.dialects.megatron_deepspeed import read_config, unread, zero
from seqloom.dialects.megatron_model import model_of
from seqloom.dialects.megatron_options import LAYOUT, untouched
from seqloom.dialects.megatron_train import recomputation, training
from seqloom.dialects.translation import OURS, Draft, Translation, conclude
from seqloom.errors import DialectError, counted


def translate(
    settings: str | Sequence[str],
    *,
    world: int | None = None,
    version: str | None = None,
    keep_order: bool = False,
    folder: Path | None = None,
    title: str = "",
) -> Translation:
    """The plan of a launch script, a string of flags or a list of them.

    version: `core_r0.8.0` and the like of MindSpeed, or `megatron-lm`; it decides what context parallelism
    without a named algorithm is. folder: where a DeepSpeed configuration that is named may lie. title: the
    script's file name, which may name the model. Raises DialectError with every reason why there is no plan.
    """
    line = from_text(settings) if isinstance(settings, str) else from_words(settings)
    if not line.options:
        raise DialectError("The settings hold no flags; give a launch script or its flags.")
    ledger = Ledger(line.options)
    if "--yaml-cfg" in ledger:
        ledger.refuse(
            "--yaml-cfg", "--yaml-cfg replaces the arguments by a file's, which is not read; give them as flags."
        )
    read_config(ledger, line, folder)
    fields, order = _layout(ledger, line, world, version)
    length = ledger.whole("--seq-length", 0) or None
    heads = ledger.whole("--num-attention-heads", 0) or None
    groups = ledger.whole("--num-query-groups", 0) or heads
    check_heads(
        ledger, "--num-attention-heads", fields, heads, groups if "--group-query-attention" in ledger else heads
    )
    model = model_of(ledger, f"{title} {line.program or ''}", length)
    fields |= zero(ledger, fields) | recomputation(ledger, fields)
    train = training(ledger, fields["data"], length, fields["pipeline"])
    _rest(ledger, line)
    return conclude(ledger, Draft(fields, model, train, order), keep_order)


def _layout(
    ledger: Ledger, line: CommandLine, world: int | None, version: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The degrees of all axes, and their rank order."""
    tensor = ledger.whole("--tensor-model-parallel-size")
    pipeline = ledger.whole("--pipeline-model-parallel-size")
    context = sequence_ranks(ledger)
    for name, axis in (("--tensor-model-parallel-size", "tensor"), ("--pipeline-model-parallel-size", "pipeline")):
        ledger.mapped(f"{axis}={ledger.whole(name)}.", name)
    fields: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
    fields |= context_axes(ledger, ledger.whole("--context-parallel-size"), version)
    fields |= _tensor(ledger, tensor)
    size = tensor * pipeline * context
    world = _world(ledger, line, world, size)
    fields["data"] = max(1, world // size)
    if world % size:
        ledger.refuse(
            "world",
            f"The world of {counted(world, 'process')} is no multiple of tensor {tensor} x pipeline {pipeline} x "
            f"context {context} = {size}; use "
            f"{' or '.join(str(n * size) for n in (world // size, world // size + 1) if n)}.",
        )
    fields |= _pipeline(ledger, pipeline) | _experts(ledger, tensor, world // pipeline, pipeline)
    order = ("tensor", "ulysses", "ring", "pipeline", "data") if ledger.flag("--use-tp-pp-dp-mapping") else OURS
    ledger.changed("It puts pipeline before data in their rank order.", "--use-tp-pp-dp-mapping")
    return fields, order


def _world(ledger: Ledger, line: CommandLine, world: int | None, size: int) -> int:
    """The number of processes: as asked for, as the launcher says, or one model's."""
    if world is not None:
        if line.world is not None and line.world != world:
            ledger.note(
                "world",
                "changed",
                f"The script starts {counted(line.world, 'process')}; --world {world} counts.",
                value=world,
            )
        return world
    if line.world is not None:
        verdict, why = said_world(line)
        ledger.note("world", verdict, why, value=line.world)
        return line.world
    ledger.note(
        "world",
        "changed",
        f"The settings do not say how many processes there are; taken as {size}, data=1. Give --world.",
    )
    return size


def _tensor(ledger: Ledger, tensor: int) -> dict[str, Any]:
    """How the tensor ranks work together."""
    asked = ledger.flag("--sequence-parallel")
    if asked and tensor == 1:
        ledger.no_effect("Megatron-LM switches it off with one tensor rank; so does seqloom.", "--sequence-parallel")
    elif asked:
        ledger.mapped(
            "sequence_parallel=true: tokens are split over the tensor ranks between its linears.", "--sequence-parallel"
        )
    found: dict[str, Any] = {"sequence_parallel": asked or tensor == 1}
    if ledger.flag("--tp-2d"):
        return _two_dimensional(ledger, tensor)
    ledger.no_effect("It is for --tp-2d.", "--tp-x", "--tp-y")
    if ledger.flag("--tp-comm-overlap"):
        if asked and tensor > 1:
            found["tensor_overlap"] = "ring"
        else:
            ledger.no_effect("It needs --sequence-parallel and more than one tensor rank.", "--tp-comm-overlap")
    return found


def _two_dimensional(ledger: Ledger, tensor: int) -> dict[str, Any]:
    x, y = ledger.whole("--tp-x"), ledger.whole("--tp-y")
    if x * y != tensor:
        ledger.refuse(
            "--tp-2d",
            f"--tp-x {x} x --tp-y {y} = {x * y}, but --tensor-model-parallel-size is {tensor}; make them equal.",
        )
    if tensor == 1:
        ledger.no_effect("There is one tensor rank.", "--tp-2d", "--tp-x", "--tp-y")
        return {}
    ledger.mapped(f"tensor_kind=2d on a grid of {x} x {y}.", "--tp-2d", "--tp-x", "--tp-y")
    if ledger.flag("--sequence-parallel"):
        ledger.changed("Refused there with --tp-2d; seqloom's 2d grid always splits tokens too.", "--sequence-parallel")
    if ledger.whole("--num-attention-heads", 0) % tensor:
        ledger.changed(
            f"Refused there with --tp-2d, since heads are no multiple of tensor {tensor}; here the grid decides.",
            "--num-attention-heads",
        )
    if ledger.get("--context-parallel-algo") not in (None, "megatron_cp_algo", "ulysses_cp_algo"):
        ledger.changed("Refused there with --tp-2d; here they go together.", "--context-parallel-algo")
    return {"tensor_kind": "2d", "grid": None if x == y else f"{x}x{y}"}


def _pipeline(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """Interleaved stages."""
    per, several = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"
    if pipeline > 1 and ledger.flag("--no-pipeline-parallel"):
        ledger.refuse(
            "--no-pipeline-parallel",
            f"--no-pipeline-parallel stands beside --pipeline-model-parallel-size {pipeline}; leave one of them out.",
        )
    if pipeline == 1:
        ledger.no_effect("There is one pipeline rank.", per, several, "--num-layer-list", *_ENDS)
        return {}
    chunks = ledger.whole(several)
    if per in ledger:
        layers, each = ledger.whole("--num-layers", 0), ledger.whole(per)
        if layers % (pipeline * each) or layers == 0:
            ledger.refuse(
                per,
                f"{counted(layers, 'layer')} cannot be cut into stages of {each} over {pipeline} pipeline ranks; give "
                "--num-layers that can.",
            )
            return {}
        if several in ledger and chunks != layers // (pipeline * each):
            said = f"{per} {each} is {layers // (pipeline * each)} stages on a pipeline rank, and {several} is {chunks}"
            ledger.refuse(several, f"{said}; leave one of them out.")
        chunks = layers // (pipeline * each)
    found: dict[str, Any] = {"schedule": "interleaved", "chunks": chunks} if chunks > 1 else {}
    ledger.mapped(f"{counted(chunks, 'stage')} on each pipeline rank.", per, several)
    found |= _ends(ledger, pipeline) if chunks == 1 else {}
    listed = ledger.get("--num-layer-list")
    if listed is not None:
        counts, layers = [as_whole(each) for each in str(listed).split(",")], ledger.whole("--num-layers", 0)
        if None not in counts and layers and sum(each or 0 for each in counts) != layers:
            ledger.refuse(
                "--num-layer-list",
                f"--num-layer-list {listed} holds {counted(sum(each or 0 for each in counts), 'layer')} and "
                f"--num-layers is {layers}; make them equal.",
            )
        found["stages"] = str(listed).replace(",", "-")
        ledger.mapped(f"stages={found['stages']}.", "--num-layer-list")
    return found


_DEEPSPEED_EXPERTS = "--moe-expert-parallel-size"


_ENDS = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")


def _ends(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """The stages where the first and the last have layers of their own number."""
    given, layers = {name: ledger.whole(name) for name in _ENDS if name in ledger}, ledger.whole("--num-layers", 0)
    between = pipeline - len(given)
    if not given or not layers or between < 1 or pipeline > layers:
        return {}
    each, left = divmod(layers - sum(given.values()), between)
    if left or each < 1:
        ledger.refuse(
            _ENDS[0] if _ENDS[0] in given else _ENDS[1],
            f"{layers} layers without the {sum(given.values())} of the ends cannot be dealt evenly to {between} "
            "pipeline ranks; give another number.",
        )
        return {}
    counts = [given.get(_ENDS[0], each), *[each] * (pipeline - 2), given.get(_ENDS[1], each)]
    stages = "-".join(map(str, counts))
    ledger.mapped(f"stages={stages}.", *_ENDS)
    return {"stages": stages}


def _experts(ledger: Ledger, tensor: int, ranks: int, pipeline: int) -> dict[str, Any]:
    """Experts, dealt to ranks of data x context x tensor."""
    name, split = "--expert-model-parallel-size", ledger.whole("--expert-tensor-parallel-size", tensor)
    if name not in ledger and _DEEPSPEED_EXPERTS in ledger:
        name = _DEEPSPEED_EXPERTS
        split = tensor if ledger.flag("--enable-expert-tensor-parallelism") else 1
        ledger.mapped(f"expert_tensor={split}.", "--enable-expert-tensor-parallelism")
    expert = ledger.whole(name)
    ledger.mapped(f"expert={expert}, taken from data x context x tensor.", name)
    ledger.mapped(f"expert_tensor={split}.", "--expert-tensor-parallel-size")
    number = ledger.whole("--num-experts", 0, least=0)
    if number > 1 and tensor > 1 and not ledger.flag("--sequence-parallel"):
        ledger.refuse(
            "--sequence-parallel",
            f"Experts beside --tensor-model-parallel-size {tensor} need --sequence-parallel; add it.",
        )
    if expert == 1 and not number:
        return {}
    if ranks % (expert * split):
        ledger.refuse(
            name,
            f"{counted(ranks * pipeline, 'process')} / pipeline {pipeline} = {ranks} is no multiple of expert "
            f"{expert} x expert tensor {split}.",
        )
    if split not in (1, tensor):
        ledger.refuse(
            "--expert-tensor-parallel-size",
            f"--expert-tensor-parallel-size {split} is neither 1 nor tensor {tensor}; seqloom splits experts over "
            "one of them.",
        )
    return {"expert": expert, "expert_tensor": split}


def _rest(ledger: Ledger, line: CommandLine) -> None:
    """Note everything that no rule has read."""
    name = "--attention-mask-type" if "--attention-mask-type" in ledger else "--cp-attention-mask-type"
    if ledger.get(name, "causal") != "causal":
        ledger.note(name, "changed", f"The run here is causal, not {shown(ledger.get(name))}.")
    ledger.mapped(
        "It is off.", *(name for name in ("--sequence-parallel", "--tp-comm-overlap") if not ledger.flag(name))
    )
    ledger.no_effect("Nothing else that is given makes it count.", *(name for name in LAYOUT if not ledger.noted(name)))
    for name, other in _NO_LONGER.items():
        if name in ledger:
            ledger.refuse(name, f"{name} is no longer an option of theirs; write {other}.")
    for name in [name for name in ledger.given if not ledger.noted(name) and untouched(name) is None]:
        plain = name.replace("_", "-")
        cut_short = [one for one in LAYOUT if len(plain) > 8 and one.startswith(plain)]
        if close := cut_short or get_close_matches(plain, LAYOUT, 1, 0.9):
            ledger.refuse(name, f"{name} is no option of theirs (did you mean '{close[0]}'?).")
    ledger.close(lambda name: _unknown(name, ledger.given[name]))
    for name in line.repeated:
        ledger.note(name, "mapped", "It is given more than once; the last one counts, as there.")
    for other in line.others:
        ledger.note(other, "no effect", "A program that the script starts without a launcher; its flags are not read.")
    for text in line.stray:
        ledger.note(text, "no effect", "A word that belongs to no option.", value=text)
    for name, value in line.dropped.items():
        ledger.note(
            name, "no effect", "A comment line ends the command before it, so the shell never passes it.", value=value
        )
    for name, value in line.launcher.items():
        ledger.note(
            name,
            "no effect",
            (untouched(name) or ("", "It is the launcher's."))[1],
            value=getattr(value, "text", value),
        )
    for name, value in line.unused.items():
        why = "An environment variable, for libraries." if name in line.exported else "Set, and never passed on."
        ledger.note(name, "no effect", why, value=value)


_NO_LONGER = {
    "--model-parallel-size": "--tensor-model-parallel-size",
    "--batch-size": "--micro-batch-size",
    "--warmup": "--lr-warmup-fraction",
}
_OFF = {
    "--deepspeed": "Off.",
    "--use-flash-attn": "Off there; seqloom's attention never builds the matrix of scores either way.",
    "--kv-head-repeat-before-uly-alltoall": "Off there; seqloom repeats key/value heads where there are too few.",
}


def _unknown(name: str, value: Any) -> tuple[Verdict, str]:
    known = untouched(name)
    if known is None:
        return unread(name)
    if known[0] == "mapped" and str(value).lower() in ("false", "0"):
        return ("no effect", _OFF[name]) if name in _OFF else ("changed", f"Off there, and here it is on: {known[1]}")
    return known  # type: ignore[return-value]
