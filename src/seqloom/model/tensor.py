"""The modules of an unmodified model, split over a tensor grid in place.

What has parameters is one of seven things, and anything else is refused: a linear with a direction, a norm, the
token embedding, a learned position embedding, the head, a router or its experts, numbers of heads. Between the entry
of an attention or MLP and its row-wise linear lies the inner side, everywhere else the outer one (`plan.grid`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from seqloom.errors import ModelError
from seqloom.geometry import HeadSplit
from seqloom.model.experts import is_experts
from seqloom.model.families import COLWISE, DOWN, ROWWISE, UP, Directions, directions, pattern
from seqloom.plan import Direction, ModelShape, Moves, Side, chunks, input_stays
from seqloom.tensor import (
    LatentLinear,
    ParallelEmbedding,
    ParallelLayerNorm,
    ParallelLinear,
    ParallelRMSNorm,
    PositionEmbedding,
    Siblings,
    TensorGroup,
    gather_from_sequence_parallel_region,
    local,
    split,
)


def split_model(model: PreTrainedModel, group: TensorGroup, *, tied: bool | None = None) -> None:
    """Replace the modules of `model` by their parts of `group`'s grid; its weights are the same on all ranks.

    tied: whether the head's weight is the embedding's, where a pipeline has put them on different stages.
    Raises ModelError for a module that cannot be split.
    """
    _Splitting(model, group).run(tied)


class _Splitting:
    """One model being split."""

    def __init__(self, model: PreTrainedModel, group: TensorGroup) -> None:
        self.model, self.base, self.group = model, model.base_model, group
        self.table: Directions = directions(model)
        shape = ModelShape.from_config(model.config.to_dict())
        self.heads = HeadSplit(shape.heads, shape.kv_heads, group.grid.heads)
        self.head_dim = shape.head_dim
        blocks = [block for block in self.base.modules() if is_experts(getattr(block, "experts", None))]
        self.routed = {module for block in blocks for module in block.children()}

    def run(self, tied: bool | None) -> None:
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        ends = [any(True for _ in end.parameters()) for end in (embedding, head)]  # what this stage holds of the two
        here = all(ends) and head.weight is embedding.weight
        if ends[0]:
            self._put(embedding, self._embedding(embedding, here if tied is None else tied))
        colwise: dict[str, list[ParallelLinear]] = {}
        latents: dict[str, list[LatentLinear]] = {}
        for name, module in list(self.base.named_modules()):
            direction, parent = self.table.linears.get(pattern(name)), name.rpartition(".")[0]
            if direction is not None:
                _refuse_wrapped(name, module)
            if direction == DOWN:
                latent = LatentLinear(self.group, module.weight, module.bias)
                self._put(module, latent)
                latents.setdefault(parent, []).append(latent)
            elif direction is not None:
                linear = self._linear(name, module, direction)
                self._put(module, linear)
                if direction == COLWISE:
                    colwise.setdefault(parent, []).append(linear)
            elif isinstance(module, nn.Embedding) and module is not embedding:
                self._put(module, self._positions(name, module))
        entries = dict.fromkeys((*colwise, *latents))
        for name in entries:
            Siblings(self.base.get_submodule(name), colwise.get(name, ()), latents.get(name, ()))
        if ends[1]:
            self._head(head, here)
        self._sides(set(entries))
        for name, module in list(self.base.named_modules()):
            if next(module.parameters(recurse=False), None) is not None and not _is_split(module):
                self._rest(name, module)
        self._attention()

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """Put `new` in the place of `old`."""
        name = next(name for name, module in self.model.named_modules() if module is old)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, new.train(old.training))

    def _linear(self, name: str, module: nn.Module, direction: str) -> ParallelLinear:
        transposed = isinstance(module, Conv1D)
        out, width = reversed(module.weight.shape) if transposed else module.weight.shape
        way: Direction = ROWWISE if direction == ROWWISE else COLWISE
        moves = self.group.grid.linear(way, input_stays=input_stays(width, out, regather=self.group.regather))
        rows = None
        if direction == UP:  # latents are gathered already
            moves = replace(moves, x=None)
        if direction == COLWISE and name.rpartition(".")[2] in ("k_proj", "v_proj"):
            moves, rows = self._kv_rows(moves)
        parts = self.table.packed.get(pattern(name), 1)
        return ParallelLinear(
            self.group,
            moves,
            module.weight,
            module.bias,
            direction=way,
            parts=parts,
            transposed=transposed,
            rows=rows,
        )

    def _kv_rows(self, moves: Moves) -> tuple[Moves, slice | Tensor | None]:
        """Where key/value heads do not divide: their weights on all ranks of heads, each of which uses some rows."""
        if self.heads.kv_heads % self.heads.parts == 0:
            return moves, None
        shards = {axis: None if dim == 0 else dim for axis, dim in moves.shards.items()}
        gathered = moves.w if moves.w is not None and moves.w.dim != 0 else None
        part = self.group.axes[self.group.grid.inner.hidden or ""].rank
        keys, reads = self.heads.keys(part), self.heads.reads(part)
        rows: slice | Tensor = slice(keys.start * self.head_dim, keys.stop * self.head_dim)
        if reads is not None:  # irregular groups: each query head has a key/value head of its own here
            heads = torch.tensor(reads) + keys.start
            rows = (heads[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        return Moves(moves.x, gathered, moves.y, shards), rows

    def _embedding(self, module: nn.Module, tied: bool) -> nn.Module:
        scale = getattr(module, "embed_scale", None)
        if type(module) is not nn.Embedding and (scale is None or not isinstance(module, nn.Embedding)):
            raise ModelError(
                f"The token embedding is {type(module).__name__}, which cannot be split over tensor ranks; "
                "use ring, ulysses or data."
            )
        _refuse_options("The token embedding", module)
        moves = self.group.grid.embedding(tied=tied)
        weight = split(module.weight, self.group, moves.shards, self.group.grid.both)
        return ParallelEmbedding(
            self.group,
            weight,
            moves,
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            scale=scale,
        )

    def _positions(self, name: str, module: nn.Embedding) -> nn.Module:
        if self.group.grid.kind != "1d":
            raise ModelError(
                f"{name} is a learned table of positions, which tensor_kind={self.group.grid.kind} does not split; "
                "use tensor_kind=1d."
            )
        _refuse_options(name, module)
        weight = split(module.weight, self.group, {}, self.group.grid.outer)
        return PositionEmbedding(self.group, weight, module.padding_idx)

    def _head(self, head: nn.Linear, tied: bool) -> None:
        new = ParallelLinear(self.group, self.group.grid.linear(COLWISE), head.weight, head.bias, direction=COLWISE)
        if tied:
            new.weight = self.model.get_input_embeddings().weight
        self._put(head, new)
        axis = self.group.axes[self.group.grid.inner.hidden or ""]
        new.register_forward_hook(
            lambda head, _, logits: gather_from_sequence_parallel_region(
                logits, axis, -1, chunks(head.out_features, axis.size), tensor_parallel_output_grad=False
            )
        )

    def _sides(self, entries: set[str]) -> None:
        """Say of every module on which side its output lies."""
        for name, module in self.base.named_modules():
            parent = next((entry for entry in entries if name.startswith(f"{entry}.")), None)
            after = isinstance(module, ParallelLinear) and module.direction == ROWWISE
            inner = parent is not None and not after and pattern(name) not in self.table.after
            module.tensor_side = "inner" if inner else "outer"

    def _rest(self, name: str, module: nn.Module) -> None:
        """A norm, or what merely needs its parameters as this rank holds them."""
        side = self.group.grid.inner if module.tensor_side == "inner" else self.group.grid.outer
        kind = type(module).__name__
        if {own for own, _ in module.named_parameters(recurse=False)} <= self.table.by_head:
            inner = self.group.grid.inner
            _on_local_parameters(module, self.group, inner, {inner.hidden or "": 0})
            return
        if isinstance(module, nn.LayerNorm) or kind.endswith("RMSNorm"):
            if side.hidden is None or module.tensor_side == "inner":  # those inside are of one head, or of a latent
                _on_local_parameters(module, self.group, side)
                return
            self._put(module, self._norm(name, module, side))
            return
        if any(hasattr(parameter, "replica_axis") for parameter in module.parameters(recurse=False)):
            return  # experts that are dealt to ranks already
        if side.hidden is None and module in self.routed:  # each rank's tokens go their own way
            _on_local_parameters(module, self.group, side)
            return
        raise ModelError(
            f"{name} ({kind}) has parameters that no rule splits over tensor ranks; use ring, ulysses or data."
        )

    def _norm(self, name: str, module: nn.Module, side: Side) -> nn.Module:
        axis = self.group.axes[side.hidden or ""]
        held = {
            key: split(parameter, self.group, {side.hidden or "": 0}, side)
            for key, parameter in module.named_parameters(recurse=False)
        }
        width = module.weight.numel()
        if isinstance(module, nn.LayerNorm):
            new: nn.Module = ParallelLayerNorm(held["weight"], held.get("bias"), width, module.eps, axis)
        elif hasattr(module, "variance_epsilon"):
            new = ParallelRMSNorm(held["weight"], width, module.variance_epsilon, axis)
        elif type(module).__name__.startswith("Gemma"):
            new = ParallelRMSNorm(held["weight"], width, module.eps, axis, zero_centered=True)
        else:
            raise ModelError(f"{name} ({type(module).__name__}) is a norm of a form that cannot be split by width.")
        new.tensor_side = module.tensor_side
        return new

    def _attention(self) -> None:
        """Numbers that attention modules keep of their width: of this rank's heads."""
        for module in self.base.modules():
            if self.model.config.model_type == "bloom" and hasattr(module, "num_heads"):
                module.num_heads = self.heads.queries(0).size
                module.first_head = self.group.axes["tensor"].rank * module.num_heads
            if self.model.config.model_type == "gpt2" and hasattr(module, "split_size"):
                module.split_size = self.heads.queries(0).size * self.head_dim


def _refuse_options(name: str, module: nn.Embedding) -> None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ModelError(f"{name} has max_norm, scale_grad_by_freq or sparse, with which no table can be split.")


def _refuse_wrapped(name: str, module: nn.Module) -> None:
    if type(module) not in (nn.Linear, Conv1D):
        raise ModelError(
            f"{name} is {type(module).__name__}, not a plain linear, and cannot be split over tensor ranks; "
            "merge adapters into it, or use ring, ulysses or data."
        )


def _is_split(module: nn.Module) -> bool:
    return isinstance(module, ParallelLinear | LatentLinear | ParallelEmbedding | PositionEmbedding)


def _on_local_parameters(
    module: nn.Module, group: TensorGroup, side: Side, shards: Mapping[str, int | None] | None = None
) -> None:
    """Make the parameters of `module` split as `shards` says, or replicated, and its own forward see this rank's."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, split(parameter, group, shards or {}, side))
    held: list[dict[str, Any]] = []

    def enter(module: nn.Module, _: Any) -> None:
        held.append(dict(module._parameters))
        module._parameters.update({name: local(p) for name, p in module._parameters.items() if p is not None})

    def leave(module: nn.Module, *_: Any) -> None:
        module._parameters.update(held.pop())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
