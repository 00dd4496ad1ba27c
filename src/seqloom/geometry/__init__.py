"""Positions, masks and layouts: integers about global token positions, no torch."""

from seqloom.geometry.heads import HeadSplit
from seqloom.geometry.layout import Layout
from seqloom.geometry.mask import Mask
from seqloom.geometry.span import Span, cut, even_bounds, even_sizes, total
from seqloom.geometry.tile import Tile, keys_of

__all__ = ["HeadSplit", "Layout", "Mask", "Span", "Tile", "cut", "even_bounds", "even_sizes", "keys_of", "total"]
