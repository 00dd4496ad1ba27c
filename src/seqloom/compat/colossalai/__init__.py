"""Colossal-AI's names over seqloom: replace `colossalai` by `seqloom.compat.colossalai` in a program of theirs.

`launch` with a CONFIG makes the groups that the layers of `nn` are split over; without one a plugin of
`booster.plugin` makes those that `Booster.boost` splits a transformers model over.
"""

from seqloom.compat.colossalai.start import get_default_parser, launch, launch_from_torch

__all__ = ["get_default_parser", "launch", "launch_from_torch"]


def __getattr__(name: str) -> object:
    """Say which names there are."""
    raise AttributeError(
        f"seqloom.compat.colossalai has no '{name}'; it has {', '.join(__all__)} and the modules accelerator, booster, "
        "cluster, context, core, nn and utils (docs/compat.md)."
    )
