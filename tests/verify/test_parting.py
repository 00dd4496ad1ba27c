"""A verdict that is not equal names where: the faults are made on one rank, and the place must be the one."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pool import Pool
from seqloom.geometry import Mask
from seqloom.model import bloom
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import Batch, shard_batch
from seqloom.tensor import local
from seqloom.verify import Case, Parting, Verdict, verify_here
from seqloom.verify.parting import later_parting

TOKENS = 48
DOCUMENTS = (7, 13, 28)
VERIFY = "seqloom.verify.verify"  # by path, since the function `verify` hides the module of its name

Fault = Callable[[], AbstractContextManager[Any]]


def case(text: str, family: str = "llama", **changes: Any) -> Case:
    plan = Plan.parse(text)
    config = fit(read_config(family), plan, TOKENS)
    return Case(config=config, plan=plan, num_tokens=TOKENS, documents=DOCUMENTS, **changes)


def of_split_batch(name: str, wrong: Callable[..., Any]) -> AbstractContextManager[Any]:
    """A method of Batch that gives `wrong(batch, right, ...)` to the split run; the reference asks from elsewhere."""
    original = getattr(Batch, name)

    def chosen(self: Batch, *args: Any) -> Any:
        right = original(self, *args)
        splitting = sys._getframe(1).f_globals["__name__"] == "seqloom.sequence.shard"
        return wrong(self, right, *args) if splitting else right

    return patch.object(Batch, name, chosen)


def masks(rank: int, only_row: int | None = None) -> AbstractContextManager[Any]:
    """The first document bound lost on one rank, in one row or all."""

    def wrong(_: Batch, right: Mask, row: int) -> Mask:
        hit = dist.get_rank() == rank and only_row in (None, row)
        return Mask(documents=(20, 28)) if hit else right

    return of_split_batch("mask", wrong)


def positions(rank: int, at: int) -> AbstractContextManager[Any]:
    def wrong(_: Batch, right: Tensor) -> Tensor:
        if dist.get_rank() == rank:
            right[:, at] += 3
        return right

    return of_split_batch("positions", wrong)


def altered(change: Callable[[Any], object], rank: int) -> AbstractContextManager[Any]:
    """The split model changed on one rank."""
    module = sys.modules[VERIFY]
    parallelize = module.parallelize

    def wrong(model: nn.Module, fabric: Any, **asked: Any) -> nn.Module:
        model = parallelize(model, fabric, **asked)
        if dist.get_rank() == rank:
            with torch.no_grad():
                change(model)
        return model

    return patch.object(module, "parallelize", wrong)


def heavier(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight[3] *= 1.1


def not_a_number(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm.weight[3] = torch.nan


def doubled_in_backward(model: Any) -> None:
    model.model.layers[1].mlp.register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads))


def tensor_doubled(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.weight.register_hook(lambda grad: 2 * grad)


def up(model: Any) -> None:
    """One row of a column-wise weight, of those that this rank holds."""
    local(model.model.layers[1].mlp.up_proj.weight)[1] *= 1.1


def down(model: Any) -> None:
    local(model.model.layers[1].mlp.down_proj.weight)[:, 1] *= 1.1


def norm(model: Any) -> None:
    local(model.model.layers[0].post_attention_layernorm.weight)[3] *= 1.1


def vocabulary(model: Any) -> None:
    local(model.model.embed_tokens.weight)[:] *= 1.1


def packed(model: Any) -> None:
    """A part of the keys of GPT-2, of which no rank holds a slice of the packed weight."""
    local(model.transformer.h[0].attn.c_attn.weight_1)[2] *= 1.1


def one_head(model: Any) -> None:
    local(model.model.layers[1].self_attn.q_norm.weight)[5] *= 1.1


def wrong_slopes(rank: int) -> AbstractContextManager[Any]:
    right = bloom.alibi_slopes

    def wrong(heads: int) -> tuple[float, ...]:
        return right(2 * heads)[:heads] if dist.get_rank() == rank else right(heads)

    return patch.object(bloom, "alibi_slopes", wrong)


def wrong_tokens(rank: int) -> AbstractContextManager[Any]:
    """The first token of the rank's first row taken for another, after the batch was dealt."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        local, shard = shard_batch(*args, **kwargs)
        if dist.get_rank() == rank:
            local.input_ids[0, 0] = (local.input_ids[0, 0] + 1) % 96
        return local, shard

    return both_ways(wrong)


def labels_lost() -> AbstractContextManager[Any]:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        local, shard = shard_batch(*args, **kwargs)
        return replace(local, labels=local.labels * 0), shard

    return both_ways(wrong)


@contextmanager
def both_ways(wrong: Callable[..., Any]) -> Iterator[None]:
    """`shard_batch` replaced where the run asks for it and where the search does."""
    with patch("seqloom.train.step.shard_batch", wrong), patch("seqloom.verify.parting.shard_batch", wrong):
        yield


