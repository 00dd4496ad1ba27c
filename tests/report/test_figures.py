"""The geometry of the pictures: every token once, every rank in its place, every value at its height."""

from math import nan, prod

import pytest

from seqloom.geometry import Layout, Mask
from seqloom.plan import Plan
from seqloom.report import figures

LAYOUTS = [
    Layout("zigzag", 48, ring=3, ulysses=2),
    Layout("contiguous", 48, ring=2, ulysses=3),
    Layout("striped", 48, ring=4, ulysses=2),
    Layout("zigzag", 48),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bars_cover_the_sequence_once(layout: Layout) -> None:
    """Catches pieces that overlap, leave a hole, or stand at another rank's tokens."""
    owners = figures.owners_between(layout, Plan(ring=layout.ring, ulysses=layout.ulysses))
    for shown in (owners, figures.owners_inside(layout)):
        pieces = figures.whole_bar(shown, 48)
        assert sum(piece.width * piece.height for piece in pieces) == pytest.approx(100 * 100)
        for token in range(48):
            at = [p for p in pieces if p.x <= 100 * (token + 0.5) / 48 < p.x + p.width]
            assert sum(piece.height for piece in at) == pytest.approx(100)
            holder = next(o.label for o in shown if any(token in range(*span) for span in o.spans))
            assert holder in {piece.label for piece in at}


def test_zoom_shows_the_first_tokens_in_order() -> None:
    """Catches a zoom that repeats the ranks' order instead of the tokens'."""
    layout = Layout("striped", 4096, ring=3, ulysses=2)
    pieces = figures.zoom_bar(figures.owners_between(layout, Plan(ring=3, ulysses=2)), 4096, 3)
    assert [piece.label for piece in pieces] == ["0", "2", "4"] * 8
    assert [round(piece.x * 24 / 100) for piece in pieces] == list(range(24))


def test_mesh_numbers_every_rank_once_in_the_plans_order() -> None:
    """Catches ring and ulysses exchanged, which no square mesh shows."""
    panels = figures.mesh(Plan(data=2, ring=3, ulysses=2))
    assert [panel.name for panel in panels] == ["data 0", "data 1"]
    assert {(c.ring, c.ulysses): c.rank for c in panels[0].cells} == {
        (r, u): 2 * r + u for r in range(3) for u in range(2)
    }
    assert sorted(cell.rank for panel in panels for cell in panel.cells) == list(range(12))
    assert len({cell.style for cell in panels[0].cells}) == 6


GRIDS = [
    "tensor=2",
    "ring=2 ulysses=2 tensor=3 data=2",
    "tensor=4 sequence_parallel=false ring=2",
    "tensor=6 tensor_kind=2d grid=3x2 ring=2",
    "tensor=6 tensor_kind=2d grid=2x3 ulysses=2 tensor_tokens=ulysses",
    "tensor=8 tensor_kind=2.5d depth=2 data=2",
    "tensor=8 tensor_kind=3d ring=2",
    "tensor=12 tensor_kind=3d grid=2x3x2 layout=striped",
]


@pytest.mark.parametrize("text", GRIDS)
def test_every_rank_of_a_tensor_grid_is_drawn_once(text: str) -> None:
    """Catches ranks of a grid left out or drawn twice, and a ring drawn without the token axes that join it."""
    plan = Plan.parse(text)
    panels = figures.mesh(plan)
    assert sorted(cell.rank for panel in panels for cell in panel.cells) == list(range(plan.world_size))
    assert len(panels) == plan.data * plan.tensor_grid.heads
    assert len({panel.name for panel in panels}) == len(panels)
    for panel in panels:
        assert {(c.ring, c.ulysses) for c in panel.cells} == {
            (r, u) for r in range(plan.attention_ring) for u in range(plan.attention_ulysses)
        }


def test_the_panels_of_a_grid_by_hand() -> None:
    """Catches rows taken for columns: on 3 x 2 ranks a ring goes through every second rank."""
    first, second = figures.mesh(Plan(tensor=6, tensor_kind="2d", grid="3x2"))
    assert (first.name, [cell.rank for cell in first.cells]) == ("col 0", [0, 2, 4])
    assert (second.name, [cell.rank for cell in second.cells]) == ("col 1", [1, 3, 5])
    assert [panel.name for panel in figures.mesh(Plan(tensor=8, tensor_kind="3d"))] == ["input 0", "input 1"]
    assert [panel.name for panel in figures.mesh(Plan(tensor=2))] == ["tensor 0", "tensor 1"]


@pytest.mark.parametrize("text", GRIDS)
def test_bars_of_a_tensor_grid_cover_the_sequence_once(text: str) -> None:
    """Catches tokens shown twice because several ranks hold their channels, or left out between linears."""
    plan = Plan.parse(text)
    layout = Layout(plan.layout, 97, plan.attention_ring, plan.attention_ulysses)
    owners = figures.owners_between(layout, plan)
    held = sorted(token for owner in owners for span in owner.spans for token in range(*span))
    assert held == list(range(97))
    grid = plan.tensor_grid
    over = prod(grid.axes[axis] for axis in grid.outer.tokens)
    assert len(owners) == plan.ring * plan.ulysses * over
    assert owners[0].label == "0"


def test_work_bars_share_one_scale() -> None:
    """Catches each layout scaled to its own longest bar, which would hide the imbalance."""
    zigzag, contiguous = figures.work([Layout(kind, 64, ring=4) for kind in ("zigzag", "contiguous")], Mask())
    assert max(contiguous.widths) == 100.0
    assert set(zigzag.widths) == {zigzag.mean} and zigzag.mean == pytest.approx(contiguous.mean)
    assert zigzag.mean == pytest.approx(100 / contiguous.imbalance)


def test_curve_places_values_between_its_ticks() -> None:
    """Catches an axis upside down, or ticks on another scale than the line."""
    drawn = figures.curve([1, 2, 3], [6.0, 4.0, 2.0], level=3.0)
    height = {tick.text: tick.at for tick in drawn.y_ticks}
    assert drawn.level == pytest.approx(height["3"])
    assert drawn.end == (100.0, pytest.approx(height["2"]))
    first = float(drawn.paths[0].split("L")[0].split()[1])
    assert first / 10 == pytest.approx(height["6"], abs=0.01)
    assert height["2"] > height["6"]


def test_curve_breaks_where_a_value_is_not_finite() -> None:
    """Catches a line drawn across a step that has no value."""
    drawn = figures.curve([1, 2, 3, 4], [1.0, nan, 3.0, 4.0])
    assert len(drawn.paths) == 2
    assert figures.curve([1, 2], [nan, nan]).paths == ()


def test_long_curves_are_means_over_equal_runs() -> None:
    """Catches a page that grows with the run, and points dropped instead of averaged."""
    drawn = figures.curve(range(1, 4001), [float(step % 2) for step in range(4000)])
    assert drawn.stride == 5
    assert drawn.paths[0].count("L") == 799


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 120), (2.2, 5.5), (0, 0.003), (1, 1), (1, 2), (3, 12345)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    """Catches ticks outside the drawing, or so many that their words overlap."""
    found = figures.ticks(low, high, 6)
    assert 1 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
