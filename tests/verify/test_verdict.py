"""The proof itself must be able to fail: every mistake it is there to see, made on purpose in one rank."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pool import Pool
from seqloom.errors import SeqloomError
from seqloom.geometry import Mask
from seqloom.model import Float64Islands, pipeline, sum_gradients, token_loss
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import Batch
from seqloom.train import step
from seqloom.verify import MEASURES, Case, Verdict, verify, verify_here
from seqloom.verify.oracle import Trajectory

TOKENS = 48
DOCUMENTS = (7, 13, 28)


def case(text: str = "ring=2", family: str = "llama", **changes: Any) -> Case:
    plan = Plan.parse(text)
    config = fit(read_config(family), plan, TOKENS)
    return Case(config=config, plan=plan, num_tokens=TOKENS, documents=DOCUMENTS, **changes)


@pytest.mark.parametrize("dtype", ["float64", "bf16"])
def test_scores_that_insist_on_float32(dtype: str) -> None:
    """Catches GPT-2's own attention in float32 asked for in float64, where it raises: exact scores are wider."""
    asked = case(family="gpt2", dtype=dtype)
    asked = replace(asked, config={**asked.config, "reorder_and_upcast_attn": True})
    assert asked.settings["reorder_and_upcast_attn"] is (dtype != "float64")
    assert asked.config["reorder_and_upcast_attn"] is True


def test_what_cases_share_a_run_on_one_device() -> None:
    """Catches a split run held against one device's run of another model, batch or number of steps."""
    base = case("ring=2")
    assert base.on_one_device == case("ulysses=2").on_one_device == case("pipeline=2 schedule=gpipe").on_one_device
    others = [
        case("data=2"),
        *(replace(base, **change) for change in ({"steps": 2}, {"accumulate": 2}, {"batch": 2}, {"seed": 1})),
        *(replace(base, **change) for change in ({"documents": None}, {"rule": Mask(window=5)}, {"dtype": "bf16"})),
        replace(base, config={**base.config, "rms_norm_eps": 1e-3}),
        replace(base, plan=Plan(pipeline=2, schedule="zbv", ring=2), accumulate=3),
    ]
    assert len({each.on_one_device for each in (base, *others)}) == 1 + len(others)
    dropped = [replace(case(text), dropout=0.1) for text in ("ring=2", "ulysses=2")]  # each plan has its own coins
    assert dropped[0].on_one_device != dropped[1].on_one_device


def on_last_rank(change: Callable[[nn.Module], None]) -> Any:
    """`sum_gradients` followed by a change of the model on the last rank."""

    def altered(model: nn.Module, fabric: Any) -> None:
        sum_gradients(model, fabric)
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                change(model)

    return patch.object(step, "sum_gradients", altered)


def one_entry(model: nn.Module) -> None:
    """A millionth of one parameter's norm, in one element of its gradient."""
    gradient = model.model.layers[1].mlp.down_proj.weight.grad
    gradient[0, 0] += 1e-6 * gradient.norm()


def doubled(model: nn.Module) -> None:
    model.model.layers[0].self_attn.k_proj.weight.grad.mul_(2)


def scaled_loss(factor: float) -> Any:
    """A loss off by a factor, as when ranks average what they should sum."""
    return patch.object(pipeline, "token_loss", lambda *args, **kwargs: token_loss(*args, **kwargs) * factor)


def unsummed(model: nn.Module, fabric: Any) -> None:
    """Gradients that stay on their rank."""


def short_mask(batch: Batch, row: int) -> Mask:
    """The first document's bound lost."""
    assert batch.documents is not None
    first, second, *rest = batch.documents[row]
    return Mask(documents=(first + second, *rest))


def split_only(name: str, replacement: Any) -> Any:
    """Patch a method of Batch for the split run alone: the reference asks from another module."""
    original = getattr(Batch, name)

    def chosen(self: Batch, *args: Any) -> Any:
        asking = sys._getframe(1).f_globals["__name__"]
        return (replacement if asking == "seqloom.sequence.shard" else original)(self, *args)

    return patch.object(Batch, name, chosen)


def halved_positions(batch: Batch) -> torch.Tensor:
    """Wrong by more than a shift, which rotary angles would not feel."""
    return torch.arange(batch.num_tokens).repeat(len(batch.tokens), 1) // 2


def altered_run(change: Callable[[Trajectory], None]) -> Any:
    """A change of what the last rank's run leaves behind, made just before it is compared."""
    module = sys.modules["seqloom.verify.verify"]  # by path, since the function `verify` hides the module of its name
    compare = module.compare

    def altered(run: Trajectory, *others: Any) -> Verdict:
        if dist.get_rank() == dist.get_world_size() - 1:
            change(run)
        return compare(run, *others)

    return patch.object(module, "compare", altered)


def not_a_number() -> Any:
    return altered_run(lambda run: run.gradients["model.norm.weight"][0].fill_(math.nan))


MISTAKES: dict[str, Callable[[], Any]] = {
    "a millionth of a gradient, on one rank": lambda: on_last_rank(one_entry),
    "not a number, on one rank": not_a_number,
    "one gradient doubled": lambda: on_last_rank(doubled),
    "loss doubled": lambda: scaled_loss(2.0),
    "loss halved": lambda: scaled_loss(0.5),
    "gradients not summed": lambda: patch.object(step, "sum_gradients", unsummed),
    "a document bound dropped": lambda: split_only("mask", short_mask),
    "documents dropped": lambda: split_only("mask", lambda batch, row: Mask()),
    "positions wrong": lambda: split_only("positions", halved_positions),
}


