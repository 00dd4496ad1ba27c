"""Memory that does not grow with ring x ulysses, counted on tensors."""

import torch

from benchmarks.memory import TensorBytes, page_body, rank_bytes
from pool import Pool

TOKENS, HIDDEN = 32, 512


def test_bytes_stay_flat_as_sequence_ranks_grow(pool: Pool) -> None:
    """Catches buffers that grow with the ranks or the whole sequence, and weights that ZeRO holds whole."""
    plans = {"ring=2": 2, "ring=2 ulysses=2": 4, "zero=3 ring=2": 2, "zero=3 ring=2 ulysses=2": 4}
    found = {text: pool.run(world, rank_bytes, text, TOKENS, HIDDEN, 1) for text, world in plans.items()}
    for text, rows in found.items():
        assert all(abs(row["rest_bytes"] / row["formula_bytes"] - 1) < 0.01 for row in rows), text
        assert all(row["most_bytes"] > row["rest_bytes"] for row in rows), text
    most = {text: max(row["most_bytes"] for row in rows) for text, rows in found.items()}
    assert abs(most["ring=2 ulysses=2"] / most["ring=2"] - 1) < 0.01
    assert most["zero=3 ring=2 ulysses=2"] < 0.9 * most["zero=3 ring=2"] < 0.9 * most["ring=2"]
    page = page_body([{"plan": text, **row} for text, rows in found.items() for row in rows])
    assert page.count("\n") == 1 + len(plans)


def test_the_count_sees_what_lives_and_forgets_what_ended() -> None:
    """Catches storages counted twice, missed inside autograd, or kept after their end."""
    counter = TensorBytes()
    before = counter.now()
    with counter:
        x = torch.ones(1000, requires_grad=True)
        y = (x.exp() * 2).view(10, 100)
        kept = counter.now() - before
    assert kept == 3 * 4000  # x, its exp, which autograd keeps, and y
    y.untyped_storage().resize_(0)
    assert counter.now() - before == 2 * 4000
    del x, y
    assert counter.now() == before
