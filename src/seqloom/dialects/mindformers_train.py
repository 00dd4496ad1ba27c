"""What MindFormers' YAML says of batches, recomputation, precision and the schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

from seqloom.dialects.ledger import Ledger, plain
from seqloom.dialects.mindformers_model import find
from seqloom.dialects.mindformers_options import SCHEDULE
from seqloom.dialects.mindformers_pipeline import again, again_of_layers
from seqloom.errors import counted

CONFIG = "recompute_config."


def training(
    ledger: Ledger, fields: Mapping[str, Any], length: int | None, counts: Sequence[Sequence[int]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`train` of a translation, fields of the plan that go with it).

    counts: layers of each chunk of each pipeline rank, where they are known.
    """
    recompute = _recompute(ledger, fields, counts)
    schedule = {}
    for name, key in SCHEDULE.items():
        if ledger.given.get(name) is not None and key in schedule:
            ledger.no_effect("Said already, by an option that comes before it there.", name)
        elif ledger.given.get(name) is not None:
            schedule[key] = plain(ledger.get(name))
            ledger.mapped(f"train.schedule.{key}.", name)
    train = {
        "sequence_length": length,
        **_batch(ledger, fields["data"], fields.get("pipeline", 1)),
        "ramp_up": None,
        "recompute": recompute,
        "precision": _precision(ledger),
        "schedule": schedule,
    }
    return train, {"recompute": recompute}


def _batch(ledger: Ledger, data: int, pipeline: int) -> dict[str, Any]:
    """Rows of a micro-batch on each data rank, micro-batches, and their product over the data ranks."""
    rows = next(
        (
            name
            for name in ("runner_config.batch_size", "train_dataset.batch_size", "training.local_batch_size")
            if name in ledger
        ),
        None,
    )
    micro = ledger.whole(rows) if rows else None
    number, gather = "parallel_config.micro_batch_num", "runner_config.gradient_accumulation_steps"
    interleave = "micro_batch_interleave_num"
    if interleave not in ledger:
        interleave = "parallel_config.micro_batch_interleave_num"
    several = ledger.whole(number)
    steps = ledger.whole(gather)
    times = ledger.whole(interleave)
    if pipeline > 1:
        if several < pipeline:
            ledger.note(
                number,
                "changed",
                f"{several} is below pipeline_stage {pipeline}, which is refused there; stages idle here.",
            )
        ledger.each("changed" if steps > 1 else "mapped", "Their trainer sets it to 1 beside a pipeline.", (gather,))
        accumulate = several * times
        ledger.mapped(f"{counted(several, 'micro-batch')}.", number)
    else:
        accumulate = steps * times
        if several > 1:
            ledger.note(number, "changed", "Without a pipeline their trainer sets it to 1.")
        else:
            ledger.mapped("One.", number)
    ledger.mapped("Micro-batches of a step.", interleave, *(() if ledger.noted(gather) else (gather,)))
    if rows:
        ledger.mapped(f"Rows of a micro-batch on each of {data} data ranks.", rows)
    batch = "training.global_batch_size"
    total = micro * data * accumulate if micro else data * accumulate
    if micro is None:
        ledger.note("batch_size", "changed", f"Not said: taken as 1, so the global batch is {total}.")
    if batch in ledger:
        total, rows_once = ledger.whole(batch), (micro or 1) * data
        accumulate = max(1, total // rows_once)
        if total % rows_once:
            ledger.refuse(
                batch,
                f"{batch} {total} is no multiple of {micro or 1} rows x data {data} = {rows_once}; use "
                f"{accumulate * rows_once} or {(accumulate + 1) * rows_once}.",
            )
        ledger.mapped("train.batch.", batch)
    return {"micro_batch": micro or 1, "accumulate": accumulate, "global_batch": total}


_FULL = "Not a switch or a list of whole numbers; recompute=full, the same result with more to compute."


def _recompute(ledger: Ledger, fields: Mapping[str, Any], counts: Sequence[Sequence[int]] | None) -> str:
    """The plan's word: a switch is all layers, a list the first so many of each stage."""
    name = CONFIG + "recompute"
    if name not in ledger and "recompute.mode" in ledger:
        return _newer_recompute(ledger, fields)
    given = ledger.get(name)
    ledger.no_effect(
        "It keeps or repeats single operations; the result is the same.",
        *(
            one
            for one in ledger.given
            if one.startswith(
                (CONFIG + "select", CONFIG + "mp_comm", CONFIG + "parallel_optimizer", CONFIG + "recompute_slice")
            )
        ),
    )
    if given in (None, False, 0, "None", "none"):
        ledger.mapped("recompute=none.", name)
        return "none"
    if given is True:
        ledger.mapped("recompute=full.", name)
        return "full"
    pipeline = fields.get("pipeline", 1)
    if type(given) is int and given > 0:
        given = [given] * pipeline
    if isinstance(given, list) and all(type(each) in (int, bool) for each in given) and len(given) > pipeline:
        ledger.refuse(
            name, f"{name} lists {counted(len(given), 'stage')}, more than pipeline_stage {pipeline}; make it as long."
        )
        return "none"
    found = again(given, fields, counts) if isinstance(given, list) and given else None
    if found is None:
        ledger.note(name, "changed", _FULL)
        return "full"
    ledger.mapped(f"recompute={found}: the first so many layers of each stage.", name)
    return found


def _newer_recompute(ledger: Ledger, fields: Mapping[str, Any]) -> str:
    """`recompute` of the newer files: a mode, and the numbers of the layers it is for."""
    mode, listed = "recompute.mode", "recompute.full_recompute_layer"
    given = ledger.get(mode)
    if given in (None, False, "None", "none"):
        ledger.mapped("recompute=none.", mode)
        ledger.no_effect("It is for the mode full.", listed)
        return "none"
    found = "full" if ledger.get(listed) is None else again_of_layers(ledger.get(listed), fields)
    if given != "full" or found is None:
        ledger.changed("recompute=full computes whole layers again, all of them; the result is the same.", mode, listed)
        return "full"
    ledger.mapped(f"recompute={found}.", mode, listed)
    return found


_PRECISIONS = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "float32": "float32",
    "fp32": "float32",
}


def _precision(ledger: Ledger) -> str:
    name = find(ledger, "compute_dtype")
    if name is None:
        ledger.note("compute_dtype", "mapped", "Not said: float16, their models' default.")
        return "fp16"
    given = str(plain(ledger.get(name))).lower()
    if given not in _PRECISIONS:
        ledger.refuse(name, f"{name} is '{given[:40]}'; it is one of bfloat16, float16, float32.")
    ledger.mapped("train.precision.", name)
    return _PRECISIONS.get(given, "float32")