def mistaken(name: str, what: Case) -> Verdict:
    with MISTAKES[name]():
        return verify_here(what)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_seen(pool: Pool, name: str) -> None:
    """Catches a proof that a wrong run passes; and every rank must say so, not only the one that is wrong."""
    verdicts = pool.run(2, mistaken, name, case())
    assert [verdict.equal for verdict in verdicts] == [False, False]
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize(
    ("name", "parameter", "error"),
    [
        ("a millionth of a gradient, on one rank", "model.layers.1.mlp.down_proj.weight", 1e-6),
        ("one gradient doubled", "model.layers.0.self_attn.k_proj.weight", 1.0),
        ("not a number, on one rank", "model.norm.weight", math.inf),
    ],
)
def test_the_worst_parameter_is_named(pool: Pool, name: str, parameter: str, error: float) -> None:
    """Catches a verdict that points elsewhere, or an error measured against another scale than the parameter's own."""
    for verdict in pool.run(2, mistaken, name, case()):
        assert verdict.worst_parameter == parameter
        assert verdict.worst_gradient_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["loss doubled", "one gradient doubled", "gradients not summed", "documents dropped"])
def test_mistakes_are_seen_in_lower_types(pool: Pool, name: str, dtype: str) -> None:
    """Catches a tolerance so wide that a lost shard, a document bound or a factor of two passes."""
    assert not any(verdict.equal for verdict in pool.run(2, mistaken, name, case(dtype=dtype)))


@pytest.mark.parametrize("text", ["ring=2 ulysses=2", "data=2 ring=2 exchange=gather"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_lower_types_are_equal_within_their_tolerance(pool: Pool, dtype: str, text: str) -> None:
    """Catches a tolerance that right runs miss; the measured error says that the type was used at all."""
    for verdict in pool.run(4, verify_here, case(text, "qwen2", dtype=dtype, steps=2, accumulate=2)):
        assert verdict.equal and verdict.tolerance == MEASURES[dtype].tolerance, verdict
        assert verdict.worst_gradient_error > {"float32": 1e-8, "bf16": 1e-4}[dtype]


def test_float64_is_exact(pool: Pool) -> None:
    """Catches float32 islands left in a model: they sit 1e-7 from exact, far over what is met here."""
    for family in ("llama", "qwen3"):
        for verdict in pool.run(3, verify_here, case("ring=3", family, steps=3)):
            assert verdict.equal and verdict.tolerance == 1e-9 and verdict.steps == 3
            assert max(verdict.loss_error, verdict.gradient_norm_error, verdict.worst_gradient_error) < 1e-12


def later_loss_lost(what: Case) -> Verdict:
    """The loss of the second step is not a number, on the last rank."""
    with altered_run(lambda run: run.losses.__setitem__(1, math.nan)):
        return verify_here(what)


def test_a_loss_that_is_not_a_number_at_a_later_step(pool: Pool) -> None:
    """Catches Python's max, which passes over NaN unless it comes first, and a rank whose loss nobody looks at."""
    for verdict in pool.run(2, later_loss_lost, case(steps=2)):
        assert verdict.loss_error == math.inf and not verdict.equal
        assert verdict.gradient_norm_error < 1e-12


def test_errors_that_are_not_numbers_are_not_equal() -> None:
    """Catches NaN that compares as no error."""
    clean = Verdict(
        plan="ring=2",
        world_size=2,
        dtype="float64",
        steps=1,
        tolerance=1e-9,
        loss_error=0.0,
        gradient_norm_error=0.0,
        worst_gradient_error=0.0,
        worst_parameter="w",
        parameter_error=0.0,
    )
    assert clean.equal
    for field in ("loss_error", "gradient_norm_error", "worst_gradient_error", "parameter_error"):
        for error in (math.nan, math.inf, 1.1e-9):
            assert not replace(clean, **{field: error}).equal, (field, error)
        assert replace(clean, **{field: 1e-9}).equal


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": -1}, "accumulate is -1"),
        ({"documents": (7, 13, 29)}, "sum to 49"),
        ({"num_tokens": 50}, "50 tokens"),
        ({"num_tokens": 3, "documents": None}, "A sequence of 3 tokens is too short"),
        ({"rule": Mask(documents=(3, 45))}, "documents of each row"),
        ({"documents": (1,) * TOKENS}, "No token predicts another"),
    ],
)
def test_cases_are_refused_before_any_process_starts(changes: dict[str, Any], said: str) -> None:
    """Catches a mistake told by four processes at once, or only after minutes."""
    with patch.object(
        sys.modules["seqloom.verify.verify"], "run_local", side_effect=AssertionError("a process was started")
    ):
        with pytest.raises(SeqloomError, match=said):
            verify(replace(case(), **changes))
        with pytest.raises(AssertionError, match="a process was started"):
            verify(case())


def test_islands_are_lifted_and_left_behind() -> None:
    """Catches a lift that stays on after its scope, or misses one way of asking for float32."""
    x = torch.ones(2, dtype=torch.float64)
    with Float64Islands():
        asked = [
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            torch.softmax(x, 0, dtype=torch.float32),
            torch.zeros(2, dtype=torch.float32),
        ]
    assert [y.dtype for y in asked] == [torch.float64] * len(asked)
    assert x.float().dtype == torch.float32 and torch.zeros(2, dtype=torch.float32).dtype == torch.float32


def test_patches_hit_what_they_mean_to() -> None:
    """Catches mistakes above that patch a name nobody reads any more."""
    assert step.sum_gradients is sum_gradients and pipeline.token_loss is token_loss