def slow_steps() -> AbstractContextManager[Any]:
    module = sys.modules[VERIFY]
    apply = module.apply_gradients

    def wrong(model: Any, optimizer: Any, report: Any, *, clip: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        apply(model, optimizer, report, clip=clip)

    return patch.object(module, "apply_gradients", wrong)


def at(module: str, before: str | None, rank: int, position: int, row: int = 0) -> dict[str, Any]:
    return {"where": "activation", "module": module, "before": before, "rank": rank, "position": position, "row": row}


ATTENTION = ("model.layers.0.self_attn", "o_proj")

FIRST_OF_LAST_HALF = int((case("data=1").batches()[0][0].tokens[0] >= 48).nonzero()[0])
"""The first token of the second half of the vocabulary, which the second of two tensor ranks holds."""

# Zigzag deals a ring of 2 the positions 0-12 and 36-48 to rank 0, 12-36 to rank 1; a ring of 3 16-32 to rank 2.
FAULTS: dict[str, tuple[Case, Fault, dict[str, Any]]] = {
    "mask of one rank": (case("ring=2"), lambda: masks(1), at(*ATTENTION, 1, 12)),
    "mask, gathered": (case("ring=2 exchange=gather"), lambda: masks(0), at(*ATTENTION, 0, 7)),
    "mask of one row": (
        case("data=2 ring=2", batch=2),
        lambda: masks(3, only_row=3),
        at(*ATTENTION, 3, 12, row=3),
    ),
    "position": (case("ring=3"), lambda: positions(2, at=30), at("model.rotary_emb", None, 2, 30)),
    "weight": (
        case("ring=2 ulysses=2"),
        lambda: altered(heavier, 3),
        at("model.layers.1.mlp.up_proj", None, 3, 24),
    ),
    "weight, float32": (
        case("ring=2", dtype="float32"),
        lambda: altered(heavier, 1),
        at("model.layers.1.mlp.up_proj", None, 1, 12),
    ),
    "not a number": (
        case("ring=2"),
        lambda: altered(not_a_number, 0),
        at("model.layers.0.post_attention_layernorm", None, 0, 0),
    ),
    "slopes": (
        case("ring=2", "bloom"),
        lambda: wrong_slopes(1),
        at("transformer.h.0.self_attention", "dense", 1, 12),
    ),
    "token": (case("data=3"), lambda: wrong_tokens(1), at("model.embed_tokens", None, 1, 0, row=1)),
    "backward": (
        case("ring=2"),
        lambda: altered(doubled_in_backward, 1),
        {"where": "gradient", "parameter": "model.layers.1.post_attention_layernorm.weight", "module": None},
    ),
    "one gradient": (
        case("ring=2", "qwen2"),
        lambda: altered(tensor_doubled, 0),
        {"where": "gradient", "parameter": "model.layers.0.self_attn.k_proj.weight"},
    ),
    # A rank of tensor=2 holds the positions 0-24 or 24-48 between its linears, or all; what is summed over
    # ranks, the first that holds the place is named for. A grid of 2x2 deals the positions to rows as a ring does.
    "column-wise": (case("tensor=2"), lambda: altered(up, 1), at("model.layers.1.mlp.up_proj", None, 1, 0)),
    "row-wise": (case("tensor=2"), lambda: altered(down, 1), at("model.layers.1.mlp.down_proj", None, 0, 0)),
    "norm": (
        case("tensor=2"),
        lambda: altered(norm, 1),
        at("model.layers.0.post_attention_layernorm", None, 1, 24),
    ),
    "vocabulary": (
        case("tensor=2"),
        lambda: altered(vocabulary, 1),
        at("model.embed_tokens", None, FIRST_OF_LAST_HALF // 24, FIRST_OF_LAST_HALF),
    ),
    "head of tensor rank 2": (
        case("tensor=3", "qwen3"),
        lambda: altered(one_head, 2),
        at("model.layers.1.self_attn.q_norm", None, 2, 0),
    ),
    "packed": (case("tensor=2", "gpt2"), lambda: altered(packed, 1), at("transformer.h.0.attn.c_attn", None, 1, 0)),
    "column-wise, whole tokens": (
        case("tensor=2 sequence_parallel=false"),
        lambda: altered(up, 1),
        at("model.layers.1.mlp.up_proj", None, 1, 0),
    ),
    "norm, whole tokens": (
        case("tensor=2 sequence_parallel=false data=2", batch=2),
        lambda: altered(norm, 3),
        at("model.layers.0.post_attention_layernorm", None, 3, 0, row=2),
    ),
    "vocabulary, whole tokens": (
        case("tensor=2 sequence_parallel=false"),
        lambda: altered(vocabulary, 1),
        at("model.embed_tokens", None, 0, FIRST_OF_LAST_HALF),
    ),
    "column-wise, 2d": (  # its weight is gathered over the rows
        case("tensor=4 tensor_kind=2d"),
        lambda: altered(up, 3),
        at("model.layers.1.mlp.up_proj", None, 1, 0),
    ),
    "norm, 2d": (
        case("tensor=4 tensor_kind=2d"),
        lambda: altered(norm, 3),
        at("model.layers.0.post_attention_layernorm", None, 3, 12),
    ),
    "mask, 2d": (case("tensor=4 tensor_kind=2d"), lambda: masks(2), at(*ATTENTION, 2, 12)),
    "norm, 3d": (
        case("tensor=4 tensor_kind=3d grid=2x2x1"),
        lambda: altered(norm, 2),
        at("model.layers.0.post_attention_layernorm", None, 2, 0),
    ),
    "weight of a later stage": (
        case("pipeline=2 stages=1-1 ring=2"),
        lambda: altered(heavier, 3),
        at("model.layers.1.mlp.up_proj", None, 3, 12),
    ),
    "backward of a later stage": (
        case("pipeline=2 stages=1-1"),
        lambda: altered(doubled_in_backward, 1),
        {"where": "gradient", "parameter": "model.layers.1.post_attention_layernorm.weight", "module": None},
    ),
    "token of a pipeline": (
        case("pipeline=2 schedule=interleaved"),
        lambda: wrong_tokens(0),
        at("model.embed_tokens", None, 0, 0),
    ),
    "labels": (case("ring=2"), labels_lost, {"where": "loss", "module": None, "parameter": None}),
    "step": (case("ring=2", steps=2), slow_steps, {"where": "step"}),
}


def faulty(name: str) -> Verdict:
    what, fault, _ = FAULTS[name]
    with fault():
        return verify_here(what)


@pytest.mark.parametrize("name", FAULTS)
def test_the_place_is_named(pool: Pool, name: str) -> None:
    """Catches a place that is downstream of the fault, another rank's, or a position inside the shard."""
    what, _, expected = FAULTS[name]
    verdicts = pool.run(what.plan.world_size, faulty, name)
    for verdict in verdicts:
        assert not verdict.equal and verdict.parting is not None
        found = asdict(verdict.parting)
        assert {key: found[key] for key in expected} == expected, verdict.parting
        assert verdict.parting.error > verdict.tolerance or verdict.parting.where == "step"
        assert verdict.parting == verdicts[0].parting


def test_equal_runs_part_nowhere(pool: Pool) -> None:
    """Catches a search that runs, or a place that is named, where nothing differs."""
    assert all(v.equal and v.parting is None for v in pool.run(2, without_search, case("ring=2")))


def without_search(what: Case) -> Verdict:
    with patch.object(sys.modules[VERIFY], "first_parting", None):
        return verify_here(what)


def searched(what: Case) -> Parting | None:
    """The search itself, on runs that agree."""
    from seqloom.fabric import Fabric
    from seqloom.model import Float64Islands, parallelize
    from seqloom.verify import parting
    from seqloom.verify.parting import first_parting

    def counted(*given: Any) -> list[Any]:
        readings = list(original(*given))
        assert readings, f"a tensor {list(given[0].shape)} of {list(given[1].shape)} was compared with nothing"
        return readings

    fabric, original = Fabric.build(what.plan), parting._slices
    with Float64Islands(), patch.object(parting, "_slices", counted):
        reference = what.model() if fabric.rank == 0 else None
        found, order = first_parting(
            reference,
            parallelize(what.model(), fabric),
            what.batches()[0][0],
            fabric,
            precision="float64",
            tolerance=1e-11,
        )
    assert order
    return found


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("gemma2", "ring=3 layout=striped"),
        ("bloom", "data=2 ulysses=2"),
        ("qwen3", "ring=2"),
        ("gpt2", "tensor=3"),
        ("bloom", "tensor=2 data=2 sequence_parallel=false"),
        ("gemma2", "tensor=4 tensor_kind=2d"),
        ("qwen3", "tensor=4 tensor_kind=3d grid=2x2x1 ring=2"),
        ("gpt2", "pipeline=2 schedule=interleaved ring=2"),
    ],
)
def test_the_search_finds_nothing_in_equal_runs(pool: Pool, text: str, family: str) -> None:
    """Catches modules that are compared though they hold other tensors, so that a place would be named in a right
    model, and tensors that are passed over because no slice seems to fit."""
    assert pool.run(Plan.parse(text).world_size, searched, case(text, family, batch=2)) == [None] * (
        Plan.parse(text).world_size
    )


def test_sentences() -> None:
    """Catches a sentence that lacks the module, the rank or the position."""
    where = Parting(where="activation", module="a.b", before="c", rank=3, row=1, position=70, error=0.25)
    assert str(where) == (
        "Activations part first in a.b, in what it hands to c: rank 3, row 1, position 70 (error 2.5e-01)."
    )
    errors = {"embed.weight": 1.0, "a.weight": 1.0, "b.weight": 1.0, "head.weight": 0.0}
    gradient = later_parting(errors, 0.0, ["embed", "a", "b", "a"], tolerance=0.5)
    assert "backward" in str(gradient) and gradient.parameter == "b.weight"
    errors["head.weight"] = float("nan")
    assert later_parting(errors, 0.0, ["embed", "a", "b"], tolerance=0.5).parameter == "head.weight"
    assert "loss" in str(later_parting(errors, float("nan"), [], tolerance=0.5))
    assert "steps" in str(later_parting({"a.weight": 0.0}, 0.0, ["a"], tolerance=0.5))
