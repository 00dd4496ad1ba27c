"""What `benchmarks.tensor` times against each other: one process, the ceiling, and seqloom under its plans.

All contenders of a problem start from the same weights and tokens, which each takes as its interface wants them. A run
is forward and backward once, with whatever sums its gradients need; no optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import gelu

from benchmarks.tensor_problems import Llama, Mlp, Results, gradients, loss_and_gradients, output_and_gradients
from seqloom import Fabric, Plan, parallelize, shard_batch, sum_gradients, token_loss
from seqloom.fabric import all_reduce_
from seqloom.geometry import even_bounds
from seqloom.model.whole import whole_tensors
from seqloom.tensor import ParallelLinear, TensorGroup

RANKS = 2


class Unavailable(Exception):
    """This contender cannot run here; the message says why."""


class Prepared(NamedTuple):
    """A contender ready to run.

    run: forward and backward once; what this rank holds of the results. whole: the results made of it, as one device
    would have them; every rank calls it; None where there is nothing to compare. metered: the bytes this rank has
    sent so far by seqloom's own meter.
    """

    run: Callable[[], Results | None]
    whole: Callable[[Any], Results | None]
    metered: Callable[[], int] | None = None
    close: Callable[[], None] = lambda: None


class Contender(NamedTuple):
    """name, kind (one of `one`, `ceiling`, `ours`, `peer`) and how it is made ready on this rank."""

    name: str
    kind: str
    prepare: Callable[[Any], Prepared]


def nothing(*_: object) -> None:
    """What a process that only waits has to say."""


def local_rows(case: Mlp, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """x, which wants a gradient, and dout [1, tokens here, width]: a part of the tokens, or all of them."""
    bounds, rank, given = even_bounds(case.tokens, RANKS), distributed.get_rank(), case.tensors()
    held = slice(bounds[rank], bounds[rank + 1]) if sequence_parallel else slice(None)
    x, dout = (given[name][:, held].clone() for name in ("x", "dout"))
    return x.requires_grad_(), dout


def joined(found: Results, sequence_parallel: bool) -> Results:
    """Results of an MLP, its output and the gradient of x [1, tokens here, width] laid end to end."""
    if not sequence_parallel:
        return found
    whole = {}
    for name in ("out", "x"):
        parts = [torch.empty_like(found[name], memory_format=torch.contiguous_format) for _ in range(RANKS)]
        distributed.all_gather(parts, found[name].contiguous())
        whole[name] = torch.cat(parts, 1)
    return {**found, **whole}


def _whole_llama(case: Llama) -> Prepared:
    """The untouched model in the first process; the second waits."""
    if distributed.get_rank() > 0:
        return Prepared(nothing, nothing)
    return Prepared(partial(loss_and_gradients, case.model(), case.batch()), lambda found: found)


def _half_llama(case: Llama) -> Prepared:
    """Half of the heads, of the intermediate width and of the vocabulary, on all tokens, and nothing travels."""
    half, batch = case.half(RANKS), case.batch()
    labels = torch.where(batch.labels < 0, batch.labels, batch.labels % half.vocabulary)
    batch = replace(batch, tokens=batch.tokens % half.vocabulary, labels=labels)
    return Prepared(partial(loss_and_gradients, half.model(), batch), nothing)


def _our_llama(case: Llama, plan: str) -> Prepared:
    fabric = Fabric.build(Plan.parse(plan), "cpu")
    model = parallelize(case.model(), fabric)
    local, shard = shard_batch(case.batch(), fabric)

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        loss = token_loss(model, local, shard)
        loss.backward()
        sum_gradients(model, fabric)
        return {"loss": loss.detach(), **gradients(model)}

    def whole(found: Results) -> Results:
        return {"loss": all_reduce_(found["loss"].clone(), fabric.world), **whole_tensors(model, fabric, "gradient")}

    return Prepared(run, whole, lambda: sum(fabric.meter.sent.values()), fabric.close)


def _whole_mlp(case: Mlp) -> Prepared:
    """The plain module in the first process; the second waits."""
    if distributed.get_rank() > 0:
        return Prepared(nothing, nothing)
    given = case.tensors()
    x = given["x"].requires_grad_()
    return Prepared(partial(output_and_gradients, case.module(), x, given["dout"]), lambda found: found)


def _half_mlp(case: Mlp) -> Prepared:
    """Half of the inner width on all tokens, and nothing travels."""
    half = case.half(RANKS)
    given = half.tensors()
    return Prepared(partial(output_and_gradients, half.module(), given["x"].requires_grad_(), given["dout"]), nothing)


class OurMlp(nn.Module):
    """seqloom's linears by themselves, as they stand in a split model."""

    def __init__(self, group: TensorGroup, given: Mapping[str, Tensor]) -> None:
        """given: the whole weights, as `Mlp.tensors` names them."""
        super().__init__()
        for name, direction in (("up", "colwise"), ("down", "rowwise")):
            weight, bias = (nn.Parameter(given[f"{name}.{key}"]) for key in ("weight", "bias"))
            linear = ParallelLinear(group, group.grid.linear(direction), weight, bias, direction=direction)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens here, width] to the same."""
        return self.down(gelu(self.up(x)))


def _our_mlp(case: Mlp, plan: str) -> Prepared:
    fabric = Fabric.build(Plan.parse(plan), "cpu")
    module = OurMlp(TensorGroup.of(fabric), case.tensors())
    x, dout = local_rows(case, fabric.plan.sequence_parallel)

    def run() -> Results:
        found = output_and_gradients(module, x, dout)
        sum_gradients(module, fabric)
        return found

    def whole(found: Results) -> Results:
        rows = joined({name: found[name] for name in ("out", "x")}, fabric.plan.sequence_parallel)
        return {**rows, **whole_tensors(module, fabric, "gradient")}

    return Prepared(run, whole, lambda: sum(fabric.meter.sent.values()), fabric.close)


PLANS = {
    "tp+sp": "",
    "tp+sp, ring": "tensor_overlap=ring",
    "tp+sp, no overlap": "tensor_overlap=none",
    "tp+sp, kept": "regather=false",
    "tp+sp, ring, kept": "tensor_overlap=ring regather=false",
    "tp+sp, no overlap, kept": "tensor_overlap=none regather=false",
    "tp": "sequence_parallel=false",
    "tp, ring": "sequence_parallel=false tensor_overlap=ring",
    "tp, no overlap": "sequence_parallel=false tensor_overlap=none",
}
"""Of tensor=2; `kept` holds gathered inputs for backward, which tp alone has nothing of."""

BASE, CEILING = "one process", "ceiling"


def _own(
    base: Callable[..., Prepared], half: Callable[..., Prepared], ours: Callable[..., Prepared]
) -> tuple[Contender, ...]:
    return (
        Contender(BASE, "one", base),
        Contender(CEILING, "ceiling", half),
        *(
            Contender(f"seqloom {name}", "ours", partial(ours, plan=f"tensor={RANKS} {fields}"))
            for name, fields in PLANS.items()
        ),
    )


OWN = {"llama": _own(_whole_llama, _half_llama, _our_llama), "mlp": _own(_whole_mlp, _half_mlp, _our_mlp)}
