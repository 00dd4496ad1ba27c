"""The report page: what it says must be what the folder's files and the formulas say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from seqloom.errors import DataError
from seqloom.report import write_report
from seqloom.report.page import traffic
from seqloom.report.record import read_folder


class _Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += " " * (self._open[-1:] == ["text"]) + data


def _words(folder: Path) -> str:
    """The page's visible words with runs of white space made one space."""
    page = _Page(write_report(folder).read_text(encoding="utf-8"))
    return re.sub(r"\s+", " ", page.words)


def test_page_loads_nothing(make_run: Any) -> None:
    """Catches a style sheet, script, font or picture fetched from elsewhere: the page must work unplugged."""
    target = write_report(make_run())
    text = target.read_text(encoding="utf-8")
    page = _Page(text)
    assert target.name == "report.html"
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert page.tags.count("path") >= 5 and page.tags.count("rect") >= 12


def test_same_folder_gives_the_same_page(make_run: Any) -> None:
    """Catches times, random ids or set order in the page."""
    folder = make_run()
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_numbers_of_the_run_are_on_the_page(make_run: Any) -> None:
    """Catches a figure wired to the wrong key, plan or layout."""
    words = _words(make_run())
    for said in (
        "1.01 M parameters trained for 120 steps on sequences of 4,096 tokens, each split over 4 processes",
        "in float64 the loss agrees to within 1.3e-16 and every parameter's gradient agrees to within 3.4e-15",
        "unigram entropy of the text, 3.307 nats/token",
        "zigzag (this plan): max/mean 1.000",
        "contiguous (for comparison): max/mean 1.500",
        "4,195,328",  # pairs of a zigzag rank: half of 4096 x 4097 / 2
        "6,292,480",  # pairs of the last contiguous rank: 2048 x 2048 + 2048 x 2049 / 2
        "model.layers.0.self_attn.k_proj.weight",
        "4 layers x (512.0 KiB forward + 1.00 MiB backward)",
        "6,291,456 B in every step",
        "Within 1.0e-09",
        "after the last optimizer step, number 2",
    ):
        assert said in words
    assert "not verified" not in words and "does not compute" not in words


def test_loss_that_is_shown_is_the_last_one(make_run: Any) -> None:
    """Catches the first, best or averaged loss shown as the last."""
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"step": 121, "loss": 1.625}
    (folder / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(last)]))
    assert re.search(r"Last loss ?1\.625 ?nats", _words(folder))


def test_without_verify_the_page_claims_nothing(make_run: Any) -> None:
    """Catches a page that calls a run equal that nobody has verified."""
    words = _words(make_run(verified=False))
    assert "not verified yet: run seqloom verify" in words
    assert "--plan 'ring=2 ulysses=2' --seq-len 4096" in words
    assert "computes what one device computes" not in words and "equals one device is not verified yet" in words


def test_verify_of_another_plan_is_not_this_runs_proof(make_run: Any) -> None:
    """Catches a verify.json left from another plan taken as proof of this run."""
    folder = make_run()
    verdict = json.loads((folder / "verify.json").read_text()) | {"plan": "ring=4"}
    (folder / "verify.json").write_text(json.dumps(verdict))
    words = _words(folder)
    assert "computes what one device computes" not in words
    assert "what was verified is another plan, ring=4" in words
    # The same plan said in another order is the same plan.
    (folder / "verify.json").write_text(json.dumps(verdict | {"plan": "ulysses=2 ring=2 data=1"}))
    assert "computes what one device computes" in _words(folder)


def test_a_failed_verify_is_said_in_the_headline(make_run: Any) -> None:
    """Catches a headline that reads only whether verify.json exists, and a tolerance that passes anything."""
    folder = make_run()
    verdict = json.loads((folder / "verify.json").read_text()) | {"equal": False, "worst_gradient_error": 0.5}
    (folder / "verify.json").write_text(json.dumps(verdict))
    words = _words(folder)
    assert "does not compute what one device computes" in words and "the worst gradient by 5.0e-01" in words
    assert words.count("✗ no") == 1 and words.count("✓ yes") == 3


