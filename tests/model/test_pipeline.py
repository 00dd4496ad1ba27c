"""Stages cut from unmodified models: equal to one device, in every schedule, and what goes between them."""

from typing import Any

import pytest
import torch

from pool import Pool
from seqloom.errors import ModelError, SeqloomError
from seqloom.fabric import Fabric
from seqloom.model import build_model, main_gradients, parallelize, token_loss, whole_tensors
from seqloom.plan import Plan, cut, fit, read_config
from seqloom.plan.shape import ModelShape
from seqloom.sequence import Batch, shard_batch
from seqloom.train import compute_gradients
from seqloom.verify import Case, Verdict, verify_here

TOKENS = 47


def case(family: str, text: str, **changes: Any) -> Case:
    plan = Plan.parse(text)
    config = fit(read_config(family), plan, TOKENS, layers=changes.pop("layers", None))
    return Case(config=config, plan=plan, num_tokens=TOKENS, **changes)


def judged(cases: list[Case]) -> list[Verdict]:
    return [verify_here(one) for one in cases]


TWO = {
    "gpipe, every layer on the second rank": case("mistral", "pipeline=2 schedule=gpipe stages=0-2"),
    "1f1b, tied": case("qwen2", "pipeline=2", steps=3, accumulate=3),
    "interleaved, kinds of layers": case("gemma3_text", "pipeline=2 schedule=interleaved", accumulate=2),
    "zbv, tied on one rank": case("gemma2", "pipeline=2 schedule=zbv", steps=2, accumulate=4),
    "positions of gpt2": case("gpt2", "pipeline=2 schedule=zbv"),
    "norm of bloom's embedding": case("bloom", "pipeline=2 schedule=interleaved"),
}
FOUR = {
    "ring": case("llama", "pipeline=2 schedule=zbv ring=2", steps=2),
    "tensor, tied": case("qwen2", "pipeline=2 tensor=2", steps=2),
    "dropout keyed by the whole model's modules": case("gpt2", "pipeline=2 schedule=interleaved tensor=2", dropout=0.3),
    "micro-batches of unlike shards": case(
        "gemma3_text", "pipeline=2 ring=2 layout=balanced", documents=(7, 13, 27), accumulate=3
    ),
    "ends with ranks between them": case("qwen2", "pipeline=4 schedule=interleaved", accumulate=3),
    "shared optimizer": case("qwen2", "data=2 pipeline=2 zero=1", steps=2),
    "recomputed stage by stage": case("llama", "pipeline=2 ring=2 recompute=selective/full"),
}


@pytest.mark.parametrize(("world", "cases"), [(2, TWO), (4, FOUR)])
def test_stages_equal_one_device(pool: Pool, world: int, cases: dict[str, Case]) -> None:
    """Catches a stage that embeds or normalises twice, a tied gradient halved or doubled, coins that move with cuts."""
    for name, verdict in zip(cases, pool.run(world, judged, list(cases.values()), timeout_seconds=120)[0], strict=True):
        worst = max(verdict.loss_error, verdict.gradient_norm_error, verdict.worst_gradient_error)
        assert verdict.equal and worst < 1e-11, (name, verdict)


def sent(text: str, micro_batches: int, family: str = "llama") -> list[dict[str, int]]:
    """Bytes that this rank sent along the pipeline in two steps of unlike lengths."""
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    config = {**fit(read_config(family), plan, 64), "output_router_logits": family == "mixtral"}
    model = parallelize(build_model(config, dtype=torch.float64), fabric)
    found = []
    for tokens in (64, 32):
        rows = [Batch.from_tokens(torch.full((2, tokens), number)) for number in range(micro_batches)]
        fabric.meter.reset()
        compute_gradients(model, rows, fabric, precision="float64", chunk_tokens=16)
        found.append(fabric.meter.sent)
    return found


@pytest.mark.parametrize("text", ["ring=2 pipeline=2", "pipeline=2 tensor=2"])
def test_each_rank_sends_its_own_block(pool: Pool, text: str) -> None:
    """Catches activations sent whole between stages, and buffers of a length that has passed."""
    for rank, steps in enumerate(pool.run(4, sent, text, 3)):
        for tokens, said in zip((64, 32), steps, strict=True):
            # Of each of 3 micro-batches this rank's half of 2 rows of 32 channels in float64: activations of the
            # first stage's ranks, gradients of the last one's.
            assert said["pipeline"] == 3 * 2 * tokens // 2 * 32 * 8, rank


