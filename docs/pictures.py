"""The drawings of docs/schemes.md, computed from the plan's own tables: PYTHONPATH=src python docs/pictures.py

Every number in a drawing is the rank that holds the block; it is read from `Grid`, `Layout` and `Mask`, not drawn by
hand. Drawings follow the reader's light or dark page.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from seqloom.geometry import Layout, Mask
from seqloom.plan import Grid, Moves, Plan, Side

WIDTH = 460
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; dominant-baseline: central }
.small { font-size: 13px; fill: #59636e }
.left { text-anchor: start }
.title { font-weight: 600; text-anchor: start }
rect, circle { stroke: #fff; stroke-width: 1.5 }
.all { fill: #e7e9ec }
.line { stroke: #8c959f; stroke-width: 1.5; fill: none }
.dashed { stroke-dasharray: 3 4 }
.fine { font-size: 13px }
marker path { fill: #8c959f }
"""
DARK = """
text { fill: #e6edf3 } .small { fill: #9198a1 } rect, circle { stroke: #0d1117 } .all { fill: #2a3038 }
.line { stroke: #768390 } marker path { fill: #768390 }
"""
HUES = (212, 24, 140, 280, 48, 188, 340, 96)
ARROW = (
    '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse">'
    '<path d="M0 0L8 4L0 8z"/></marker></defs>'
)


class Drawing:
    """Shapes one after the other, from the top down."""

    def __init__(self, title: str) -> None:
        self.title, self.parts, self.height = title, list[str](), 0.0

    def box(self, x: float, y: float, width: float, height: float, ranks: Sequence[int], words: str = "") -> None:
        """A block with the ranks that hold it, in the colour of the first."""
        kind = f"r{ranks[0]}" if len(ranks) < 8 else "all"
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>')
        said = words or ("all" if len(ranks) > 2 else ",".join(map(str, ranks)))
        self.text(x + width / 2, y + height / 2, said, "fine" if len(said) * 9 > width else "")

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Words around (x, y), or from it on."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>')
        self.height = max(self.height, y + 14)

    def line(self, path: str, *, ends: str = "end", dashed: bool = False) -> None:
        """An arrow along an SVG path."""
        marks = {"end": ' marker-end="url(#to)"', "both": ' marker-start="url(#to)" marker-end="url(#to)"', "": ""}[
            ends
        ]
        self.parts.append(f'<path class="line{" dashed" * dashed}" d="{path}"{marks}/>')

    def svg(self) -> str:
        """The drawing as a file."""
        light = "".join(f".r{rank} {{ fill: hsl({hue} 70% 82%) }}\n" for rank, hue in enumerate(HUES))
        dark = "".join(f".r{rank} {{ fill: hsl({hue} 45% 32%) }}\n" for rank, hue in enumerate(HUES))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height + 6:g}" '
            f'viewBox="0 0 {WIDTH} {self.height + 6:g}" role="img">\n'
            f"<title>{self.title}</title>\n"
            f"<style>{STYLE}{light}@media (prefers-color-scheme: dark) {{{DARK}{dark}}}</style>\n"
            f"{ARROW}\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def places(grid: Grid) -> Iterator[tuple[int, dict[str, int]]]:
    """Each rank of a tensor group with its coordinates."""
    yield from enumerate(dict(zip(grid.axes, at, strict=True)) for at in product(*map(range, grid.sizes)))


def number(at: Mapping[str, int], axes: Iterable[str], grid: Grid) -> tuple[int, int]:
    """Which part of a dim that axes split, slowest first, and of how many."""
    found, parts = 0, 1
    for axis in axes:
        found, parts = found * grid.axes[axis] + at[axis], parts * grid.axes[axis]
    return found, parts


def matrix(
    drawing: Drawing,
    corner: tuple[float, float],
    size: tuple[float, float],
    grid: Grid,
    axes: tuple[Sequence[str], ...],
) -> None:
    """A matrix whose rows are split over axes[0] and columns over axes[1], each block with those that hold it."""
    holders: dict[tuple[int, int], list[int]] = {}
    rows = columns = 1
    for rank, at in places(grid):
        (row, rows), (column, columns) = (number(at, some, grid) for some in axes)
        holders.setdefault((row, column), []).append(rank)
    width, height = size[0] / columns, size[1] / rows
    for (row, column), ranks in sorted(holders.items()):
        drawing.box(corner[0] + column * width, corner[1] + row * height, width, height, ranks)


