"""Attention dropout that does not depend on the plan: each (sample, layer, head, query, key) has its own coin.

The coin is a hash of those five numbers and the seed, not the next number of a generator: every rank,
ring step, tile, device and recomputation finds the same one, in any order. The hash is the finalizer
of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
figure 16), applied once to each number in turn:

    key  = mix(mix(mix(mix(seed + g) + g sample) + g layer) + g head)     g: the golden ratio, 64 bits
    coin = mix(mix(key + g query) + g key position)

in 64-bit integers that wrap around. Wrapping and shifting are the same on every device; floating point
is not used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Integers = Sequence[int] | Tensor


def _signed(number: int) -> int:
    """The 64 bits of `number` as the int64 that torch holds."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST = _signed(0xBF58476D1CE4E5B9)
SECOND = _signed(0x94D049BB133111EB)
RESOLUTION = 53
"""Bits of the coin that are compared with the probability: as many as a float holds exactly."""


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros moving in; torch's own shift moves the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the input moves every bit of the output."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def keys(seed: int, samples: Integers, layer: int, heads: Integers, device: torch.device | str | None = None) -> Tensor:
    """The keys [rows, Hq] int64 of a layer's heads in each row, from which `keep` goes on.

    samples: for each row its number in the run's data order. heads: the number of each query head in
    the whole model, so that a rank that holds some of the heads finds the same coins. device: of the
    result; that of `samples` or the CPU by default.
    """
    rows, columns = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (samples, heads))
    key = _mix(torch.full_like(rows, _signed(seed + GOLDEN)))
    key = _mix(key + rows * GOLDEN)
    key = _mix(key + _signed(layer * GOLDEN))
    return _mix(key[:, None] + columns.to(rows.device) * GOLDEN)


def keeps(key: Tensor, query: Tensor, position: Tensor, p: float) -> Tensor:
    """Whether the score of `query` on the key at `position` stays; elementwise, the arguments broadcast."""
    coin = _mix(_mix(key + query * GOLDEN) + position * GOLDEN)
    return _shifted(coin, 64 - RESOLUTION) >= int(p * (1 << RESOLUTION))


def keep(keys: Tensor, q_positions: Tensor, k_positions: Tensor, p: float) -> Tensor:
    """Which scores stay when each is dropped with probability p: bool [rows, Hq, n, m].

    keys: [rows, Hq] from `keys`; q_positions [n], k_positions [m]: int64 positions in the row. 0 <= p < 1.
    """
    return keeps(keys[:, :, None, None], q_positions[:, None], k_positions, p)
