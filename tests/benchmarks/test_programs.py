"""The programs that need no second process: their arguments, their records, and what they compute; no timings."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks import balance, gpu_attention, gpu_step, mask_memory, parity
from benchmarks.documents import lengths
from benchmarks.emulation import Loop, Sizes, whole
from close import assert_close
from seqloom import Layout, Mask
from seqloom.attention.kernels import Call, Kernel, choose

TINY = Sizes(num_tokens=48, heads=4, kv_heads=2, width=8, dtype=torch.float64, device="cpu")


def rows_of(page: Path) -> list[dict[str, Any]]:
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["rows"]


def test_documents_are_heavy_tailed() -> None:
    """Catches lengths that do not fill the row, that repeat between seeds, or whose median is not the one asked for."""
    assert sum(lengths(1000, 3)) == 1000
    assert lengths(65_536, 0) != lengths(65_536, 1) and lengths(65_536, 1) == lengths(65_536, 1)
    many = lengths(10_000_000, 0)
    assert 0.9 < median(many) / 1024 < 1.1
    assert 2.5 < (sum(many) / len(many)) / median(many) < 3.7  # exp(1.5**2 / 2) = 3.08


def test_balance(tmp_path: Path) -> None:
    """Catches layouts mixed up: balanced is even, contiguous is not, and both hold all work of the mask."""
    page = balance.main(["--tokens", "4096", "--ranks", "4", "--seeds", "2", "--out", str(tmp_path)])
    rows = rows_of(page)
    assert [(row["seed"], row["layout"]) for row in rows] == [(s, kind) for s in (0, 1) for kind in balance.KINDS]
    for seed in (0, 1):
        work = sum(length * (length + 1) // 2 for length in lengths(4096, seed))
        assert {sum(row["work"]) for row in rows if row["seed"] == seed} == {work}
    worst = {kind: max(row["imbalance"] for row in rows if row["layout"] == kind) for kind in balance.KINDS}
    assert worst["balanced"] < 1.05 < worst["contiguous"]


def test_mask_memory(tmp_path: Path) -> None:
    """Catches a measurement that sees nothing: more documents take more, a longer row does not."""
    page = mask_memory.main(["--tokens", "1024", "4096", "--ranks", "2", "--out", str(tmp_path)])
    took = {(row["mask"], row["tokens"]): row["python_bytes"] + row["tensor_bytes"] for row in rows_of(page)}
    assert took["256 documents", 1024] > 3 * took["1 document", 1024] > 0
    assert took["256 documents", 4096] < 1.5 * took["256 documents", 1024]
    assert "16,384" in page.read_text(encoding="utf-8")  # KiB of a dense mask of 4,096 tokens


def test_mask_memory_counts_tensors() -> None:
    """Catches a mask that hides in a tensor."""
    held = [torch.zeros(100_000, dtype=torch.uint8)]
    assert mask_memory.tensor_bytes() >= held[0].numel()


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False, allowed=lambda q, k: k <= q)], ids=["tiles", "positions"])
@pytest.mark.parametrize("kind", ["zigzag", "contiguous", "balanced"])
def test_the_emulated_ring_is_the_whole(kind: str, mask: Mask) -> None:
    """Catches a loop that is timed without some of its blocks, tiles or gradients, or at other positions."""
    truth = gpu_attention.exact(TINY)
    layout = Layout(kind, TINY.num_tokens, 3)
    found = whole([Loop(TINY, layout, rank, mask) for rank in range(3)])
    for part, true in zip(found, truth, strict=True):
        assert_close(part, true, tolerance=1e-12, ranks=3)


@pytest.mark.parametrize(
    ("program", "arguments", "why"),
    [
        (balance, ["--seeds", "0"], "at least one seed"),
        (mask_memory, ["--tokens", "64"], "rows of 256 tokens"),
        (gpu_attention, ["--tokens", "small", "8192"], "give `small`, or numbers"),
        (gpu_attention, ["--repeats", "0"], "measures nothing"),
        (gpu_attention, ["--parts", "all"], "invalid choice"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    program: Any, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an argument that is accepted and then ignored."""
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert why in capsys.readouterr().err


def test_the_gpu_program_runs_through(tmp_path: Path) -> None:
    """Catches a program that first fails on the GPU: all of it runs here, in small."""
    arguments = ["--device", "cpu", "--tokens", "small", "--repeats", "1", "--out", str(tmp_path)]
    rows = rows_of(gpu_attention.main(arguments))
    assert [row for row in rows if "failed" in row] == []
    assert [(row["layout"], row["bound"]) for row in rows if row["part"] == "loops"] == [
        ("zigzag", 1.0),
        ("contiguous", 8 / 15),
    ]
    errors = {row["what"]: row["errors"] for row in rows if row["part"] == "errors"}
    assert set(errors) == {"kernel torch_cpu", "kernel plain", "ring of 2", "ring of 4", "ring of 8"}
    assert all(error < 1e-2 for row in errors.values() for error in row.values())  # bf16
    assert {row["what"] for row in rows if row["part"] == "documents"} == {
        "one causal call, documents not told apart",
        "one rank, tile by tile",
        "slowest of 8 ranks, zigzag",
        "slowest of 8 ranks, balanced",
    }


