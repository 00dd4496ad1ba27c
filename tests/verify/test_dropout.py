"""Dropout in a verdict: the reference draws the plan's coins from their definition, and finds those that differ."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from seqloom.attention import dropout as attention_dropout
from seqloom.errors import ModelError
from seqloom.model import Float64Islands
from seqloom.plan import FAMILIES, Plan, fit, read_config
from seqloom.tensor import ParallelDropout
from seqloom.verify import Case, Verdict, verify_here
from seqloom.verify.coins import stays
from seqloom.verify.oracle import one_device_logits

TOKENS = 35


def case(text: str, family: str, **changes: Any) -> Case:
    plan = Plan.parse(text)
    config = fit(read_config(family), plan, TOKENS)
    return Case(**{"config": config, "plan": plan, "num_tokens": TOKENS, "dropout": 0.3, **changes})


PLANS = [
    ("llama", "data=1"),
    ("llama", "data=2 ring=2 exchange=needed"),
    ("gpt2", "ring=3 layout=striped"),
    ("gpt2", "ulysses=2 data=2"),
    ("gpt_oss", "ring=2 ulysses=2"),
    ("gemma2", "tensor=2"),
    ("bloom", "tensor=2 data=2"),
    ("gpt2", "tensor=2 sequence_parallel=false"),
    ("gpt2", "tensor=2 ring=2"),
    ("qwen3", "tensor=4 tensor_kind=2d"),
    ("llama", "tensor=4 tensor_kind=3d grid=2x2x1"),
]


@pytest.mark.parametrize(("family", "text"), PLANS)
def test_dropped_alike(pool: Pool, family: str, text: str) -> None:
    """Catches coins that depend on the plan, on a rank's own tokens, heads or channels, or on the micro-batch; a weight
    or channel that another layer drops too; and a scale that is left out."""
    what = case(text, family, batch=2, steps=2, accumulate=2)
    for verdict in pool.run(what.plan.world_size, verify_here, what):
        assert verdict.equal and verdict.worst_gradient_error < 1e-11, verdict
        assert verdict.dropouts == tuple(f"{key}=0.3" for key in what.dropouts) and verdict.dropouts_off == ()


def logits(family: str, **changes: Any) -> torch.Tensor:
    what = case("data=1", family, **changes)
    with Float64Islands(), torch.no_grad():
        model = what.model()
        model.set_attn_implementation("eager")
        return one_device_logits(model, what.batches()[0][0], 0, precision="float64")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_drops_out(family: str) -> None:
    """Catches a reference that drops nothing, or by torch's own coins: a plan that does the same would be 'equal'."""
    first = logits(family)
    assert torch.equal(first, logits(family))
    for other in (logits(family, dropout=None), logits(family, dropout=0.31), logits(family, seed=1)):
        assert (first - other).norm() / first.norm() > 1e-3


def test_what_is_set() -> None:
    """Catches a dropout of the family that is forgotten because the configuration does not name it, one of another
    head, and one that no plan can have, which would be refused."""
    assert case("data=1", "llama").dropouts == ("attention_dropout",)
    gpt2 = case("data=1", "gpt2")
    assert set(gpt2.dropouts) == {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    assert {gpt2.settings[key] for key in gpt2.dropouts} == {0.3}
    assert {replace(gpt2, dropout=None).settings[key] for key in gpt2.dropouts} == {0.0}
    config = {**read_config("bloom"), "hidden_dropout": 0.1, "attention_dropout": 0.2}
    bloom = case("data=1", "bloom", config=config)
    assert bloom.dropouts == ("attention_dropout",)
    assert (bloom.settings["attention_dropout"], bloom.settings["hidden_dropout"]) == (0.3, 0.0)
    with patch.object(sys.modules["seqloom.verify.verify"], "_split", lambda case, fabric: reference(case)):
        verdict = verify_here(bloom)
    assert verdict.dropouts == ("attention_dropout=0.3",) and verdict.dropouts_off == ("hidden_dropout=0.1",)


def reference(what: Case) -> Any:
    module = sys.modules["seqloom.verify.verify"]
    from seqloom.fabric import Fabric

    return module._reference(what, Fabric.build(Plan()))


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_probabilities_that_are_none(p: float) -> None:
    """Catches everything dropped, of which a division by zero is made, or nothing where something was asked."""
    with pytest.raises(ModelError, match=r"dropout is .*; it must be above 0 and below 1, or left out for none\."):
        case("data=1", "llama", dropout=p).check()


def test_coins_are_fair() -> None:
    """Catches coins that share a number, ignore one, or fall more often to one side."""
    kept = stays(0.25, 3, torch.arange(40)[:, None].numpy(), -2, torch.arange(500).numpy())
    assert kept.shape == (40, 500) and abs(kept.double().mean() - 0.75) < 0.01
    for other in (stays(0.25, 4, torch.arange(40)[:, None].numpy(), -2, torch.arange(500).numpy()), kept.roll(1, 0)):
        assert abs((kept == other).double().mean() - (0.75**2 + 0.25**2)) < 0.02


Fault = Callable[[], AbstractContextManager[Any]]


def on_rank(rank: int, owner: Any, name: str, wrong: Callable[..., Any]) -> Fault:
    original = getattr(owner, name)
    return lambda: patch.object(
        owner, name, lambda *args: (wrong if dist.get_rank() == rank else lambda f, *rest: f(*rest))(original, *args)
    )


FAULTS: dict[str, tuple[Case, Fault, str]] = {
    "another row": (
        case("tensor=2", "gpt2"),
        on_rank(1, ParallelDropout, "_drawn_from", lambda right, self: (0, right(self)[1] + 1)),
        "Activations part first in transformer.drop: rank 1, row 0, position 17 ",
    ),
    "local positions": (
        case("ring=2", "gpt2"),
        on_rank(1, ParallelDropout, "_positions", lambda right, self, x: torch.arange(len(right(self, x)))),
        "Activations part first in transformer.drop: rank 1, row 0, position 8 ",
    ),
    "heads of another rank": (
        case("tensor=2", "llama"),
        on_rank(
            1,
            sys.modules["seqloom.attention.front"],
            "dropout_keys",
            lambda right, seed, samples, layer, heads, device: right(
                seed, samples, layer, [h - 2 for h in heads], device
            ),
        ),
        "Activations part first in model.layers.0.self_attn, in what it hands to o_proj: rank 1, row 0, position 0 ",
    ),
}


def faulty(name: str) -> Verdict:
    what, fault, _ = FAULTS[name]
    with fault():
        return verify_here(what)


@pytest.mark.parametrize("name", FAULTS)
def test_other_coins_are_found(pool: Pool, name: str) -> None:
    """Catches a reference that follows the split run instead of the definition."""
    what, _, said = FAULTS[name]
    for verdict in pool.run(what.plan.world_size, faulty, name):
        assert not verdict.equal and str(verdict.parting).startswith(said), verdict.parting


def test_patches_hit_what_they_mean_to() -> None:
    """Catches faults above that patch a name nobody reads any more."""
    assert sys.modules["seqloom.attention.front"].dropout_keys is attention_dropout.keys
