"""The optimizer and scheduler of a DeepSpeed configuration, under the names of `train.schedule`."""

from typing import Any

from seqloom.dialects.ledger import Ledger, plain, shown

INSIDE = "deepspeed_config."

_OPTIMIZER, _SCHEDULER = INSIDE + "optimizer.", INSIDE + "scheduler."
_OWN_OPTIMIZER = ("--optimizer", "--lr", "--adam-beta1", "--adam-beta2", "--adam-eps", "--weight-decay")
_OWN_SCHEDULE = (
    "--lr",
    "--min-lr",
    "--lr-decay-style",
    "--lr-decay-iters",
    "--lr-decay-samples",
    "--lr-decay-tokens",
    "--lr-warmup-iters",
    "--lr-warmup-samples",
    "--lr-warmup-tokens",
    "--lr-warmup-fraction",
)
_PARAMETERS = {"lr": ("learning_rate", 1e-3), "eps": ("epsilon", 1e-8), "weight_decay": ("weight_decay", 0.0)}
"""Of the optimizer: what `train.schedule` calls them, and what DeepSpeed's Adam takes where they are not said."""

_WARMUP = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_UNSAID = {"warmup_max_lr": 0.001, "warmup_min_lr": 0.0, "warmup_num_steps": 1000, "cos_min_ratio": 0.0001}


def optimizer(ledger: Ledger) -> dict[str, Any]:
    """The optimizer, where no flag makes the script hand one of its own to DeepSpeed, which would count."""
    names = [name for name in ledger.given if name.startswith(_OPTIMIZER)]
    if own := [flag for flag in _OWN_OPTIMIZER if flag in ledger]:
        ledger.no_effect(f"{own[0]} makes the script's own optimizer, and DeepSpeed takes that.", *names)
        return {}
    found: dict[str, Any] = {}
    if (kind := ledger.get(_OPTIMIZER + "type")) is not None:
        found["optimizer"] = str(plain(kind))
        plainly = str(kind).lower() in ("adam", "adamw", "fusedadam", "cpuadam")
        why = "AdamW, which DeepSpeed's Adam is too unless adam_w_mode is off." if plainly else "It is not AdamW."
        ledger.each("mapped" if plainly else "changed", f"train.schedule.optimizer: {why}", (_OPTIMIZER + "type",))
    if _OPTIMIZER + "params.adam_w_mode" in ledger and not ledger.flag(_OPTIMIZER + "params.adam_w_mode", True):
        ledger.changed("Weights decay apart from the gradient here, as in AdamW.", _OPTIMIZER + "params.adam_w_mode")
    for option, (key, unsaid) in _PARAMETERS.items():
        name = f"{_OPTIMIZER}params.{option}"
        if (value := _number(ledger, name)) is not None:
            found[key] = value
            ledger.mapped(f"train.schedule.{key}.", name)
        elif names and name not in ledger:
            found[key] = unsaid
            ledger.note(name, "mapped", f"Not said: {unsaid:g}, the default there.", value=unsaid)
    betas = ledger.get(name := _OPTIMIZER + "params.betas")
    if isinstance(betas, list) and len(betas) == 2 and all(type(each) in (int, float) for each in betas):
        found["betas"] = list(betas)
        ledger.mapped("train.schedule.betas.", name)
    elif betas not in (None, "auto"):
        ledger.refuse(name, f"{name} is {shown(betas)}; it is two numbers.")
    _left_open(ledger, names)
    return found


def scheduler(ledger: Ledger, rate: float | None) -> dict[str, Any]:
    """The scheduler, where no flag makes the script hand one of its own to DeepSpeed.

    rate: of the optimizer, from which WarmupCosineLR starts.
    """
    names = [name for name in ledger.given if name.startswith(_SCHEDULER)]
    kind = str(plain(ledger.get(_SCHEDULER + "type")))
    if own := [flag for flag in _OWN_SCHEDULE if flag in ledger]:
        why = f"{own[0]} makes the script's own schedule, which counts here; older releases of DeepSpeed take this."
        ledger.changed(why, *names)
        return {}
    if not names or kind not in _WARMUP:
        ledger.changed("A schedule that train.schedule has not; choose one for a run.", *names)
        return {"decay": kind} if names else {}
    cosine = kind == "WarmupCosineLR"
    found: dict[str, Any] = {"decay": _WARMUP[kind]}
    ledger.mapped(f"train.schedule.decay={found['decay']}.", _SCHEDULER + "type")
    highest = rate if cosine else _said(ledger, "warmup_max_lr", "learning_rate")
    if highest is not None:
        found["learning_rate"] = highest
    if not cosine:
        rated = _OPTIMIZER + "params.lr"
        ledger.each("no effect", "The scheduler's warmup_max_lr counts.", (rated,) if rated in ledger else ())
    found["warmup_steps"] = int(_said(ledger, "warmup_num_steps", "warmup_steps"))
    share = _number(ledger, _name("warmup_min_ratio")) or 0.0
    first = share * (highest or 0.0) if cosine else _said(ledger, "warmup_min_lr", "first_learning_rate")
    found["first_learning_rate"] = first
    ledger.mapped("train.schedule.first_learning_rate.", _name("warmup_min_ratio"))
    if ledger.get(_name("warmup_type"), "log") != "linear":
        why = "Their warm-up rises with the logarithm of the step; here it rises evenly."
        ledger.note(_name("warmup_type"), "changed", why)
    ledger.mapped("Warm-up rises evenly.", *(() if ledger.noted(_name("warmup_type")) else (_name("warmup_type"),)))
    if kind != "WarmupLR":
        total = _number(ledger, _name("total_num_steps"))
        if total is not None:
            found["decay_steps"] = int(total)
            ledger.mapped("train.schedule.decay_steps.", _name("total_num_steps"))
        share = _said(ledger, "cos_min_ratio", "final_learning_rate") if cosine else 0.0
        found["final_learning_rate"] = share * (highest or 0.0)
    _left_open(ledger, names)
    return found


def _name(option: str) -> str:
    return f"{_SCHEDULER}params.{option}"


def _said(ledger: Ledger, option: str, key: str) -> float:
    """A number of the scheduler, or DeepSpeed's own where it is not said; `key`: its name in `train.schedule`."""
    name = _name(option)
    value = _number(ledger, name)
    ledger.mapped(f"train.schedule.{key}.", *(() if value is None else (name,)))
    if name not in ledger:
        ledger.note(name, "mapped", f"Not said: {_UNSAID[option]:g}, the default there.", value=_UNSAID[option])
    return _UNSAID[option] if value is None else value


def _number(ledger: Ledger, name: str) -> float | None:
    """A number from 0, None where it is not said or left to the program."""
    if ledger.get(name) == "auto":
        return None
    value = ledger.number(name)
    if value is not None and value < 0:
        ledger.refuse(name, f"{name} is {value:g}; it is 0 or more.")
    return value


def _left_open(ledger: Ledger, names: list[str]) -> None:
    """Tell of what a program fills in itself."""
    for name in names:
        if ledger.get(name) == "auto":
            ledger.changed("Left to the program, which is not read; seqloom's or the flags' own counts.", name)
