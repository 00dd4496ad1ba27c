"""Context parallelism of Megatron-LM, MindSpeed and Megatron-DeepSpeed: ring, Ulysses and how they exchange."""

import re
from typing import Any

from seqloom.dialects.context import axes, check_length
from seqloom.dialects.ledger import Ledger
from seqloom.errors import DialectError

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
DEEPSPEED_ULYSSES = ("--ds-sequence-parallel-size", "deepspeed_config.sequence_parallel_size")
_MINDSPEED_ONLY = ("--ulysses-degree-in-cp", "--cp-window-size")


def context_axes(ledger: Ledger, context: int, version: str | None) -> dict[str, Any]:
    """ring, ulysses and how they exchange."""
    ledger.mapped(
        f"{context} ranks share a sequence." if context > 1 else "Each sequence is whole.", "--context-parallel-size"
    )
    algorithm = ledger.word("--context-parallel-algo", ALGORITHMS)
    unsaid = default_algorithm(version)
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
        return _deepspeed_ulysses(ledger)
    if any(ledger.whole(name) > 1 for name in DEEPSPEED_ULYSSES):
        ledger.refuse(
            DEEPSPEED_ULYSSES[0],
            "Megatron-DeepSpeed's sequence parallelism and --context-parallel-size are both above 1; give one of them.",
        )
    if algorithm is None and "--cp-comm-type" in ledger:
        return _megatron_context(ledger, context)
    if algorithm is None:
        choice = unsaid
        ledger.note(
            kind,
            "changed",
            f"Not said: taken as {choice}. MindSpeed up to core_r0.8.0 takes ulysses_cp_algo, as it documents; "
            "later ones "
            "take megatron_cp_algo (ring), as Megatron-LM itself does; --dialect-version decides.",
        )
    ledger.no_effect(f"{kind} decides here.", "--cp-comm-type", "--hierarchical-context-parallel-sizes")
    return _mindspeed_context(ledger, context, choice or "")


def sequence_ranks(ledger: Ledger) -> int:
    """Ranks that share a sequence, by whichever option says it."""
    return max(ledger.whole(name) for name in ("--context-parallel-size", *DEEPSPEED_ULYSSES))


def _deepspeed_ulysses(ledger: Ledger) -> dict[str, Any]:
    """Megatron-DeepSpeed's Ulysses; the flag and the JSON must agree."""
    degrees = {ledger.whole(name) for name in DEEPSPEED_ULYSSES if name in ledger} or {1}
    if len(degrees) > 1:
        ledger.refuse(DEEPSPEED_ULYSSES[0], f"{' and '.join(DEEPSPEED_ULYSSES)} differ; make them equal.")
    ledger.mapped(f"ulysses={max(degrees)}.", *DEEPSPEED_ULYSSES)
    return axes(1, max(degrees))


def default_algorithm(version: str | None) -> str:
    """What context parallelism without a named algorithm is: Ulysses in MindSpeed up to 2.0.0_core_r0.8.0.

    Raises DialectError for a version that is none.

    >>> default_algorithm(None), default_algorithm("core_r0.12.1"), default_algorithm("megatron-lm")
    ('ulysses_cp_algo', 'megatron_cp_algo', 'megatron_cp_algo')
    >>> default_algorithm("2.0.0"), default_algorithm("1.0.RC3"), default_algorithm("2.1.0")
    ('ulysses_cp_algo', 'ulysses_cp_algo', 'megatron_cp_algo')
    """
    if version is None:
        return "ulysses_cp_algo"
    if version.lower().startswith(("megatron", "master", "main", "head")):
        return "megatron_cp_algo"
    found = re.search(r"r(\d{1,4})\.(\d{1,4})(\.\d{1,4})?$", version) or re.match(r"v?(\d{1,4})\.(\d{1,4})\b", version)
    if found is None:
        raise DialectError(
            f"'{version[:40]}' is no version; give core_r0.8.0 or 2.0.0 and the like of MindSpeed, or megatron-lm."
        )
    numbers = int(found[1]), int(found[2])
    return "ulysses_cp_algo" if numbers <= (0, 8) or (1, 0) <= numbers <= (2, 0) else "megatron_cp_algo"


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
        ledger.no_effect(f"{name} decides here.", *_MINDSPEED_ONLY)
        return found
    ledger.no_effect(f"{name} decides here.", *_MINDSPEED_ONLY)
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
    if choice == "kvallgather_cp_algo" or "adaptive" in choice:
        ledger.no_effect(f"{choice} goes round no ring here.", "--cp-window-size")
        window = 1
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
    if ledger.noted(name) or name not in ledger:
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
