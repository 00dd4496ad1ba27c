"""seqloom plan"""

from collections.abc import Iterable, Iterator
from itertools import islice, product
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from seqloom.cli.listing import legal_lines
from seqloom.cli.weights import weight_lines
from seqloom.errors import ConfigError, counted

if TYPE_CHECKING:
    from seqloom.geometry import Layout, Mask
    from seqloom.plan import ModelShape, Plan

MOST_RANKS = 64
"""The bytes of more ranks than this are not counted one by one."""


def plan(  # noqa: PLR0913, PLR0917
    check: Annotated[str | None, typer.Option("--check", help='The plan, such as "ring=2 ulysses=2".')] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A built-in model such as llama, a config.json, or a folder.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Tokens of one sequence.")] = None,
    world: Annotated[
        int | None, typer.Option("--world", help="Processes there are; the plan's own by default.")
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads of a built-in model.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key/value heads of a built-in model.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of a built-in model.")] = None,
    documents: Annotated[str | None, typer.Option("--documents", help="Lengths packed in a sequence: 60,7,61.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Attention to both sides instead of causal.")] = False,
    window: Annotated[int | None, typer.Option("--window", help="Tokens apart from which on none is seen.")] = None,
    prefix: Annotated[int, typer.Option("--prefix", help="First tokens of a document that all of it sees.")] = 0,
    every: Annotated[bool, typer.Option("--list", help="All legal plans of --world processes, one a line.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Which attention kernel does what here, and why another does not.")
    ] = False,
) -> None:
    """Say whether a plan can run a model at a length, with every reason why not and the nearest plan that can.

    Reads the configuration only; starts no process and needs no torch, but for --table, which may stand alone.
    """
    from seqloom import plan as plans
    from seqloom.cli.shape import document_lengths, model_settings
    from seqloom.geometry import Mask

    lengths = document_lengths(documents)
    seq_len = sum(lengths) if lengths and seq_len is None else seq_len
    if lengths and sum(lengths) != seq_len:
        raise ConfigError(
            f"--documents holds {counted(sum(lengths), 'token')}, but --seq-len is {seq_len}; leave --seq-len out, or "
            "make the lengths add up to it."
        )
    if every:
        _drop({"--full": full, "--window": window is not None, "--prefix": prefix != 0, "--table": table})
        if model is None or world is None:
            raise ConfigError("seqloom plan --list needs --model and --world, and --seq-len where lengths matter.")
        typer.echo("\n".join(legal_lines(model, seq_len, world, check, heads, kv_heads, layers)))
    elif check is not None and model is not None and seq_len is not None:
        wanted = plans.Plan.parse(check)
        shape = plans.ModelShape.from_config(model_settings(model, wanted, seq_len, heads, kv_heads, layers))
        mask = Mask(causal=not full, window=window, prefix=prefix, documents=lengths)
        plans.check(wanted, shape, seq_len, world=world)
        typer.echo("\n".join(_cost(wanted, shape, seq_len, mask)))
    else:
        given = (
            full,
            prefix,
            *(x is not None for x in (check, model, seq_len, world, heads, kv_heads, layers, window)),
        )
        if any(given) or not table:
            _lacks({"--check": check, "--model": model, "--seq-len (or --documents)": seq_len})
    if table:
        from seqloom.attention.kernels.table import render

        typer.echo(render())


def _lacks(needed: dict[str, object]) -> NoReturn:
    """Refuse half a question."""
    names = ", ".join(name for name, value in needed.items() if value is None)
    raise ConfigError(f"seqloom plan needs {names} to check a plan; --table alone shows the attention kernels.")


def _drop(given: dict[str, bool]) -> None:
    """Refuse what --list does not look at."""
    if any(given.values()):
        named = ", ".join(name for name, there in given.items() if there)
        raise ConfigError(f"seqloom plan --list takes no {named}: no mask or kernel changes what is legal; drop it.")


def _cost(plan: "Plan", model: "ModelShape", num_tokens: int, mask: "Mask") -> Iterator[str]:
    """What each process holds, works and sends, in sentences."""
    from seqloom.geometry import HeadSplit, Layout
    from seqloom.planner import local_heads, tokens_held

    masks = tuple(mask.within(window) for window in model.windows)
    layout = Layout(plan.layout, num_tokens, plan.attention_ring, plan.attention_ulysses, masks)
    outer, inner = tokens_held(plan, layout)
    splits = [
        HeadSplit(*local_heads(plan, model, rank), plan.attention_ulysses) for rank in range(plan.tensor_grid.heads)
    ]
    dealt = list(product(splits, range(plan.attention_ulysses)))
    yield (
        f"Legal: '{plan}' on {counted(plan.world_size, 'process')}; each holds {_spread(outer)} of "
        f"{counted(num_tokens, 'token')}, and {_spread(split.queries(m).size for split, m in dealt)} of "
        f"{counted(model.heads, 'query head')} and {_spread(split.keys(m).size for split, m in dealt)} of "
        f"{counted(model.kv_heads, 'key/value head')} in attention."
    )
    if plan.pipeline > 1:
        yield _stages(plan, model, num_tokens)
    if plan.tensor > 1:
        yield _grid(plan, model, _spread(outer), _spread(inner))
    if plan.attention_ring > 1:
        yield f"Attention work of the busiest ring rank over the mean: {_compared(layout, masks)}."
    if plan.recompute != "none":
        yield _kept(plan, model, layout)
    yield from _sent(plan, model, num_tokens, layout, masks)
    yield from weight_lines(plan, model, num_tokens)


def _kept(plan: "Plan", model: "ModelShape", layout: "Layout") -> str:
    """What layers that are computed again keep."""
    from seqloom.planner import kept_bytes

    found = kept_bytes(plan, model, layout, item_bytes=2, input_item_bytes=4)
    where = "host memory" if plan.activations == "offloaded" else "its memory"
    beside = f", and with selective {found.attention:,} bytes of attention" if "selective" in plan.recompute else ""
    return (
        f"Of a layer that is computed again (recompute={plan.recompute}) a process keeps in {where} at most "
        f"{found.input:,} bytes of input a sequence{beside}, in bf16 with a float32 residual stream."
    )


def _stages(plan: "Plan", model: "ModelShape", num_tokens: int) -> str:
    """The layers of each stage, and how long the ranks wait for each other."""
    from seqloom.plan import cut, micro_batches_needed, stages_of
    from seqloom.planner import bubble_share

    layers = cut(plan, model, num_tokens)
    dealt = "; ".join(
        f"rank {rank} " + " and ".join(str(layers[stage]) for stage in stages_of(plan, rank))
        for rank in range(plan.pipeline)
    )
    least = micro_batches_needed(plan)
    shares = ", ".join(
        f"{bubble_share(plan, count):.1%} with {count}"
        for count in sorted({micro_batches_needed(plan, factor * plan.pipeline) for factor in (1, 2, 4)})
    )
    return (
        f"Pipeline {plan.schedule}, layers of each stage: {dealt}. A step has at least "
        f"{counted(least, 'micro-batch')}, of which ranks wait {shares}, where stages cost the same."
    )


def _grid(plan: "Plan", model: "ModelShape", outer: str, inner: str) -> str:
    """What a rank of the tensor grid holds of the activations on both sides."""
    from seqloom.plan import chunks

    grid = plan.tensor_grid
    axes = " x ".join(f"{axis} {size}" for axis, size in grid.axes.items())

    def width(axis: str | None, channels: int) -> str:
        parts = _spread(chunks(channels, grid.axes[axis])) if axis else "all"
        return f"{parts} of {counted(channels, 'channel')}"

    return (
        f"Tensor grid {axes}: in the residual stream {outer} tokens and "
        f"{width(grid.outer.hidden, model.hidden)}, inside the MLP {inner} tokens and "
        f"{width(grid.inner.hidden, model.intermediate)}."
    )


def _compared(layout: "Layout", masks: "tuple[Mask, ...]") -> str:
    """The imbalance of the plan's layout, all layers together, and that of the others."""
    from dataclasses import replace
    from typing import get_args

    from seqloom.plan.plan import LayoutKind

    found = {kind: replace(layout, kind=kind).imbalance(*masks) for kind in get_args(LayoutKind)}
    others = (f"{kind} {uneven:.3f}" for kind, uneven in found.items() if kind != layout.kind)
    return f"{found[layout.kind]:.3f} ({', '.join(others)})"


def _sent(
    plan: "Plan", model: "ModelShape", num_tokens: int, layout: "Layout", masks: "tuple[Mask, ...]"
) -> Iterator[str]:
    """What activations send over the wire, along each axis that is split."""
    from seqloom.planner import attention_bytes, pipeline_bytes, places, tensor_bytes

    ranks = list(islice(places(plan), MOST_RANKS + 1))
    who = "Each process"
    if len(ranks) > MOST_RANKS:
        who, ranks = "Process 0", ranks[:1]
    attention = [
        attention_bytes(
            plan,
            model,
            num_tokens,
            ring_rank=place.ring,
            ulysses_rank=place.ulysses,
            heads_rank=place.heads,
            masks=(mask,),
            layout=layout,
            item_bytes=2,
        )
        for place, mask in product(ranks, dict.fromkeys(masks))
    ]
    kinds = {width: layer for layer, width in enumerate(model.inside)}.values()
    linears = [
        tensor_bytes(plan, model, num_tokens, place=place, layout=layout, item_bytes=2, layer=layer)
        for place, layer in product(ranks, kinds)
    ]
    for found, where in ((attention, ""), (linears, " in its linears")):
        for axis in found[0]:
            counts = [sent[axis]["forward"] + sent[axis]["backward"] for sent in found]
            if max(counts):
                yield (
                    f"{who} sends {_spread(counts)} bytes a layer and sequence along {axis.replace('_', ' ')}{where}, "
                    "forward and backward, in bf16."
                )
    if plan.pipeline > 1:
        passed = [
            sum(pipeline_bytes(plan, model, layout, place, rank=rank).values())
            for place, rank in product(ranks, range(plan.pipeline))
        ]
        yield (
            f"{who} sends {_spread(passed)} bytes a sequence along pipeline, forward and backward, of a float32 "
            "residual stream."
        )
    if plan.expert > 1:
        yield _dispatched(plan, model, layout)


def _dispatched(plan: "Plan", model: "ModelShape", layout: "Layout") -> str:
    """What goes to experts and back, which routers decide, where they favour none."""
    from fractions import Fraction

    from seqloom.geometry import even_sizes
    from seqloom.planner import expert_bytes, tokens_held

    outer, inner = tokens_held(plan, layout)
    tokens = max(outer if plan.expert_tensor == 1 else inner)
    held = even_sizes(model.experts, plan.expert)
    counts = []
    for rank, own in enumerate(held):
        there = round(tokens * model.experts_per_token * Fraction(model.experts - own, model.experts))
        here = round(tokens * model.experts_per_token * (plan.expert - 1) * Fraction(own, model.experts))
        counts.append(sum(expert_bytes(plan, model, there, here, rank=rank, item_bytes=2).values()))
    return (
        f"Each process sends about {max(counts):,} bytes a layer and sequence along expert, forward and backward, in "
        "bf16, where routers favour no expert."
    )


def _spread(counts: Iterable[int]) -> str:
    """A number, or the least and the most of several."""
    found = set(counts)
    return f"{min(found):,}" if len(found) == 1 else f"{min(found):,} to {max(found):,}"
