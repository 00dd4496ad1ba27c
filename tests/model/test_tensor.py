"""Whole models over tensor grids, against the untouched model on one device."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from close import assert_close
from model.dense import batch_of, build, dense_loss, gradients
from pool import Pool
from seqloom.errors import ModelError, PlanError
from seqloom.fabric import Fabric, all_reduce_
from seqloom.model import Float64Islands, outline, parallelize, probe, sum_gradients, token_loss, whole_tensors
from seqloom.plan import Plan, fit, read_config
from seqloom.sequence import shard_batch
from seqloom.tensor import Placeholder

TOKENS = 37
ZERO = 1e-10
"""A gradient below this share of the global norm is zero but for rounding (the key bias of Qwen2 is)."""


def step(
    family: str, text: str, changes: dict[str, Any], rows: int = 1, documents: Any = None, checkpointing: bool = False
) -> int:
    """One step's loss and gradients held against one device; returns how many gradients were compared."""
    tolerance = 1e-6 if checkpointing else 1e-12
    fabric = Fabric.build(Plan.parse(text))
    settings = {**fit(read_config(family), fabric.plan, TOKENS), **changes}
    # torch runs what a checkpoint recomputes outside of function modes, so there the islands stay in float32.
    with nullcontext() if checkpointing else Float64Islands():
        dense, model = build(family, **settings), build(family, seed=fabric.rank, **settings)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of(rows * fabric.plan.data, documents, TOKENS, settings["vocab_size"])
        parallelize(model, fabric)  # of which every rank but the first drew other weights
        local, shard = shard_batch(batch, fabric)
        share = token_loss(model, local, shard, chunk_tokens=5)
        share.backward()
        sum_gradients(model, fabric)
        loss = dense_loss(dense, batch)
        loss.backward()
    assert_close(all_reduce_(share.detach(), fabric.world), loss, tolerance=tolerance, ranks=fabric.world.size)
    found, expected = whole_tensors(model, fabric, "gradient"), gradients(dense)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert found.keys() == expected.keys()
    compared = 0
    for name, gradient in expected.items():
        if gradient.norm() < max(ZERO, tolerance) * norm:
            assert found[name].norm() < max(ZERO, tolerance) * norm, name
            continue
        assert_close(found[name], gradient, tolerance=10 * tolerance, ranks=fabric.world.size)
        compared += 1
    fabric.close()
    return compared


ONE_D = [
    f"tensor={n}{sp}{overlap}"
    for n in (2, 3, 4)
    for sp in ("", " sequence_parallel=false")
    for overlap in ("", " tensor_overlap=ring")
]
GRIDS = (
    "tensor=4 tensor_kind=2d",
    "tensor=6 tensor_kind=2d grid=3x2",
    "tensor=8 tensor_kind=2.5d depth=2",
    "tensor=8 tensor_kind=3d",
    "tensor=6 tensor_kind=3d grid=3x2x1",
)
BESIDE = (
    "tensor=2 ring=2 ulysses=2",
    "tensor=2 data=2 ring=2",
    "tensor=4 tensor_kind=2d ring=2",
    "tensor=4 tensor_kind=2d ulysses=2 regather=false",
    "tensor=4 tensor_kind=2d tensor_tokens=ulysses data=2",
    "tensor=4 tensor_kind=2d ring=2 exchange=needed layout=striped",
    "tensor=4 tensor_kind=2d exchange=gather ring=2 tensor_tokens=ulysses",
    "tensor=4 tensor_kind=3d grid=2x2x1 ulysses=2 exchange=gather",
    "tensor=8 tensor_kind=2d grid=4x2 inner_ring=2 layout=contiguous",
)
CASES = [
    *(("llama", text) for text in (*ONE_D, *GRIDS, *BESIDE)),
    *(("qwen3", text) for text in (ONE_D[0], ONE_D[5], *GRIDS, BESIDE[2])),
    *(("qwen2", text) for text in (ONE_D[4], ONE_D[2], GRIDS[1], GRIDS[3], BESIDE[0])),
    *((family, text) for family in ("bloom", "gpt2") for text in (*ONE_D, BESIDE[0])),
    *((family, text) for family in ("mistral", "gemma2", "gemma3_text") for text in (ONE_D[4], GRIDS[1])),
    ("gpt_oss", BESIDE[0]),
]


@pytest.mark.parametrize(("family", "text"), CASES)
def test_whole_model_equals_one_device(pool: Pool, family: str, text: str) -> None:
    """A direction, norm, embedding, bias or sum of gradients that is wrong for one family on one grid."""
    assert min(pool.run(Plan.parse(text).world_size, step, family, text, {})) > 10


