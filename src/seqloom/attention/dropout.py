"""Attention dropout that does not depend on the plan: each (sample, layer, head, query, key) has its own coin.

    key  = after(after(after(seed, sample), layer), head)
    coin = after(after(key, query), key position)

with the hash of `sequence.coin`: every rank, ring step, tile, device and recomputation finds the same one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqloom.sequence.coin import after, key_of, stays

Integers = Sequence[int] | Tensor


def keys(seed: int, samples: Integers, layer: int, heads: Integers, device: torch.device | str | None = None) -> Tensor:
    """The keys [rows, Hq] int64 of a layer's heads in each row, from which `keep` goes on.

    samples: for each row its number in the run's data order. heads: the number of each query head in
    the whole model, so that a rank that holds some of the heads finds the same coins. device: of the
    result; that of `samples` or the CPU by default.
    """
    rows, columns = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (samples, heads))
    return after(after(key_of(seed, rows), layer)[:, None], columns.to(rows.device))


def keeps(key: Tensor, query: Tensor, position: Tensor, p: float) -> Tensor:
    """Whether the score of `query` on the key at `position` stays; elementwise, the arguments broadcast."""
    return stays(after(after(key, query), position), p)


def keep(keys: Tensor, q_positions: Tensor, k_positions: Tensor, p: float) -> Tensor:
    """Which scores stay when each is dropped with probability p: bool [rows, Hq, n, m].

    keys: [rows, Hq] from `keys`; q_positions [n], k_positions [m]: int64 positions in the row. 0 <= p < 1.
    """
    return keeps(keys[:, :, None, None], q_positions[:, None], k_positions, p)
