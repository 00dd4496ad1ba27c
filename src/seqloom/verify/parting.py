"""The first point of divergence: the module, the rank and the token at which a split run leaves one device's.

Both runs make one more forward pass over the first micro-batch, from the first weights. Every rank keeps
what its modules saw and gave; then rank 0 walks the one-device model and sends each module's tensor
as it comes, so that of the reference only one module is held at a time. Each rank compares what it holds:
some of the tokens, and of a tensor grid's activations a slice of the hidden dim.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqloom.fabric import Fabric, all_reduce_, broadcast_, gather_values
from seqloom.geometry import Span
from seqloom.model import layer_windows, step_loss
from seqloom.model.pipeline import Elsewhere, Nothing
from seqloom.plan import chunks, stages_of
from seqloom.sequence import Batch, SequenceShard, shard_batch
from seqloom.tensor import Placeholder
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
    """What one forward pass leaves on a rank, of a pipeline that of its stages.

    sides: the positions of the tokens that this rank holds, once for each side of a tensor grid. packed: how many
    parts of the reference's output a module gives one after the other. kept: the tensors of tokens.
    """

    sides: tuple[Tensor, ...]
    packed: dict[str, int]
    kept: dict[Event, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Met:
    """Where an event parted: the first wrong token, and how wrong it is."""

    row: int
    position: int
    error: float


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
    trace = _split_forward(model, batch, fabric, precision)
    # Stages of a pipeline keep other events; which of them the reference meets when, it says as it comes by.
    events = sorted({event for kept in gather_values(list(trace.kept), fabric.world) for event in kept})
    walked: dict[Event, int] = {}
    parted: dict[int, _Met] = {}
    order: list[str] = []
    for row in range(len(batch.tokens)):

        def meet(event: Event, whole: Tensor, row: int = row) -> None:
            number = walked.setdefault(event, len(walked))
            if row // rows != fabric.data.rank or number in parted or event not in trace.kept:
                return
            mine = trace.kept[event][row % rows].to(whole)
            name, side, _ = event
            packed = trace.packed.get(name, 1) if side == "output" else 1
            readings = _slices(mine, whole, trace.sides, packed, fabric)
            # Sides that hold equally many tokens are told apart by what fits.
            found = min((_compared(mine, *reading, tolerance) for reading in readings), default=None)
            if found is not None and found.wrong:
                parted[number] = _Met(row, found.position, found.error)

        order = _walk(reference, events, batch, row, fabric, precision, meet)
    return _agree(parted, list(walked), batch.num_tokens, fabric), gather_values(order, fabric.world)[0]


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


def _split_forward(model: PreTrainedModel, batch: Batch, fabric: Fabric, precision: str) -> _Trace:
    """What this rank's modules saw and gave, and the positions it holds."""
    local, shard = shard_batch(batch, fabric, windows=layer_windows(model))
    packed = {
        name: max(len(parts) for parts, _ in module.packed.values())
        for name, module in model.named_modules()
        if getattr(module, "packed", None)
    }
    trace = _Trace(_sides(shard), packed)

    others = set[str]()
    if 0 not in stages_of(fabric.plan, fabric.pipeline.rank):
        # Handed this stage's input where one device hands on embeddings, as rotary positions are.
        base = model.base_model.named_children()
        others = {f"{model.base_model_prefix}.{name}" for name, part in base if next(part.parameters(), None) is None}

    def keep(event: Event, tensor: Tensor) -> None:
        name, side, _ = event
        if side == "output" or name not in others:
            trace.kept[event] = tensor.cpu()

    shapes = {(len(local.input_ids), len(held)) for held in trace.sides}
    with torch.no_grad(), _watched(model, shapes, keep, []):
        step_loss(
            model,
            [(local, shard)],
            fabric,
            total=batch.label_count,
            sequences=0,
            chunk_tokens=batch.num_tokens,
            computing=partial(computing, precision, fabric.device),
            backward=False,
        )
    return trace


def _sides(shard: SequenceShard) -> tuple[Tensor, ...]:
    """The positions this rank holds; on a tensor grid those of the outer and of the inner side."""
    both: list[tuple[Span, ...]] = [shard.tokens.outer, shard.tokens.inner] if shard.tokens else [shard.spans]
    return tuple(torch.cat([torch.arange(*span) for span in spans]) for spans in dict.fromkeys(both))


MOST_DIMS = 8
"""A tensor's shape travels ahead of it as so many numbers."""


