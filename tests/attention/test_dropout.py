"""The coins of attention dropout, alone."""

import math

import pytest
import torch
from torch import Tensor

from seqloom.attention.dropout import keep, keys
from seqloom.sequence import coin

N = 256
PLACES = torch.arange(N)


def coins(p: float = 0.5, seed: int = 0, samples: tuple[int, ...] = (0,), layer: int = 0) -> Tensor:
    """[rows, 4, N, N] bool."""
    return keep(keys(seed, samples, layer, range(4)), PLACES, PLACES, p)


def within(kept: Tensor, p: float) -> None:
    """The number kept lies within 4 sigma of a binomial's mean."""
    sigma = math.sqrt(kept.numel() * p * (1 - p))
    assert abs(int(kept.sum()) - (1 - p) * kept.numel()) < 4 * sigma


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """Catches a comparison the wrong way round, a signed one, and a probability of the wrong resolution."""
    within(coins(p, samples=(0, 1, 2)), p)


def test_probability_0_keeps_everything() -> None:
    """Catches a threshold that is off by one."""
    assert bool(coins(0.0).all())


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_every_slice_has_the_rate(dim: int) -> None:
    """Catches rows, heads, queries or keys that share a bias: a weak hash leaves stripes."""
    kept = coins(0.3, samples=(5, 6, 7)).movedim(dim, 0).flatten(1).double()
    size = kept.shape[1]
    z = (kept.sum(1) - 0.7 * size) / math.sqrt(size * 0.21)
    assert z.abs().max() < 5
    if len(z) > 30:  # the sums scatter as much as independent coins would: chi squared within 4 sigma
        assert abs(float(z.square().sum()) - len(z)) < 4 * math.sqrt(2 * len(z))


def test_neighbours_are_independent() -> None:
    """Catches coins that repeat, or turn over, from one row, head, query, key, diagonal, layer or seed to the next."""
    base = coins()
    pairs = [
        (base[:, 1:], base[:, :-1]),
        (base[..., 1:, :], base[..., :-1, :]),
        (base[..., 1:], base[..., :-1]),
        (base[..., 1:, 1:], base[..., :-1, :-1]),
        (base[..., :-1, 1:], base[..., 1:, :-1]),
        (base, base.transpose(-1, -2)),
        (base, coins(seed=1)),
        (base, coins(samples=(1,))),
        (base, coins(layer=1)),
    ]
    for one, other in pairs:
        within(one ^ other, 0.5)
    # Four corners of a rectangle: a hash that only adds up one of the query and one of the key fails here.
    within(base[..., 1:, 1:] ^ base[..., :-1, 1:] ^ base[..., 1:, :-1] ^ base[..., :-1, :-1], 0.5)


def test_coins_are_uniform() -> None:
    """Catches bits that are stuck or lean to one side."""
    key = keys(3, [0], 0, [0])
    bits = coin.mix(key + PLACES[:, None] * coin.GOLDEN + torch.arange(64) * coin.FIRST).flatten()
    for bit in range(64):
        within((bits >> bit) & 1 == 1, 0.5)


def test_keys_differ() -> None:
    """Catches two of seed, sample, layer and head that can stand for each other."""
    found = [keys(seed, range(8), layer, range(8)).flatten() for seed in (0, 1, 2, -1, 2**63) for layer in (0, 1, 2, 7)]
    assert len(torch.cat(found).unique()) == 5 * 4 * 64


def test_a_part_finds_the_coins_of_the_whole() -> None:
    """Catches coins that depend on which heads, rows or positions a rank holds."""
    whole = keep(keys(9, range(3), 2, range(8)), PLACES, PLACES, 0.2)
    queries, places = torch.tensor([200, 3, 77]), torch.tensor([9, 250])
    part = keep(keys(9, torch.tensor([2]), 2, torch.tensor([1, 6])), queries, places, 0.2)
    assert torch.equal(part, whole[2:, [1, 6]][:, :, queries][..., places])


def test_known_values() -> None:
    """Catches any change of the coins: a run resumed with other coins is another run."""
    # Python's integers do not wrap, so this is splitmix64 written a second time.
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def after(x: int, number: int) -> int:
        return mix((x + number * 0x9E3779B97F4A7C15) & mask)

    assert after(0, 1) == 0xE220A8397B1DCDAF  # the first number of splitmix64 from seed 0
    seed, sample, layer, head = 12345, 7, 3, 2
    key = after(after(after(after(seed, 1), sample), layer), head)
    assert int(keys(seed, [sample], layer, [head])) & mask == key
    kept = keep(keys(seed, [sample], layer, [head]), torch.tensor([5]), torch.arange(40), 0.25)[0, 0, 0]
    assert kept.tolist() == [after(after(key, 5), place) / 2**64 >= 0.25 for place in range(40)]
