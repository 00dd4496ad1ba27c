"""The first point of divergence: the module, the rank and the token at which a split run leaves one device's.

Both runs make one more forward pass over the first micro-batch, from the first weights. Every rank keeps
what its modules saw and gave; then rank 0 walks the one-device model and sends each module's tensor
as it comes, so that of the reference only one module is held at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.fabric import Fabric, all_reduce_, broadcast_
from seqloom.model import layer_windows, token_loss
from seqloom.sequence import Batch, shard_batch
from seqloom.train import computing
from seqloom.verify.oracle import one_device_logits

Event = tuple[str, str, int]
"""A module's name, "input" or "output", and which call of the module it is."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where two runs part first.

    where: "activation" (with module, rank, row and position), "loss", "gradient" (with parameter), or
    "step": nothing differs before the optimizer's first step. module: whose code makes the first
    wrong tensor: its output, or, with `before`, what it hands to that module inside it. row, position: in
    the global micro-batch. error: relative; of an activation |x - ref| of the token over the root mean
    square of all tokens of the row.
    """

    where: Literal["activation", "loss", "gradient", "step"]
    error: float = 0.0
    module: str | None = None
    before: str | None = None
    rank: int | None = None
    row: int | None = None
    position: int | None = None
    parameter: str | None = None

    def __str__(self) -> str:
        if self.where == "activation":
            what = f"in {self.module}, in what it hands to {self.before}" if self.before else f"in {self.module}"
            return (
                f"Activations part first {what}: rank {self.rank}, row {self.row}, position {self.position} "
                f"(error {self.error:.1e})."
            )
        if self.where == "loss":
            return f"All activations agree; the difference lies in the loss made of them (error {self.error:.1e})."
        if self.where == "gradient":
            return (
                f"All activations agree, so the difference lies in backward; the first gradient on its way that "
                f"differs is that of {self.parameter} (error {self.error:.1e})."
            )
        return "Activations, loss and gradients of the first step agree; the difference arises in the steps taken."


@dataclass
class _Trace:
    """What one forward pass leaves: the order in which modules ended, and the tensors that fit."""

    ended: list[str] = field(default_factory=list)
    kept: dict[Event, Tensor] = field(default_factory=dict)


def first_parting(
    reference: PreTrainedModel | None,
    model: PreTrainedModel,
    batch: Batch,
    fabric: Fabric,
    *,
    precision: str,
    tolerance: float,
) -> tuple[Parting | None, list[str]]:
    """Where the activations of `model`, split, part first from the reference's, or None; and the order of modules.

    reference: the one-device model on rank 0, None elsewhere. Every rank calls it and gets the same.
    """
    rows = len(batch.tokens) // fabric.plan.data
    trace, held = _split_forward(model, batch, fabric, precision)
    events = list(trace.kept)
    parted: dict[int, tuple[int, int, float]] = {}  # event: row, position, error
    for row in range(len(batch.tokens)):

        def meet(number: int, whole: Tensor, row: int = row) -> None:
            if row // rows != fabric.data.rank or number in parted:
                return
            mine = trace.kept[events[number]][row % rows].to(whole)
            errors = _token_errors(mine, whole, held.to(whole.device))
            wrong = (~(errors <= tolerance)).nonzero().flatten().cpu()
            if len(wrong):
                first = int(wrong[held[wrong].argmin()])
                parted[number] = row, int(held[first]), errors[first].item()

        _walk(reference, trace, batch, row, fabric, precision, meet)
    return _agree(parted, events, batch.num_tokens, fabric), trace.ended


def later_parting(errors: Mapping[str, float], loss_error: float, order: Sequence[str], *, tolerance: float) -> Parting:
    """Where two runs part whose activations agree.

    errors: of each parameter's gradient, over all ranks. order: modules in the order of the forward pass.
    """
    if not loss_error <= tolerance:
        return Parting(where="loss", error=loss_error)
    place = {name: number for number, name in reversed(list(enumerate(order)))}
    # Backward meets the parameters in the other order; what no module's forward used, the head, comes first.
    met = sorted(errors, key=lambda name: place.get(name.rpartition(".")[0], len(order)), reverse=True)
    for name in met:
        if not errors[name] <= tolerance:
            return Parting(where="gradient", parameter=name, error=errors[name])
    return Parting(where="step")


def _split_forward(model: PreTrainedModel, batch: Batch, fabric: Fabric, precision: str) -> tuple[_Trace, Tensor]:
    """What this rank's modules saw and gave, and the positions it holds."""
    local, shard = shard_batch(batch, fabric, windows=layer_windows(model))
    trace = _Trace()
    shape = (local.input_ids.shape[0], local.input_ids.shape[1])

    def keep(event: Event, tensor: Tensor) -> None:
        trace.kept[event] = tensor.cpu()

    with torch.no_grad(), _watched(model, shape, keep, trace.ended), computing(precision, fabric.device):
        token_loss(model, local, shard)
    return trace, torch.cat([torch.arange(*span) for span in shard.spans])


