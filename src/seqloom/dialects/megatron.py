"""Megatron-LM, MindSpeed, AscendSpeed and Megatron-DeepSpeed: launch flags as a plan."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seqloom.dialects.context import axes, check_heads, check_length
from seqloom.dialects.flags import CommandLine, from_text, from_words
from seqloom.dialects.ledger import Ledger, Verdict
from seqloom.dialects.megatron_model import model_of
from seqloom.dialects.megatron_options import LAYOUT, untouched
from seqloom.dialects.megatron_train import recomputation, training, zero
from seqloom.dialects.translation import OURS, Draft, Translation, conclude

ALGORITHMS = (
    "ulysses_cp_algo",
    "megatron_cp_algo",
    "hybrid_cp_algo",
    "adaptive_cp_algo",
    "hybrid_adaptive_cp_algo",
    "kvallgather_cp_algo",
    "mamba_cp_algo",
)
COMMUNICATIONS = ("p2p", "a2a", "allgather", "all_gather", "a2a+p2p")


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
    ledger = Ledger(line.options)
    fields, order = _layout(ledger, line, world, version)
    length = ledger.whole("--seq-length", 0) or None
    heads = ledger.whole("--num-attention-heads", 0) or None
    groups = ledger.whole("--num-query-groups", 0) or heads
    check_heads(
        ledger, "--num-attention-heads", fields, heads, groups if "--group-query-attention" in ledger else heads
    )
    model = model_of(ledger, f"{title} {line.program or ''}", length)
    fields |= zero(ledger, line, folder) | recomputation(ledger)
    train = training(ledger, fields["data"], length, fields["pipeline"])
    _rest(ledger, line)
    return conclude(ledger, Draft(fields, model, train, order), keep_order)


def _layout(
    ledger: Ledger, line: CommandLine, world: int | None, version: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The degrees of all axes, and their rank order."""
    tensor = ledger.whole("--tensor-model-parallel-size")
    pipeline = ledger.whole("--pipeline-model-parallel-size")
    context = ledger.whole("--context-parallel-size")
    for name, axis in (("--tensor-model-parallel-size", "tensor"), ("--pipeline-model-parallel-size", "pipeline")):
        ledger.mapped(f"{axis}={ledger.whole(name)}.", name)
    fields: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline}
    fields |= _context(ledger, context, version)
    fields |= _tensor(ledger, tensor)
    size = tensor * pipeline * context
    world = _world(ledger, line, world, size)
    fields["data"] = max(1, world // size)
    if world % size:
        ledger.refuse(
            "world",
            f"{world} processes are no multiple of tensor {tensor} x pipeline {pipeline} x context {context} = {size}; "
            f"use {max(1, world // size) * size} or {(world // size + 1) * size}.",
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
                "world", "changed", f"The script starts {line.world} processes; --world {world} counts.", value=world
            )
        return world
    if line.world is not None:
        ledger.note("world", "mapped", f"The launcher starts {line.world} processes.", value=line.world)
        return line.world
    ledger.note(
        "world",
        "changed",
        f"The settings do not say how many processes there are; taken as {size}, data=1. Give --world.",
    )
    return size


def _context(ledger: Ledger, context: int, version: str | None) -> dict[str, Any]:
    """ring, ulysses and how they exchange."""
    ledger.mapped(
        f"{context} ranks share a sequence." if context > 1 else "Each sequence is whole.", "--context-parallel-size"
    )
    algorithm = ledger.word("--context-parallel-algo", ALGORITHMS)
    kind, choice = "--context-parallel-algo", algorithm
    if context == 1:
        unused = "It says how context ranks work together, and --context-parallel-size is 1 here."
        for name in (
            kind,
            "--cp-comm-type",
            "--ulysses-degree-in-cp",
            "--cp-window-size",
            "--hierarchical-context-parallel-sizes",
        ):
            ledger.no_effect(unused, name)
        return axes()
    if algorithm is None and "--cp-comm-type" in ledger:
        return _megatron_context(ledger, context)
    if algorithm is None:
        choice = default_algorithm(version)
        ledger.note(
            kind,
            "changed",
            f"Not said: taken as {choice}. MindSpeed up to core_r0.8.0 takes ulysses_cp_algo, as it documents; "
            "later ones "
            "take megatron_cp_algo (ring), as Megatron-LM itself does; --dialect-version decides.",
        )
    ledger.no_effect(f"{kind} decides here.", "--cp-comm-type", "--hierarchical-context-parallel-sizes")
    return _mindspeed_context(ledger, context, choice or "")


def default_algorithm(version: str | None) -> str:
    """What context parallelism without a named algorithm is.

    >>> default_algorithm(None), default_algorithm("core_r0.12.1"), default_algorithm("megatron-lm")
    ('ulysses_cp_algo', 'megatron_cp_algo', 'megatron_cp_algo')
    """
    numbers = re.search(r"r?(\d{1,4})\.(\d{1,4})(\.\d{1,4})?$", version or "")
    if version is None or (numbers and (int(numbers[1]), int(numbers[2])) <= (0, 8)):
        return "ulysses_cp_algo"
    return "megatron_cp_algo"


def _megatron_context(ledger: Ledger, context: int) -> dict[str, Any]:
    """Megatron-LM's own --cp-comm-type."""
    name, given = "--cp-comm-type", ledger.get("--cp-comm-type")
    kinds = list(dict.fromkeys(given if isinstance(given, list) else [given]))
    length = ledger.whole("--seq-length", 0) or None
    check_length(ledger, "--seq-length", length, 2 * context, "2 x context")
    if len(kinds) > 1:
        ledger.refuse(
            name,
            f"{name} names {', '.join(map(str, kinds))} for different layers; seqloom takes one for all, so name one.",
        )
        return axes(context)
    kind = kinds[0]
    if kind not in COMMUNICATIONS:
        ledger.refuse(name, f"{name} is '{kind}'; it is one of {', '.join(COMMUNICATIONS)}.")
        return axes(context)
    if kind != "a2a+p2p":
        ledger.no_effect("It is for a2a+p2p.", "--hierarchical-context-parallel-sizes")
        found = {"p2p": axes(context), "a2a": axes(1, context)}.get(kind, axes(context, exchange="gather"))
        ledger.mapped(_said(found), name)
        return found
    sizes = ledger.get("--hierarchical-context-parallel-sizes")
    numbers = [int(one) for one in sizes if str(one).isdecimal()] if isinstance(sizes, list) else []
    if len(numbers) != 2 or len(sizes) != 2 or numbers[0] * numbers[1] != context:
        ledger.refuse(
            "--hierarchical-context-parallel-sizes",
            f"a2a+p2p takes --hierarchical-context-parallel-sizes INNER OUTER with INNER x OUTER = {context}; give "
            "them.",
        )
        return axes(context)
    found = axes(numbers[1], numbers[0])
    ledger.mapped(_said(found), name, "--hierarchical-context-parallel-sizes")
    return found


def _mindspeed_context(ledger: Ledger, context: int, choice: str) -> dict[str, Any]:
    """MindSpeed's --context-parallel-algo."""
    name, length = "--context-parallel-algo", ledger.whole("--seq-length", 0) or None
    window = ledger.whole("--cp-window-size")
    if choice == "mamba_cp_algo":
        ledger.refuse(
            name, "mamba_cp_algo splits a state-space model, which seqloom does not run; use another algorithm."
        )
        return axes(context)
    ulysses = 1
    if choice in ("hybrid_cp_algo", "hybrid_adaptive_cp_algo"):
        ulysses = _ulysses_degree(ledger, context, choice)
    elif choice == "ulysses_cp_algo":
        ulysses = context
    if choice not in ("hybrid_cp_algo", "hybrid_adaptive_cp_algo"):
        ledger.no_effect("It is for hybrid_cp_algo.", "--ulysses-degree-in-cp")
    ring = context // ulysses
    check_length(
        ledger, "--seq-length", length, context if ring == 1 else 2 * context, "context" if ring == 1 else "2 x context"
    )
    found = axes(ring, ulysses, inner=_window(ledger, ring, window))
    if choice == "kvallgather_cp_algo":
        found = axes(ring, ulysses, exchange="gather")
    elif "adaptive" in choice:
        found = axes(ring, ulysses, exchange="needed", layout="balanced")
        ledger.changed(
            "adaptive_cp_algo deals tokens out by the mask; layout=balanced with exchange=needed does so by exact "
            "work.",
            name,
        )
    ledger.note(name, "mapped", _said(found), value=choice)
    return found


def _ulysses_degree(ledger: Ledger, context: int, choice: str) -> int:
    name = "--ulysses-degree-in-cp"
    if name not in ledger:
        ledger.refuse(
            name, f"{choice} needs --ulysses-degree-in-cp, a divisor of --context-parallel-size {context}; give it."
        )
        return 1
    degree = ledger.whole(name)
    if context % degree:
        ledger.refuse(
            name,
            f"--context-parallel-size {context} is not divisible by --ulysses-degree-in-cp {degree}; "
            f"use a divisor of {context}.",
        )
        return 1
    if degree == context:
        ledger.note(
            name,
            "changed",
            f"A ulysses degree equal to the context size is refused there; here it is ulysses={degree}, ring=1.",
        )
    ledger.mapped(f"context {context} / ulysses {degree} = ring {context // degree}.", name)
    return degree


def _window(ledger: Ledger, ring: int, window: int) -> int | None:
    """The inner ring of a double ring."""
    name = "--cp-window-size"
    if name not in ledger:
        return None
    if ring == 1 or window == 1:
        ledger.no_effect("One ring: there is no inner one.", name)
        return None
    if ring % window or window >= ring:
        ledger.refuse(name, f"--cp-window-size {window} must be below ring {ring} and divide it; use one that does.")
        return None
    ledger.mapped(f"inner_ring={window}: a double ring.", name)
    return window


def _said(found: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in found.items() if value != 1) + "."


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
    return {"tensor_kind": "2d", "grid": None if x == y else f"{x}x{y}"}


def _pipeline(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """Interleaved stages."""
    per, several = "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"
    if pipeline == 1:
        ledger.no_effect("There is one pipeline rank.", per, several, "--num-layer-list")
        return {}
    chunks = ledger.whole(several)
    if per in ledger:
        layers, each = ledger.whole("--num-layers", 0), ledger.whole(per)
        if layers % (pipeline * each) or layers == 0:
            ledger.refuse(
                per,
                f"{layers} layers cannot be cut into stages of {each} over {pipeline} pipeline ranks; give "
                "--num-layers that can.",
            )
            return {}
        chunks = layers // (pipeline * each)
    found: dict[str, Any] = {"schedule": "interleaved", "chunks": chunks} if chunks > 1 else {}
    ledger.mapped(f"{chunks} stages on each pipeline rank.", per, several)
    listed = ledger.get("--num-layer-list")
    if listed is not None:
        found["stages"] = str(listed).replace(",", "-")
        ledger.mapped(f"stages={found['stages']}.", "--num-layer-list")
    return found


def _experts(ledger: Ledger, tensor: int, ranks: int, pipeline: int) -> dict[str, Any]:
    """Experts, dealt to ranks of data x context x tensor."""
    expert = ledger.whole("--expert-model-parallel-size")
    split = ledger.whole("--expert-tensor-parallel-size", tensor)
    ledger.mapped(f"expert={expert}, taken from data x context x tensor.", "--expert-model-parallel-size")
    ledger.mapped(f"expert_tensor={split}.", "--expert-tensor-parallel-size")
    if expert == 1 and not ledger.whole("--num-experts", 0, least=0):
        return {}
    if ranks % (expert * split):
        ledger.refuse(
            "--expert-model-parallel-size",
            f"{ranks * pipeline} processes / pipeline {pipeline} = {ranks} are no multiple of expert {expert} x "
            f"expert tensor {split}.",
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
    for name in [name for name in ledger.given if not ledger.noted(name) and untouched(name) is None]:
        if close := get_close_matches(name, LAYOUT, 1, 0.9):
            ledger.refuse(name, f"{name} is no option of theirs (did you mean '{close[0]}'?).")
    ledger.close(_unknown)
    for name in line.repeated:
        ledger.note(name, "mapped", "It is given more than once; the last one counts, as there.")
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


def _unknown(name: str) -> tuple[Verdict, str]:
    known = untouched(name)
    if known is not None:
        return known  # type: ignore[return-value]
    return (
        "no effect",
        "Not an option that is known here to change what is computed or how it is split; it does not enter the plan.",
    )
