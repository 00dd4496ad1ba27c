"""Coins that do not depend on the plan: each is a hash of the numbers that say what it decides about.

A coin is not the next number of a generator, so every rank, step, tile, device and recomputation finds
the same one, in any order. The hash is the finalizer of splitmix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014, figure 16), applied once to each number in turn:

    key = mix(seed + g);  key = mix(key + g number) for each number      g: the golden ratio, 64 bits

in 64-bit integers that wrap around. Wrapping and shifting are the same on every device; floating point
is not used.
"""

import torch
from torch import Tensor


def signed(number: int) -> int:
    """The 64 bits of `number` as the int64 that torch holds."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


GOLDEN = signed(0x9E3779B97F4A7C15)
FIRST = signed(0xBF58476D1CE4E5B9)
SECOND = signed(0x94D049BB133111EB)
RESOLUTION = 53
"""Bits of the coin that are compared with the probability: as many as a float holds exactly."""


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros moving in; torch's own shift moves the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 in which every bit of the input moves every bit of the output."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def key_of(seed: int, samples: Tensor) -> Tensor:
    """The keys of rows, int64 like `samples`: of each its number in the run's data order."""
    return after(mix(torch.full_like(samples, signed(seed + GOLDEN))), samples)


def after(key: Tensor, number: Tensor | int) -> Tensor:
    """The key, or coin, that follows `key` for one more number; elementwise, the arguments broadcast."""
    return mix(key + (signed(number * GOLDEN) if isinstance(number, int) else number * GOLDEN))


def stays(coin: Tensor, p: float) -> Tensor:
    """Whether what a coin decides about stays, bool, when it is dropped with probability p: 0 <= p <= 1."""
    return _shifted(coin, 64 - RESOLUTION) >= int(p * (1 << RESOLUTION))
