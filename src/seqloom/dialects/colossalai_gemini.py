"""GeminiPlugin: chunks of ZeRO-3 as a plan."""

from typing import Any

from seqloom.dialects.colossalai_plugin import clipping, data_degree, first_scale
from seqloom.dialects.ledger import Ledger
from seqloom.dialects.translation import OURS, Draft

PLACEMENTS = ("static", "auto", "cpu", "cuda")


def gemini(ledger: Ledger, world: int | None) -> Draft:
    """The draft of a GeminiPlugin: zero=3 over what tensor parallelism leaves of the world."""
    tensor = ledger.whole("tp_size")
    ledger.mapped(f"tensor={tensor}.", "tp_size")
    if tensor > 1 and not ledger.flag("enable_tensor_parallelism"):
        why = "Not on, without which some releases leave the weights whole; taken as on, since tp_size is above 1."
        ledger.note("enable_tensor_parallelism", "changed", why)
    ledger.mapped("Weights are split over the tensor ranks.", "enable_tensor_parallelism")
    asked = ledger.flag("enable_sequence_parallelism")
    ledger.mapped("sequence_parallel." if tensor > 1 else "There is one tensor rank.", "enable_sequence_parallelism")
    data = data_degree(ledger, world, tensor, f"tp {tensor}")
    fields: dict[str, Any] = {"tensor": tensor, "data": data, "sequence_parallel": asked or tensor == 1, "zero": 3}
    replicas = ledger.whole("extra_dp_size")
    if data % replicas:
        ledger.refuse(
            "extra_dp_size", f"extra_dp_size {replicas} does not divide the data degree {data}; use a divisor."
        )
    fields |= {"zero_replicas": replicas} | _placement(ledger)
    ledger.mapped(f"zero_replicas={replicas}.", "extra_dp_size")
    precision = ledger.word("precision", ("fp16", "bf16", "fp32"), "fp16") or "fp16"
    ledger.mapped("train.precision.", "precision")
    train = {
        "sequence_length": None,
        "micro_batch": None,
        "accumulate": None,
        "global_batch": None,
        "ramp_up": None,
        "recompute": "none",
        "precision": "float32" if precision == "fp32" else precision,
        "schedule": clipping(ledger) | first_scale(ledger, precision),
    }
    peculiar = "shares of ZeRO spread over ranks that are extra_dp_size apart" if replicas > 1 else None
    return Draft(fields, None, train, OURS, peculiar)


def _placement(ledger: Ledger) -> dict[str, Any]:
    """ZeRO stage by the part of the parameters that is shared out, and host memory where it is asked for."""
    found: dict[str, Any] = {}
    policy = ledger.word("placement_policy", PLACEMENTS, "static")
    share = ledger.number("shard_param_frac", 1.0)
    if share == 0:
        found["zero"] = 2
        ledger.mapped("zero=2: no parameters are shared out.", "shard_param_frac")
    elif share != 1:
        ledger.changed("zero=3 shares all parameters out, not a part of them.", "shard_param_frac")
    else:
        ledger.mapped("zero=3.", "shard_param_frac")
    fractions = {name: ledger.number(name, 0.0) for name in ("offload_optim_frac", "offload_param_frac")}
    asked = [name for name, value in fractions.items() if value]
    if policy in ("auto", "cpu") or (policy == "static" and asked):
        found["offload"] = True
        if policy != "static":
            ledger.changed(
                "offload=true: parameters, gradients and the optimizer's state wait in host memory.", "placement_policy"
            )
        ledger.changed("offload=true moves parameters, gradients and the optimizer's state to host memory.", *asked)
    where = "As the fractions say." if asked else "Parameters stay on the device."
    ledger.mapped(where, *(() if ledger.noted("placement_policy") else ("placement_policy",)))
    ledger.no_effect("It moves nothing to host memory.", *(name for name in fractions if not ledger.noted(name)))
    return found
