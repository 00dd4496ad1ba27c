"""Peers of `benchmarks.tensor` that run on CPU; one that is missing is skipped with a message.

torch's `parallelize_module` with the plan of torchtitan's Llama (the same styles and layouts, on transformers'
modules). Megatron-core, of the extra `bench`, its linears alone: tensor parallel unpatched, with sequence
parallelism `torch.cuda.current_device`, by which it says where a buffer lies, answers "cpu".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, gelu

from benchmarks.tensor_contenders import RANKS, Contender, Prepared, Unavailable, joined, local_rows
from benchmarks.tensor_problems import Llama, Mlp, Results, gradients, output_and_gradients, plain_logits

Plan = dict[str, ParallelStyle]


def llama_plan(layers: int, sequence_parallel: bool, split_loss: bool) -> Plan:
    """torchtitan's plan under transformers' names."""
    outer = Shard(1) if sequence_parallel else Replicate()
    entry = {
        "input_kwarg_layouts": {"hidden_states": outer},
        "desired_input_kwarg_layouts": {"hidden_states": Replicate()},
    }
    plan: Plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outer),
        "lm_head": ColwiseParallel(
            input_layouts=outer,
            output_layouts=Shard(-1) if split_loss else Replicate(),
            use_local_output=not split_loss,
        ),
    }
    if sequence_parallel:
        plan["model.norm"] = SequenceParallel()
    for number in range(layers):
        layer: Plan = {
            "self_attn": PrepareModuleInput(**entry),
            "mlp": PrepareModuleInput(input_layouts=(outer,), desired_input_layouts=(Replicate(),)),
            **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            "self_attn.o_proj": RowwiseParallel(output_layouts=outer),
            **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
            "mlp.down_proj": RowwiseParallel(output_layouts=outer),
        }
        if sequence_parallel:
            layer |= {name: SequenceParallel() for name in ("input_layernorm", "post_attention_layernorm")}
        plan |= {f"model.layers.{number}.{name}": style for name, style in layer.items()}
    return plan


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))


def _settle(module: nn.Module) -> None:
    """Sum what DTensor leaves as parts of a sum, as a step of an optimizer would."""
    for parameter in module.parameters():
        if isinstance(parameter.grad, DTensor) and any(isinstance(p, Partial) for p in parameter.grad.placements):
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def _full(found: Results) -> Results:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def _torch_llama(case: Llama, sequence_parallel: bool, split_loss: bool) -> Prepared:
    model, batch = case.model(), case.batch()
    parallelize_module(model, _mesh(), llama_plan(case.layers, sequence_parallel, split_loss))

    def run() -> Results:
        model.zero_grad(set_to_none=True)
        with loss_parallel() if split_loss else nullcontext():
            loss = cross_entropy(plain_logits(model, batch).flatten(0, 1), batch.labels.flatten())
            loss.backward()
        _settle(model)
        return {"loss": loss.detach(), **gradients(model)}

    return Prepared(run, _full)


def _torch_mlp(case: Mlp, sequence_parallel: bool) -> Prepared:
    outer = Shard(1) if sequence_parallel else Replicate()
    plan = {"up": ColwiseParallel(input_layouts=outer), "down": RowwiseParallel(output_layouts=outer)}
    module = parallelize_module(case.module(), _mesh(), plan)
    x, dout = local_rows(case, sequence_parallel)

    def run() -> Results:
        found = output_and_gradients(module, x, dout)
        _settle(module)
        return found

    return Prepared(run, lambda found: _full(joined(found, sequence_parallel)))


class _MegatronMlp(nn.Module):
    """ColumnParallelLinear, GELU, RowParallelLinear, of activations [tokens, 1, width]."""

    def __init__(self, layers: Any, config: Any, case: Mlp) -> None:
        super().__init__()
        asked = {"config": config, "init_method": nn.init.zeros_, "bias": True, "skip_bias_add": False}
        self.up = layers.ColumnParallelLinear(case.width, case.inner, gather_output=False, **asked)
        self.down = layers.RowParallelLinear(case.inner, case.width, input_is_parallel=True, **asked)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)[0]))[0]

    def load(self, given: dict[str, Tensor]) -> None:
        """Take this rank's part of the whole weights."""
        rank = distributed.get_rank()
        with torch.no_grad():
            for name, dim in _MEGATRON_SPLITS.items():
                part = given[name] if dim is None else given[name].chunk(RANKS, dim)[rank]
                self.get_parameter(name).copy_(part)


