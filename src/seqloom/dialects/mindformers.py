"""MindFormers: YAML files of the static graph, and of the newer `parallelism` section."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from seqloom.dialects.context import axes, check_heads, mask_bytes
from seqloom.dialects.ledger import Ledger, as_whole, flatten, plain, shown
from seqloom.dialects.mindformers_model import PLACES, find, model_of
from seqloom.dialects.mindformers_options import check_names, close_all
from seqloom.dialects.mindformers_pipeline import even, layers_of_stages, schedule, stages
from seqloom.dialects.mindformers_train import training
from seqloom.dialects.models import full
from seqloom.dialects.pynative import pynative
from seqloom.dialects.translation import MOST_RANKS, Draft, Translation, conclude
from seqloom.errors import DialectError, counted

ALGORITHMS = ("colossalai_cp", "ulysses_cp", "hybrid_cp")
_MODES = {
    "0": 0,
    "1": 1,
    "2": 2,
    "3": 3,
    "data_parallel": 0,
    "semi_auto_parallel": 1,
    "auto_parallel": 2,
    "hybrid_parallel": 3,
    "stand_alone": 0,
    "semi": 1,
}
CONFIG = "parallel_config."
_DEVICES = "parallel.device_num"


def translate(
    settings: str | Sequence[str],
    *,
    world: int | None = None,
    version: str | None = None,
    keep_order: bool = False,
    folder: Path | None = None,
    title: str = "",
) -> Translation:
    """The plan of a YAML file of either generation. Raises DialectError with every reason why there is none."""
    values, repeated = _read(settings if isinstance(settings, str) else " ".join(settings))
    ledger = Ledger(dict(flatten(values)))
    for name in repeated:
        ledger.note(name, "changed", "It is given twice in a section; the last counts, as there.")
    if version is not None:
        ledger.note("--dialect-version", "no effect", "The file itself tells its generation.", value=version)
    if any(name.startswith("parallelism.") for name in ledger.given):
        fields = pynative(ledger, world)
    else:
        fields = _static(ledger, world)
    check_names(ledger)
    length, model = _length(ledger), model_of(ledger, title)
    counts = _stages(ledger, fields, _layers(ledger, model))
    train, recompute = training(ledger, fields, length, counts)
    _attention(ledger, fields, length)
    heads, kv_heads = (
        find(ledger, "num_heads", "num_attention_heads"),
        find(ledger, "n_kv_heads", "num_key_value_heads"),
    )
    if heads:
        query = ledger.whole(heads)
        check_heads(ledger, heads, fields, query, ledger.whole(kv_heads) if kv_heads else query)
    close_all(ledger)
    return conclude(ledger, Draft({**fields, **recompute}, model, train), keep_order)


_MOST_MARKS = 12_000
_MARKS = re.compile(r"[\[{,\n]|[-?:](?=\s)")
"""What parts the pieces of a YAML file: reading one takes a tenth of a millisecond."""


class _Loader(yaml.SafeLoader):
    """Plain data, and the keys that a section gives more than once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        self.repeated += [key for key, times in keys.items() if times > 1]
        return super().construct_mapping(node, deep)


def _read(text: str) -> tuple[dict[Any, Any], list[str]]:
    """The sections of a file, and keys given twice, of which the last counts."""
    if sum(1 for _ in _MARKS.finditer(text)) > _MOST_MARKS:
        raise DialectError(f"The settings hold more than {_MOST_MARKS:,} lines and entries; give the file of one run.")
    try:
        loader = _Loader(text)
        try:
            values = loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        problem = " ".join(str(error).split())
        raise DialectError(f"The settings are not readable as YAML: {problem[:200]}.") from error
    if not isinstance(values, dict):
        raise DialectError("The settings hold no sections; give a MindFormers YAML file.")
    if "distribute_parallel_config" in values:
        raise DialectError("`distribute_parallel_config` is not read here; write its degrees as `parallel_config`.")
    if not {"parallel_config", "parallelism", "parallel", "use_parallel"} & set(map(str, values)):
        raise DialectError(
            "The settings have neither `parallel_config` nor `parallelism`; give a MindFormers YAML file."
        )
    return values, loader.repeated