def weight_axes(moves: Moves) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split a weight's inputs and its outputs, slowest first."""
    return tuple(a for a, dim in moves.shards.items() if dim == 1), tuple(
        a for a, dim in moves.shards.items() if dim == 0
    )


def said(moves: Moves) -> list[str]:
    """What one linear moves, in words."""
    words = []
    for name, move, verb in (
        ("x", moves.x, "gather"),
        ("weight", moves.w, "gather"),
        ("y", moves.y, "sum and scatter"),
    ):
        if move is not None:
            dim = {0: "its outputs", 1: "its inputs"}.get(move.dim, move.dim) if isinstance(move.dim, int) else move.dim
            words.append(f"{name}: {verb} {dim} over {move.axis}")
    return words


def linears(plan: Plan, title: str) -> Drawing:
    """A linear that widens and one that narrows: who holds what of x, the weight and y."""
    drawing, grid = Drawing(title), plan.tensor_grid
    drawing.text(8, 16, f"{plan}", "title")
    top = 44.0
    for direction, name in (("colwise", "column-wise"), ("rowwise", "row-wise")):
        moves = grid.linear(direction)  # type: ignore[arg-type]
        before, after = (grid.outer, grid.inner) if direction == "colwise" else (grid.inner, grid.outer)
        narrow, wide = 96.0, 136.0
        x_width, y_width = (narrow, wide) if direction == "colwise" else (wide, narrow)
        for words in (name, *said(moves)):
            drawing.text(8, top, words, "small left" if words != name else "left")
            top += 20
        left = 8.0
        for words, width, height, axes in (
            ("x: tokens × in", x_width, 128.0, side_axes(before)),
            ("weight: in × out", y_width, x_width, weight_axes(moves)),
            ("y: tokens × out", y_width, 128.0, side_axes(after)),
        ):
            matrix(drawing, (left, top + 20), (width, height), grid, axes)
            drawing.text(left + width / 2, top + 6, words, "small")
            left += width
            if words[0] != "y":
                drawing.text(left + 16, top + 84, "×" if words[0] == "x" else "=")
                left += 32
        top += 20 + 136 + 36
    drawing.height = top - 32
    return drawing


