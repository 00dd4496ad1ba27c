"""Colossal-AI: plugins in a Python file, the older configuration files, and command lines of its benchmarks."""

import ast
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seqloom.dialects import colossalai_benchmark, colossalai_legacy
from seqloom.dialects.colossalai_gemini import gemini
from seqloom.dialects.colossalai_options import GEMINI, HYBRID, MOE, close, said_version
from seqloom.dialects.colossalai_plugin import hybrid
from seqloom.dialects.flags import from_text, from_words
from seqloom.dialects.ledger import Ledger, Unread, flatten, plain
from seqloom.dialects.literals import Source
from seqloom.dialects.models import by_name
from seqloom.dialects.translation import Draft, Translation, conclude
from seqloom.errors import DialectError

PLUGINS = {"HybridParallelPlugin": HYBRID, "MoeHybridParallelPlugin": [*MOE, *HYBRID], "GeminiPlugin": GEMINI}
OTHERS: dict[str, dict[str, Any]] = {
    "LowLevelZeroPlugin": {"tp_size": 1, "pp_size": 1, "zero_stage": 1},
    "TorchDDPPlugin": {"tp_size": 1, "pp_size": 1, "precision": "fp32"},
}
"""Plugins that are the hybrid one with some arguments fixed, as defaults."""


def translate(
    settings: str | Sequence[str],
    *,
    world: int | None = None,
    version: str | None = None,
    keep_order: bool = False,
    folder: Path | None = None,
    title: str = "",
) -> Translation:
    """The plan of a Python file's plugin or CONFIG, or of a benchmark's command line.

    world: processes there are; data parallelism is what is left of them. version: `0.4.3`, where inner rings of
    ring attention have a rule of their own. Raises DialectError with every reason why there is no plan.
    """
    if not isinstance(settings, str) or _is_command_line(settings):
        line = from_text(settings) if isinstance(settings, str) else from_words(settings)
        return colossalai_benchmark.translate(line, world=world, version=version, keep_order=keep_order, title=title)
    source = Source.read(settings)
    found = list(source.calls([*PLUGINS, *OTHERS]))
    if not found:
        if given := colossalai_legacy.settings(source):
            return colossalai_legacy.translate(given, world=world, keep_order=keep_order, version=version)
        raise DialectError(
            f"The file makes none of {', '.join(PLUGINS)} and holds no `parallel = dict(...)`; give one that does."
        )
    name, arguments = _the_plugin(source, found)
    ledger, draft = _drafted(name, arguments, world, version)
    _surroundings(ledger, source, draft)
    _optimizer(ledger, source, draft.train["schedule"])
    again = _recompute(ledger, source, draft)
    model = _model(ledger, source) or draft.model
    close(ledger)
    return conclude(ledger, Draft({**draft.plan, **again}, model, draft.train, draft.order, draft.peculiar), keep_order)


def translate_plugin(name: str, arguments: Mapping[str, Any], *, world: int) -> Translation:
    """The plan of a plugin made with these arguments in a world of so many processes.

    name: of its class. Their rank order is kept, where an order of axes tells it. Raises DialectError with every
    reason why there is no plan.
    """
    ledger, draft = _drafted(name, _as_hybrid(name, arguments), world, None)
    close(ledger)
    return conclude(ledger, draft, keep_order=draft.peculiar is None)


def translate_config(settings: Mapping[str, Any] | str, *, world: int) -> Translation:
    """The plan of a CONFIG, which is a dict or the text of a Python file that is read and never run.

    Their rank order is kept. Raises DialectError with every reason why there is no plan.
    """
    given = colossalai_legacy.settings(Source.read(settings)) if isinstance(settings, str) else dict(flatten(settings))
    if given is None:
        raise DialectError("The file holds no `parallel = dict(...)`; give one that does.")
    return colossalai_legacy.translate(given, world=world, keep_order=True)


def _drafted(name: str, arguments: Mapping[str, Any], world: int | None, version: str | None) -> tuple[Ledger, Draft]:
    """What the arguments of a plugin say, as it is read."""
    ledger = Ledger(arguments)
    said_version(ledger, version)
    draft = (
        gemini(ledger, world) if name == "GeminiPlugin" else hybrid(ledger, world, version, moe=name.startswith("Moe"))
    )
    for option in arguments:
        near = get_close_matches(option, PLUGINS.get(name, HYBRID), 1, 0.8)
        if near and near[0] != option and option not in HYBRID:
            ledger.refuse(option, f"{option} is no argument of {name} (did you mean '{near[0]}'?).")
    return ledger, draft


