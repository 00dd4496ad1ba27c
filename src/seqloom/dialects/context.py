"""Context parallelism: what each system's names for it come to, and the conditions that come with it."""

from collections.abc import Mapping
from typing import Any

from seqloom.dialects.ledger import Ledger
from seqloom.errors import counted


def axes(
    ring: int = 1, ulysses: int = 1, *, exchange: str = "ring", layout: str = "zigzag", inner: int | None = None
) -> dict[str, Any]:
    """The fields of a plan for a sequence dealt to ring x ulysses ranks; those of one rank stay unsaid."""
    found: dict[str, Any] = {"ring": ring, "ulysses": ulysses}
    if ring > 1:
        found |= {"exchange": exchange, "layout": layout}
        if inner is not None and 1 < inner < ring:
            found["inner_ring"] = inner
    return found


def check_heads(ledger: Ledger, option: str, plan: Mapping[str, Any], heads: int | None, kv_heads: int | None) -> None:
    """Heads over ulysses x tensor: even, honoured unevenly with a note, or refused where a rank would have none."""
    tensor, ulysses = plan.get("tensor", 1), plan.get("ulysses", 1)
    if heads is None or plan.get("tensor_kind", "1d") != "1d":
        return
    if heads % tensor:
        ledger.refuse(
            option,
            f"{counted(heads, 'query head')} cannot be split evenly over tensor={tensor}; use a divisor of {heads}.",
        )
    elif ulysses * tensor > heads:
        ledger.refuse(
            option,
            f"ulysses={ulysses} x tensor={tensor} is more than the {counted(heads, 'query head')}, and each rank "
            f"takes at least one; the largest ulysses is {heads // tensor}.",
        )
    elif ulysses > 1:
        uneven = heads % (ulysses * tensor) or (kv_heads or heads) % (ulysses * tensor)
        said = (
            f"{heads} query and {counted(kv_heads or heads, 'key/value head')} over ulysses={ulysses} x tensor={tensor}"
        )
        ledger.note(
            option,
            "mapped",
            f"{said} do not divide evenly; seqloom deals heads out unevenly and repeats key/value heads where "
            "there are "
            "too few, exactly."
            if uneven
            else f"{said} divide evenly.",
        )


def check_length(ledger: Ledger, option: str, length: int | None, divisor: int, said: str) -> None:
    """A length that the other system would refuse, which seqloom deals out as it is."""
    if length is not None and divisor > 1 and length % divisor:
        ledger.note(
            option,
            "mapped",
            f"A sequence of {counted(length, 'token')} is no multiple of {said} = {divisor}, which is refused there; "
            "seqloom deals them out unevenly.",
        )


def mask_bytes(length: int | None) -> str:
    """What it saves not to hold the mask of a sequence, in words."""
    if length is None:
        return "The bytes saved are the sequence length squared, at one byte each; the length is not said here."
    return (
        f"A whole mask of {length:,} x {length:,} at one byte each would take {length * length:,} bytes; all of "
        "them are "
        f"saved (theirs keeps a mask of 2,048 x 2,048: 4,194,304 bytes)."
    )
