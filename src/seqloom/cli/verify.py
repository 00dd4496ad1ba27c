"""seqloom verify"""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqloom.errors import counted

if TYPE_CHECKING:
    from seqloom.geometry import Mask
    from seqloom.verify import Case, Verdict


def verify(  # noqa: PLR0913, PLR0917
    plan: Annotated[str, typer.Option("--plan", help='The plan, such as "ring=2 ulysses=2".')],
    model: Annotated[str, typer.Option("--model", help="A built-in model such as llama, a config.json, or a folder.")],
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Tokens of one sequence.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Query heads of a built-in model.")] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="Key/value heads of a built-in model.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Layers of a built-in model.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences of a micro-batch on each data rank.")] = 1,
    documents: Annotated[str | None, typer.Option("--documents", help="Lengths packed in a sequence: 60,7,61.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Attention to both sides instead of causal.")] = False,
    window: Annotated[int | None, typer.Option("--window", help="Tokens apart from which on none is seen.")] = None,
    prefix: Annotated[int, typer.Option("--prefix", help="First tokens of a document that all of it sees.")] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps taken before parameters are compared.")] = 1,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Micro-batches of a step.")] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="float64, float32 or bf16 (autocast).")] = "float64",
    dropout: Annotated[float | None, typer.Option("--dropout", help="Drop out with this probability; else 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON.")] = False,
) -> None:
    """Run a model under a plan and on one device, and hold loss, gradients and parameters against each other.

    Exit status 0 only if they are equal; 1 if they differ, 2 if the case is refused.
    """
    from seqloom.cli.shape import document_lengths, model_settings
    from seqloom.geometry import Mask
    from seqloom.plan import ModelShape, Plan, check, shortest, without_dropout

    wanted = Plan.parse(plan)
    lengths = document_lengths(documents)
    if seq_len is None:
        seq_len = sum(lengths) if lengths else max(64, shortest(wanted))
    rule = Mask(causal=not full, window=window, prefix=prefix)  # refuses what cannot be
    settings = model_settings(model, wanted, seq_len, heads, kv_heads, layers)
    check(wanted, ModelShape.from_config(without_dropout(settings)[0]), seq_len)

    # torch loads only now, so that a plan that cannot run is told at once.
    from seqloom.fabric.launch import speaks
    from seqloom.model import weights_folder
    from seqloom.verify import Case

    case = Case(
        config=settings,
        weights=weights_folder(model),
        plan=wanted,
        num_tokens=seq_len,
        batch=batch,
        accumulate=accumulate,
        steps=steps,
        documents=lengths,
        rule=rule,
        dtype=dtype,
        dropout=dropout,
    )
    verdict = _judged(case)
    if speaks():
        typer.echo(_said(verdict, case, as_json))
    if not verdict.equal:
        raise typer.Exit(1)


def _judged(case: "Case") -> "Verdict":
    """The verdict on a case, by the processes a launcher started or by some of its own."""
    from seqloom.fabric.launch import distributed, launched
    from seqloom.verify import verify, verify_here

    if launched() is not None:
        with distributed():
            return verify_here(case)
    return verify(case)


def _said(verdict: "Verdict", case: "Case", as_json: bool) -> str:
    """What is printed of a verdict."""
    extras = {"equal": verdict.equal, "num_tokens": case.num_tokens, "mask": _mask_words(case.rule, case.documents)}
    values = {**asdict(verdict), **extras}
    if as_json:
        return json.dumps(values, indent=1)
    more = case.micro_batches > case.accumulate
    needed = [f"Both sides took {case.micro_batches} micro-batches a step, as the schedule needs."] if more else []
    return "\n".join([*_table(values), *needed, *([str(verdict.parting)] if verdict.parting else [])])


def _mask_words(rule: "Mask", lengths: tuple[int, ...] | None) -> str:
    """The mask in words, such as: causal, window 24, 3 documents."""
    words = ["causal" if rule.causal else "full"]
    words += [f"window {rule.window}"] if rule.window else []
    words += [f"prefix {rule.prefix}"] if rule.prefix else []
    words += [counted(len(lengths), "document")] if lengths else []
    return ", ".join(words)


def _table(verdict: dict[str, Any]) -> list[str]:
    rows = [
        ("loss", verdict["loss_error"], ""),
        ("gradient norm", verdict["gradient_norm_error"], ""),
        ("worst gradient", verdict["worst_gradient_error"], verdict["worst_parameter"]),
        ("parameters", verdict["parameter_error"], f"after {counted(verdict['steps'], 'step')}"),
    ]
    lines = [
        f"{name:<15} error {error:.1e}  {'ok' if error <= verdict['tolerance'] else 'OVER'}  {said}".rstrip()
        for name, error, said in rows
    ]
    outcome = "equals" if verdict["equal"] else "DIFFERS FROM"
    on, off = (", ".join(verdict[key]) for key in ("dropouts", "dropouts_off"))
    mask = f"{verdict['mask']}, " * (verdict["mask"] != "causal")
    return [
        f"Plan '{verdict['plan']}' on {counted(verdict['world_size'], 'process')}, "
        f"{counted(verdict['num_tokens'], 'token')}, {mask}{verdict['dtype']}: {outcome} one device (tolerance "
        f"{verdict['tolerance']:.1e}).",
        *lines,
        *([f"Both sides dropped out alike, with {on}."] if on else []),
        *([f"Dropout was off on both sides; the model has {off}."] if off else []),
    ]
