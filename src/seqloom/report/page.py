"""The report of a run as one self-contained page: read the folder, lay the figures out, fill the template."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined

from seqloom.errors import DataError, counted
from seqloom.geometry import Layout, Mask, total
from seqloom.plan import Plan, cut, run_again
from seqloom.planner import all_reduce_bytes, attention_bytes, tensor_bytes
from seqloom.report import figures
from seqloom.report.record import Folder, Run, Step, read_folder

ITEM_BYTES = {"bf16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_PANELS = 8
"""More copies of the mesh than this are counted, not drawn."""

MAX_WORK_ROWS = 64
MAX_STRIP_HEIGHT = 160
"""A bar of interleaved tokens grows with its strips up to this many pixels."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    The folder holds run.json and metrics.jsonl as training writes them, and verify.json once the
    plan has been verified. Raises DataError where one of them is missing or broken, or the page cannot be written.
    """
    page = render(read_folder(folder))
    target = folder / "report.html"
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror}); make the folder writable.") from error
    return target


def render(folder: Folder) -> str:
    """The page of a run folder's contents."""
    environment = Environment(
        loader=PackageLoader("seqloom.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": said_bytes, "count": said_count, "error": said_error, "short": figures.number}
    environment.filters["seconds"] = said_seconds
    run, plan, steps = folder.run, folder.plan, folder.steps
    layout = Layout(plan.layout, run.num_tokens, plan.attention_ring, plan.attention_ulysses)
    panels, between = figures.mesh(plan), figures.owners_between(layout, plan)
    return environment.get_template("page.html.j2").render(
        run=run,
        plan=plan,
        shape=folder.shape,
        steps=steps,
        verdict=folder.verdict,
        status=status(folder),
        commands=commands(folder),
        curves=curves(run, steps),
        panels=panels[:MAX_PANELS],
        panels_left=len(panels) - len(panels[:MAX_PANELS]),
        bars=bars(between, layout),
        position_ticks=figures.position_ticks(run.num_tokens),
        split_over=len(between),
        axes=axes(plan),
        held=held(between),
        works=works(layout),
        max_work_rows=MAX_WORK_ROWS,
        traffic=traffic(folder),
        speed=speed(steps),
        parity=parity(folder),
        tolerance_place=figures.error_place(folder.verdict.tolerance or 0.0) if folder.verdict else 0.0,
        ring_styles=[figures.shade(r, layout.ring) for r in range(layout.ring)],
        config=json.dumps(run.model, indent=2),
    )


# --- whether it equals one device -----------------------------------------------------------------


def status(folder: Folder) -> str:
    """One of `equal`, `different`, `other plan` (what was verified is not what ran) and `unverified`."""
    if folder.verdict is None:
        return "unverified"
    if folder.verdict_plan != folder.plan:
        return "other plan"
    return "equal" if folder.verdict.equal else "different"


@dataclass(frozen=True)
class ParityRow:
    """One quantity compared with one device; `place` is where its error stands on the log scale."""

    what: str
    detail: str
    error: float
    place: float
    within: bool | None


def parity(folder: Folder) -> tuple[ParityRow, ...]:
    """The comparisons of verify.json, in the order in which a run computes them."""
    verdict = folder.verdict
    if verdict is None:
        return ()
    found = [
        ("Loss", "token mean over the global batch", verdict.loss_error),
        ("Gradient norm", "global, over all parameters", verdict.gradient_norm_error),
        ("Worst gradient", verdict.worst_parameter, verdict.worst_gradient_error),
    ]
    if verdict.parameter_error is not None:
        after = "after the last optimizer step" + (f", number {verdict.steps}" if verdict.steps else "")
        found.append(("Worst parameter", after, verdict.parameter_error))
    limit = verdict.tolerance
    return tuple(
        ParityRow(what, detail, error, figures.error_place(error), None if limit is None else error <= limit)
        for what, detail, error in found
    )


def commands(folder: Folder) -> dict[str, str]:
    """What to type to train, check and verify this run again."""
    run = folder.run
    plan, config = shlex.quote(str(folder.plan)), "config.json"
    verified = folder.verdict.num_tokens if folder.verdict else None
    verify = f"seqloom verify --model {config} --plan {plan} --seq-len {verified or run.num_tokens} --dtype float64"
    return {
        "train": f"seqloom train CONFIG.yaml plan={plan}",
        "check": f"seqloom plan --check {plan} --model {config} --seq-len {run.num_tokens} --world {run.world_size}",
        "verify": f"{verify} --json > {shlex.quote(str(folder.path / 'verify.json'))}",
        "short": verify,
    }


# --- training -------------------------------------------------------------------------------------


def curves(run: Run, steps: Sequence[Step]) -> dict[str, figures.Curve]:
    """The series of metrics.jsonl, laid out."""
    numbers = [step.step for step in steps]
    loss = figures.curve(numbers, [step.loss for step in steps], level=run.unigram_entropy)
    small = {
        "norm": [step.gradient_norm for step in steps],
        "rate": [step.learning_rate for step in steps],
        "speed": [step.tokens_per_second for step in steps],
    }
    return {"loss": loss} | {
        name: figures.curve(numbers, series, zero=True, x_most=3) for name, series in small.items()
    }


@dataclass(frozen=True)
class Speed:
    """Throughput of the whole run. `median` is over all steps but the first, which warms up."""

    tokens: int
    seconds: float
    median: float
    slowest_seconds: float
    median_seconds: float
    not_finite: int


def speed(steps: Sequence[Step]) -> Speed:
    """Summarise tokens and time."""
    warm = steps[1:] or steps
    return Speed(
        tokens=sum(step.label_tokens for step in steps),
        seconds=sum(step.seconds for step in steps),
        median=median(step.tokens_per_second for step in warm),
        slowest_seconds=max(step.seconds for step in steps),
        median_seconds=median(step.seconds for step in warm),
        not_finite=sum(not isfinite(step.loss) for step in steps),
    )


# --- tokens and work ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A sequence coloured by who holds it; `zoom` shows the first `zoom_tokens` where tokens interleave."""

    title: str
    pieces: tuple[figures.Piece, ...]
    height: int
    zoom: tuple[figures.Piece, ...]
    zoom_tokens: int


def bars(between: Sequence[figures.Owner], layout: Layout) -> tuple[Bar, ...]:
    """Who holds which tokens, between attention layers and inside them."""
    num_tokens = layout.num_tokens
    found = []
    for title, owners in (
        ("Between attention layers, by rank", between),
        ("Inside attention, by ring rank", figures.owners_inside(layout)),
    ):
        step = max(span.step for owner in owners for span in owner.spans)
        height = min(max(44, 18 * step), MAX_STRIP_HEIGHT) if step > 1 else 44
        zoom = figures.zoom_bar(owners, num_tokens, step) if step > 1 else ()
        found.append(Bar(title, figures.whole_bar(owners, num_tokens), height, zoom, len(zoom)))
    return tuple(found)


def axes(plan: Plan) -> str:
    """The axes of the mesh and their sizes, as the header says them.

    >>> axes(Plan(data=2, tensor=4, tensor_kind="2d"))
    'data 2 x ring 1 x ulysses 1 x tensor 4 (row 2 x col 2)'
    """
    sizes = [("data", plan.data)] * (plan.data > 1) + [("ring", plan.ring), ("ulysses", plan.ulysses)]
    said = " x ".join(f"{axis} {size}" for axis, size in sizes)
    if plan.tensor == 1:
        return said
    grid = " x ".join(f"{axis} {size}" for axis, size in plan.tensor_grid.axes.items())
    return f"{said} x tensor {plan.tensor}" + f" ({grid})" * (plan.tensor_kind != "1d")


def held(between: Sequence[figures.Owner]) -> str:
    """How many tokens a process holds between layers: a number, or a range where they differ."""
    sizes = {total(owner.spans) for owner in between}
    return " to ".join(f"{size:,}" for size in sorted({min(sizes), max(sizes)}))


def works(layout: Layout) -> tuple[figures.Work, ...]:
    """The causal work under the plan's layout and, for comparison, under another."""
    other = "zigzag" if layout.kind == "contiguous" else "contiguous"
    return figures.work((layout, Layout(other, layout.num_tokens, layout.ring, layout.ulysses)), Mask())


# --- bytes ----------------------------------------------------------------------------------------

CARRIES = {
    "ring": "keys and values along a row, and their gradients back",
    "inner_ring": "keys and values among neighbours of a row, and their gradients back",
    "outer_ring": "keys and values between the neighbourhoods of a row, and their gradients back",
    "ulysses": "tokens traded for heads down a column, and back",
    "tensor": "tokens gathered for the linears and their outputs summed, and the gradients of both",
    "row": "weights gathered, and their gradients summed",
    "col": "channels gathered for the linears and their outputs summed, and the gradients of both",
    "depth": "gradients of the weights, summed",
    "input": "tokens gathered for the linears and their outputs summed, and the gradients of both",
    "output": "tokens gathered for the linears and their outputs summed, and the gradients of both",
    "weight": "weights gathered, and their gradients summed",
    "replicas": "gradients summed over all ranks that hold the same weights",
}


@dataclass(frozen=True)
class Traffic:
    """Bytes rank 0 sent along an axis in one step, beside the formula (None where there is none).

    measured: of the step farthest from the formula. differing: steps that are not as the formula says.
    """

    axis: str
    degree: int | None
    carries: str
    how: str
    measured: int
    formula: int | None
    differing: int

    @property
    def difference(self) -> int:
        return self.measured - (self.formula or 0)


def traffic(folder: Folder) -> tuple[Traffic, ...]:
    """Measured and predicted bytes of every axis that the formulas know or the meter saw."""
    run, plan, shape, steps = folder.run, folder.plan, folder.shape, folder.steps
    item = ITEM_BYTES[run.dtype]
    layer = attention_bytes(
        plan,
        shape,
        run.num_tokens,
        masks=(Mask(),) * (run.batch // plan.data),
        item_bytes=item,
        accumulate_bytes=max(item, 4),
    )
    times = shape.layers * run.accumulate
    each = counted(shape.layers, "layer") + (f" x {run.accumulate} micro-batches" if run.accumulate > 1 else "")
    known: dict[str, tuple[int, str, int | None]] = {}
    outer, inner = plan.rings
    degrees = {"ring": outer * inner, "outer_ring": outer, "inner_ring": inner, "ulysses": plan.attention_ulysses}
    _, again = run_again(plan, cut(plan, shape, run.num_tokens))
    for axis, passes in layer.items():
        forward, backward = passes["forward"], passes["backward"]
        how = f"{each} x ({said_bytes(forward)} forward + {said_bytes(backward)} backward)" + _repeated(again)
        known[axis] = degrees[axis], how, times * (forward + backward) + again * run.accumulate * forward
        if degrees[axis] > 1 and (plan.layout == "balanced" or (axis == "ring" and plan.exchange == "needed")):
            known[axis] = degrees[axis], "as much as the documents of each batch need", None
    known |= _tensor_axes(folder, item, each)
    replicas = plan.data * plan.ring * plan.ulysses
    gradients = run.parameters * max(item, 4)
    how = f"2 ({replicas} - 1) / {replicas} of {said_bytes(gradients)} of gradients"
    known["replicas"] = replicas, how, all_reduce_bytes(gradients, replicas)
    if plan.tensor > 1 and replicas > 1:
        known["replicas"] = replicas, "each tensor rank's part of the gradients", None
    seen = {axis for step in steps for axis in step.sent_bytes}
    return tuple(_axis_traffic(axis, known.get(axis), steps) for axis in (*known, *sorted(seen - known.keys())))


def _tensor_axes(folder: Folder, item: int, each: str) -> dict[str, tuple[int, str, int | None]]:
    """The axes of a tensor grid: what the layers' linears send is known, not what goes with it."""
    run, plan = folder.run, folder.plan
    if plan.tensor == 1:
        return {}
    rows = max(1, run.batch // plan.data)
    found: dict[str, tuple[int, str, int | None]] = {}
    for axis, passes in tensor_bytes(plan, folder.shape, run.num_tokens, sequences=rows, item_bytes=item).items():
        again, _ = run_again(plan, cut(plan, folder.shape, run.num_tokens))
        forward, backward = passes["forward"], passes["backward"]
        how = f"{each} x ({said_bytes(forward)} forward + {said_bytes(backward)} backward){_repeated(again)} in linears"
        others = ", and the embedding's, the head's, the norms' and shared gradients"
        found[axis] = plan.tensor_grid.axes[axis], how + others, None
    return found


def _repeated(layers: int) -> str:
    return f", forward once more in {counted(layers, 'layer')}" if layers else ""


def _axis_traffic(axis: str, known: tuple[int, str, int | None] | None, steps: Sequence[Step]) -> Traffic:
    sent = [step.sent_bytes.get(axis, 0) for step in steps]
    if known is None:
        return Traffic(axis, None, "", "small sums, such as the loss; no formula", max(sent), None, 0)
    degree, how, formula = known
    if formula is None:
        return Traffic(axis, degree, CARRIES[axis], how, max(sent), None, 0)
    farthest = max(sent, key=lambda count: abs(count - formula))
    if degree == 1:
        how = "one rank has nobody to send to"
    return Traffic(axis, degree, CARRIES[axis], how, farthest, formula, sum(count != formula for count in sent))


# --- how numbers are said -------------------------------------------------------------------------


def said_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1.

    >>> said_bytes(0), said_bytes(1536), said_bytes(-3 * 2**20)
    ('0 B', '1.50 KiB', '-3.00 MiB')
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}" if abs(size) < 100 else f"{size:.1f} {unit}"


def said_count(count: float) -> str:
    """A large count in three digits.

    >>> said_count(977), said_count(1234567), said_count(4.2e9)
    ('977', '1.23 M', '4.20 G')
    """
    value, name = float(count), ""
    for larger in (" k", " M", " G", " T"):
        if abs(value) < (10_000 if not name else 1000):
            break
        value, name = value / 1000, larger
    if not name:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}{name}"


def said_error(error: float) -> str:
    """An error in two digits, and 0 as 0.

    >>> said_error(3.14e-15), said_error(0.0)
    ('3.1e-15', '0')
    """
    return f"{error:.1e}" if error else "0"


def said_seconds(seconds: float) -> str:
    """A duration as a person says it.

    >>> said_seconds(0.42), said_seconds(95), said_seconds(7260)
    ('0.42 s', '1 min 35 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