def side_axes(side: Side) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split the tokens of a side, and its hidden dim."""
    return side.tokens, (side.hidden,) if side.hidden else ()


def grids() -> Drawing:
    """The ranks of a 2d, a 2.5d and a 3d grid."""
    drawing = Drawing("The ranks of 2d, 2.5d and 3d grids")
    square, layers, cube = (
        Plan(tensor=4, tensor_kind="2d"),
        Plan(tensor=8, tensor_kind="2.5d", depth=2),
        Plan(tensor=8, tensor_kind="3d"),
    )
    tops = (20, 210, 452)
    for plan, top in zip((square, layers, cube), tops, strict=True):
        drawing.text(8, top, str(plan), "title")
        grid = plan.tensor_grid
        slow, down, right = ("", *grid.axes) if len(grid.axes) == 2 else tuple(grid.axes)
        spots = {}
        for rank, at in places(grid):
            deep = at.get(slow, 0)
            spots[rank] = (
                120 + at[right] * 120 + deep * 62,
                top + 44 + at[down] * 84 + (1 - deep) * (32 if slow else 0),
            )
        for rank, at in places(grid):
            for other, beside in places(grid):
                differing = [axis for axis in at if at[axis] != beside[axis]]
                if rank < other and len(differing) == 1:
                    (x1, y1), (x2, y2) = spots[rank], spots[other]
                    drawing.line(f"M{x1} {y1}L{x2} {y2}", ends="", dashed=differing == ["depth"])
        for rank, (x, y) in spots.items():
            drawing.parts.append(f'<circle class="r{rank}" cx="{x}" cy="{y}" r="19"/>')
            drawing.text(x, y, str(rank))
        low = top + 44 + 84 + (32 if slow else 0)
        drawing.text(180, low + 30, f"{right} →", "small")
        drawing.text(8, top + 86 + (32 if slow else 0), f"{down} ↓", "small left")
        if slow:
            drawing.text(350, top + 44, f"{slow} ↗", "small left")
        drawing.height = low + 36
    return drawing


def ulysses_ring() -> Drawing:
    """Eight ranks as ulysses x ring: who holds which tokens, and what of them in attention."""
    plan = Plan(ring=4, ulysses=2)
    drawing, layout = Drawing("A grid of ulysses x ring"), Layout("zigzag", 16, plan.ring, plan.ulysses)
    drawing.text(8, 16, f"{plan}, 16 tokens, zigzag, 8 heads", "title")
    width, height, left, top = 88, 74, 70, 52
    for ring in range(plan.ring):
        drawing.text(left + ring * 98 + width / 2, top - 14, f"ring {ring}", "small")
        for ulysses in range(plan.ulysses):
            rank, x, y = ring * plan.ulysses + ulysses, left + ring * 98, top + ulysses * (height + 66)
            held = [token for span in layout.shard(ring, ulysses) for token in range(*span)]
            drawing.box(x, y, width, height, [rank], " ")
            drawing.text(x + width / 2, y + 16, f"rank {rank}")
            drawing.text(x + width / 2, y + 38, "tokens", "fine")
            drawing.text(x + width / 2, y + 56, runs(held), "fine")
        middle = left + ring * 98 + width / 2
        drawing.line(f"M{middle} {top + height + 6}L{middle} {top + height + 60}", ends="both")
    drawing.text(8, top + height / 2, "ulysses 0", "small left")
    drawing.text(8, top + height / 2 + height + 66, "ulysses 1", "small left")
    drawing.text(8, top + height + 33, "all-to-all", "small left")
    bottom = top + 2 * height + 66 + 8
    for ring in range(plan.ring):
        held = [token for span in layout.ring_spans[ring] for token in range(*span)]
        x = left + ring * 98
        drawing.text(x + width / 2, bottom + 16, runs(held), "small")
    drawing.text(8, bottom + 16, "together", "small left")
    low = bottom + 40
    first, last = left + 20, left + 3 * 98 + width - 20
    drawing.line(f"M{first} {low}H{last}")
    drawing.line(f"M{last + 6} {low}h12v20H{first - 18}v-20h12")
    drawing.text(8, low + 44, "In attention each rank has 4 of 8 heads for the tokens that its", "small left")
    drawing.text(8, low + 62, "column holds together; their keys and values go around its row.", "small left")
    return drawing


def runs(tokens: Sequence[int]) -> str:
    """Tokens in words: 0-1, 14-15.

    >>> runs([0, 1, 14, 15])
    '0-1, 14-15'
    """
    spans: list[list[int]] = []
    for token in tokens:
        if spans and spans[-1][1] == token - 1:
            spans[-1][1] = token
        else:
            spans.append([token, token])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in spans)


def zigzag() -> Drawing:
    """The pairs that each ring rank computes under a causal mask, contiguous and zigzag."""
    drawing, tokens, ring, cell = Drawing("Contiguous and zigzag under a causal mask"), 16, 4, 12.0
    for index, kind in enumerate(("contiguous", "zigzag")):
        left, layout = 8 + index * 232.0, Layout(kind, tokens, ring)
        owner = {
            token: rank for rank, spans in enumerate(layout.ring_spans) for span in spans for token in range(*span)
        }
        drawing.text(left, 16, f"layout={kind}", "title")
        for token in range(tokens):
            shape = f'x="{left:g}" y="{40 + token * cell:g}" width="{(token + 1) * cell:g}" height="{cell:g}"'
            drawing.parts.append(f'<rect class="r{owner[token]}" {shape}/>')
        for rank, work in enumerate(layout.work(Mask())):
            drawing.box(left, 252 + rank * 28, 24, 24, [rank])
            drawing.text(left + 34, 264 + rank * 28, f"{runs(held(layout, rank))}: {work} pairs", "small left")
    drawing.text(8, 380, "A row is a query, as long as the keys that it sees.", "small left")
    return drawing


def held(layout: Layout, rank: int) -> list[int]:
    """The tokens of a ring rank."""
    return [token for span in layout.ring_spans[rank] for token in range(*span)]


def pictures() -> dict[str, str]:
    """Every drawing by its file's name."""
    drawn = {
        "split-1d": linears(Plan(tensor=4), "Column and row split of two linears"),
        "split-2d": linears(Plan(tensor=4, tensor_kind="2d"), "Two linears on a grid of rows and columns"),
        "split-2.5d": linears(Plan(tensor=8, tensor_kind="2.5d", depth=2), "Two linears on two layers of a grid"),
        "split-3d": linears(Plan(tensor=8, tensor_kind="3d"), "Two linears on a cube"),
        "grids": grids(),
        "ulysses-ring": ulysses_ring(),
        "zigzag": zigzag(),
    }
    return {f"{name}.svg": drawing.svg() for name, drawing in drawn.items()}


if __name__ == "__main__":
    for name, text in pictures().items():
        (Path(__file__).parent / "images" / name).write_text(text, encoding="utf-8")