ODD = {
    "few key/value heads": ("tensor=4", {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
    "irregular groups": ("tensor=3", {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96}),
    "one head": (
        "tensor=6 tensor_kind=2d grid=2x3",
        {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48},
    ),
    "few heads, 3d": (
        "tensor=8 tensor_kind=3d",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16},
    ),
    "uneven widths": ("tensor=3", {"intermediate_size": 49, "vocab_size": 97}),
    "uneven widths, 2d": (
        "tensor=6 tensor_kind=2d grid=3x2",
        {"intermediate_size": 49, "vocab_size": 97, "hidden_size": 44},
    ),
    "uneven widths, 3d": (
        "tensor=6 tensor_kind=3d grid=3x2x1",
        {"intermediate_size": 51, "vocab_size": 99, "hidden_size": 44},
    ),
    "biases": ("tensor=2 ring=2", {"attention_bias": True, "mlp_bias": True}),
    "biases, 2d": ("tensor=6 tensor_kind=2d grid=3x2", {"attention_bias": True, "mlp_bias": True}),
    "biases, all tokens": ("tensor=3 sequence_parallel=false", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("tensor=3", {"tie_word_embeddings": True}),
    "tied, rectangle": ("tensor=6 tensor_kind=2d grid=3x2", {"tie_word_embeddings": True}),
    "tied, 3d": ("tensor=8 tensor_kind=3d", {"tie_word_embeddings": True}),
    "padding token": ("tensor=4 tensor_kind=2d", {"pad_token_id": 3}),
}


@pytest.mark.parametrize("name", ODD)
def test_numbers_that_do_not_divide(pool: Pool, name: str) -> None:
    """Heads, widths, vocabularies and ties that a grid does not divide: lost rows, doubled gradients."""
    text, changes = ODD[name]
    assert min(pool.run(Plan.parse(text).world_size, step, "llama", text, changes)) > 10


@pytest.mark.parametrize("text", ["tensor=2 ring=2", "tensor=4 tensor_kind=2d", "tensor=3 tensor_overlap=ring"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_rows_and_recomputation(pool: Pool, text: str, checkpointing: bool) -> None:
    """Rows of packed documents whose positions are those of another side's tokens; a layer recomputed without them."""
    documents = [[9, 20, 8], [TOKENS]]
    assert min(pool.run(Plan.parse(text).world_size, step, "qwen2", text, {}, 2, documents, checkpointing)) > 10


LATENT: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("deepseek_v3", "tensor=3 sequence_parallel=false", {"first_k_dense_replace": 2, "attention_bias": True}),
    ("deepseek_v2", "tensor=2 ulysses=2 tensor_overlap=ring", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", "tensor=4 regather=false", {}),
)


@pytest.mark.parametrize(("family", "text", "changes"), LATENT)
def test_latent_attention_equals_one_device(pool: Pool, family: str, text: str, changes: dict[str, Any]) -> None:
    """Catches latents of other tokens, and gradients of whole projections and norms summed once too often or not."""
    assert min(pool.run(Plan.parse(text).world_size, step, family, text, changes)) > 10


def layer_elements(text: str, layers: int) -> int:
    """Elements this rank sends in forward and backward of a Llama, norms' sums not counted."""
    fabric = Fabric.build(Plan.parse(text))
    model = build("llama", num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, hidden_size=32)
    parallelize(model, fabric)
    local, shard = shard_batch(batch_of(1, None, 48), fabric)
    fabric.meter.reset()
    token_loss(model, local, shard).backward()
    sent = fabric.meter.sent["tensor"] // 8
    fabric.close()
    return sent


@pytest.mark.parametrize(
    ("more", "times"),
    [("", 10), (" regather=false", 8), (" tensor_overlap=ring", 10), (" tensor_overlap=ring regather=false", 8)],
)
@pytest.mark.parametrize("t", [2, 4])
def test_elements_of_a_layer(pool: Pool, t: int, more: str, times: int) -> None:
    """A decoder layer that sends more than 10 (t - 1)/t N h elements: q, k, v or gate, up gathered one by one."""
    three, one = (pool.run(t, layer_elements, f"tensor={t}{more}", layers) for layers in (3, 1))
    for many, few in zip(three, one, strict=True):
        assert (many - few) / 2 == times * (t - 1) / t * 48 * 32


def saved(text: str, family: str, folder: str) -> dict[str, torch.Tensor]:
    """Save a split model; what one device would hold."""
    fabric = Fabric.build(Plan.parse(text))
    model = build(family)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    parallelize(model, fabric)
    model.save_pretrained(folder)
    fabric.close()
    return before


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bloom"])
@pytest.mark.parametrize("text", ["tensor=2", "tensor=4 tensor_kind=2d"])
def test_save_pretrained_gives_ordinary_weights(pool: Pool, tmp_path: Any, family: str, text: str) -> None:
    """A folder that transformers loads into other weights: parts, packed ones apart, a tie cut."""
    if "2d" in text and family in ("gpt2", "bloom"):
        text = "tensor=2 ring=2 sequence_parallel=false"
    world = Plan.parse(text).world_size
    before = pool.run(world, saved, text, family, str(tmp_path))[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {name: p.shape for name, p in loaded.state_dict().items()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in loaded.state_dict().items())


def logits(text: str) -> torch.Tensor:
    """What the split model itself returns, at this rank's tokens; zeros elsewhere."""
    fabric = Fabric.build(Plan.parse(text))
    model, batch = build("gemma2"), batch_of(1, None, TOKENS)
    parallelize(model, fabric)
    local, shard = shard_batch(batch, fabric)
    found = torch.zeros(TOKENS, 96, dtype=torch.float64)
    held = torch.cat([torch.arange(*span) for span in shard.spans])
    with torch.no_grad():
        found[held] = model(**local.inputs, sequence=shard).logits[0]
    fabric.close()
    return found


@pytest.mark.parametrize(
    ("text", "holders"), [("tensor=2", 2), ("tensor=4 tensor_kind=2d", 2), ("tensor=8 tensor_kind=3d", 2)]
)
def test_the_model_itself_gives_whole_logits(pool: Pool, text: str, holders: int) -> None:
    """`model(...)` hands out a part of the vocabulary as if it were all of it."""
    found = pool.run(Plan.parse(text).world_size, logits, text)
    (one,) = pool.run(1, logits, "data=1")
    assert_close(torch.stack(found).sum(0) / holders, one, tolerance=1e-6)


def viewing(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """An MLP that reads its input beside its projections."""
    return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)) + hidden_states


def test_a_model_that_reads_the_gathered_input_is_refused() -> None:
    """A module that uses its input beside its linears: it would see a part, or nothing, and go on."""
    shape = fit(read_config("llama"), Plan(tensor=2), TOKENS)
    model = outline(shape)
    before, type(model.model.layers[0].mlp).forward = type(model.model.layers[0].mlp).forward, viewing
    try:
        with pytest.raises(ModelError, match="reads its input itself"):
            probe(model, Plan(tensor=2))
    finally:
        type(model.model.layers[0].mlp).forward = before


def test_a_placeholder_has_a_shape_and_no_contents() -> None:
    """A stand-in whose contents can be read: rubbish would flow on without a word."""
    stands = Placeholder.like(torch.randn(2, 5, 8), 10, 16, "MLP")
    assert stands.shape == (2, 10, 16) and stands.size(1) == 10 and stands.dim() == 3
    for use in (lambda: stands + 1, lambda: stands.view(-1), lambda: nn.functional.silu(stands), stands.sum):
        with pytest.raises(ModelError, match="MLP, whose linears are split, reads its input itself"):
            use()


def test_wrongly_viewed_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose attention views its projections by other numbers than they hold: heads would mix in silence."""
    model = outline(fit(read_config("gpt2"), Plan(tensor=2), TOKENS))
    attention = type(model.transformer.h[0].attn)
    forward = attention.forward

    def mixing(self: Any, *args: Any, **given: Any) -> Any:
        self.head_dim = 4
        return forward(self, *args, **given)

    monkeypatch.setattr(attention, "forward", mixing)
    with pytest.raises(ModelError, match="views its projections as 4 heads of 14 tokens where they hold 2 of 14"):
        probe(model, Plan(tensor=2))


def asked_too_much(what: str) -> None:
    """Ask a split model for what no rank can give."""
    fabric = Fabric.build(Plan.parse("ring=2" if what == "twice" else "tensor=2"))
    model = build("llama")
    try:
        parallelize(model, fabric)
        local, shard = shard_batch(batch_of(1, None, TOKENS), fabric)
        if what == "twice":
            parallelize(model, fabric)
        elif what == "converted":
            token_loss(model, local, shard).backward()
            model.to(torch.float64)
            sum_gradients(model, fabric)
        elif what == "no sequence":
            model(**local.inputs)
        else:
            model(**local.inputs, sequence=shard, logits_to_keep=1)
    finally:
        fabric.close()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("twice", "split already, under 'ring=2'"),
        ("converted", "converted after parallelize"),
        ("no sequence", "without a sequence"),
        ("last logits", "given logits_to_keep=1, which would keep"),
    ],
)
def test_what_a_split_model_refuses(pool: Pool, what: str, said: str) -> None:
    """Gradients left unsummed, or logits of other tokens, without a word."""
    with pytest.raises(ModelError, match=said):
        pool.run(2, asked_too_much, what)


def test_directions_are_two() -> None:
    """A misspelt direction that is taken for the other one."""
    with pytest.raises(PlanError, match="not 'columnwise'"):
        Plan(tensor=2).tensor_grid.linear("columnwise")  # type: ignore[arg-type]
