"""Kernels: attention of one tile that also returns the log-sum-exp, one file a library.

`Call` says what a tile asks for, `Kernel` what computes it (`seqloom.attention.kernels.call` holds the
formulas and shapes). `choose` takes the first of `KERNELS` that is here and honours the whole call:
nothing is ever computed by a kernel that honours part of it. `rows` and `render` show the same table.
"""

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.choice import KERNELS, choose, kernels_for
from seqloom.attention.kernels.plain import PLAIN
from seqloom.attention.kernels.table import Row, render, rows
from seqloom.attention.kernels.torch_cpu import TORCH_CPU

__all__ = ["KERNELS", "PLAIN", "TORCH_CPU", "Call", "Kernel", "Row", "choose", "kernels_for", "render", "rows"]
