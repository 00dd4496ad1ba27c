"""`parallelize`, `token_loss` and `sum_gradients` in one's own loop, against the untouched model on one device."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from model.dense import TOKENS, batch_of, build, dense_loss, gradients
from pool import Pool
from seqloom.fabric import Fabric, all_reduce_
from seqloom.geometry import Mask
from seqloom.model import Float64Islands, parallelize, sum_gradients, token_loss
from seqloom.plan import FAMILIES, Plan
from seqloom.sequence import Batch, shard_batch

Documents = list[list[int]] | None
ZERO = 1e-10
"""A gradient below this share of the global norm is zero but for rounding (the key bias of Qwen2 is)."""


def split(model: Any, batch: Batch, fabric: Fabric, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over all ranks and summed gradients."""
    local, shard = shard_batch(batch, fabric)
    loss = token_loss(model, local, shard, **options)
    loss.backward()
    sum_gradients(model, fabric)
    return all_reduce_(loss.detach().clone(), fabric.world), gradients(model)


def compare(
    found: tuple[Tensor, dict[str, Tensor]],
    loss: Tensor,
    expected: dict[str, Tensor],
    ranks: int,
    tolerance: float = 1e-11,
) -> int:
    """Hold loss and every gradient against one device; raises where they part. Returns how many were compared."""
    assert_close(found[0], loss, tolerance=tolerance, ranks=ranks)
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert found[1].keys() == expected.keys()
    compared = 0
    for name, gradient in expected.items():
        if gradient.norm() < ZERO * whole:
            assert found[1][name].norm() < ZERO * whole, name
            continue
        assert_close(found[1][name], gradient, tolerance=tolerance, ranks=ranks)
        compared += 1
    return compared


def one_loop(
    family: str,
    text: str,
    rows: int,
    documents: Documents,
    changes: dict[str, Any],
    checkpointing: bool = False,
    frozen: str = "",
    **others: Any,
) -> tuple[int, int]:
    """How many gradients were compared, of how many parameters."""
    fabric = Fabric.build(Plan.parse(text))
    batch = batch_of(rows, documents, **others)
    # torch runs what a checkpoint recomputes outside of function modes, so there the islands stay in float32.
    with nullcontext() if checkpointing else Float64Islands():
        dense, model = build(family, **changes), build(family, **changes)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for each in (dense, model):
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(not (frozen and frozen in name))
        loss = dense_loss(dense, batch)
        loss.backward()
        assert parallelize(model, fabric) is model
        found = split(model, batch, fabric, chunk_tokens=5)
        assert bool(frozen) == any(p.grad is None for p in model.parameters())
        assert model.base_model.gradient_checkpointing == checkpointing
        tolerance = 1e-5 if checkpointing else 1e-11
        compared = compare(found, loss, gradients(dense), fabric.world.size, tolerance)
        return compared, len(list(model.parameters()))


UNEVEN = [[48], [1, 22, 25]]