def test_names_from_files_are_escaped(make_run: Any) -> None:
    """Catches markup in a model's or parameter's name that becomes part of the page."""
    folder = make_run(model={"model_type": "<script>alert(1)</script>"})
    verdict = json.loads((folder / "verify.json").read_text()) | {"worst_parameter": "<img src=x>"}
    (folder / "verify.json").write_text(json.dumps(verdict))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;img src=x&gt;" in text


@pytest.mark.parametrize(
    ("plan", "rest"),
    [
        ("data=1", {"steps": 1}),
        ("data=2 ring=4 ulysses=2 layout=striped", {"batch": 2, "accumulate": 2, "dtype": "bfloat16"}),
        ("ring=3 ulysses=2", {"num_tokens": 12, "dtype": "float64"}),
        ("ring=8 layout=contiguous", {"steps": 2500}),
        ("ring=64 layout=striped exchange=gather", {"verified": False}),
        ("data=64", {"batch": 64}),
    ],
)
def test_bytes_agree_under_every_plan(make_run: Any, plan: str, rest: dict[str, Any]) -> None:
    """Catches a formula that forgets rows, accumulation, item size or an axis; and a page that cannot be drawn."""
    words = _words(make_run(plan=plan, **rest))
    assert words.count("✓ equal") - words.count("✓ equals") == 3


def test_bytes_off_the_formula_show_the_difference(make_run: Any) -> None:
    """Catches an average that hides one odd step, and a check mark given to nearly equal bytes."""
    folder = make_run(extra_bytes=-4096)
    ring = next(row for row in traffic(read_folder(folder)) if row.axis == "ring")
    assert (ring.difference, ring.differing) == (-4096, 1)
    words = _words(folder)
    assert "-4,096 B (-0.0651 %)" in words and "in 1 of 120 steps" in words
    assert words.count("✓ equal") - words.count("✓ equals") == 2


def test_recomputation_doubles_the_forward_bytes(make_run: Any) -> None:
    """Catches a formula that counts one forward pass where gradient checkpointing runs two."""
    folder = make_run()
    before = {row.axis: row.formula for row in traffic(read_folder(folder))}
    run = json.loads((folder / "run.json").read_text()) | {"gradient_checkpointing": True}
    (folder / "run.json").write_text(json.dumps(run))
    after = {row.axis: row.formula for row in traffic(read_folder(folder))}
    assert before == {"ring": 6 * 2**20, "ulysses": 6 * 2**20, "replicas": 6_079_488}
    assert after == {"ring": 8 * 2**20, "ulysses": 9 * 2**20, "replicas": 6_079_488}


def test_recomputation_of_a_plan_repeats_what_it_runs(make_run: Any) -> None:
    """Catches attention's bytes counted again where its output was kept, or for layers that are not run again."""
    found = {}
    for way in ("none", "selective", "full:block:1", "full"):
        rows = traffic(read_folder(make_run(plan=f"ring=2 ulysses=2 recompute={way}")))
        found[way] = {row.axis: row.formula for row in rows if row.axis in ("ring", "ulysses")}
    assert found["none"] == found["selective"]
    for axis, whole in found["full"].items():
        assert whole - found["none"][axis] == 4 * (found["full:block:1"][axis] - found["none"][axis]) > 0


def test_a_double_ring_is_two_axes(make_run: Any) -> None:
    """Catches bytes between nodes added to those inside them, or left out."""
    rows = {row.axis: row for row in traffic(read_folder(make_run(plan="ring=8 inner_ring=4")))}
    assert [(rows[axis].degree, rows[axis].difference) for axis in ("outer_ring", "inner_ring")] == [(2, 0), (4, 0)]
    assert rows["outer_ring"].formula * 6 == rows["inner_ring"].formula > 0 and "ring" not in rows