def _as_hybrid(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a plugin that is the hybrid one with some fixed, as the hybrid one takes them."""
    if name not in OTHERS:
        return dict(arguments)
    renamed = {"stage": "zero_stage"}
    return {**OTHERS[name], **{renamed.get(key, key): value for key, value in arguments.items()}}


def _is_command_line(text: str) -> bool:
    """Whether a text is flags or a launch script, rather than Python."""
    if text.lstrip().startswith(("#!/bin/", "#!/usr/bin/env bash", "-")):
        return True
    if "Plugin(" in text or ("parallel" in text and "dict(" in text):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ".py " in text or " --" in text or " -" in text
    return False


def _the_plugin(source: Source, found: Sequence[tuple[str, ast.Call]]) -> tuple[str, dict[str, Any]]:
    """The one plugin that a file makes; several are refused unless they say the same."""
    read = []
    for name, call in found:
        arguments = source.arguments(call, HYBRID if name == "HybridParallelPlugin" else [])
        read.append((name, _as_hybrid(name, arguments)))
    if any(other != read[0] for other in read[1:]):
        lines = ", ".join(f"{name} at line {call.lineno}" for name, call in found)
        raise DialectError(f"The file makes several plugins ({lines}); give a file that makes one.")
    return read[0]


def _recompute(ledger: Ledger, source: Source, draft: Draft) -> dict[str, str]:
    """recompute=full where the program turns it on in its model, wherever the call stands."""
    for _, call in source.calls(["gradient_checkpointing_enable"]):
        draft.train["recompute"] = "full"
        why = f"recompute=full, as the call at line {call.lineno} says; the result is the same."
        ledger.note("gradient_checkpointing_enable", "mapped", why)
        return {"recompute": "full"}
    return {}


def _surroundings(ledger: Ledger, source: Source, draft: Draft) -> None:
    """Batch sizes of prepare_dataloader, as far as they are written out."""
    for _, call in source.calls(["prepare_dataloader"]):
        arguments = source.keywords(call) if all(keyword.arg for keyword in call.keywords) else {}
        batch = arguments.get("batch_size")
        if isinstance(batch, int) and not isinstance(batch, bool) and batch > 0:
            data = draft.plan["data"]
            draft.train["global_batch"] = batch * data
            micro = draft.train.get("micro_batch") or batch // (draft.train.get("accumulate") or 1)
            draft.train["micro_batch"], draft.train["accumulate"] = micro, max(1, batch // max(1, micro))
            why = f"Rows on each of {data} data ranks: a batch of {batch * data}."
            ledger.note("prepare_dataloader.batch_size", "mapped", why, value=batch)
        for name in ("shuffle", "drop_last", "seed", "num_workers", "pin_memory"):
            if name in arguments:
                why = "Order and loading of data are seqloom's own (data.seed)."
                value = arguments[name]
                ledger.note(f"prepare_dataloader.{name}", "no effect", why, value=getattr(value, "text", value))


_ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{name: _ADAM for name in ("HybridAdam", "CPUAdam", "FusedAdam")},
    "AdamW": _ADAM | {"weight_decay": 0.01},
    **{name: {} for name in ("Adam", "SGD", "Lamb", "Lars", "CAME", "Adafactor", "DistGaloreAwamW")},
}
"""Optimizers with their defaults; those without any are no AdamW."""

_SCHEDULERS = (
    *("CosineAnnealingLR", "CosineAnnealingWarmupLR", "LinearWarmupLR", "StepLR", "MultiStepLR", "ConstantLR"),
    *("LambdaLR", "OneCycleLR", "PolynomialLR", "PolynomialWarmupLR", "FlatAnnealingWarmupLR", "ExponentialLR"),
    *("get_linear_schedule_with_warmup", "get_cosine_schedule_with_warmup", "get_scheduler"),
)


def _optimizer(ledger: Ledger, source: Source, schedule: dict[str, Any]) -> None:
    """What the program's optimizer is, as far as it is written out; its own defaults for the rest."""
    for name, _ in source.calls(_SCHEDULERS):
        why = "A program's schedule is not read; train.schedule, warmup_steps and decay_steps say it for a run."
        ledger.note(name, "changed", why)
    for name, call in source.calls(list(_OPTIMIZERS)):
        schedule["optimizer"] = "adamw" if _OPTIMIZERS[name] else name
        given = source.keywords(call) if all(keyword.arg for keyword in call.keywords) else {}
        if len(call.args) > 1:
            given = {"lr": source.value(call.args[1]), **given}
        keys = {"lr": "learning_rate", "betas": "betas", "eps": "epsilon", "weight_decay": "weight_decay"}
        for option, default in _OPTIMIZERS[name].items():
            value = given.get(option, default)
            if isinstance(value, Unread):
                why = f"{value.why[0].upper()}{value.why[1:]}; set train.{keys[option]} for a run."
                ledger.note(f"{name}.{option}", "changed", why, value=value.text)
                continue
            schedule[keys[option]] = list(value) if isinstance(value, tuple) else value
            said = "" if option in given else "Not said, the default there: "
            ledger.note(f"{name}.{option}", "mapped", f"{said}train.schedule.{keys[option]}.", value=plain(value))
        for option in given.keys() - keys.keys():
            why = "It is about how the optimizer computes; the result is the same."
            ledger.note(f"{name}.{option}", "no effect", why, value=plain(given[option]))
        return


_CONFIGS = {
    "LlamaConfig": "llama",
    "MistralConfig": "mistral",
    "MixtralConfig": "mixtral",
    "Qwen2Config": "qwen2",
    "Qwen3Config": "qwen3",
    "GPT2Config": "gpt2",
    "BloomConfig": "bloom",
    "DeepseekV2Config": "deepseek_v2",
    "DeepseekV3Config": "deepseek_v3",
}
_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""What LlamaConfig takes where nothing is said."""


def _model(ledger: Ledger, source: Source) -> dict[str, Any] | None:
    """The model that the file makes: a configuration written out, or a name that is known."""
    for name, call in source.calls(list(_CONFIGS)):
        try:
            given = source.keywords(call)
        except (ValueError, RecursionError):
            given = {"**": Unread("**", "it is not a literal")}
        if any(isinstance(value, Unread) for value in given.values()) or call.args or source.changes(call):
            what = "is changed after it is made" if source.changes(call) else "is not written out"
            ledger.note("model", "changed", f"{name} at line {call.lineno} {what}, so the model is not known.")
            return None
        family = _CONFIGS[name]
        ledger.note("model", "mapped", f"{name} at line {call.lineno}.", value=name)
        return {"model_type": family, **(_LLAMA if family == "llama" else {}), **given}
    for _, call in source.calls(["from_pretrained"]):
        value = source.value(call.args[0]) if call.args else None
        if isinstance(value, str) and (found := by_name(value)):
            ledger.note("model", "mapped", f"Known by name as {found[0]}.", value=value)
            return found[1]
    return None
