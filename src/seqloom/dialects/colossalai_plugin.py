"""HybridParallelPlugin and MoeHybridParallelPlugin: their arguments as a plan."""

import re
from typing import Any

from seqloom.dialects.context import axes
from seqloom.dialects.ledger import Ledger, shown
from seqloom.dialects.translation import Draft
from seqloom.errors import counted

MODES = ("split_gather", "ring", "all_to_all", "ring_attn")
IN_TENSOR = ("split_gather", "ring")
"""The modes whose sequence group is the tensor group."""


def hybrid(ledger: Ledger, world: int | None, version: str | None = None, *, moe: bool = False) -> Draft:
    """The draft of either plugin."""
    tensor, pipeline = _degree(ledger, "tp_size"), _degree(ledger, "pp_size")
    mode, sequence = _sequence(ledger, tensor, moe)
    fields: dict[str, Any] = {
        "tensor": tensor,
        "pipeline": pipeline,
        "sequence_parallel": mode in IN_TENSOR or tensor == 1,
    }
    if mode == "ring":
        fields["tensor_overlap"] = "ring"
    fields |= {
        "all_to_all": axes(1, sequence),
        "ring_attn": axes(sequence, inner=_inner(ledger, mode, sequence, version)),
    }.get(mode or "", axes())
    fields["data"] = data = data_degree(
        ledger, world, tensor * pipeline * sequence, f"tp {tensor} x pp {pipeline} x sp {sequence}"
    )
    fields |= _zero(ledger, pipeline, moe) | _pipeline(ledger, pipeline)
    peculiar = None
    if moe:
        expert = ledger.whole("ep_size")
        if data % expert:
            ledger.refuse(
                "ep_size", f"The data degree {data} is no multiple of ep_size {expert}; use a divisor of {data}."
            )
        else:
            ledger.mapped(f"expert={expert}, taken from data parallelism.", "ep_size")
        if expert > 1:
            fields |= {"expert": expert, "expert_tensor": tensor}
            if pipeline > 1 or sequence > 1:
                peculiar = "experts spread over data ranks alone, between the pipeline and the sequence ranks"
    return Draft(fields, None, _train(ledger, pipeline), _rank_order(ledger, mode), peculiar)


def _degree(ledger: Ledger, name: str) -> int:
    if name not in ledger:
        ledger.note(name, "changed", f"{name} is missing, which their plugin refuses; taken as 1.")
        return 1
    degree = ledger.whole(name)
    ledger.mapped(f"{'tensor' if name == 'tp_size' else 'pipeline'}={degree}.", name)
    return degree


