"""The matrices a rank holds, from a model's numbers: of linears, experts, routers and tables. Norms and biases, which a
configuration does not always tell, are left out."""

from collections.abc import Mapping
from dataclasses import dataclass

from seqloom.geometry import even_sizes
from seqloom.plan import ModelShape, Plan, chunks, cut, stages_of
from seqloom.planner.place import Place
from seqloom.planner.tensor_traffic import layer_linears

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matrices:
    """Shapes of what a rank holds before ZeRO shares it out.

    layers: of each of its layers. experts: of each layer whose experts are dealt out, which have replicas of their
    own. outside: embedding and head, where they are here.
    """

    layers: tuple[tuple[Shape, ...], ...]
    experts: tuple[tuple[Shape, ...], ...]
    outside: tuple[Shape, ...]


def matrices(plan: Plan, model: ModelShape, rank: int = 0, *, num_tokens: int | None = None) -> Matrices:
    """Those of a pipeline rank, at the first rank of the tensor grid and at the rank of most experts.

    num_tokens: of a sequence, by which stages are balanced. Raises ValueError where the plan's pipeline has reasons
    against it.

    >>> sizes = dict(vocab=9, hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, max_positions=9)
    >>> shape = ModelShape(family="llama", **sizes)
    >>> matrices(Plan(tensor=2), shape).layers[0][:3], matrices(Plan(tensor=2), shape).outside
    (((4, 8), (4, 8), (4, 8)), ((5, 8), (5, 8)))
    """
    stages, sizes = stages_of(plan, rank), cut(plan, model, num_tokens)
    layers, experts = [], []
    for stage in stages:
        before = sum(sizes[:stage])
        for layer in range(before, before + sizes[stage]):
            own = _experts(plan, model, layer)
            dealt = plan.expert > 1 or plan.expert_tensor > 1
            layers.append((*_linears(plan, model, layer), *(() if dealt else own)))
            if dealt and own:
                experts.append(own)
    return Matrices(tuple(layers), tuple(experts), _outside(plan, model, stages))


def _linears(plan: Plan, model: ModelShape, layer: int) -> tuple[Shape, ...]:
    """Of a layer all but its experts."""
    grid, at = plan.tensor_grid, Place().on_grid(plan)
    found = [
        _part((linear.out_features, linear.in_features), linear.moves.shards, grid.axes, at)
        for together in layer_linears(plan, model, layer=layer)
        for linear in together
    ]
    if model.family == "gpt2":  # [in, out]
        found = [(columns, rows) for rows, columns in found]
    return (*found, *(((model.experts, model.hidden),) if model.routed[layer] else ()))


def _experts(plan: Plan, model: ModelShape, layer: int) -> tuple[Shape, ...]:
    """The experts of a layer."""
    if not model.routed[layer]:
        return ()
    held = max(even_sizes(model.experts, plan.expert))
    width = max(even_sizes(model.routed[layer] // model.experts_per_token, plan.expert_tensor))
    first = [(held, 2 * width, model.hidden)] if plan.expert_tensor == 1 else [(held, width, model.hidden)] * 2
    return (*first, (held, model.hidden, width))


def _outside(plan: Plan, model: ModelShape, stages: tuple[int, ...]) -> tuple[Shape, ...]:
    """Embedding and head; a tied one once."""
    grid, at, table = plan.tensor_grid, Place().on_grid(plan), (model.vocab, model.hidden)
    found = []
    if 0 in stages:
        found.append(_part(table, grid.embedding(tied=model.tied).shards, grid.axes, at))
        if model.family == "gpt2" and model.max_positions:
            found.append((model.max_positions, model.hidden))
    if plan.num_stages - 1 in stages and not (model.tied and 0 in stages):
        found.append(_part(table, grid.linear("colwise").shards, grid.axes, at))
    return tuple(found)


def _part(shape: Shape, shards: Mapping[str, int | None], axes: Mapping[str, int], at: Mapping[str, int]) -> Shape:
    """What a rank of the grid holds of a matrix."""
    sizes = list(shape)
    for axis, dim in shards.items():
        if dim is not None:
            sizes[dim] = chunks(sizes[dim], axes[axis])[at[axis]]
    return tuple(sizes)