def _stages(ledger: Ledger, fields: dict[str, Any], layers: int | None) -> list[list[int]] | None:
    """Write the stages into the fields where offset says them, or recomputation counts their layers."""
    counts = layers_of_stages(ledger, fields, layers)
    why = "the same number each, plus offset, as there"
    if counts is None and isinstance(ledger.given.get("recompute_config.recompute"), list):
        counts, why = even(fields, layers), "as many layers each, as there, since recompute counts them"
    if counts is not None:
        fields["stages"] = stages(fields, counts)
        ledger.note(find(ledger, "offset") or "stages", "mapped", f"stages={fields['stages']}: {why}.")
    return counts


def _layers(ledger: Ledger, model: dict[str, Any] | None) -> int | None:
    """The layers of the model, None where the file does not say."""
    found = full(model).get("num_hidden_layers") if model else None
    name = find(ledger, "num_layers", "num_hidden_layers")
    return found if isinstance(found, int) else ledger.whole(name) if name else None


def _length(ledger: Ledger) -> int | None:
    """The sequence length of the model or of the data."""
    name = find(ledger, "seq_length") or ("training.seq_length" if "training.seq_length" in ledger else None)
    for other in ("dataset.seq_length", "train_dataset.data_loader.config.seq_length"):
        name = name or (other if other in ledger else None)
    if name is None:
        return None
    ledger.mapped("train.sequence_length.", name)
    return ledger.whole(name, 0) or None


def _static(ledger: Ledger, world: int | None) -> dict[str, Any]:
    """Fields of a plan by `parallel_config`."""
    names = {"data": "data_parallel", "tensor": "model_parallel", "pipeline": "pipeline_stage"}
    mode = _mode(ledger)
    degrees = {axis: ledger.whole(CONFIG + name, most=MOST_RANKS) for axis, name in names.items()}
    context = ledger.whole(CONFIG + "context_parallel", most=MOST_RANKS)
    if said := ledger.whole(_DEVICES, 0):
        why = f"The run is on {counted(world or said, 'process')}."
        ledger.note(_DEVICES, "mapped" if world in (None, said) else "changed", why)
        world = world or said
    if mode in (0, 3):
        return _reset(ledger, world)
    for axis, name in names.items():
        ledger.mapped(f"{axis}={degrees[axis]}.", CONFIG + name)
    ledger.mapped(
        f"{context} ranks share a sequence." if context > 1 else "Each sequence is whole.", CONFIG + "context_parallel"
    )
    product = degrees["data"] * degrees["tensor"] * context * degrees["pipeline"]
    if world is not None and world != product:
        ledger.refuse(
            _DEVICES if _DEVICES in ledger else "device_num",
            f"device_num {world} must be data_parallel {degrees['data']} x model_parallel {degrees['tensor']} x "
            f"context_parallel {context} x pipeline_stage {degrees['pipeline']} = {product}; change one of them.",
        )
    fields: dict[str, Any] = dict(degrees) | _context(ledger, context)
    fields |= schedule(ledger, degrees["pipeline"]) | _sequence_parallel(ledger, degrees["tensor"], context)
    fields |= _zero(ledger, fields) | _experts(ledger, fields)
    return fields


def _mode(ledger: Ledger) -> int:
    """parallel.parallel_mode as its number; 0 where nothing is parallel."""
    name = "parallel.parallel_mode"
    if not ledger.flag("use_parallel", True):
        ledger.note("use_parallel", "mapped", "Off: one process, all degrees 1.")
        return 0
    given = ledger.get(name, 1)
    mode = _MODES.get(str(plain(given)).lower())
    if mode is None:
        ledger.refuse(name, f"{name} is {shown(given)}; it is one of 0, 1, 2, 3.")
        return 1
    if mode == 2:
        ledger.note(
            name, "changed", "The automatic mode lets the compiler choose; the degrees written down count here."
        )
    ledger.mapped("Data parallel alone." if mode in (0, 3) else "Degrees as written down.", name)
    return mode