@pytest.mark.parametrize("text", ["ring=3", "ring=2 ulysses=2", "data=2 ulysses=2 exchange=gather layout=striped"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(pool: Pool, family: str, text: str) -> None:
    """Catches a family whose norms, biases, tied weights or rotary angles see local positions for global ones."""
    plan = Plan.parse(text)
    for compared, parameters in pool.run(plan.world_size, one_loop, family, text, 2, UNEVEN, {}):
        assert compared >= parameters - (2 if family == "qwen2" else 0)


@pytest.mark.parametrize("text", ["ring=3", "ring=2 ulysses=2 layout=contiguous exchange=gather"])
def test_gradient_checkpointing(pool: Pool, text: str) -> None:
    """Catches a shard lost, or exchanges out of step, when layers run again in backward."""
    assert all(c for c, _ in pool.run(Plan.parse(text).world_size, one_loop, "llama", text, 2, UNEVEN, {}, True, ""))


@pytest.mark.parametrize("frozen", ["embed_tokens", "layers.0.", "lm_head", "k_proj"])
def test_frozen_parameters(pool: Pool, frozen: str) -> None:
    """Catches a message that one frozen parameter shifts, gradients made for what is frozen, or a backward pruned."""
    found = pool.run(2, one_loop, "llama", "ring=2", 1, None, {}, False, frozen)
    assert all(0 < compared < parameters for compared, parameters in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        {"tie_word_embeddings": True},
    ],
    ids=["as many key heads", "biases", "llama3 rope", "tied"],
)  # fmt: skip
def test_variants_of_llama(pool: Pool, changes: dict[str, Any]) -> None:
    """Catches grouped heads taken for granted, biases forgotten, or rotary scaling lost."""
    assert all(c for c, _ in pool.run(4, one_loop, "llama", "ring=2 ulysses=2", 1, None, changes))


MIXED = {
    "use_sliding_window": True,
    "sliding_window": 11,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 48}),
    ("mistral", {"sliding_window": 17}),
    ("mistral", {"sliding_window": 1}),
    ("qwen2", MIXED),
    ("qwen3", MIXED | {"num_key_value_heads": 1}),
    ("gemma2", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window": 7, "sliding_window_pattern": 3, "num_hidden_layers": 3}),
    ("gpt_oss", {"sliding_window": 13}),
]


@pytest.mark.parametrize(("family", "changes"), WINDOWS, ids=lambda x: x if isinstance(x, str) else x["sliding_window"])
def test_windows_of_layers(pool: Pool, family: str, changes: dict[str, Any]) -> None:
    """Catches a window dropped silently, off by one, or taken from another layer."""
    for text in ("ring=3", "ring=2 ulysses=2 layout=striped exchange=needed"):
        assert all(c for c, _ in pool.run(Plan.parse(text).world_size, one_loop, family, text, 2, UNEVEN, changes))


def reached(q: Any, k: Any) -> Any:
    """Every third position, and one's own."""
    return ((q - k) % 3 == 0) | (q == k)


RULES = {
    "full": Mask(causal=False),
    "window": Mask(window=7),
    "prefix": Mask(prefix=5),
    "all": Mask(causal=False, window=9, prefix=2),
    "allowed": Mask(allowed=reached),
}


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
@pytest.mark.parametrize("name", RULES)
def test_rules_of_the_batch(pool: Pool, name: str, family: str) -> None:
    """Catches a rule lost on its way to the layers, or one that a layer's own window, cap or slopes undo."""
    found = pool.run(3, with_rule, family, "ring=3", RULES[name])
    found += pool.run(4, with_rule, family, "ring=2 ulysses=2 exchange=gather", RULES[name])
    assert all(found)


def with_rule(family: str, text: str, rule: Mask) -> int:
    return one_loop(family, text, 2, UNEVEN, {}, rule=rule)[0]


def padded(family: str, text: str, left: bool) -> int:
    """Rows of other lengths in one tensor, against each row alone, cut to its length."""
    fabric, lengths = Fabric.build(Plan.parse(text)), (48, 29)
    position = torch.arange(TOKENS)
    kept = torch.stack([position >= TOKENS - n if left else position < n for n in lengths])
    batch = batch_of(2, attention_mask=kept.long())
    assert batch.label_count == sum(lengths) - 2
    with Float64Islands():
        dense, model = build(family), parallelize(build(family), fabric)
        loss = torch.zeros((), dtype=torch.float64)
        for row in range(2):
            alone = Batch.from_tokens(batch.tokens[row : row + 1, kept[row]])
            share = dense_loss(dense, alone) * alone.label_count / batch.label_count
            share.backward()
            loss += share.detach()
        return compare(split(model, batch, fabric), loss, gradients(dense), fabric.world.size)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("left", [True, False])
def test_padding(pool: Pool, left: bool, family: str) -> None:
    """Catches padding that is attended to, counted in the loss, or that shifts positions and slopes."""
    for text in ("ring=3", "ring=2 ulysses=2 exchange=gather"):
        assert all(pool.run(Plan.parse(text).world_size, padded, family, text, left))


YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}  # fmt: skip


def sinks_set(text: str) -> int:
    """gpt-oss with sinks that matter; transformers draws them near zero, as scores of one key among many."""
    fabric = Fabric.build(Plan.parse(text))
    batch = batch_of(2, UNEVEN)
    with Float64Islands():
        dense, model = (build("gpt_oss", rope_parameters=YARN) for _ in range(2))
        for each in (dense, model):
            for i, layer in enumerate(each.model.layers):
                layer.self_attn.sinks.data = torch.linspace(-1.0, 3.0 + i, 4, dtype=torch.float64)
        loss = dense_loss(dense, batch)
        loss.backward()
        expected = gradients(dense)
        assert all(expected[f"model.layers.{i}.self_attn.sinks"].norm() > 1e-4 for i in range(2))
        return compare(split(parallelize(model, fabric), batch, fabric), loss, expected, fabric.world.size)


@pytest.mark.parametrize("text", ["ring=3", "ulysses=3", "ring=2 ulysses=2 exchange=rsa layout=striped"])
def test_attention_sinks(pool: Pool, text: str) -> None:
    """Catches sinks counted once a rank, given to another rank's heads, or left without their gradient."""
    assert all(pool.run(Plan.parse(text).world_size, sinks_set, text))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "text"), [(5, 1, "ulysses=3"), (6, 2, "ulysses=4"), (7, 7, "ring=2 ulysses=2")]
)
def test_heads_that_do_not_divide(pool: Pool, heads: int, kv_heads: int, text: str) -> None:
    """Catches heads lost, doubled or parted from their group where the Ulysses degree does not divide them."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads}
    world = Plan.parse(text).world_size
    assert all(c for c, _ in pool.run(world, one_loop, "llama", text, 2, UNEVEN, changes))


@pytest.mark.parametrize("num_tokens", [7, 31, 53])
def test_lengths_that_do_not_divide(pool: Pool, num_tokens: int) -> None:
    """Catches tokens dropped or doubled where the length is a prime."""
    for text in ("ring=3", "ring=2 ulysses=2", "data=2 ring=2 layout=contiguous"):
        found = pool.run(Plan.parse(text).world_size, of_length, text, num_tokens)
        assert all(found)


def of_length(text: str, num_tokens: int) -> int:
    return one_loop("llama", text, 2, None, {}, num_tokens=num_tokens)[0]


def dropped(text: str) -> tuple[Tensor, dict[str, Tensor]]:
    fabric = Fabric.build(Plan.parse(text))
    with Float64Islands():
        model = parallelize(build("llama", attention_dropout=0.4), fabric)
        return split(model, batch_of(2, UNEVEN, seed=3), fabric)


def test_attention_dropout(pool: Pool) -> None:
    """Catches dropout that depends on the plan, that is left out, or that all layers draw alike."""
    (loss, expected), *_ = pool.run(1, dropped, "data=1")
    for text in ("ring=3", "ulysses=2", "data=2 ring=2 layout=striped exchange=gather"):
        for found in pool.run(Plan.parse(text).world_size, dropped, text):
            compare(found, loss, expected, 2)
    with Float64Islands(), torch.no_grad():
        model = parallelize(build("llama", attention_dropout=0.4), Fabric.build(Plan()))
        again = [shard_batch(batch_of(2, UNEVEN, seed=seed), Fabric.build(Plan())) for seed in (3, 4)]
        assert abs(token_loss(model, *again[0]) - loss) < 1e-12
        assert abs(token_loss(model, *again[1]) - loss) > 1e-3
        model.model.layers[1].self_attn.layer_idx = 0
        assert abs(token_loss(model, *again[0]) - loss) > 1e-3
        plain = token_loss(parallelize(build("llama"), Fabric.build(Plan())), *again[0])
        assert token_loss(model.eval(), *again[0]) == plain


def uneven_labels(text: str) -> int:
    """All labels on one rank of the ring and one row; a second micro-batch shares the step's total."""
    fabric = Fabric.build(Plan.parse(text))
    first, second = batch_of(2), batch_of(2, UNEVEN)
    labels = torch.full_like(first.labels, -100)
    labels[0, 3:7] = first.labels[0, 3:7]
    first = Batch(first.tokens, labels)
    total = first.label_count + second.label_count
    with Float64Islands():
        dense, model = build("llama"), build("llama")
        loss = torch.zeros((), dtype=torch.float64)
        for batch in (first, second):
            share = dense_loss(dense, batch) * batch.label_count / total
            share.backward()
            loss += share.detach()
        parallelize(model, fabric)
        found = torch.zeros((), dtype=torch.float64)
        for batch in (first, second):
            local, shard = shard_batch(batch, fabric)
            share = token_loss(model, local, shard, total=total)
            if batch is first and not (local.labels >= 0).any():
                assert share.item() == 0
            share.backward()
            found += share.detach()
        sum_gradients(model, fabric)
        return compare((all_reduce_(found, fabric.world), gradients(model)), loss, gradients(dense), fabric.world.size)


