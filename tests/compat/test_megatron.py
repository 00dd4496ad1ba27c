"""Megatron-LM's names against one device: groups, regions, linears, the calls of AscendSpeed, and what is refused."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import gelu

from architecture.source import ROOT
from close import assert_close
from pool import Pool
from seqloom.compat import megatron
from seqloom.compat.megatron import ModelParallelConfig, parallel_state, tensor_parallel
from seqloom.errors import ConfigError, DataError, PlanError, SeqloomError
from train.runs import environment

LINEAR = megatron.linear_with_grad_accumulation_and_async_allreduce
BATCH, WIDTH, INNER = 2, 6, 10
"""INNER is not to divide by 3 or 4, nor the tokens by all of the degrees."""


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@contextmanager
def groups(*sizes: int, **degrees: Any) -> Iterator[tuple[int, int]]:
    """The groups of this process for a while, which outlives a test; rank and size of its tensor group."""
    megatron.initialize_model_parallel(*sizes, **degrees)
    try:
        yield parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    finally:
        parallel_state.destroy_model_parallel()


def settings(sequence_parallel: bool) -> ModelParallelConfig:
    size = parallel_state.get_tensor_model_parallel_world_size()
    return ModelParallelConfig(
        tensor_model_parallel_size=size, params_dtype=torch.float64, sequence_parallel=sequence_parallel
    )


def part(x: Tensor, dim: int, rank: int, world: int) -> Tensor:
    """What `rank` holds of x: from rank * size / world on, rounded down."""
    size = x.shape[dim]
    return x.narrow(dim, rank * size // world, (rank + 1) * size // world - rank * size // world)


def drawn(seed: int) -> Any:
    return lambda weight: weight.copy_(noise(tuple(weight.shape), seed))


def one_device(tokens: int) -> dict[str, Tensor]:
    """The MLP of `mlp` on one device: output, and the gradients of everything."""
    x, up, down = noise((tokens, BATCH, WIDTH), 1), noise((INNER, WIDTH), 2), noise((WIDTH, INNER), 3)
    biases = noise((INNER,), 4), noise((WIDTH,), 5)
    leaves = [leaf.requires_grad_() for leaf in (x, up, down, *biases)]
    y = gelu(x @ up.T + biases[0]) @ down.T + biases[1]
    (y * noise((tokens, BATCH, WIDTH), 6)).sum().backward()
    return {
        "y": y.detach(),
        **dict(zip(("x", "up", "down", "up bias", "down bias"), (t.grad for t in leaves), strict=True)),
    }


def mlp(tokens: int, sequence_parallel: bool, whole_between: bool) -> dict[str, Tensor]:
    """A column- and a row-parallel linear on this rank: output, and the gradients of everything."""
    with groups(distributed.get_world_size()) as (rank, world):
        config = settings(sequence_parallel)
        up = megatron.ColumnParallelLinear(
            WIDTH, INNER, config=config, init_method=drawn(2), gather_output=whole_between, skip_bias_add=False
        )
        down = megatron.RowParallelLinear(
            INNER,
            WIDTH,
            config=config,
            init_method=drawn(3),
            bias=True,
            input_is_parallel=not whole_between,
            skip_bias_add=True,
        )
        with torch.no_grad():
            up.bias.copy_(part(noise((INNER,), 4), 0, rank, world))
            down.bias.copy_(noise((WIDTH,), 5))
        x, cotangent = noise((tokens, BATCH, WIDTH), 1), noise((tokens, BATCH, WIDTH), 6)
        if sequence_parallel:
            x, cotangent = (part(t, 0, rank, world).clone() for t in (x, cotangent))
        x.requires_grad_()
        between, none = up(x)
        assert none is None
        y, bias = down(gelu(between))
        ((y + bias) * cotangent).sum().backward()
        if down.bias.sequence_parallel:  # the loop's part, as in Megatron-LM
            distributed.all_reduce(down.bias.grad, group=parallel_state.get_tensor_model_parallel_group())
        assert up.weight.tensor_model_parallel and up.weight.partition_dim == 0 and down.weight.partition_dim == 1
        grads = {"up": up.weight, "down": down.weight, "up bias": up.bias, "down bias": down.bias}
        return {"y": (y + bias).detach(), "x": x.grad, **{name: parameter.grad for name, parameter in grads.items()}}


@pytest.mark.parametrize(
    ("world", "tokens", "sequence_parallel", "whole_between"),
    [
        (1, 5, True, False),
        (2, 8, True, False),
        (2, 8, False, True),
        (3, 7, True, False),
        (4, 7, True, False),
        (4, 8, False, False),
    ],
)
def test_linears_equal_one_device(
    pool: Pool, world: int, tokens: int, sequence_parallel: bool, whole_between: bool
) -> None:
    """Catches a gradient summed twice or not at all, parts out of order, a bias added once a rank."""
    expected = one_device(tokens)
    for rank, found in enumerate(pool.run(world, mlp, tokens, sequence_parallel, whole_between)):
        dims = {"up": 0, "up bias": 0, "down": 1, **({"y": 0, "x": 0} if sequence_parallel else {})}
        for name, whole in expected.items():
            wanted = part(whole, dims[name], rank, world) if name in dims else whole
            assert_close(found[name], wanted, tolerance=1e-12, ranks=world)


CALLS: dict[str, Callable[..., Tensor]] = {
    "AscendSpeed, by position": LINEAR,
    "AscendSpeed, by name": lambda x, w, b, split: LINEAR(input_=x, weight=w, bias=b, sequence_parallel_enabled=split),
    "AscendSpeed, both": lambda x, w, b, split: LINEAR(x, w, bias=b, sequence_parallel_enabled=split),
    "Megatron-LM, by position": lambda x, w, b, split: LINEAR(x, w, b, False, not split, split),
    "Megatron-LM, by name": lambda x, w, b, split: LINEAR(
        input=x,
        weight=w,
        bias=b,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=not split,
        sequence_parallel=split,
        grad_output_buffer=None,
        wgrad_deferral_limit=None,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    ),
    "Megatron-LM, older": lambda x, w, b, split: LINEAR(
        x, w, b, gradient_accumulation_fusion=False, async_grad_allreduce=not split, sequence_parallel_enabled=split
    ),
}


def called(sequence_parallel: bool) -> dict[str, tuple[Tensor, ...]]:
    """Output and gradients of the linear, called in every way."""
    with groups(2) as (rank, _):
        found = {}
        for name, call in CALLS.items():
            weight, bias = (part(noise(shape, 1), 0, rank, 2).clone().requires_grad_() for shape in ((4, 3), (4,)))
            x = noise((6, BATCH, 3), 3)
            x = (part(x, 0, rank, 2) if sequence_parallel else x).clone().requires_grad_()
            copied = (
                name.startswith("AscendSpeed") and not sequence_parallel
            )  # which sums the input's gradient by itself
            out = call(
                tensor_parallel.copy_to_tensor_model_parallel_region(x) if copied else x,
                weight,
                bias,
                sequence_parallel,
            )
            out.backward(part(noise((6, BATCH, 4), 4), -1, rank, 2))
            found[name] = (out.detach(), x.grad, weight.grad, bias.grad)
        return found


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_every_way_to_call_the_linear(pool: Pool, sequence_parallel: bool) -> None:
    """Catches AscendSpeed's fourth argument taken for Megatron-LM's, an older name dropped, a gradient summed twice."""
    x, weight, bias = (
        noise(shape, seed).requires_grad_() for shape, seed in (((6, BATCH, 3), 3), ((4, 3), 1), ((4,), 1))
    )
    out = x @ weight.T + bias
    out.backward(noise((6, BATCH, 4), 4))
    dims = (-1, 0 if sequence_parallel else None, 0, 0)
    for rank, found in enumerate(pool.run(2, called, sequence_parallel)):
        assert len(found) == len(CALLS)
        for tensors in found.values():
            for got, whole, dim in zip(tensors, (out, x.grad, weight.grad, bias.grad), dims, strict=True):
                assert whole is not None
                assert_close(got, whole if dim is None else part(whole, dim, rank, 2), tolerance=1e-12)


def regions(world: int) -> dict[str, Tensor]:
    """Each region of sequence-first tensors, forward and backward, over the tensor group and over a group handed in."""
    with groups(world) as (rank, _):
        return all_regions(rank, world, parallel_state.get_tensor_model_parallel_group())


def all_regions(rank: int, world: int, group: distributed.ProcessGroup | None) -> dict[str, Tensor]:
    whole, mine = noise((7, BATCH, 3), 1), noise((7, BATCH, 3), 10 + rank)
    held = part(whole, 0, rank, world)
    sizes = [len(part(whole, 0, other, world)) for other in range(world)]
    found = {}

    def ran(name: str, x: Tensor, region: Callable[[Tensor], Tensor]) -> None:
        x = x.clone().requires_grad_()
        out = region(x)
        out.backward(noise(tuple(out.shape), 1)[: len(out)])
        found[name], found[f"{name}, gradient"] = out.detach(), x.grad

    ran("scatter", whole, megatron.scatter_to_sequence_parallel_region)
    ran("gather", held, lambda x: megatron.gather_from_sequence_parallel_region(x, group=group))
    ran("gather, alike", held, lambda x: megatron.gather_from_sequence_parallel_region(x, False, group, sizes))
    ran("sum", mine, lambda x: megatron.reduce_scatter_to_sequence_parallel_region(x, input_split_sizes=sizes))
    ran("last dim", whole, tensor_parallel.scatter_to_tensor_model_parallel_region)
    ran("last dim, gathered", part(whole, -1, rank, world), tensor_parallel.gather_from_tensor_model_parallel_region)
    ran("all", mine, tensor_parallel.reduce_from_tensor_model_parallel_region)
    return found


def test_regions_are_sequence_first(pool: Pool) -> None:
    """Catches the batch dim taken for tokens, the adjoint of the other gather, a group handed in and ignored."""
    world = 3
    whole, total = noise((7, BATCH, 3), 1), sum(noise((7, BATCH, 3), 10 + rank) for rank in range(world))
    assert isinstance(total, Tensor)
    for rank, found in enumerate(pool.run(world, regions, world)):
        tokens, channels = part(whole, 0, rank, world), part(whole, -1, rank, world)
        expected = {
            "scatter": tokens,
            "gather": whole,
            "gather, gradient": world * tokens,
            "gather, alike": whole,
            "gather, alike, gradient": tokens,
            "sum": part(total, 0, rank, world),
            "last dim": channels,
            "last dim, gathered": whole,
            "last dim, gathered, gradient": channels,
            "all": total,
            "all, gradient": whole,
        }
        for name, wanted in expected.items():
            assert_close(found[name], wanted, tolerance=1e-14, ranks=world)


def ranks_of(degrees: dict[str, Any]) -> dict[str, list[int]]:
    """The ranks of this rank's groups."""
    state = parallel_state
    with groups(**degrees):
        found = {}
        for name, group, size, rank in (
            ("tensor", *(getattr(state, f"get_tensor_model_parallel_{what}")() for what in WHAT)),
            ("context", *(getattr(state, f"get_context_parallel_{what}")() for what in WHAT)),
            ("data", *(getattr(state, f"get_data_parallel_{what}")() for what in WHAT)),
            ("both", *(getattr(state, f"get_data_parallel_{what}")(with_context_parallel=True) for what in WHAT)),
            ("pipeline", *(getattr(state, f"get_pipeline_model_parallel_{what}")() for what in WHAT)),
        ):
            found[name] = distributed.get_process_group_ranks(group)
            assert size == len(found[name])
            assert rank == found[name].index(distributed.get_rank())
        assert state.model_parallel_is_initialized()
    assert not state.model_parallel_is_initialized()
    return found


