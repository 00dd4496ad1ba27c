"""The one linear as a module, alone or among siblings that read the same input."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqloom.errors import DataError, ModelError
from seqloom.geometry import total
from seqloom.plan import Moves, chunks
from seqloom.tensor.group import TOKENS, TensorGroup
from seqloom.tensor.latent import LatentLinear, compute_latents
from seqloom.tensor.linear import Call, computed_in, in_autocast, parallel_linear
from seqloom.tensor.parameters import local, split, whole
from seqloom.tensor.ring import ring_linear


class ParallelLinear(nn.Module):
    """A linear whose weight is split over a tensor grid.

    Input [..., tokens, in part], output [..., tokens, out part], each as its side of the grid holds it. The
    parameters are those of the linear it stands for, under their names; where that one packs several into one
    (GPT-2's c_attn), they are held as weight_0, weight_1, ... and joined again in the state dict.
    """

    def __init__(
        self,
        group: TensorGroup,
        moves: Moves,
        weight: Tensor,
        bias: Tensor | None,
        *,
        direction: str,
        parts: int = 1,
        transposed: bool = False,
        rows: Tensor | slice | None = None,
    ) -> None:
        """Take this rank's part of `weight` and `bias`, which are whole and the same on all ranks.

        moves: how activations and weight travel, as `Grid.linear` gives it. direction: colwise or rowwise.
        parts: how many linears of equal size are packed along the output. transposed: whether the weight is
        [in, out], as in transformers' Conv1D. rows: of the held weight [out, in] those that this rank uses,
        where several ranks share them.
        """
        super().__init__()
        self.group, self.moves, self.direction, self.rows = group, moves, direction, rows
        self.transposed = transposed
        # Weak: a model in no cycle ends when it is let go, and with it the process groups that it holds.
        self.siblings: weakref.ref[Siblings] | None = None
        out_dim = 1 if transposed else 0
        self.in_features, self.out_features = weight.shape[1 - out_dim], weight.shape[out_dim] // parts
        grid = group.grid
        self.names = [""] if parts == 1 else [f"_{number}" for number in range(parts)]
        self.packed: dict[str, tuple[tuple[str, ...], int]] = {}
        shards = {axis: dim if dim is None or not transposed else 1 - dim for axis, dim in moves.shards.items()}
        target = grid.inner if direction == "colwise" else grid.outer
        for name, tensor, dim in (("weight", weight, out_dim), ("bias", bias, 0)):
            if tensor is None:
                self.bias = None
                continue
            if parts > 1:
                self.packed[name] = tuple(f"{name}{suffix}" for suffix in self.names), dim
            held = shards if name == "weight" else self._bias_shards(target.hidden)
            side = grid.both if name == "weight" else target
            for suffix, part in zip(self.names, tensor.chunk(parts, dim), strict=True):
                self.register_parameter(f"{name}{suffix}", split(part, group, held, side))

    def _bias_shards(self, hidden: str | None) -> dict[str, int | None]:
        """A bias lies with the outputs: split as their hidden dim is, unless ranks share rows of the weight."""
        return {} if hidden is None or self.rows is not None else {hidden: 0}

    def weights(self) -> list[Tensor]:
        """This rank's part of each weight, [out, in]."""
        held = [local(getattr(self, f"weight{suffix}")) for suffix in self.names]
        held = [w.mT if self.transposed else w for w in held]
        return held if self.rows is None else [w[self.rows] for w in held]

    def biases(self) -> list[Tensor | None]:
        """This rank's part of each bias, [out]."""
        held = [getattr(self, f"bias{suffix}", None) for suffix in self.names]
        found = [None if b is None else local(b) for b in held]
        return found if self.rows is None else [None if b is None else b[self.rows] for b in found]

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of the output for its part of the input; among siblings, what was made at their entry."""
        siblings = self.siblings() if self.siblings is not None else None
        outs = siblings.take(self) if siblings is not None else None
        if outs is None:
            outs = compute(self.group, [self], x)
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)

    def extra_repr(self) -> str:
        """What nn.Linear says, and the direction."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.direction}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, (parts, dim) in self.packed.items():
            held = [whole(destination.pop(prefix + part), self.group.axes) for part in parts]
            destination[prefix + name] = torch.cat(held, dim)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, (parts, dim) in self.packed.items():
            joined = state_dict.pop(prefix + name, None)
            if joined is not None:
                for part, tensor in zip(parts, joined.chunk(len(parts), dim), strict=True):
                    held = getattr(self, part)
                    state_dict[prefix + part] = split(tensor, self.group, _shards_of(held), self.group.grid.outer)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _shards_of(parameter: Tensor) -> Mapping[str, int | None]:
    """For each axis of a parameter's mesh the dim that is split over it."""
    mesh, placements = parameter.device_mesh, parameter.placements
    return {name: p.dim if p.is_shard() else None for name, p in zip(mesh.mesh_dim_names, placements, strict=True)}


def _check(group: TensorGroup, linear: ParallelLinear, x: Tensor) -> None:
    """Raise DataError for an input that is not this rank's part: parts of other sizes would not meet."""
    side = group.grid.outer if linear.direction == "colwise" else group.grid.inner
    axis = group.axes[side.hidden] if side.hidden else None
    width = linear.in_features if axis is None else chunks(linear.in_features, axis.size)[axis.rank]
    tokens = x.shape[TOKENS] if x.dim() > 1 else None
    move = linear.moves.x or linear.moves.y
    if group.shard is not None and group.shard.tokens and move is not None and move.dim == "tokens":
        held = group.shard.tokens.outer if linear.direction == "colwise" else group.shard.tokens.inner
        tokens = total(held)
    if x.dim() < 2 or x.shape[-1] != width or x.shape[TOKENS] != tokens:
        raise DataError(
            f"The input is {list(x.shape)}, but this rank holds [..., {tokens or 'tokens'}, {width}] on the side that "
            f"a {linear.direction} linear reads; give it the part that belongs to it."
        )


def compute(group: TensorGroup, linears: Sequence[ParallelLinear], x: Tensor) -> list[Tensor]:
    """The outputs of linears that read the same x, in order, packed ones apart."""
    weights, biases, ws, ys = [], [], [], []
    _check(group, linears[0], x)
    collect = group.collecting(linears[0].moves.x, x, linears[0].in_features)
    tokens = sum(collect.sizes) if collect is not None and collect.dim == TOKENS else x.shape[TOKENS]
    for linear in linears:
        whole = (linear.out_features, linear.in_features)
        for weight, bias in zip(linear.weights(), linear.biases(), strict=True):
            weights.append(weight)
            biases.append(bias)
            ws.append(group.weight(linear.moves, whole))
            ys.append(group.scattering(linear.moves.y, tokens, linear.out_features))
    dtype = computed_in(x)
    if weights[0].dtype != x.dtype and not in_autocast(x):
        raise DataError(f"The input is in {dtype}, but the weights are in {weights[0].dtype}; convert one of them.")
    x, weights = x.to(dtype), [w.to(dtype) for w in weights]
    call = Call(collect, tuple(ws), tuple(ys), group.overlap != "none", group.regather)
    run = ring_linear if group.overlap == "ring" and not x.is_meta else parallel_linear
    outs = run(x, weights, call)
    return [out if bias is None else out.add_(bias.to(dtype)) for out, bias in zip(outs, biases, strict=True)]


_READS = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")
) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}


