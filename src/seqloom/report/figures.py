"""The geometry of each picture, in percent of the width and height it is given.

Percentages keep the text of a drawing at its size while the drawing follows the window, so one page
serves a wide screen and a telephone. Colour says who: the hue is the ring rank, the shade the
Ulysses rank, in every picture alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import floor, isfinite, log10
from statistics import fmean

from seqloom.geometry import Layout, Mask, Span, even_bounds
from seqloom.plan import Plan
from seqloom.planner import Place, outer_spans, places

MAX_POINTS = 800
"""A curve of more steps is drawn as means over equal runs of steps."""

MAX_LABELS = 32
"""A bar of more pieces goes without a number in each."""

ZOOM_TOKENS = 24
"""How many tokens a zoom shows, as far as they make whole rounds of the ring."""


# --- colour ---------------------------------------------------------------------------------------


def shade(ring_rank: int, ring: int, ulysses_rank: int = 0, ulysses: int = 1) -> str:
    """The CSS properties that colour a rank: hue in degrees, lift in lightness from the page's tone.

    >>> shade(1, 2)
    '--hue:75;--lift:0.000'
    """
    lift = 0.055 * (1 - 2 * ulysses_rank / (ulysses - 1)) if ulysses > 1 else 0.0
    return f"--hue:{round(255 + 360 * ring_rank / ring) % 360};--lift:{lift:.3f}"


# --- the mesh -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One process of the mesh: its number, its place on attention's axes, its colour."""

    rank: int
    ring: int
    ulysses: int
    style: str


@dataclass(frozen=True)
class Panel:
    """Attention's ulysses x ring grid at one point of the other axes; `name` is empty when there is only one."""

    name: str
    cells: tuple[Cell, ...]


def mesh(plan: Plan) -> tuple[Panel, ...]:
    """A panel for each copy of the model and each share of its heads.

    The other axes of a tensor grid are a part of attention's ring, or of its Ulysses group.

    >>> [panel.name for panel in mesh(Plan(data=2, tensor=4, tensor_kind="2d"))]
    ['data 0, col 0', 'data 0, col 1', 'data 1, col 0', 'data 1, col 1']
    """
    ring, ulysses, grid = plan.attention_ring, plan.attention_ulysses, plan.tensor_grid
    sizes = {"pipeline": plan.pipeline, "data": plan.data, grid.inner.hidden or "tensor": grid.heads}
    panels = []
    for pipeline, data, heads in product(*map(range, sizes.values())):
        at = zip(sizes.items(), (pipeline, data, heads), strict=True)
        cells = tuple(
            Cell(Place(r, u, heads).rank(plan, data=data, pipeline=pipeline), r, u, shade(r, ring, u, ulysses))
            for u, r in product(range(ulysses), range(ring))
        )
        panels.append(Panel(", ".join(f"{axis} {index}" for (axis, size), index in at if size > 1), cells))
    return tuple(panels)


# --- who holds which tokens -----------------------------------------------------------------------


@dataclass(frozen=True)
class Owner:
    """Somebody who holds tokens: a rank between attention layers, a ring rank inside attention."""

    label: str
    name: str
    style: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Piece:
    """A coloured rectangle of a bar, in percent, with the words shown on it and under the pointer."""

    x: float
    y: float
    width: float
    height: float
    label: str
    title: str
    style: str


def owners_between(layout: Layout, plan: Plan) -> tuple[Owner, ...]:
    """The ranks of the first copy among which tokens are split between linears, with the tokens of each.

    Ranks that hold other channels of the same tokens, or the same, go with the first of them.
    """
    grid = plan.tensor_grid
    found = []
    for place in places(plan):
        at, rank = place.on_grid(plan), place.rank(plan)
        if all(at[axis] == 0 for axis in grid.axes if axis not in grid.outer.tokens):
            style = shade(place.ring, layout.ring, place.ulysses, layout.ulysses)
            found.append(Owner(str(rank), f"rank {rank}", style, outer_spans(plan, layout, place)))
    return tuple(found)


def owners_inside(layout: Layout) -> tuple[Owner, ...]:
    """The ring ranks, with the tokens whose queries each holds inside attention."""
    spans = layout.ring_spans
    return tuple(Owner(str(r), f"ring rank {r}", shade(r, layout.ring), spans[r]) for r in range(layout.ring))


def whole_bar(owners: Sequence[Owner], num_tokens: int) -> tuple[Piece, ...]:
    """The sequence from first token to last. Interleaved tokens are stacked in strips, one per step."""
    labels = sum(len(owner.spans) for owner in owners) <= MAX_LABELS
    pieces = [
        Piece(
            x=100 * (span.start - span.start % span.step) / num_tokens,
            y=100 * (span.start % span.step) / span.step,
            # From the first round of the ring to the end of the last, so that the strips line up.
            width=100 * min(span.size * span.step, num_tokens - span.start + span.start % span.step) / num_tokens,
            height=100 / span.step,
            label=owner.label if labels else "",
            title=f"{owner.name}: {_said(span)}",
            style=owner.style,
        )
        for owner in owners
        for span in owner.spans
        if span.size
    ]
    return tuple(sorted(pieces, key=lambda piece: (piece.x, piece.y)))