def test_the_balance_of_experts_travels_along(pool: Pool) -> None:
    """Catches router logits sent on instead of their sums: 4 probabilities, 4 counts and the tokens of each row."""
    for rank, steps in enumerate(pool.run(4, sent, "ring=2 pipeline=2", 3, "mixtral")):
        for tokens, said in zip((64, 32), steps, strict=True):
            assert said["pipeline"] == 3 * 2 * (tokens // 2 * 32 + 2 * 4 + 1) * 8, rank


def held(text: str) -> tuple[list[str], list[str], dict[str, torch.Size]]:
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    model = parallelize(build_model(fit(read_config("qwen2"), plan, 64)), fabric)
    whole = whole_tensors(model, fabric)
    local, shard = shard_batch(Batch.from_tokens(torch.zeros(1, 8, dtype=torch.int64)), fabric)
    with pytest.raises(ModelError, match=r"cut into stages"):
        token_loss(model, local, shard)
    names = [name for name, _ in build_model(fit(read_config("qwen2"), plan, 64)).named_parameters()]
    return names, [name for name, _ in model.named_parameters()], {name: x.shape for name, x in whole.items()}


def test_names_stay_and_nothing_is_held_twice(pool: Pool) -> None:
    """Catches layers renumbered by the cut, a tied head saved as a tensor of its own, a stage held by both ranks."""
    (names, first, whole), (_, last, other) = pool.run(2, held, "pipeline=2")
    assert sorted(whole) == sorted(other) == sorted(names)
    assert set(first) | (set(last) - {"lm_head.weight"}) == set(names) and not set(first) & set(last)
    assert "model.embed_tokens.weight" in first and {"lm_head.weight", "model.norm.weight"} <= set(last)


def failing(text: str) -> None:
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    model = parallelize(build_model(fit(read_config("llama"), plan, 64)), fabric)

    def refuse(*_: Any) -> None:
        raise ModelError("This layer is refused.")

    if fabric.pipeline.rank == 1:
        model.model.layers[-1].register_forward_pre_hook(refuse)
    rows = [Batch.from_tokens(torch.zeros(1, 16, dtype=torch.int64))] * 2
    compute_gradients(model, rows, fabric, precision="float32", chunk_tokens=16)


def test_a_stage_that_fails_says_so(pool: Pool) -> None:
    """Catches an error of a stage that reaches the user as torch's words about a micro-batch."""
    with pytest.raises(SeqloomError, match=r"This layer is refused"):
        pool.run(2, failing, "pipeline=2", timeout_seconds=30)


def main_gradients_asked(text: str) -> None:
    plan = Plan.parse(text)
    fabric = Fabric.build(plan)
    main_gradients(parallelize(build_model(fit(read_config("llama"), plan, 64), dtype=torch.bfloat16), fabric))


def test_main_gradients_where_hooks_do_not_run(pool: Pool) -> None:
    """Catches gradients of weights that zbv adds up in bfloat16 though float32 was asked for."""
    pool.run(2, main_gradients_asked, "pipeline=2")
    with pytest.raises(ModelError, match=r"schedule=zbv adds up .* use schedule=1f1b"):
        pool.run(2, main_gradients_asked, "pipeline=2 schedule=zbv")


def test_layers_are_cut_by_cost() -> None:
    """Catches a head that is not counted, attention that is not, and a cut by layers where windows differ."""
    shape = ModelShape(
        family="llama", vocab=128_256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        max_positions=None, intermediate=14_336,
    )  # fmt: skip
    assert cut(Plan(pipeline=4), shape) == (8, 9, 9, 6)
    assert cut(Plan(pipeline=4), shape, 131_072) == (8, 8, 8, 8)
    assert cut(Plan(pipeline=2, stages="20-12"), shape) == (20, 12)
    windows = ModelShape(
        family="gemma2", vocab=8, hidden=64, layers=6, heads=4, kv_heads=4, head_dim=16, max_positions=None,
        windows=(16, 16, 16, 16, None, None),
    )  # fmt: skip
    assert cut(Plan(pipeline=2), windows, 65_536) == (5, 1)
    for stages in range(2, 9):
        layers = cut(Plan(pipeline=stages), windows)
        assert sum(layers) == 6 and min((1, *layers[1:-1])) == 1