class Placeholder(torch.Tensor):
    """Stands for the gathered input of a module whose projections have been computed already.

    It has the shape of the tokens that the projections hold, which is what modules view them by, and no
    contents: whatever else is done with it raises ModelError.
    """

    owner = "A module"

    @classmethod
    def like(cls, x: Tensor, tokens: int, width: int, owner: str) -> "Placeholder":
        """For x [..., tokens, hidden part], with `tokens` and the whole `width`; owner: the module that gets it."""
        stands = x.new_empty(()).expand(*x.shape[:TOKENS], tokens, width).as_subclass(cls)
        stands.owner = owner
        return stands

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give the shape, refuse the rest."""
        if func in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        owner = next((x.owner for x in (*args, *(kwargs or {}).values()) if isinstance(x, Placeholder)), cls.owner)
        raise ModelError(
            f"{owner}, whose linears are split, reads its input itself ({getattr(func, '__name__', func)}), not only "
            "through its projections; the model cannot be split over tensor ranks. Use ring or ulysses."
        )


class Siblings:
    """The linears that read one module's input, column-wise or to latents: computed when the module is entered.

    So the column-wise ones share one gathering of the input, and backward sums their gradients before one
    reduce-scatter; and the latents are gathered together.
    """

    def __init__(
        self, module: nn.Module, linears: Sequence[ParallelLinear], latents: Sequence[LatentLinear] = ()
    ) -> None:
        """Compute `linears` and `latents` at each entry of `module`, whose first argument they all read."""
        self.linears, self.latents = list(linears), list(latents)
        self.made: dict[nn.Module, list[Tensor]] = {}
        for linear in (*self.linears, *self.latents):
            linear.siblings = weakref.ref(self)
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave, always_call=True)

    def take(self, linear: nn.Module) -> list[Tensor] | None:
        """What was made for a linear, once."""
        return self.made.pop(linear, None)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = args[0] if args else kwargs["hidden_states"]
        first = (*self.linears, *self.latents)[0]
        if self.linears:
            outs = iter(compute(first.group, self.linears, x))
            self.made = {linear: [next(outs) for _ in linear.names] for linear in self.linears}
        if self.latents:
            found = zip(self.latents, compute_latents(self.latents, x), strict=True)
            self.made |= {linear: [latent] for linear, latent in found}
        stands = Placeholder.like(x, self.made[first][0].shape[TOKENS], first.in_features, type(module).__name__)
        return ((stands, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stands})

    def _leave(self, *_: Any) -> None:
        self.made = {}
