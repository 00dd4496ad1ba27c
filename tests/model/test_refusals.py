"""What a split model does not do is refused by name, never ignored."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model.dense import TOKENS, batch_of, build
from pool import Pool
from seqloom.errors import ModelError, PlanError, SeqloomError
from seqloom.fabric import Fabric
from seqloom.geometry import Mask
from seqloom.model import build_model, parallelize, sum_gradients, token_loss
from seqloom.model.adapter import refuse_unknown
from seqloom.model.probe import probe
from seqloom.plan import FAMILIES, Plan
from seqloom.sequence import shard_batch


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    """One process."""
    return Fabric.build(Plan())


def tiny(family: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPTJ = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
DEAF: dict[str, tuple[str, dict[str, Any]]] = {
    "FalconForCausalLM": ("falcon", SIZES),
    "GPTJForCausalLM": ("gptj", {**GPTJ, "bos_token_id": 1, "eos_token_id": 2}),
}


@pytest.mark.parametrize("name", DEAF)
def test_probe_refuses_deaf_families(name: str) -> None:
    """Catches a family that swallows the shard and attends to its own part only."""
    family, settings = DEAF[name]
    with pytest.raises(ModelError, match=rf"{name} cannot be split: a sequence shard given to its forward"):
        probe(tiny(family, **settings))


@pytest.mark.parametrize("name", DEAF)
def test_parallelize_refuses_deaf_families(fabric: Fabric, name: str) -> None:
    """Catches the same on the way users take."""
    family, settings = DEAF[name]
    with pytest.raises(SeqloomError, match=f"Model family '{family}' is not supported yet"):
        parallelize(tiny(family, **settings), fabric)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_lets_families_pass_and_leaves_them_alone(family: str) -> None:
    """Catches a probe that refuses everything, changes weights, the attention chosen, or the random state."""
    model = build(family)
    before = [p.clone() for p in model.parameters()]
    chosen, state = model.config._attn_implementation, torch.get_rng_state()
    probe(model)
    assert model.config._attn_implementation == chosen and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_probe_counts_layers() -> None:
    """Catches a family where some layers only get the shard: half the layers must not pass for all."""
    model = build("llama")
    forward = type(model.model.layers[0]).forward

    def forgetful(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.self_attn.layer_idx == 1:
            kwargs.pop("sequence", None)
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.model.layers[0]), "forward", forgetful)
        with pytest.raises(ModelError, match="reached attention in 1 of 2 layers"):
            probe(model)
    probe(model)


def test_dropout_of_hidden_states_is_refused(fabric: Fabric) -> None:
    """Catches dropout that BLOOM hands to a function as a number, where no nn.Dropout tells of it."""
    with pytest.raises(SeqloomError, match=r"hidden_dropout.*0\.1"):
        parallelize(build("bloom", hidden_dropout=0.1), fabric)
    model = build("bloom")
    model.transformer.h[1].mlp.hidden_dropout = 0.1
    with pytest.raises(ModelError, match=r"h\.1\.mlp drops out with p=0\.1"):
        parallelize(model, fabric)


def test_attention_dropout_needs_the_number_of_the_layer(fabric: Fabric) -> None:
    """Catches layers that all drop the same pairs because none knows which one it is."""
    model = parallelize(build("llama", attention_dropout=0.1), fabric)
    local, shard = shard_batch(batch_of(1), fabric)
    model(**local.inputs, sequence=shard)
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ModelError, match="LlamaAttention has no layer_idx"):
        model(**local.inputs, sequence=shard)
    model.eval()(**local.inputs, sequence=shard)


def with_dropout_inside(text: str) -> str:
    """Parallelize a model that drops out between its linears; what became of that module."""
    fabric = Fabric.build(Plan.parse(text))
    model = build("llama")
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.25))
    try:
        return type(parallelize(model, fabric).model.layers[1].mlp.act_fn[1]).__name__
    finally:
        fabric.close()


def test_dropout_modules_are_drawn_alike_or_refused(pool: Pool) -> None:
    """Catches dropout that the configuration does not tell of, left to torch; and one between split linears."""
    assert pool.run(2, with_dropout_inside, "ring=2") == ["ParallelDropout"] * 2
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.act_fn\.1 drops out with p=0\.25 between linears"):
        pool.run(2, with_dropout_inside, "tensor=2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensor=3", "4 query heads cannot be split evenly over tensor=3"),
        ("ulysses=5", "ulysses=5 is more than the model's 4 query heads"),
    ],
)
def test_plans_that_do_not_fit_the_model(pool: Pool, text: str, said: str) -> None:
    """Catches a model left whole, or heads cut in pieces, under a plan that cannot hold for it."""
    with pytest.raises(PlanError, match=said):
        pool.run(Plan.parse(text).world_size, make, text)


def make(text: str) -> None:
    parallelize(build("llama"), Fabric.build(Plan.parse(text)))


Call = Callable[[PreTrainedModel, dict[str, Any], Any], object]
CALLS: dict[str, tuple[Call, str]] = {
    "without a sequence": (lambda model, inputs, _: model(**inputs), "called without a sequence"),
    "shorter": (
        lambda model, inputs, shard: model(
            input_ids=inputs["input_ids"][:, 1:], position_ids=inputs["position_ids"][:, 1:], sequence=shard
        ),
        "the sequence shard holds 2 rows of 48 tokens",
    ),
    "fewer rows": (
        lambda model, inputs, shard: model(
            input_ids=inputs["input_ids"][1:], position_ids=inputs["position_ids"][1:], sequence=shard
        ),
        "the sequence shard holds 2 rows of 48 tokens",
    ),
    "padding": (
        lambda model, inputs, shard: model(
            **inputs, attention_mask=(inputs["input_ids"] != inputs["input_ids"][0, 5]).long(), sequence=shard
        ),
        "attention_mask with padding; give it to the batch instead, as Batch.from_tokens(tokens, attention_mask=...)",
    ),
    "dense mask": (
        lambda model, inputs, shard: model(
            **inputs, attention_mask=torch.zeros(2, 1, TOKENS, TOKENS, dtype=torch.float64), sequence=shard
        ),
        "dense attention_mask of 4 dims; the mask comes with the sequence shard: write it as a rule on positions, "
        "Batch(..., rule=Mask(allowed=...))",
    ),
    "without positions": (
        lambda model, inputs, shard: model(input_ids=inputs["input_ids"], sequence=shard),
        "called without position_ids",
    ),
    "a cache": (lambda model, inputs, shard: model(**{**inputs, "use_cache": True}, sequence=shard), "use_cache=False"),
    "unknown option": (lambda model, inputs, shard: model(**inputs, sequence=shard, temperature=0.7), "=0.7"),
    "unknown tensor": (
        lambda model, inputs, shard: model(**inputs, sequence=shard, head_mask=torch.zeros(4)),
        "head_mask=a tensor [4]",
    ),
    "labels": (
        lambda model, inputs, shard: model(**inputs, sequence=shard, labels=inputs["input_ids"]),
        "LlamaForCausalLM was given labels, of which it would make a loss of this rank's tokens alone; leave them out "
        "and use token_loss.",
    ),
    "not causal": (
        lambda model, inputs, shard: model(**inputs, sequence=shard, is_causal=False),
        "not causal, but the batch's mask is; give the batch rule=Mask(causal=False)",
    ),
    "dropout": (lambda model, inputs, shard: model(**inputs, sequence=shard, dropout_p=0.1), "dropout_p=0.1"),
    "weights of attention": (
        lambda model, inputs, shard: model(**inputs, sequence=shard, output_attentions=True),
        "output_attentions",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(fabric: Fabric, name: str) -> None:
    """Catches an argument accepted and ignored, or a shard that belongs to another batch."""
    model = parallelize(build("llama"), fabric)
    local, shard = shard_batch(batch_of(2), fabric)
    call, said = CALLS[name]
    with pytest.raises(SeqloomError) as caught:
        call(model, local.inputs, shard)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_calls_that_are_allowed(fabric: Fabric) -> None:
    """Catches a refusal of what changes nothing: a mask without padding, hidden states asked for."""
    model = parallelize(build("llama"), fabric)
    local, shard = shard_batch(batch_of(2), fabric)
    plain = model(**local.inputs, sequence=shard).logits
    ones = torch.ones_like(local.input_ids)
    for options in ({"attention_mask": ones}, {"output_hidden_states": True}, {"is_causal": True}, {"softcap": None}):
        assert torch.equal(model(**local.inputs, sequence=shard, **options).logits, plain)


@pytest.mark.parametrize("given", [1, 0.5, "x", True, [0]])
def test_unknown_keywords(given: object) -> None:
    """Catches a refusal that depends on the type of the argument."""
    with pytest.raises(ModelError, match="Layer asks attention for novelty="):
        refuse_unknown("Layer", {"novelty": given})
    refuse_unknown("Layer", {"novelty": None, "use_cache": True, "dropout": 0.0, "past_key_values": object()})


def test_a_model_that_is_not_causal(fabric: Fabric) -> None:
    """Catches a bidirectional model trained causally; under a rule that is not causal either it is honoured."""
    model = parallelize(build("gemma2"), fabric)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    local, shard = shard_batch(batch_of(1), fabric)
    with pytest.raises(ModelError, match="Gemma2Attention asks for attention that is not causal"):
        model(**local.inputs, sequence=shard)
    local, shard = shard_batch(batch_of(1, rule=Mask(causal=False)), fabric)
    model(**local.inputs, sequence=shard)


def test_a_parameter_without_gradient(fabric: Fabric) -> None:
    """Catches ranks that wait for a gradient which others do not have; a frozen parameter needs none."""
    model = parallelize(build("llama"), fabric)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    token_loss(model, *shard_batch(batch_of(1), fabric)).backward()
    with pytest.raises(ModelError, match="unused has no gradient"):
        sum_gradients(model, fabric)
    model.unused.requires_grad_(False)
    sum_gradients(model, fabric)


def test_weights_that_do_not_fit(tmp_path: Any) -> None:
    """Catches a layer left at random because the folder's weights are another model's, and a file that was cut short
    told in the words of its reader, as a failed rank."""
    model = build("llama")
    model.save_pretrained(tmp_path)
    settings = model.config.to_dict()
    again = build_model(settings, weights=tmp_path, dtype=torch.float64, seed=5)
    assert all(
        torch.allclose(a, b, rtol=1e-6) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )  # saved in float64, read through float32
    with pytest.raises(ModelError, match="do not fit the configuration"):
        build_model({**settings, "num_hidden_layers": 3}, weights=tmp_path)
    with pytest.raises(
        ModelError, match=r"configuration: model\.layers\.0\.mlp\.down_proj\.weight is missing or of another"
    ):
        build_model({**settings, "intermediate_size": 64}, weights=tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*\); restore the folder, or name another"):
        build_model(settings, weights=tmp_path)
