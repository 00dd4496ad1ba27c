"""seqloom plan"""

from typing import Annotated

import typer


def plan(
    check: Annotated[str, typer.Option("--check", help='The plan, such as "ring=2 ulysses=2".')],
    model: Annotated[str, typer.Option("--model", help="llama, mistral, qwen2, qwen3, a config.json, or a folder.")],
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of one sequence.")],
    world: Annotated[
        int | None, typer.Option("--world", help="Processes there are; the plan's own by default.")
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads of a built-in model.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key/value heads of a built-in model.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of a built-in model.")] = None,
) -> None:
    """Say whether a plan can run a model at a length, with every reason why not and the nearest plan that can.

    Reads the configuration only; starts no process and needs no torch.
    """
    from seqloom import plan as plans
    from seqloom.cli.shape import model_settings
    from seqloom.geometry import Layout, Mask
    from seqloom.planner import attention_bytes

    wanted = plans.Plan.parse(check)
    shape = plans.ModelShape.from_config(model_settings(model, wanted, seq_len, heads, kv_heads, layers))
    plans.check(wanted, shape, seq_len, world=world)
    sent = attention_bytes(wanted, shape, seq_len, item_bytes=2)
    layout = Layout(wanted.layout, seq_len, wanted.ring, wanted.ulysses)
    typer.echo(
        f"Legal: '{wanted}' on {wanted.world_size} processes; each holds {seq_len // (wanted.ring * wanted.ulysses):,} "
        f"of {seq_len:,} tokens, and {shape.heads // wanted.ulysses} of {shape.heads} query heads and "
        f"{shape.kv_heads // wanted.ulysses} of {shape.kv_heads} key/value heads in attention."
    )
    typer.echo(f"Causal attention work, most over mean: {layout.imbalance(Mask()):.3f}.")
    for axis, passes in sent.items():
        if getattr(wanted, axis) > 1:
            typer.echo(
                f"Each process sends {passes['forward'] + passes['backward']:,} bytes a layer and sequence "
                f"along {axis}, forward and backward, in bf16."
            )
