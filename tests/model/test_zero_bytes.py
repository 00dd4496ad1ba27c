"""What ZeRO holds and sends, counted on tensors and by the meter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pool import Pool
from seqloom.fabric import Fabric
from seqloom.model import build_model, clear_gradients, gradient, parallelize, sharded_units, token_loss, whole_tensors
from seqloom.plan import Plan, fit, read_config
from seqloom.planner import AtRest, at_rest_bytes, zero_bytes
from seqloom.sequence import Batch, shard_batch
from seqloom.tensor import local
from seqloom.train import adamw, apply_gradients, compute_gradients

TOKENS = 24


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece of it once."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in map(local, tensors)}
    return sum(found.values())


def built(text: str, **changes: Any) -> tuple[Any, Fabric, list[Batch], list[list[tuple[int, ...]]]]:
    """A model under a plan, its fabric, two micro-batches, and the shapes of its parts by units."""
    fabric = Fabric.build(Plan.parse(text))
    settings = {**fit(read_config("llama"), fabric.plan, TOKENS), "vocab_size": 97, "intermediate_size": 49, **changes}
    model, stages = build_model(settings), Plan.parse(text.partition(" zero")[0])
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if stages.tensor > 1:
        parts = parallelize(build_model(settings), replace(fabric, plan=stages))
        whole = {name: tuple(local(parameter).shape) for name, parameter in parts.named_parameters()}
    units: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in whole.items():
        units.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(shape)
    rest = units.pop("rest")
    parallelize(model, fabric)
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch.from_tokens(torch.randint(97, (fabric.plan.data, TOKENS), generator=generator), None) for _ in range(2)
    ]
    return model, fabric, batches, [*units.values(), rest]


def held(text: str) -> tuple[AtRest, AtRest]:
    """What the tensors of a rank take after a step and another backward, and what the formula says."""
    model, fabric, batches, units = built(text)
    optimizer = adamw(model, fabric, learning_rate=1e-3, weight_decay=0.1)
    for _ in range(2):
        report = compute_gradients(model, batches, fabric, precision="float32", chunk_tokens=64)
        gradients = [found for parameter in model.parameters() if (found := gradient(parameter)) is not None]
        counted = storage_bytes(list(model.parameters())), storage_bytes(gradients)
        apply_gradients(model, optimizer, report, clip=1.0)
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    shapes = [shape for unit in units for shape in unit]
    expected = at_rest_bytes(fabric.plan, shapes, zero_rank=fabric.zero.rank)
    fabric.close()
    return AtRest(*counted, storage_bytes(moments)), expected


@pytest.mark.parametrize(
    "text",
    [
        "data=3",
        "ring=3 zero=1",
        "ring=3 zero=2",
        "data=3 zero=3",
        "data=2 ulysses=2 zero=3 zero_replicas=2",
        "ring=2 tensor=2 zero=3",
        "ring=2 zero=3 offload=true",
    ],
)
def test_bytes_at_rest(pool: Pool, text: str) -> None:
    """Catches gradients or moments held whole beside their shares, and layers that stay gathered."""
    for counted, expected in pool.run(Plan.parse(text).world_size, held, text):
        assert counted == expected


def sent(text: str) -> tuple[dict[str, int], int]:
    """What a rank sends along each axis in a step of two micro-batches, and what FSDP2 sends by the formula."""
    model, fabric, batches, units = built(text)
    fabric.meter.reset()
    compute_gradients(model, batches, fabric, precision="float32", chunk_tokens=64)
    found = fabric.meter.sent
    fabric.close()
    return found, zero_bytes(fabric.plan, units, micro_batches=2)


@pytest.mark.parametrize("text", ["data=2 zero=2", "data=3 zero=3", "data=4 zero=3 zero_replicas=2"])
def test_bytes_sent(pool: Pool, text: str) -> None:
    """Catches a unit gathered once too often, or sums over ranks of what is shared out."""
    for found, expected in pool.run(Plan.parse(text).world_size, sent, text):
        assert found["zero"] == expected
        assert "replicas" not in found
        assert ("zero_replicas" in found) == ("zero_replicas" in text)


def stage_1() -> tuple[int, int]:
    """Bytes that an optimizer step of zero=1 sends along `zero`, and those of this rank's rows."""
    model, fabric, batches, _ = built("data=3 zero=1")
    optimizer = adamw(model, fabric, learning_rate=1e-3, weight_decay=0.1)
    report = compute_gradients(model, batches, fabric, precision="float32", chunk_tokens=64)
    fabric.meter.reset()
    apply_gradients(model, optimizer, report, clip=1.0)
    rows = sum(one.part.numel() for one in optimizer.stepped) * 4
    found = fabric.meter.sent["zero"]
    fabric.close()
    return found, rows


def test_bytes_of_stepped_rows(pool: Pool) -> None:
    """Catches rows that are fetched padded, or whole parameters that travel."""
    for found, rows in pool.run(3, stage_1):
        assert found == 2 * rows


def every_unit_sums() -> list[tuple[float, bool]]:
    """What each unit of FSDP2 divides gradients by, and whether it asks for sums alone."""
    model, fabric, _, _ = built("data=2 zero=3")
    assert len(sharded_units(model)) == 1 + model.config.num_hidden_layers
    groups = [g for unit in sharded_units(model) for g in unit._get_fsdp_state()._fsdp_param_groups]
    assert all(isinstance(unit, FSDPModule) for unit in sharded_units(model)) and len(groups) == 3
    fabric.close()
    return [(group.gradient_divide_factor, group.force_sum_reduction_for_comms) for group in groups]


def test_every_unit_sums_and_none_averages(pool: Pool) -> None:
    """Catches the two settings made of the outermost unit alone, which leave layers' gradients divided."""
    assert pool.run(2, every_unit_sums) == [[(1.0, True)] * 3] * 2


def without_backward() -> tuple[list[int], list[int]]:
    """Bytes of parameters before and after a loss that nobody calls backward on, and after a cut-off step."""
    model, fabric, batches, _ = built("data=2 zero=3")
    mine, shard = shard_batch(batches[0], fabric)
    before = storage_bytes(list(model.parameters()))
    with torch.no_grad():
        token_loss(model, mine, shard)
    seen = [storage_bytes(list(model.parameters()))]
    token_loss(model, mine, shard)
    clear_gradients(model)
    seen.append(storage_bytes(list(model.parameters())))
    model(**mine.inputs, sequence=shard)
    assert len(whole_tensors(model, fabric)) == len(list(model.parameters()))
    seen.append(storage_bytes(list(model.parameters())))
    fabric.close()
    return [before] * 3, seen


def test_a_loss_without_backward_leaves_nothing_gathered(pool: Pool) -> None:
    """Catches an evaluation after which the optimizer or a checkpoint meets whole parameters in place of shares."""
    for expected, seen in pool.run(2, without_backward):
        assert seen == expected
