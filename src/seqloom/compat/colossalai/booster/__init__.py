"""`colossalai.booster`: a model, its optimizer and its data under a plugin's plan."""

from seqloom.compat.colossalai.booster.boost import Booster

__all__ = ["Booster"]
