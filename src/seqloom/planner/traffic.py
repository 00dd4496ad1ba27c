"""Bytes each rank sends, from the formulas: what a byte meter must count, no more and no less.

P is the degree, n the tokens a rank of that axis holds while it communicates, Hq and Hk the query
and key/value heads there, D the head width. Elements sent per rank and layer, even splits:

    ring      forward 2 (P-1) n Hk D            backward 2 (P-1) n Hk D + dKV 2 (P-1) n Hk D
    gather    forward 2 (P-1) n Hk D            backward the same two, as all-gather and reduce-scatter
    ulysses   forward (P-1)/P n D (2 Hq + 2 Hk) backward the same

dK and dV travel in the accumulation type, everything else in the type of the activations. The ring
sends P-1 times, not P: the gradient of a block starts at its first stop and ends at its owner.
Sources: arXiv 2309.14509 (Ulysses), 2310.01889 (ring), 2407.21783 (all-gather).
"""

from seqloom.plan import ModelShape, Plan


def attention_bytes(
    plan: Plan, model: ModelShape, num_tokens: int, *, rows: int = 1, item_bytes: int = 4, accumulate_bytes: int = 4
) -> dict[str, dict[str, int]]:
    """Bytes one rank sends in one attention layer, as {axis: {"forward": ..., "backward": ...}}.

    num_tokens: length of a global sequence, divisible as the plan asks. rows: sequences of one
    local micro-batch. item_bytes: size of an activation element; accumulate_bytes: of a gradient
    on its way around the ring (at least 4).
    """
    ring, ulysses = plan.ring, plan.ulysses
    width = model.head_dim * rows
    held = num_tokens // ring  # tokens a ring rank holds once its Ulysses group has traded heads
    blocks = 2 * (ring - 1) * held * (model.kv_heads // ulysses) * width
    mine = num_tokens // (ring * ulysses)
    traded = (ulysses - 1) * mine * width * (2 * model.heads + 2 * model.kv_heads) // ulysses
    return {
        "ring": {"forward": blocks * item_bytes, "backward": blocks * (item_bytes + accumulate_bytes)},
        "ulysses": {"forward": traded * item_bytes, "backward": traded * item_bytes},
    }


def all_reduce_bytes(num_bytes: int, degree: int) -> int:
    """Bytes one rank sends to sum a buffer of `num_bytes` over `degree` ranks, bandwidth-optimally.

    2 (P-1)/P of the buffer (reduce-scatter, then all-gather), rounded down.
    """
    return 2 * (degree - 1) * num_bytes // degree