_MEGATRON_SPLITS = {"up.weight": 0, "up.bias": 0, "down.weight": 1, "down.bias": None}
"""The dim of each parameter that Megatron-core splits."""


@contextmanager
def _as_on_cpu(sequence_parallel: bool) -> Iterator[None]:
    """Where Megatron-core runs: without its advice for GPUs, and with the one stand-in that it needs."""
    with catch_warnings():
        simplefilter("ignore")
        with patch.object(torch.cuda, "current_device", lambda: "cpu") if sequence_parallel else nullcontext():
            yield


def _megatron() -> tuple[Any, Any, Callable[[], None]]:
    """Its module of linears, its configuration class, and what ends its groups, with its groups made."""
    try:
        with _as_on_cpu(False):
            from megatron.core import ModelParallelConfig, parallel_state
            from megatron.core.tensor_parallel import layers
    except ImportError as error:
        raise Unavailable(f"megatron-core does not import ({error}); the extra `bench` brings it") from error
    try:
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    except Exception as error:  # whatever it is, it is why this peer is missing
        raise Unavailable(f"megatron-core does not start ({error})") from error
    return layers, ModelParallelConfig, parallel_state.destroy_model_parallel


def _megatron_mlp(case: Mlp, sequence_parallel: bool) -> Prepared:
    layers, settings, close = _megatron()
    config = settings(
        tensor_model_parallel_size=RANKS,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
    )
    module = _MegatronMlp(layers, config, case)
    module.load(case.tensors())
    # Tokens first, as Megatron-core has them; of one row it is the same memory.
    x, dout = (each.detach().transpose(0, 1) for each in local_rows(case, sequence_parallel))
    x.requires_grad_()

    def run() -> Results:
        with _as_on_cpu(sequence_parallel):
            found = output_and_gradients(module, x, dout)
        if sequence_parallel:  # what its finalize_model_grads sums
            distributed.all_reduce(found["down.bias"])
        return found

    def whole(found: Results) -> Results:
        rows = {name: found[name].transpose(0, 1) for name in ("out", "x")}
        made = dict(joined(rows, sequence_parallel))
        for name, dim in _MEGATRON_SPLITS.items():
            made[name] = found[name]
            if dim is not None:
                parts = [torch.empty_like(found[name]) for _ in range(RANKS)]
                distributed.all_gather(parts, found[name].contiguous())
                made[name] = torch.cat(parts, dim)
        return made

    return Prepared(run, whole, close=close)


PEERS = {
    "llama": (
        Contender("torch tp", "peer", partial(_torch_llama, sequence_parallel=False, split_loss=False)),
        Contender("torch tp, loss parallel", "peer", partial(_torch_llama, sequence_parallel=False, split_loss=True)),
        Contender("torch tp+sp", "peer", partial(_torch_llama, sequence_parallel=True, split_loss=False)),
        Contender("torch tp+sp, loss parallel", "peer", partial(_torch_llama, sequence_parallel=True, split_loss=True)),
    ),
    "mlp": (
        Contender("torch tp", "peer", partial(_torch_mlp, sequence_parallel=False)),
        Contender("torch tp+sp", "peer", partial(_torch_mlp, sequence_parallel=True)),
        Contender("Megatron-core tp", "peer", partial(_megatron_mlp, sequence_parallel=False)),
        Contender("Megatron-core tp+sp", "peer", partial(_megatron_mlp, sequence_parallel=True)),
    ),
}