@pytest.mark.parametrize("plan", ["ring=4 exchange=needed", "ring=2 ulysses=2 layout=balanced"])
def test_bytes_that_depend_on_documents_are_not_predicted(make_run: Any, plan: str) -> None:
    """Catches bytes of one batch held against those of another with other documents."""
    folder = make_run(plan=plan)
    rows = {row.axis: row for row in traffic(read_folder(folder))}
    assert rows["ring"].formula is None and rows["ring"].measured > 0 and rows["replicas"].formula
    assert "not predicted" in _words(folder)


def test_a_page_that_cannot_be_written(make_run: Any) -> None:
    """Catches a traceback where the folder is not the user's to write to."""
    folder = make_run(steps=1)
    (folder / "report.html").mkdir()
    with pytest.raises(
        DataError, match=r"report\.html cannot be written \(Is a directory\); make the folder writable\.$"
    ):
        write_report(folder)


def test_an_axis_without_a_formula_is_listed(make_run: Any) -> None:
    """Catches traffic on an axis nobody predicted that the page leaves out."""
    folder = make_run(steps=1)
    line = json.loads((folder / "metrics.jsonl").read_text())
    line["sent_bytes"]["world"] = 3072
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    words = _words(folder)
    assert "3.00 KiB" in words and "not predicted" in words


def test_a_loss_that_is_not_finite_leaves_a_gap(make_run: Any) -> None:
    """Catches a diverged run that cannot be drawn, and coordinates that are not numbers."""
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[50]) | {"loss": float("nan")}
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:50], json.dumps(broken), *lines[51:]]))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "1 step had a loss that is not finite" in text
    assert not re.search(r'(?:d|x|y|cx|cy|x1|x2|y1|y2)="[^"]*(?:nan|inf)', text)


@pytest.mark.parametrize(
    "plan",
    [
        "tensor=2",
        "tensor=4 sequence_parallel=false data=2",
        "tensor=4 ring=2 ulysses=2 tensor_overlap=ring",
        "tensor=6 tensor_kind=2d grid=2x3 ring=2 layout=striped",
        "tensor=8 tensor_kind=2.5d depth=2 tensor_tokens=ulysses",
        "tensor=8 tensor_kind=3d layout=balanced",
        "tensor=4 tensor_kind=2d exchange=needed",
        "tensor=4 tensor_kind=2d ring=2 inner_ring=2",
    ],
)
def test_a_page_of_any_tensor_grid(make_run: Any, plan: str) -> None:
    """Catches a page that breaks, or is silent about, the axes of a tensor grid."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4}
    folder = make_run(plan=plan, batch=2, model=heads, steps=3)
    words, read = _words(folder), read_folder(folder)
    grid = read.plan.tensor_grid
    for axis, size in grid.axes.items():
        assert f"{axis} = {size}" in words
        assert f"{axis} {size}" in words or grid.kind == "1d"
    assert f"tensor {read.plan.tensor}" in words
    rows = {row.axis: row for row in traffic(read)}
    assert {axis: rows[axis].degree for axis in grid.axes} == grid.axes
    assert all(rows[axis].formula is None and "in linears" in rows[axis].how for axis in grid.axes)
    if read.plan.exchange == "ring" and read.plan.layout != "balanced" and read.plan.inner_ring is None:
        assert (rows["ring"].differing, rows["ulysses"].differing) == (0, 0)


def test_a_sequence_is_split_over_a_tensor_group(make_run: Any) -> None:
    """Catches a page that says a sequence stays whole where sequence parallelism splits it between linears."""
    assert "each split over 4 processes as tensor=4" in _words(make_run(plan="tensor=4"))
    words = _words(make_run(plan="tensor=4 sequence_parallel=false"))
    assert "spread over 4 processes as tensor=4 sequence_parallel=false" in words and "4,096 on each process" in words
    assert "each split over 4 processes" in _words(make_run(plan="tensor=8 tensor_kind=2.5d depth=2"))
