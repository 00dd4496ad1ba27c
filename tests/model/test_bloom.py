"""BLOOM: forwards replaced on one instance, and nothing else touched."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel, _get_alibi_slopes

from close import assert_close
from model.dense import batch_of, build, dense_loss, gradients
from model.test_parity import UNEVEN, compare, split
from pool import Pool
from seqloom.errors import ModelError
from seqloom.fabric import Fabric
from seqloom.geometry import Mask
from seqloom.model import Float64Islands, parallelize, token_loss
from seqloom.model.bloom import alibi_slopes
from seqloom.plan import Plan
from seqloom.sequence import shard_batch


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 112])
def test_slopes(heads: int) -> None:
    """Catches slopes of another rule, or in another order, where the heads are no power of two."""
    with Float64Islands():
        theirs = _get_alibi_slopes(heads, torch.device("cpu"))
    assert_close(torch.tensor(alibi_slopes(heads), dtype=torch.float64), theirs, tolerance=1e-14)


def one_loop(text: str, changes: dict[str, Any], rule: Mask, checkpointing: bool) -> int:
    fabric = Fabric.build(Plan.parse(text))
    batch = batch_of(2, UNEVEN, rule=rule)
    with Float64Islands():
        dense, model = build("bloom", **changes), build("bloom", **changes)
        loss = dense_loss(dense, batch)
        loss.backward()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parallelize(model, fabric)
        # torch runs what a checkpoint recomputes outside of function modes, so there softmax stays in float32.
        return compare(split(model, batch, fabric, chunk_tokens=5), loss, gradients(dense), fabric.world.size,
                       1e-5 if checkpointing else 1e-11)  # fmt: skip


CASES: list[tuple[str, dict[str, Any], Mask, bool]] = [
    ("ring=3", {}, Mask(), False),
    ("ulysses=3", {"n_head": 5, "hidden_size": 40}, Mask(), False),
    ("ring=2 ulysses=2", {"apply_residual_connection_post_layernorm": True}, Mask(window=9), False),
    ("data=2 ring=2 exchange=gather", {}, Mask(causal=False), False),
    ("ring=2 ulysses=2 layout=striped", {"n_head": 3, "hidden_size": 24}, Mask(prefix=4), False),
    ("ring=3 layout=contiguous", {}, Mask(), True),
]


@pytest.mark.parametrize(("text", "changes", "rule", "checkpointing"), CASES, ids=[case[0] for case in CASES])
def test_parity(pool: Pool, text: str, changes: dict[str, Any], rule: Mask, checkpointing: bool) -> None:
    """Catches slopes of another rank's heads, local positions for global ones, or BLOOM turned bidirectional."""
    assert all(pool.run(Plan.parse(text).world_size, one_loop, text, changes, rule, checkpointing))


def test_logits_of_the_whole_model() -> None:
    """Catches a sequence that the outer forward drops, or a head that sees other hidden states."""
    fabric = Fabric.build(Plan())
    batch = batch_of(1)
    with Float64Islands(), torch.no_grad():
        theirs = build("bloom")(input_ids=batch.tokens).logits
        local, shard = shard_batch(batch, fabric)
        model = parallelize(build("bloom"), fabric)
        found = model(**local.inputs, sequence=shard, output_hidden_states=True)
    assert_close(found.logits, theirs, tolerance=1e-12)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    assert model(**local.inputs, sequence=shard).hidden_states is None


def test_only_the_instance_changes(tmp_path: Path) -> None:
    """Catches a patch of the class, weights renamed, forwards that are saved, and a copy bound to the original."""
    before = BloomModel.forward, BloomAttention.forward
    plain, model = build("bloom"), build("bloom")
    keys = list(model.state_dict())
    parallelize(model, Fabric.build(Plan()))
    assert (BloomModel.forward, BloomAttention.forward) == before
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float64)
    tokens = batch_of(1).tokens
    with torch.no_grad():
        wanted = plain(input_ids=tokens).logits
        assert torch.equal(again(input_ids=tokens).logits, wanted)
        twin = copy.deepcopy(model)
        twin.transformer.ln_f.weight.zero_()
        local, shard = shard_batch(batch_of(1), Fabric.build(Plan()))
        assert twin(**local.inputs, sequence=shard).logits.std() < 1e-12
        assert_close(model(**local.inputs, sequence=shard).logits, wanted, tolerance=1e-6)


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "no sequence": ({"sequence": None}, "without a sequence"),
    "labels": ({"labels": torch.zeros(1, 48, dtype=torch.int64)}, "use token_loss"),
    "cache": ({"past_key_values": object()}, "use_cache=False"),
    "cache asked for": ({"use_cache": True}, "use_cache=False"),
    "tuple": ({"return_dict": False}, "return_dict=False"),
    "weights of attention": ({"output_attentions": True}, "output_attentions"),
    "padding": ({"attention_mask": torch.arange(48)[None] > 3}, "Batch.from_tokens(tokens, attention_mask=...)"),
    "dense mask": ({"attention_mask": torch.zeros(1, 1, 48, 48)}, "rule=Mask(allowed=...)"),
    "novelty": ({"novelty": 3}, "novelty=3"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name: str) -> None:
    """Catches an argument that the replaced forward swallows, as BLOOM's own does."""
    fabric = Fabric.build(Plan())
    model = parallelize(build("bloom"), fabric)
    local, shard = shard_batch(batch_of(1), fabric)
    changes, said = CALLS[name]
    with pytest.raises(ModelError) as caught:
        model(**{**local.inputs, "sequence": shard, **changes})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def dropped(text: str) -> tuple[Tensor, dict[str, Tensor]]:
    fabric = Fabric.build(Plan.parse(text))
    with Float64Islands():
        model = parallelize(build("bloom", attention_dropout=0.4), fabric)
        return split(model, batch_of(2, UNEVEN), fabric)


def test_attention_dropout(pool: Pool) -> None:
    """Catches BLOOM's attention dropout left out, or drawn by layers alike, or by the plan."""
    (loss, expected), *_ = pool.run(1, dropped, "data=1")
    for text in ("ring=3", "ulysses=2"):
        for found in pool.run(Plan.parse(text).world_size, dropped, text):
            compare(found, loss, expected, 2)
    fabric = Fabric.build(Plan())
    with Float64Islands(), torch.no_grad():
        model = parallelize(build("bloom", attention_dropout=0.4), fabric)
        batch = shard_batch(batch_of(2, UNEVEN), fabric)
        assert abs(token_loss(model, *batch) - loss) < 1e-12
        assert abs(token_loss(model.eval(), *batch) - loss) > 1e-3
