"""Where the float64 lift was first: it is the models' now."""

from seqloom.model import Float64Islands

__all__ = ["Float64Islands"]