@pytest.mark.parametrize("text", ["ring=4 layout=contiguous", "data=2 ring=2", "ulysses=2"])
def test_ranks_without_labels(pool: Pool, text: str) -> None:
    """Catches NaN, or a mean over ranks or micro-batches that weighs them alike, where labels lie on one rank only."""
    assert all(pool.run(Plan.parse(text).world_size, uneven_labels, text))


def two_models() -> int:
    """Two models under two plans, used in turn in one process; the other's backward comes between."""
    first, second = Fabric.build(Plan(ring=2)), Fabric.build(Plan(ulysses=2))
    batches = batch_of(2, UNEVEN), batch_of(1)
    compared = 0
    with Float64Islands():
        dense = build("llama"), build("qwen3", seed=1)
        losses = [dense_loss(m, b) for m, b in zip(dense, batches, strict=True)]
        for loss in losses:
            loss.backward()
        models = [parallelize(build("llama"), first), parallelize(build("qwen3", seed=1), second)]
        parts = [shard_batch(b, f) for b, f in zip(batches, (first, second), strict=True)]
        shares = [token_loss(m, *part) for m, part in zip(models, parts, strict=True)]
        for share in shares:
            share.backward()
        for fabric, model, one, loss, share in zip((first, second), models, dense, losses, shares, strict=True):
            sum_gradients(model, fabric)
            found = all_reduce_(share.detach().clone(), fabric.world), gradients(model)
            compared += compare(found, loss, gradients(one), 2)
    return compared


def test_two_models_in_one_process(pool: Pool) -> None:
    """Catches a plan kept in a module: one model would take the other's."""
    assert all(pool.run(2, two_models))


def weights_after(text: str) -> list[Tensor]:
    fabric = Fabric.build(Plan.parse(text))
    model = parallelize(build("llama", seed=fabric.rank), fabric)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("text", ["ring=3", "data=2 ulysses=2"])
def test_weights_of_rank_0_win(pool: Pool, text: str) -> None:
    """Catches ranks that train different models because each drew its own weights."""
    expected = [p.detach() for p in build("llama", seed=0).parameters()]
    other = [p.detach() for p in build("llama", seed=1).parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    for weights in pool.run(Plan.parse(text).world_size, weights_after, text):
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_default_total_is_the_micro_batch() -> None:
    """Catches a default total that counts local labels, or none."""
    fabric = Fabric.build(Plan())
    with Float64Islands():
        model = parallelize(build("llama"), fabric)
        local, shard = shard_batch(batch_of(1), fabric)
        assert_close(
            token_loss(model, local, shard, total=(TOKENS - 1) * 3) * 3,
            token_loss(model, local, shard),
            tolerance=1e-14,
        )