def test_a_kernel_that_refuses_the_whole_is_called_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part of a GPU's time lost to one refusal, and calls on parts of the heads that pass as one."""
    asked: list[int] = []

    def refuse_four_heads(q: torch.Tensor, v: torch.Tensor, call: Call) -> Kernel:
        asked.append(q.shape[1])
        if q.shape[1] == TINY.heads:
            raise RuntimeError("too many elements")
        return choose(q, v, call)

    monkeypatch.setattr(gpu_attention, "choose", refuse_four_heads)
    name, ahead, back = gpu_attention.fused_seconds(TINY, 3)
    assert asked == [4, 2, 2]
    assert name.endswith(", 2 calls")
    assert len(ahead) == len(back) == 3


def test_parts_are_chosen(tmp_path: Path) -> None:
    """Catches a part that runs although others were asked for."""
    arguments = ["--device", "cpu", "--tokens", "small", "--parts", "errors", "--out", str(tmp_path)]
    assert {row["part"] for row in rows_of(gpu_attention.main(arguments))} == {"errors"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    """Catches figures of a CPU in a record of a GPU."""
    page = gpu_attention.main(["--out", str(tmp_path)])
    assert "Not measured" in page.read_text(encoding="utf-8")
    assert rows_of(page) == []


def test_the_table_of_parity(tmp_path: Path) -> None:
    """Catches a plan that fails or differs and is left out of the page, or the exit status; rows run twice or lost."""
    page, kept = tmp_path / "parity.md", tmp_path / "rows.jsonl"
    arguments = ["--worlds", "1", "--models", "llama", "--tokens", "9", "--out", str(page), "--rows", str(kept)]
    assert parity.main(arguments) == 0
    said = page.read_text(encoding="utf-8")
    assert "1 of the 1 plans that `seqloom plan --list` names for 1 processes ran. 1 of these 1 equal one dev" in said
    row = kept.read_text(encoding="utf-8")
    kept.write_text(row.replace('"failed": ""', '"failed": "it hung"'), encoding="utf-8")
    assert parity.main(arguments) == 1 and len(kept.read_text(encoding="utf-8").splitlines()) == 1
    assert "it hung" in page.read_text(encoding="utf-8")
    kept.unlink()
    assert parity.main([*arguments, "--kept"]) == 0
    assert "0 of the 1 plans" in page.read_text(encoding="utf-8") and not kept.exists()


def test_the_page_of_parity() -> None:
    """Catches rows counted as equal that are not, and plans that were listed and are silently missing."""
    asked = argparse.Namespace(tokens=9, every=2)
    rows = [
        parity.Row("llama", 2, "ring=2", 1e-15, 1e-15, 1e-15, 1e-15),
        parity.Row("llama", 2, "data=2", 1e-15, 1e-15, 2e-9, 1e-15),
        parity.Row("llama", 2, "ulysses=2", float("nan")),
        parity.Row("llama", 2, "tensor=2", failed="it hung"),
    ]
    assert [row.equal for row in rows] == [True, False, False, False]
    listed = parity.Listed("llama", 2, 9, ("ring=2", "data=2", "ulysses=2", "tensor=2"), ("zero=1 data=2",))
    text = "\n".join(parity.page(rows, [listed], asked))
    assert "4 of the 9 plans" in text and "ran, one of every 2. 1 of these 4 equal" in text and "it hung" in text
    many = parity.Listed("llama", 16, 70, ("ring=16",))
    assert "4 of the 9 plans" in (text16 := "\n".join(parity.page(rows, [listed, many], asked)))
    assert "and 0 chosen ones of 70 for 16" in text16
    assert "| llama | 2 | 9 | 4 | 3 | nan |" in text and "- llama: `zero=1 data=2`" in text
    assert [parity.Listed.of(model, 4, 47).dropped for model in ("llama", "mixtral")] == [(), ()]


def test_whole_steps_run_through(tmp_path: Path) -> None:
    """Catches a program that first fails on the GPU, a choice left out, and a gain that has another sense."""
    arguments = ["--device", "cpu", "--tokens", "small", "--repeats", "1", "--out", str(tmp_path)]
    rows = rows_of(gpu_step.main(arguments))
    assert [row["choice"] for row in rows] == list(gpu_step.CHOICES)
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in rows)
    made = [
        {"tokens": 8, "choice": choice, "step_seconds": taken, "attention_forward_seconds": 2.0}
        for choice, taken in (("full", 10.0), ("selective", 8.0))
    ]
    assert gpu_step.gain(made, 8) == 1.0 and gpu_step.gain(made[:1], 8) is None


def test_flops_by_hand() -> None:
    """Catches the whole square counted for causal attention, the head left out, or recomputation counted."""
    found = gpu_step.model_flops(gpu_step.SMALL, 128)
    linears = 64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 128
    assert found == 6 * 128 * (4 * linears + 64 * 256) + 4 * 12 * 4 * 16 * 128 * 129 // 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would be measured")
def test_without_a_gpu_no_step_is_claimed(tmp_path: Path) -> None:
    """Catches figures of a CPU in a record of a GPU."""
    page = gpu_step.main(["--out", str(tmp_path)])
    assert "Not measured" in page.read_text(encoding="utf-8")
