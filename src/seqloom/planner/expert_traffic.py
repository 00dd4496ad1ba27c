"""Bytes each rank sends to its experts' ranks: what a byte meter must count, given what was routed.

A copy of a token for each expert that it goes to and that is not here, [hidden], in the type of the activations.
With `there` copies of this rank's tokens for experts elsewhere, and `here` copies of others' tokens for its own:

    dispatch  there, forward     here, backward (their gradients, back to where they came from)
    return    here, forward      there, backward

and forward, to every other rank, the number of copies for each of its experts, 8 bytes each.
"""

from seqloom.geometry import even_sizes
from seqloom.plan import ModelShape, Plan

COUNT_BYTES = 8


def expert_bytes(
    plan: Plan, model: ModelShape, there: int, here: int, *, rank: int = 0, item_bytes: int = 4
) -> dict[str, int]:
    """Bytes one rank sends along the expert axis in a layer, as {"forward": ..., "backward": ...}.

    there: copies of this rank's tokens for experts of other ranks. here: copies of other ranks' tokens for its
    experts. rank: on the expert axis. item_bytes: size of an activation element.
    """
    held = even_sizes(model.experts, plan.expert)
    copies = (there + here) * model.hidden * item_bytes
    return {"forward": copies + COUNT_BYTES * (model.experts - held[rank]), "backward": copies}
