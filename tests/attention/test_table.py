"""The table of kernels and features that `seqloom plan --table` prints."""

import pytest
import torch

from attention.dense import compare_tile, inputs
from attention.test_kernels import BY_NAME, make_call
from seqloom.attention.kernels import KERNELS, Call, Kernel, choose, kernels_for, render, rows, table

ASKED = {
    "causal": (make_call(range(9), range(9), causal=True), inputs(9, 9)),
    "grouped heads": (make_call(range(9), range(9)), inputs(9, 9)),
    "any length": (make_call(range(13), range(9)), inputs(13, 9)),
    "other V width": (make_call(range(9), range(9)), inputs(9, 9, 24, 16)),
    "soft cap": (make_call(range(9), range(9), ("softcap",)), inputs(9, 9)),
    "ALiBi": (make_call(range(9), range(9), ("slopes",)), inputs(9, 9)),
    "dropout": (make_call(range(9), range(9), ("dropout",)), inputs(9, 9)),
    "callable mask": (make_call(range(9), range(9), ("allowed",)), inputs(9, 9)),
}


def test_every_kernel_has_a_row() -> None:
    """Catches a kernel missing from the table, listed twice for its two devices, or above one chosen before it."""
    names = [row.kernel for row in rows()]
    assert sorted(names) == sorted(BY_NAME)
    for _, kernels in KERNELS:
        places = [names.index(kernel.name) for kernel in kernels]
        assert places == sorted(places)
    assert {row.kernel: row.devices for row in rows()}["plain"] == ("cpu", "cuda")
    for row in rows():
        assert set(row.features) == {*ASKED, "float64", "float32", "bf16", "runs here"}


@pytest.mark.parametrize("feature", ASKED)
def test_yes_means_yes(feature: str) -> None:
    """Catches a "yes" that computes something else, and a reason beside a kernel that is chosen all the same."""
    call, tensors = ASKED[feature]
    for row in rows():
        if "cpu" not in row.devices:
            continue
        honoured, kernel = row.features[feature] == "yes", BY_NAME[row.kernel]
        assert honoured == (kernel.lacks(call, tensors[1], tensors[3]) is None)
        if honoured:
            compare_tile(kernel, call, tensors)
        else:
            assert choose(tensors[1], tensors[3], call) is not kernel


@pytest.mark.parametrize(("feature", "dtype"), table.TYPES.items())
def test_types(feature: str, dtype: torch.dtype) -> None:
    """Catches a type computed in a lower one."""
    for row in rows():
        if "cpu" in row.devices and row.features[feature] == "yes":
            _, *qkv = (x.to(dtype) for x in inputs(6, 6))
            out, _ = BY_NAME[row.kernel].forward(*qkv, Call(0.3))
            assert torch.promote_types(out.dtype, dtype) == out.dtype


def test_what_runs_here() -> None:
    """Catches a kernel said to run that is never chosen on any device of this machine, and the reverse."""
    here = {row.kernel for row in rows() if row.features["runs here"] == "yes"}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    usable = {each.name for kind in devices for each in kernels_for(kind) if each.absent(torch.device(kind)) is None}
    assert here == usable >= {"torch_cpu", "plain"}


def test_cells_of_the_gpu_kernels() -> None:
    """Catches a limit that has moved without anyone reading the library again."""
    cells = {row.kernel: row.features for row in rows()}
    assert {name for name, row in cells.items() if row["soft cap"] != "yes"} == {
        "torch_cpu",
        "flash_attn_4",
        "cudnn",
        "torch_flash",
    }
    for feature in ("ALiBi", "dropout", "callable mask"):
        assert {name for name, row in cells.items() if row[feature] == "yes"} == {"plain", "flex"}
    assert {name for name, row in cells.items() if row["other V width"] != "yes"} == {"flash_attn_4", "cudnn"}
    assert {name for name, row in cells.items() if row["any length"] != "yes"} == {"cudnn"}
    assert {name for name, row in cells.items() if row["float64"] == "yes"} == {"torch_cpu", "plain"}
    assert {name for name, row in cells.items() if row["float32"] == "yes"} == {"torch_cpu", "plain", "flex"}
    for feature in ("causal", "grouped heads", "bf16"):
        assert {row[feature] for row in cells.values()} == {"yes"}


def test_the_table_asks_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second list of features, kept by hand: a kernel that says no to all must show it everywhere."""
    shy = Kernel(
        "shy", lambda device: "not today", lambda call, q, v: "too wide" if q.shape[-1] > 64 else None, *[None] * 2
    )
    monkeypatch.setattr(table, "KERNELS", (("cpu", (shy,)),))
    (row,) = rows()
    assert {feature for feature, cell in row.features.items() if cell != "yes"} == {"other V width", "runs here"}
    assert row.features["other V width"] == "too wide" and row.features["runs here"] == "not today"


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numbers without their reason, columns that do not line up, and lines too long for a terminal."""
    text = render().splitlines()
    gap = text.index("")
    assert max(map(len, text)) <= 120
    named = {line.split()[0]: line for line in text[2:gap]}
    reasons = {line[:2].strip(): line[4:] for line in text[gap + 1 :]}
    assert list(named) == [row.kernel for row in rows()]
    for row in rows():
        cells = named[row.kernel].removeprefix(row.kernel).strip().removeprefix(", ".join(row.devices)).split()
        assert [reasons.get(cell, cell) for cell in cells] == list(row.features.values())
    for line in named.values():  # every cell begins below its heading
        assert all(text[1][i] != " " for i in range(20, len(line)) if line[i] != " " and line[i - 1] == " ")