def data_degree(ledger: Ledger, world: int | None, size: int, said: str) -> int:
    """What is left of the world, which is the one copy's where it is not said."""
    if world is None:
        why = f"The settings do not say how many processes there are; taken as {said} = {size}, data=1. Give --world."
        ledger.note("world", "changed", why)
        return 1
    if world % size:
        lower = max(1, world // size) * size
        ledger.refuse(
            "world",
            f"The world of {counted(world, 'process')} is no multiple of {said} = {size}; use {lower} or "
            f"{lower + size}.",
        )
    return max(1, world // size)


def _sequence(ledger: Ledger, tensor: int, moe: bool) -> tuple[str | None, int]:
    """(mode, sequence degree beside tensor): None and 1 where sequence parallelism is off."""
    on, name = ledger.flag("enable_sequence_parallelism"), "sequence_parallelism_mode"
    size = ledger.whole("sp_size")
    mode = ledger.word(name, MODES)
    if not on:
        ledger.no_effect("Off.", "enable_sequence_parallelism")
        ledger.no_effect("enable_sequence_parallelism is off, so the mode counts for nothing.", name)
        if size != 1:
            ledger.refuse(
                "sp_size",
                f"sp_size {size} without enable_sequence_parallelism is refused there; turn it on with a mode, or "
                "leave sp_size out.",
            )
        ledger.mapped("Sequence parallelism is off.", "sp_size")
        return None, 1
    if name not in ledger or ledger.given[name] is None:
        ledger.refuse(
            name,
            "enable_sequence_parallelism=True without sequence_parallelism_mode is incoherent there: the plugin takes "
            f"all_to_all, its layers split_gather; name one of {', '.join(MODES)}.",
        )
        return None, 1
    if mode is None:
        return None, 1
    ledger.mapped("On.", "enable_sequence_parallelism")
    if mode in IN_TENSOR:
        if tensor == 1:
            ledger.refuse(
                name,
                f"{mode} splits the sequence over the tensor group and needs tp_size above 1; give it, or use "
                "all_to_all or ring_attn.",
            )
        ledger.no_effect(f"{mode} takes the tensor group as its sequence group, whatever sp_size says.", "sp_size")
        kind = "sequence_parallel=true" + (" tensor_overlap=ring; it is not ring attention." if mode == "ring" else ".")
        ledger.mapped(kind, name)
        return mode, 1
    if moe and mode == "ring_attn":
        ledger.changed(
            "Their MoE plugin has no ring_attn (it fails there); here it is ring attention as elsewhere.", name
        )
    ledger.mapped(f"{'ulysses' if mode == 'all_to_all' else 'ring'}={size}.", "sp_size")
    ledger.mapped(
        f"{'ulysses (all-to-all)' if mode == 'all_to_all' else 'ring attention, zigzag'} over {size} ranks.", name
    )
    if size == 1:
        ledger.note("sp_size", "mapped", f"1, so {mode} is on there without a split; so here.")
    return mode, size


def _inner(ledger: Ledger, mode: str | None, ring: int, version: str | None) -> int | None:
    """The inner ring of a double ring."""
    name, old = "inner_ring_size", re.match(r"v?0\.4\.([34])\b", version or "")
    if mode != "ring_attn" or ring == 1:
        ledger.no_effect("It is for ring_attn over more than one rank.", name)
        return None
    if ledger.get(name) is None:
        if old and ring > 2:
            inner = 2 if ring <= 4 else 4
            ledger.note(
                name,
                "changed",
                f"Not said: one ring. 0.4.3 and 0.4.4 take an inner ring of {inner} over several nodes.",
            )
        ledger.mapped("One ring.", name)
        return None
    inner = ledger.whole(name)
    if ring % inner or inner > ring:
        ledger.refuse(name, f"inner_ring_size {inner} does not divide sp_size {ring}; use a divisor.")
        return None
    wrong = (
        ""
        if inner in (1, ring) or inner * inner == ring
        else (
            " Their code makes the right groups only where inner x inner is sp_size; here each inner ring is a "
            "block of neighbours."
        )
    )
    ledger.each(
        "changed" if wrong else "mapped", f"inner_ring={inner}.{wrong}" if 1 < inner < ring else "One ring.", (name,)
    )
    return inner


def _zero(ledger: Ledger, pipeline: int, moe: bool) -> dict[str, Any]:
    stage = ledger.whole("zero_stage", 0, least=0, most=3)
    found: dict[str, Any] = {"zero": stage}
    if stage == 3:
        ledger.refuse(
            "zero_stage", "zero_stage 3 is not one of this plugin (0, 1, 2); GeminiPlugin is theirs, zero=3 ours."
        )
    elif stage == 2 and moe:
        found["zero"] = 1
        ledger.changed("Their MoE plugin runs stage 2 as stage 1; zero=1.", "zero_stage")
    elif stage == 2 and pipeline > 1:
        ledger.refuse("zero_stage", "zero_stage 2 with pp_size above 1 is refused there; use zero_stage 1.")
    ledger.mapped(f"zero={found['zero']}, over data and sequence ranks.", "zero_stage")
    precision = ledger.word("precision", ("fp16", "bf16", "fp32"), "fp16")
    if stage and precision == "fp32":
        ledger.note("precision", "mapped", "fp32 with ZeRO is refused there; seqloom shards it alike.")
    if ledger.flag("cpu_offload"):
        found["offload"] = True
        ledger.changed("offload=true: parameters and gradients wait in host memory too.", "cpu_offload")
    else:
        ledger.no_effect("Off.", "cpu_offload")
    return found


def _pipeline(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """Schedule, chunks and stages."""
    names = ("pp_style", "num_model_chunks", "num_layers_per_stage", "num_microbatches", "microbatch_size")
    style = ledger.word("pp_style", ("1f1b", "interleaved", "zbv"), "1f1b")
    chunks = ledger.whole("num_model_chunks")
    if pipeline == 1:
        ledger.no_effect("There is one pipeline rank, and a batch goes through it whole.", *names)
        return {}
    found: dict[str, Any] = {"schedule": style}
    wanted = {"1f1b": chunks == 1, "interleaved": chunks > 1, "zbv": chunks == 2}[style or "1f1b"]
    if not wanted:
        needs = {"1f1b": "1", "interleaved": "2 or more", "zbv": "2"}[style or "1f1b"]
        ledger.refuse("num_model_chunks", f"pp_style {style} takes num_model_chunks {needs}, not {chunks}; give that.")
    if chunks > 1:
        found["chunks"] = chunks
    ledger.mapped(f"schedule={style}.", "pp_style")
    ledger.mapped(f"chunks={chunks}.", "num_model_chunks")
    layers = ledger.get("num_layers_per_stage")
    if layers is not None:
        if not isinstance(layers, list) or not all(type(each) is int and each >= 0 for each in layers) or not layers:
            ledger.refuse("num_layers_per_stage", "num_layers_per_stage is no list of whole numbers; write one.")
        elif len(layers) != pipeline * chunks:
            ledger.refuse(
                "num_layers_per_stage",
                f"num_layers_per_stage lists {counted(len(layers), 'stage')}, and pp_size {pipeline} x "
                f"num_model_chunks {chunks} = {pipeline * chunks}; make it as long.",
            )
        else:
            found["stages"] = "-".join(map(str, layers))
            ledger.mapped(f"stages={found['stages']}.", "num_layers_per_stage")
    if ledger.get("num_microbatches") is None and ledger.get("microbatch_size") is None:
        ledger.note(
            "num_microbatches",
            "changed",
            "A pipeline needs num_microbatches or microbatch_size there; set train.accumulate here.",
        )
    return found


def _train(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    accumulate = ledger.whole("num_microbatches", 0) or None
    micro = ledger.whole("microbatch_size", 0) or None
    micro = None if accumulate else micro
    if pipeline == 1:
        accumulate = micro = None
    else:
        ledger.mapped("Micro-batches of a step.", "num_microbatches")
        ledger.each(
            "no effect" if accumulate else "mapped",
            "num_microbatches wins." if accumulate else "Rows of a micro-batch.",
            ("microbatch_size",),
        )
    precision = ledger.word("precision", ("fp16", "bf16", "fp32"), "fp16") or "fp16"
    ledger.mapped("train.precision.", "precision")
    if "precision" not in ledger:
        ledger.note("precision", "mapped", "Not said: fp16, as there.")
    return {
        "sequence_length": None,
        "micro_batch": micro,
        "accumulate": accumulate,
        "global_batch": None,
        "ramp_up": None,
        "recompute": "none",
        "precision": "float32" if precision == "fp32" else precision,
        "schedule": clipping(ledger) | first_scale(ledger, precision),
    }


def clipping(ledger: Ledger) -> dict[str, float]:
    """The largest norm of all gradients, where there is one; norm_type is an argument of some plugins."""
    clip = ledger.number("max_norm", 0.0)
    if not clip:
        ledger.no_effect("Nothing is clipped.", "norm_type")
        return {}
    if ledger.get("norm_type", 2) != 2:
        why = (
            f"norm_type is {shown(ledger.given['norm_type'])}, and gradients are clipped by their 2-norm; leave it out."
        )
        ledger.refuse("norm_type", why)
    ledger.mapped("The norm of gradients is the 2-norm.", "norm_type")
    return {"clip": clip}


def first_scale(ledger: Ledger, precision: str) -> dict[str, float]:
    """What fp16 multiplies losses by at first, where that is said; the rest of their scaler is not taken over."""
    scale = ledger.number("initial_scale")
    if precision != "fp16":
        return {}
    rest = ("min_scale", "max_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis")
    ledger.changed("seqloom's loss scale grows and shrinks by its own rule; see train.loss_scale_window.", *rest)
    if scale is not None and scale < 1:
        ledger.refuse("initial_scale", f"initial_scale is {scale}, and losses are not scaled down; use 1 or more.")
    ledger.mapped("train.initial_loss_scale.", "initial_scale")
    return {"initial_loss_scale": scale} if scale is not None else {}


def _rank_order(ledger: Ledger, mode: str | None) -> tuple[str, ...]:
    """Their rank order, fastest first: all_to_all puts the sequence before tensor, and data stands outside."""
    outside = ledger.flag("dp_outside", True)
    ledger.mapped("It orders ranks, data outside pipeline or inside; see the note on rank order.", "dp_outside")
    inside = ("ulysses", "tensor", "ring") if mode == "all_to_all" else ("tensor", "ulysses", "ring")
    return (*inside, "pipeline", "data") if outside else (*inside, "data", "pipeline")