def _walk(
    reference: PreTrainedModel | None,
    events: Sequence[Event],
    batch: Batch,
    row: int,
    fabric: Fabric,
    precision: str,
    meet: Callable[[Event, Tensor], None],
) -> list[str]:
    """Run the reference over a row on rank 0; every rank meets each tensor [S, ...] of `events`, in its order.

    Returns on rank 0 the modules in the order in which their calls ended.
    """
    wide = torch.float64 if precision == "float64" else torch.float32
    numbers = {event: number for number, event in enumerate(events)}
    ended: list[str] = []

    def say(number: int, shape: Sequence[int] = ()) -> tuple[int, list[int]]:
        said = torch.tensor([number, len(shape), *shape, *[0] * (MOST_DIMS - len(shape))], device=fabric.device)
        number, dims, *sizes = broadcast_(said, fabric.world).tolist()
        return number, sizes[:dims]

    def send(event: Event, tensor: Tensor) -> None:
        if event in numbers and tensor.dim() <= MOST_DIMS:
            whole = tensor[0].to(wide).contiguous()
            say(numbers[event], whole.shape)
            meet(event, broadcast_(whole, fabric.world))

    if reference is not None:
        with torch.no_grad(), _watched(reference, {(1, batch.num_tokens)}, send, ended):
            one_device_logits(reference, batch, row, precision=precision)
        say(-1)
        return ended
    number, shape = say(-1)
    while number >= 0:
        whole = broadcast_(torch.empty(shape, dtype=wide, device=fabric.device), fabric.world)
        meet(events[number], whole)
        number, shape = say(-1)
    return ended


def _slices(
    mine: Tensor, whole: Tensor, sides: Sequence[Tensor], packed: int, fabric: Fabric
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what `mine` should be, the positions of its tokens) for each reading of mine [tokens, ...] as a slice of whole.

    It has the tokens of one side, and the whole of the other dims or, of one of them, this rank's part over an
    axis: of each of so many equal parts, where the reference packs them. None where its shape fits no such
    slice: what ranks hold in some other way is not compared.
    """
    if mine.dim() != whole.dim():
        return
    grid, differing = fabric.plan.tensor_grid, [d for d in range(1, mine.dim()) if mine.shape[d] != whole.shape[d]]
    readings = [whole] if not differing else []
    for name in dict.fromkeys((grid.inner.hidden, grid.outer.hidden)) if len(differing) == 1 else ():
        axis = fabric.grid.get(name or "")
        if axis is not None:
            cut = [
                x.split(list(chunks(x.shape[differing[0]], axis.size)), differing[0])
                for x in whole.chunk(packed, differing[0])
            ]
            readings.append(torch.cat([pieces[axis.rank] for pieces in cut], differing[0]))
    for held in sides:
        for reading in readings:
            if len(held) == len(mine) and reading.shape[1:] == mine.shape[1:]:
                yield reading[held.to(whole.device)], held


@dataclass(frozen=True, order=True)
class _Reading:
    """How far a tensor is from what it should be: the number of wrong tokens, all their errors, and the first's."""

    wrong: int
    total: float
    position: int = 0
    error: float = 0.0


def _compared(mine: Tensor, expected: Tensor, held: Tensor, tolerance: float) -> _Reading:
    """A token's error is |mine - expected| over the root mean square of all tokens of `expected`."""
    size = expected.flatten(1).norm(dim=1).square().mean().sqrt().clamp_min(torch.finfo(expected.dtype).tiny)
    errors = ((mine - expected).flatten(1).norm(dim=1) / size).nan_to_num(nan=float("inf")).cpu()
    wrong = (~(errors <= tolerance)).nonzero().flatten()
    if not len(wrong):
        return _Reading(0, 0.0)
    first = int(wrong[held[wrong].argmin()])
    return _Reading(len(wrong), errors[wrong].sum().item(), int(held[first]), errors[first].item())


def _agree(parted: Mapping[int, _Met], events: Sequence[Event], num_tokens: int, fabric: Fabric) -> Parting | None:
    """The first event that parted on any rank, at the first of its tokens."""
    none = torch.iinfo(torch.int64).max

    def least(number: int) -> int:
        return int(all_reduce_(torch.tensor(number, device=fabric.device), fabric.world, "min"))

    first = least(min(parted, default=none))
    if first == none:
        return None
    met = parted.get(first)
    here = none if met is None else met.row * num_tokens + met.position
    place = least(here)
    rank = least(fabric.rank if here == place else none)
    sizes = torch.tensor(met.error if met and fabric.rank == rank else -1.0, dtype=torch.float64, device=fabric.device)
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
    model: nn.Module,
    shapes: Collection[tuple[int, int]],
    take: Callable[[Event, Tensor], None],
    ended: list[str],
) -> Iterator[None]:
    """While entered, `take` gets the first tensor that each module is given, and that it returns, of [*shape, ...].

    Left out are the model and its base, whose output is that of a stage, and what stands for modules of other stages.
    ended: filled with the names of modules in the order in which calls end.
    """
    calls: dict[tuple[str, str], int] = {}

    def fits(x: Tensor) -> bool:
        return not isinstance(x, Placeholder) and x.is_floating_point() and tuple(x.shape[:2]) in shapes

    def offer(name: str, side: str, *values: Any) -> None:
        calls[name, side] = calls.get((name, side), 0) + 1
        found = next(filter(fits, _tensors(values)), None)
        if found is not None:
            take((name, side, calls[name, side]), found)

    def before(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: offer(name, "input", args, kwargs)

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
            offer(name, "output", output)
            ended.append(name)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel | Elsewhere | Nothing):
            continue
        # Ahead of hooks that are there: those of a split model take the input of its projections away.
        hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
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