def _walk(
    reference: PreTrainedModel | None,
    trace: _Trace,
    batch: Batch,
    row: int,
    fabric: Fabric,
    precision: str,
    meet: Callable[[int, Tensor], None],
) -> None:
    """Run the reference over a row on rank 0; every rank meets each tensor [S, ...] with the number of its event."""
    wide = torch.float64 if precision == "float64" else torch.float32
    shapes = [tensor.shape[2:] for tensor in trace.kept.values()]
    numbers = {event: number for number, event in enumerate(trace.kept)}

    def say(number: int) -> int:
        return int(broadcast_(torch.tensor(number, device=fabric.device), fabric.world))

    def send(event: Event, tensor: Tensor) -> None:
        number = numbers.get(event, -1)
        if number >= 0 and shapes[number] == tensor.shape[2:]:
            meet(say(number), broadcast_(tensor[0].to(wide).contiguous(), fabric.world))

    if reference is not None:
        with torch.no_grad(), _watched(reference, (1, batch.num_tokens), send, []):
            one_device_logits(reference, batch, row, precision=precision)
        say(-1)
        return
    while (number := say(-1)) >= 0:
        whole = torch.empty(batch.num_tokens, *shapes[number], dtype=wide, device=fabric.device)
        meet(number, broadcast_(whole, fabric.world))


def _token_errors(mine: Tensor, whole: Tensor, held: Tensor) -> Tensor:
    """[local_tokens]: how far each token of `mine` is from that of `whole` [S, ...] at the positions held."""
    size = whole.flatten(1).norm(dim=1).square().mean().sqrt().clamp_min(torch.finfo(whole.dtype).tiny)
    return ((mine - whole[held]).flatten(1).norm(dim=1) / size).nan_to_num(nan=float("inf"))


def _agree(
    parted: Mapping[int, tuple[int, int, float]], events: Sequence[Event], num_tokens: int, fabric: Fabric
) -> Parting | None:
    """The first event that parted on any rank, at the first of its tokens."""
    none = torch.iinfo(torch.int64).max

    def least(number: int) -> int:
        return int(all_reduce_(torch.tensor(number, device=fabric.device), fabric.world, "min"))

    first = least(min(parted, default=none))
    if first == none:
        return None
    row, position, error = parted.get(first, (none, 0, 0.0))
    here = none if row == none else row * num_tokens + position
    place = least(here)
    rank = least(fabric.rank if here == place else none)
    sizes = torch.tensor(error if fabric.rank == rank else -1.0, dtype=torch.float64, device=fabric.device)
    error = all_reduce_(sizes, fabric.world, "max").item()
    name, side, _ = events[first]
    module, _, child = name.rpartition(".") if side == "input" else (name, "", "")
    return Parting(
        where="activation",
        module=module,
        before=child or None,
        rank=rank,
        row=place // num_tokens,
        position=place % num_tokens,
        error=error,
    )


@contextmanager
def _watched(
    model: nn.Module, shape: tuple[int, int], take: Callable[[Event, Tensor], None], ended: list[str]
) -> Iterator[None]:
    """While entered, `take` gets the first tensor of [*shape, ...] that each module is given, and that it returns.

    ended: filled with the names of modules in the order in which their first calls end.
    """
    calls: dict[tuple[str, str], int] = {}

    def offer(name: str, side: str, *values: Any) -> None:
        calls[name, side] = calls.get((name, side), 0) + 1
        tensor = next((x for x in _tensors(values) if x.is_floating_point() and tuple(x.shape[:2]) == shape), None)
        if tensor is not None:
            take((name, side, calls[name, side]), tensor)

    def before(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: offer(name, "input", args, kwargs)

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            offer(name, "output", output)
            ended.append(name)

        return hook

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