def zoom_bar(owners: Sequence[Owner], num_tokens: int, step: int) -> tuple[Piece, ...]:
    """The first tokens one by one, as many as make whole rounds of `step`; one piece per token."""
    count = min(num_tokens, max(step, ZOOM_TOKENS // step * step))
    pieces = [
        Piece(
            x=100 * position / count,
            y=0.0,
            width=100 / count,
            height=100.0,
            label=owner.label if count <= ZOOM_TOKENS else "",
            title=f"{owner.name}: token {position}",
            style=owner.style,
        )
        for owner in owners
        for span in owner.spans
        for position in range(span.start, min(span.stop, count), span.step)
    ]
    return tuple(sorted(pieces, key=lambda piece: piece.x))


def _said(span: Span) -> str:
    last = span.start + (span.size - 1) * span.step
    every = f" in steps of {span.step}" if span.step > 1 else ""
    return f"tokens {span.start:,} to {last:,}{every}"


# --- curves ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent from the left or from the top."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A line over steps, in the 1000 x 1000 box of a stretched drawing.

    paths: SVG path data, one for each run of finite values. level: the height of the labelled
    line, in percent from the top. end: the last finite point, in percent. stride: steps a point
    stands for.
    """

    paths: tuple[str, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    level: float | None
    end: tuple[float, float] | None
    stride: int


def curve(
    steps: Sequence[int], values: Sequence[float], *, level: float | None = None, zero: bool = False, x_most: int = 6
) -> Curve:
    """Lay a series out. level: a value to draw a line at. zero: let the axis begin at 0. x_most: ticks on it.

    Values that are not finite leave a gap.
    """
    stride = -(-len(steps) // MAX_POINTS)
    xs = [fmean(steps[i : i + stride]) for i in range(0, len(steps), stride)]
    ys = [fmean(values[i : i + stride]) for i in range(0, len(values), stride)]
    shown = [y for y in ys if isfinite(y)] + ([level] if level is not None else []) or [0.0]
    low, high = (min(0.0, *shown), max(shown)) if zero else (min(shown), max(shown))
    room = (high - low or abs(high) or 1.0) * 0.08
    low, high = low if zero else low - room, high + room
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def across(x: float) -> float:
        return 100 * (x - first) / (last - first)

    def down(y: float) -> float:
        return 100 * (high - y) / (high - low)

    points = [(across(x), down(y)) if isfinite(y) else None for x, y in zip(xs, ys, strict=True)]
    finite = [point for point in points if point]
    return Curve(
        paths=tuple(_paths(points)),
        x_ticks=tuple(Tick(across(x), f"{x:,.0f}") for x in ticks(first, steps[-1], x_most) if x == int(x)),
        y_ticks=tuple(Tick(down(y), number(y)) for y in ticks(low, high, 5)),
        level=None if level is None else down(level),
        end=finite[-1] if finite else None,
        stride=stride,
    )


def _paths(points: Iterable[tuple[float, float] | None]) -> Iterator[str]:
    run: list[str] = []
    for point in [*points, None]:
        if point:
            run.append(f"{10 * point[0]:.1f} {10 * point[1]:.1f}")
        elif run:
            # A path of one point is drawn by its round cap.
            yield "M" + "L".join(run if len(run) > 1 else run * 2)
            run = []


def ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    """At most about `most` round numbers from low to high, in steps of 1, 2 or 5 times a power of ten.

    >>> ticks(1, 120, 6)
    (20.0, 40.0, 60.0, 80.0, 100.0, 120.0)
    """
    if high <= low:
        return (float(low),)
    rough = (high - low) / most
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    count = floor(high / step + 1e-9)
    first = -floor(-low / step + 1e-9)
    return tuple(float(f"{index * step:.12g}") for index in range(first, count + 1))


def number(value: float) -> str:
    """A number as an axis says it.

    >>> number(0.0005), number(2.5), number(12000)
    ('0.0005', '2.5', '12,000')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- attention work -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Visible (query, key) pairs by ring rank under one layout; widths in percent of `most`."""

    kind: str
    pairs: tuple[int, ...]
    widths: tuple[float, ...]
    mean: float
    imbalance: float


def work(layouts: Sequence[Layout], mask: Mask) -> tuple[Work, ...]:
    """The work of several layouts on one scale: the longest bar of all is 100 percent."""
    pairs = [layout.work(mask) for layout in layouts]
    most = max(max(each) for each in pairs)
    return tuple(
        Work(
            kind=layout.kind,
            pairs=each,
            widths=tuple(100 * count / most for count in each),
            mean=100 * sum(each) / len(each) / most,
            imbalance=layout.imbalance(mask),
        )
        for layout, each in zip(layouts, pairs, strict=True)
    )


# --- errors on a log scale ------------------------------------------------------------------------

SMALLEST_ERROR_EXPONENT = -17
"""Left end of the error scale: below the resolution of float64."""


def error_place(error: float) -> float:
    """Where an error stands between 1e-17 and 1, in percent on a log scale; outside is cut.

    >>> error_place(1e-17), error_place(1.0), error_place(0.0)
    (0.0, 100.0, 0.0)
    """
    if not error > 0:
        return 0.0 if error == 0 else 100.0  # not a number is as far from equal as can be
    place = 100 * (log10(error) - SMALLEST_ERROR_EXPONENT) / -SMALLEST_ERROR_EXPONENT if isfinite(error) else 100.0
    return min(100.0, max(0.0, place))


def position_ticks(num_tokens: int) -> tuple[Tick, ...]:
    """Token positions under a bar: both ends and the quarters."""
    return tuple(Tick(100 * at / num_tokens, f"{at:,}") for at in even_bounds(num_tokens, 4))