def _reset(ledger: Ledger, world: int | None) -> dict[str, Any]:
    """Data parallelism alone: their trainer sets all other degrees to 1."""
    alone = not ledger.flag("use_parallel", True)
    why = "Their trainer sets it to 1 in this mode: data parallelism over all processes."
    degrees = (
        "data_parallel",
        "model_parallel",
        "context_parallel",
        "pipeline_stage",
        "expert_parallel",
        "micro_batch_num",
        "use_seq_parallel",
    )
    ledger.changed(why, *(CONFIG + name for name in degrees))
    if alone and world not in (None, 1):
        ledger.refuse("use_parallel", f"use_parallel is off, which is one process, but --world is {world}; turn it on.")
    if alone:
        return {"data": 1}
    if world is None:
        ledger.note(
            "device_num", "changed", "The file does not say how many processes there are; taken as 1. Give --world."
        )
    return {"data": world or 1}


def _context(ledger: Ledger, context: int) -> dict[str, Any]:
    """ring, ulysses and their exchange."""
    name, degree = CONFIG + "context_parallel_algo", CONFIG + "ulysses_degree_in_cp"
    algorithm = ledger.word(name, ALGORITHMS, "colossalai_cp")
    if context == 1:
        ledger.no_effect("context_parallel is 1.", name, degree)
        return axes()
    ulysses = 1
    if algorithm == "hybrid_cp":
        ulysses = ledger.whole(degree)
        if context % ulysses:
            ledger.refuse(
                degree,
                f"context_parallel {context} is not divisible by ulysses_degree_in_cp {ulysses}; use a divisor of "
                f"{context}.",
            )
            return axes(context)
        ledger.mapped(f"context {context} / ulysses {ulysses} = {context // ulysses} outer ranks.", degree)
    elif algorithm == "ulysses_cp":
        ulysses = _ulysses(ledger, context, name, degree)
    else:
        ledger.no_effect("It is for hybrid_cp, as their warning says.", degree)
    ring = _is_ring(ledger)
    found = axes(context // ulysses, ulysses, exchange="ring" if ring else "gather", layout="contiguous")
    if context > ulysses:
        kind = "a ring" if ring else "an all-gather of keys and values, since use_ring_attention is not on"
        ledger.note(
            name,
            "mapped",
            f"{algorithm}: ulysses {ulysses} x {context // ulysses} outer ranks by {kind}; tokens lie contiguous, "
            "as there (layout=zigzag would even out the causal work).",
        )
    else:
        ledger.note(name, "mapped", f"{algorithm}: ulysses={ulysses}.")
    return found


def _ulysses(ledger: Ledger, context: int, name: str, degree: str) -> int:
    """The degree of ulysses_cp, which their newer models take from elsewhere."""
    newer = "use_legacy" in ledger and not ledger.flag("use_legacy", True)
    if not newer:
        ledger.no_effect("It is for hybrid_cp, as their warning says.", degree)
        return context
    given = ledger.whole(degree)
    if given == context:
        ledger.mapped(f"ulysses={given}.", degree)
        return context
    ledger.note(
        name,
        "changed",
        "Documented as Ulysses; the code of these models (use_legacy: False) takes the degree from "
        "ulysses_degree_in_cp "
        f"alone, here {given}, and gathers keys and values over the rest. Followed; set ulysses_degree_in_cp: "
        f"{context} "
        "for Ulysses.",
    )
    if context % given:
        ledger.refuse(
            degree, f"context_parallel {context} is not divisible by ulysses_degree_in_cp {given}; use a divisor."
        )
        return 1
    ledger.mapped(f"ulysses={given}.", degree)
    return given


def _is_ring(ledger: Ledger) -> bool:
    name = find(ledger, "use_ring_attention")
    return name is not None and ledger.flag(name)


def _sequence_parallel(ledger: Ledger, tensor: int, context: int) -> dict[str, Any]:
    name = CONFIG + "use_seq_parallel"
    asked = ledger.flag(name)
    if asked and tensor == 1:
        ledger.no_effect("There is one tensor rank.", name)
    elif asked and context > 1:
        ledger.note(
            name,
            "mapped",
            "sequence_parallel=true beside context_parallel: their documents call the two incompatible, their code "
            "splits "
            "norms over both, and so does seqloom, exactly.",
        )
    ledger.mapped(f"sequence_parallel={str(asked).lower()}.", name)
    return {"sequence_parallel": asked or tensor == 1}


def _zero(ledger: Ledger, fields: dict[str, Any]) -> dict[str, Any]:
    """Optimizer states shared out."""
    name, config = "parallel.enable_parallel_optimizer", "parallel.parallel_optimizer_config."
    size = config + "optimizer_weight_shard_size"
    if not ledger.flag(name):
        ledger.mapped("zero=0.", name)
        ledger.no_effect("enable_parallel_optimizer is off.", *(one for one in ledger.given if one.startswith(config)))
        return {}
    gradients = ledger.flag(config + "gradient_accumulation_shard")
    found: dict[str, Any] = {"zero": 2 if gradients else 1}
    ledger.mapped("zero=1: optimizer states are shared out over data x context.", name)
    ledger.mapped(f"zero={found['zero']}.", config + "gradient_accumulation_shard")
    replicas = fields["data"] * fields["ring"] * fields["ulysses"]
    shards = ledger.whole(size, 0, least=-1)
    if size in ledger and shards > 0:
        if replicas % shards:
            ledger.no_effect(
                f"It does not divide data x context = {replicas}, and then it counts for nothing there.", size
            )
        else:
            found["zero_replicas"] = replicas // shards
    ledger.mapped(f"zero_replicas={found.get('zero_replicas', 1)}.", *(() if ledger.noted(size) else (size,)))
    return found


def _experts(ledger: Ledger, fields: dict[str, Any]) -> dict[str, Any]:
    """Experts, dealt to ranks of data x context x tensor."""
    name = CONFIG + "expert_parallel"
    expert = ledger.whole(name)
    ranks = fields["data"] * fields["ring"] * fields["ulysses"]
    ledger.mapped(f"expert={expert}, which is no factor of device_num.", name)
    many = (as_whole(ledger.given.get("moe_config.expert_num")) or 1) > 1
    if many and fields["tensor"] > 1 and not fields.get("sequence_parallel"):
        ledger.refuse(
            CONFIG + "use_seq_parallel",
            f"Experts beside model_parallel {fields['tensor']} need use_seq_parallel: True, there too; set it.",
        )
    if expert == 1:
        return {}
    if (ranks * fields["tensor"]) % expert:
        ledger.refuse(
            name,
            f"expert_parallel {expert} does not divide data x context x model = {ranks * fields['tensor']}; use a "
            "divisor.",
        )
    return {"expert": expert, "expert_tensor": fields["tensor"] if ranks % expert == 0 else 1}


_MASKS = ("use_attn_mask_compression", "use_eod_attn_mask_compression")


def _attention(ledger: Ledger, fields: dict[str, Any], length: int | None) -> None:
    """Flash and ring attention, and compressed masks."""
    flash, ring = find(ledger, "use_flash_attention"), find(ledger, "use_ring_attention")
    shared = fields.get("ring", 1) * fields.get("ulysses", 1) > 1
    on = flash is not None and ledger.flag(flash)
    if shared and not on:
        why = (
            "context_parallel without use_flash_attention is refused there; seqloom's attention is always of that kind."
        )
        ledger.note(flash or "use_flash_attention", "changed", why)
    elif flash:
        always = "seqloom's attention never builds the matrix of scores; this is always so."
        ledger.each("mapped" if on else "no effect", always if on else f"Off there; {always}", (flash,))
    if ring:
        used = fields.get("ring", 1) > 1 and fields.get("exchange") == "ring"
        on = ledger.flag(ring)
        none = (
            "The newer method gathers keys and values; it has no ring."
            if fields.get("ring", 1) > 1
            else "context_parallel leaves no ring."
        )
        why = "exchange=ring." if on and used else none if on else "Off."
        ledger.note(ring, "mapped" if used or not on else "no effect", why)
    for name in (place + mask for place in PLACES for mask in _MASKS):
        if name in ledger and ledger.flag(name):
            said = "seqloom never holds a mask of tokens x tokens. " + mask_bytes(length)
            if ring and ledger.flag(ring):
                said += " Beside ring attention the option has no effect there: no mask is handed over."
            if "eod" in name:
                said += " Documents packed in a sequence do not see each other here, always."
            ledger.note(name, "mapped", said)
        ledger.no_effect(
            "Off there; seqloom never holds a mask of tokens x tokens.", *(() if ledger.noted(name) else (name,))
        )