WHAT = ("group", "world_size", "rank")


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
            {"tensor": [2, 3], "context": [1, 3], "data": [3, 7], "both": [1, 3, 5, 7], "pipeline": [3]},
        ),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            {"tensor": [2, 3], "context": [3], "data": [1, 3], "both": [1, 3], "pipeline": [3, 7]},
        ),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "order": "tp-cp-ep-pp-dp"},
            {"tensor": [2, 3], "context": [3], "data": [3, 7], "both": [3, 7], "pipeline": [1, 3]},
        ),
    ],
)
def test_groups_hold_the_ranks_that_they_hold_there(
    pool: Pool, degrees: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    """Catches another numbering of ranks, and a group of one that torch.distributed would take for all processes."""
    assert pool.run(8, ranks_of, degrees)[3] == expected


def cut(stride: int, world: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weights of both linears, and the column-parallel one as it was before it was cut."""
    with groups(world):
        config = settings(False)
        column = megatron.ColumnParallelLinear(
            3, 8, config=config, init_method=drawn(1), stride=stride, keep_master_weight_for_test=True, bias=False
        )
        row = megatron.RowParallelLinear(
            8,
            3,
            config=config,
            init_method=drawn(1),
            stride=stride,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        return column.weight.detach(), row.weight.detach(), column.master_weight


def test_a_stride_deals_each_block(pool: Pool) -> None:
    """Catches a weight of two stacked blocks (gate and up) cut as one, whose halves then land on other ranks."""
    for rank, (column, row, master) in enumerate(pool.run(2, cut, 2, 2)):
        mine = [0, 1, 4, 5] if rank == 0 else [2, 3, 6, 7]
        assert master is not None and torch.equal(master, noise((8, 3), 1))
        assert torch.equal(column, noise((8, 3), 1)[mine])
        assert torch.equal(row, noise((3, 8), 1)[:, mine])


def handed() -> tuple[Tensor, Tensor, Tensor | None, str]:
    """A column-parallel linear without a weight of its own: gathered at the call, its bias handed out; a refusal."""
    with groups(2) as (rank, _):
        linear = megatron.ColumnParallelLinear(
            3,
            4,
            config=settings(False),
            init_method=nn.init.zeros_,
            skip_weight_param_allocation=True,
            skip_bias_add=True,
        )
        weight = part(noise((4, 3), 1), 0, rank, 2)
        out, bias = linear(noise((5, BATCH, 3), 2), weight, runtime_gather_output=True)
        with pytest.raises(DataError) as refused:
            linear(noise((5, BATCH, 3), 2))
        return out, linear(noise((5, BATCH, 3), 2), weight)[0], bias, str(refused.value)


def test_a_weight_may_be_handed_in(pool: Pool) -> None:
    """Catches a tied head that reads another weight, a bias added though the caller adds it, and no weight at all."""
    whole = noise((5, BATCH, 3), 2) @ noise((4, 3), 1).T
    for rank, (gathered, mine, bias, refused) in enumerate(pool.run(2, handed)):
        assert_close(gathered, whole, tolerance=1e-12)
        assert_close(mine, part(whole, -1, rank, 2), tolerance=1e-12)
        assert bias is not None and bias.shape == (2,)
        assert refused == "The weight is None, but this rank's part is (2, 3); hand it to forward as `weight`."


def less_usual() -> dict[str, Any]:
    """Settings that few use, each on this rank of two."""
    with groups(2) as (rank, _):
        # As Megatron-LM's own class, with settings that these linears do not read.
        config = SimpleNamespace(
            sequence_parallel=False,
            params_dtype=torch.float64,
            perform_initialization=True,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            timers=object(),
        )
        group = parallel_state.get_tensor_model_parallel_group()
        given: dict[str, Any] = {"config": config, "init_method": drawn(1), "tp_group": group, "bias": False}
        kept = megatron.ColumnParallelLinear(3, 4, disable_grad_reduce=True, tp_comm_buffer_name="fc1", **given)
        x = noise((5, BATCH, 3), 2).requires_grad_()
        kept(x)[0].backward(part(noise((5, BATCH, 4), 3), -1, rank, 2))

        config.perform_initialization = False
        given["init_method"] = None
        megatron.ColumnParallelLinear(3, 4, **given)
        lower = megatron.ModelParallelConfig(sequence_parallel=True)
        half = megatron.ColumnParallelLinear(3, 4, config=lower, init_method=drawn(1), skip_bias_add=False)
        with torch.autocast("cpu", torch.bfloat16):
            out = half(noise((3, BATCH, 3), 4).float())[0]
        out.float().sum().backward()
        assert x.grad is not None and half.weight.grad is not None
        return {"gradient": x.grad, "types": (out.dtype, half.weight.grad.dtype)}


def test_less_usual_settings(pool: Pool) -> None:
    """Catches a gradient summed although it was to be left, a group or a foreign config ignored, autocast ignored."""
    for rank, found in enumerate(pool.run(2, less_usual)):
        cotangent, weight = noise((5, BATCH, 4), 3), noise((4, 3), 1)
        own = part(cotangent, -1, rank, 2) @ part(weight, 0, rank, 2)
        assert_close(found["gradient"], own, tolerance=1e-12)
        assert found["types"] == (torch.bfloat16, torch.float32)


X, W = torch.ones(2, 1, 3), torch.ones(3, 3)
NO_FUSION = {"allreduce_dgrad": False, "sequence_parallel": False}
REFUSED: dict[str, tuple[Callable[[], Any], type[SeqloomError]]] = {
    "gradient_accumulation_fusion": (lambda: LINEAR(X, W, None, True, **NO_FUSION), ConfigError),
    "grad_output_buffer": (lambda: LINEAR(X, W, None, False, **NO_FUSION, grad_output_buffer=[]), ConfigError),
    "wgrad_deferral_limit": (lambda: LINEAR(X, W, None, False, **NO_FUSION, wgrad_deferral_limit=2), ConfigError),
    "allreduce_dgrad=True and": (lambda: LINEAR(X, W, None, False, True, True), ConfigError),
    "async_grad_allreduce=True": (
        lambda: LINEAR(X, W, None, False, **NO_FUSION, async_grad_allreduce=True),
        ConfigError,
    ),
    "not 5 by position": (lambda: LINEAR(X, W, None, False, False), ConfigError),
    "not 4 by position, sequence_parallel": (lambda: LINEAR(X, W, None, False, sequence_parallel=True), ConfigError),
    "use_global_buffer": (
        lambda: megatron.gather_from_sequence_parallel_region(X, use_global_buffer=True),
        ConfigError,
    ),
    "cpu_offloading": (lambda: ModelParallelConfig(cpu_offloading=True), ConfigError),
    "timers": (lambda: ModelParallelConfig(timers=None), ConfigError),
    "tensor_model_parallel_size=2": (
        lambda: column(config=ModelParallelConfig(tensor_model_parallel_size=2)),
        ConfigError,
    ),
    "is_expert": (lambda: column(is_expert=True), ConfigError),
    "embedding_activation_buffer": (lambda: column(embedding_activation_buffer=[]), ConfigError),
    "input_is_parallel=False": (lambda: row(settings(True), input_is_parallel=False), ConfigError),
    "exist already": (megatron.initialize_model_parallel, ConfigError),
    "virtual_pipeline_model_parallel_size": (lambda: megatron.initialize_model_parallel(1, 1, 2), ConfigError),
    "expert_model_parallel_size": (
        lambda: megatron.initialize_model_parallel(expert_model_parallel_size=2),
        ConfigError,
    ),
    "order='tp-tp'": (lambda: again(order="tp-tp"), PlanError),
    "1 process cannot be shared out": (lambda: again(tensor_model_parallel_size=3), PlanError),
}


def column(**more: Any) -> nn.Module:
    return megatron.ColumnParallelLinear(3, 4, **{"config": settings(False), "init_method": nn.init.zeros_, **more})


def row(config: ModelParallelConfig, **more: Any) -> nn.Module:
    return megatron.RowParallelLinear(
        4, 3, config=config, init_method=nn.init.zeros_, bias=True, skip_bias_add=False, **more
    )


def again(**degrees: Any) -> None:
    parallel_state.destroy_model_parallel()
    megatron.initialize_model_parallel(**degrees)


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(sentence: str) -> None:
    """Catches an argument that is taken and does nothing, and a refusal that does not name it or no way out."""
    call, error = REFUSED[sentence]
    with groups(), pytest.raises(error) as refused:
        call()
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".") and ";" in str(refused.value)


def test_nothing_works_before_the_groups_are_made() -> None:
    """Catches a region that would quietly do nothing where a program forgot to make its groups."""
    with pytest.raises(ConfigError, match="call initialize_model_parallel first"):
        megatron.scatter_to_sequence_parallel_region(X)


@pytest.mark.sweep
def test_the_example_equals_one_device() -> None:
    """Catches an example that does not run, or that shows another output than one device has."""
    program = str(ROOT / "examples" / "megatron_linears.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", program]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"rank {rank}" for rank in range(4)]
    apart = [float(number) for line in lines for number in re.findall(r"\de-\d+", line)]
    assert len(apart) == 8 and max(apart) < 1e-12
