"""Layers whose forward pass is run again in backward, and where what that takes waits.

`torch.utils.checkpoint` keeps the input of some layers and throws the rest away. Each layer's `forward` is
replaced on the instance, below the hooks of its call, and called by what replaces it: classes, weights and what is
saved stay as they are.
"""

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from seqloom.errors import ModelError
from seqloom.fabric import Axis, start_collect
from seqloom.plan import Unit, chunks
from seqloom.plan.plan import Kept
from seqloom.sequence import KeptResults, SequenceShard
from seqloom.sequence.kept import Unpack, whole
from seqloom.tensor import TensorGroup

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside its hidden states."""


def recompute(layers: Sequence[nn.Module], units: Sequence[Unit], group: TensorGroup, activations: Kept) -> None:
    """Make backward compute the layers of `units` again.

    layers: of one stage, in order; they take hidden states [rows, tokens, hidden] first, and return them alone or
    first of a tuple. units: as `seqloom.plan.units` gives them. group: is told the sequences of layers that run
    again. activations: `Plan.activations`.
    """
    for unit in units:
        held = layers[unit.start : unit.stop]
        region = Region(held, group, keeps_attention=unit.keeps_attention, activations=activations)
        for number, layer in enumerate(held):
            # On the layer, as a region that held it would hold the layer.
            layer._own_forward = layer.__dict__.get("forward")
            layer.forward = partial(region.call, number)


class Region:
    """Neighbouring layers that run as one when the last of them is called, and once more in backward.

    Until then each of them hands its input on, so that a model goes through its list of layers as ever.
    """

    def __init__(
        self, layers: Sequence[nn.Module], group: TensorGroup, *, keeps_attention: bool, activations: Kept
    ) -> None:
        # Weak, as a layer holds its region: a model in no cycle ends when it is let go.
        self._layers = [weakref.ref(layer) for layer in layers]
        self._group, self._keeps_attention, self._activations = group, keeps_attention, activations
        self._waiting: list[Call] = []
        self._input: weakref.ref[Tensor] | None = None

    def __deepcopy__(self, copied: dict[int, Any]) -> "Region":
        """Of the copies of its layers: a weak reference is copied as it is."""
        twin = copied[id(self)] = copy.copy(self)
        twin._layers = [weakref.ref(copy.deepcopy(layer(), copied)) for layer in self._layers]
        twin._group, twin._waiting, twin._input = copy.deepcopy(self._group, copied), [], None
        return twin

    def call(self, number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of the forward of the layer of this number, counted in the region."""
        if not torch.is_grad_enabled():
            return _run(self._layers[number], hidden, (args, kwargs))
        if number == 0:
            self._waiting, self._input = [], weakref.ref(hidden)
        if len(self._waiting) != number or self._input is None or self._input() is not hidden:
            raise ModelError(
                f"The model computes something between layers that run again as one ({number} of "
                f"{len(self._layers)}); use recompute=full, which takes each layer by itself."
            )
        self._waiting.append((args, kwargs))
        if number + 1 < len(self._layers):
            return hidden
        calls, self._waiting, self._input = self._waiting, [], None
        return self._checkpoint(hidden, calls)

    def _checkpoint(self, hidden: Tensor, calls: Sequence[Call]) -> Any:
        """Run all layers, keeping their input and what attention keeps."""
        args, kwargs = calls[0]
        shard = next((x for x in (*args, *kwargs.values()) if isinstance(x, SequenceShard)), None)
        kept = None
        if self._keeps_attention:
            kept = KeptResults(offload if self._activations == "offloaded" else whole)
            calls = [(_keeping(kept, args), dict(_keeping(kept, kwargs.items()))) for args, kwargs in calls]

        def run(hidden: Tensor) -> Any:
            out: Any = hidden
            with self._bound(shard):
                for layer, call in zip(self._layers, calls, strict=True):
                    out = _run(layer, out[0] if isinstance(out, tuple) else out, call)
            return out

        again = Again(kept)
        with self._storing():
            return checkpoint(run, hidden, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

    @contextmanager
    def _bound(self, shard: SequenceShard | None) -> Iterator[None]:
        """While entered, split modules know the sequences of these layers: others may have been under way since."""
        before, self._group.shard = self._group.shard, shard
        try:
            yield
        finally:
            self._group.shard = before

    def _storing(self) -> AbstractContextManager[Any]:
        """While entered, the input that a checkpoint keeps goes where it is to wait."""
        if self._activations == "whole":
            return nullcontext()
        pack = offload if self._activations == "offloaded" else partial(partition, self._group.axes["tensor"])
        return saved_tensors_hooks(pack, lambda unpack: unpack())


class Again:
    """While entered, what ran before runs as it did: with what it kept, and under the function modes of then.

    torch leaves function modes for backward; without theirs, the float32 that `Float64Islands` lifts would come back.
    """

    def __init__(self, kept: KeptResults | None) -> None:
        self._kept, self._modes = kept, _get_current_function_mode_stack()
        self._entered = ExitStack()

    def __enter__(self) -> None:
        there = _get_current_function_mode_stack()
        for context in (*(mode for mode in self._modes if mode not in there), self._kept or nullcontext()):
            self._entered.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


def _run(layer: weakref.ref[nn.Module], hidden: Tensor, call: Call) -> Any:
    found, (args, kwargs) = layer(), call
    if found is None:
        raise ModelError("A layer was called after its model had ended; keep the model as long as its layers.")
    own = found._own_forward
    return type(found).forward(found, hidden, *args, **kwargs) if own is None else own(hidden, *args, **kwargs)


def _keeping(kept: KeptResults, given: Any) -> tuple[Any, ...]:
    """Positional arguments, or keyword arguments as pairs, with a shard that keeps these results."""
    return tuple(
        x.keeping(kept) if isinstance(x, SequenceShard) else _keeping(kept, x) if type(x) is tuple else x for x in given
    )


def offload(x: Tensor) -> Unpack:
    """Put a tensor into host memory until it is asked for."""
    there = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    there.copy_(x)
    device = x.device
    return lambda: there.to(device)


def partition(axis: Axis, x: Tensor) -> Unpack:
    """Keep this rank's part of a tensor that all ranks of `axis` hold alike; they gather it together."""
    shape, sizes = x.shape, chunks(x.numel(), axis.size)
    mine = x.flatten().split(sizes)[axis.rank].clone()
    return lambda: start_collect(mine, axis, 0, sizes).wait().view(shape)
