"""The table of kernels and features: honoured, or why not.

Each cell is the answer of the kernel's own `lacks` to a call that asks for the feature and nothing else,
so the table and the choice cannot disagree. The questions are put on meta tensors: nothing is computed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqloom.attention.kernels.call import Call, Kernel
from seqloom.attention.kernels.choice import KERNELS

YES = "yes"
HERE = "runs here"
TYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Question:
    """What a cell asks: the call, and the shapes it is for."""

    call: Call
    heads: int = 4
    kv_heads: int = 4
    tokens: int = 256
    width: int = 64
    v_width: int = 64

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """q and v of those shapes, without memory."""
        q = torch.empty(1, self.heads, self.tokens, self.width, dtype=dtype, device="meta")
        return q, torch.empty(1, self.kv_heads, self.tokens, self.v_width, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Row:
    """One kernel: the kinds of device it is for, and for each feature "yes" or the reason why not."""

    kernel: str
    devices: tuple[str, ...]
    features: dict[str, str]


def _questions() -> dict[str, Question]:
    bare = Call(scale=0.125)
    positions = torch.arange(256, device="meta")
    placed = replace(bare, q_positions=positions, k_positions=positions)
    return {
        "causal": Question(replace(bare, causal=True)),
        "grouped heads": Question(bare, kv_heads=2),
        "any length": Question(bare, tokens=201),
        "other V width": Question(bare, width=192, v_width=128),
        "soft cap": Question(replace(bare, softcap=50.0)),
        "ALiBi": Question(replace(placed, slopes=torch.empty(4, device="meta"))),
        "dropout": Question(replace(placed, dropout=0.1, dropout_keys=torch.empty(1, 4, device="meta").long())),
        "callable mask": Question(replace(placed, allowed=lambda q, k: (q - k) % 3 != 1)),
    }


def _answer(kernel: Kernel, question: Question) -> str:
    """The answer in the lowest type the kernel computes in, so that the type is not the reason."""
    bare = Question(Call(scale=0.125))
    fits = [dtype for dtype in reversed(TYPES.values()) if kernel.lacks(bare.call, *bare.tensors(dtype)) is None]
    return kernel.lacks(question.call, *question.tensors(fits[0])) or YES


def _here(kernel: Kernel, devices: tuple[str, ...]) -> str:
    """Whether it runs on some device of this machine."""
    reasons = [kernel.absent(torch.device(device)) for device in devices]
    return YES if None in reasons else str(reasons[0])


def rows() -> tuple[Row, ...]:
    """Every kernel once, with "yes" or a reason for each feature and for this machine.

    In the order of `KERNELS`, and a kernel of several kinds of device at its last place: what stands
    above another is chosen before it.
    """
    devices: dict[str, tuple[str, ...]] = {}
    kernels: dict[str, Kernel] = {}
    for device, listed in KERNELS:
        for kernel in listed:
            devices[kernel.name] = (*devices.get(kernel.name, ()), device)
            kernels.pop(kernel.name, None)
            kernels[kernel.name] = kernel
    bare = Question(Call(scale=0.125))
    found = []
    for name, kernel in kernels.items():
        cells = {feature: _answer(kernel, question) for feature, question in _questions().items()}
        for label, dtype in TYPES.items():
            cells[label] = kernel.lacks(bare.call, *bare.tensors(dtype)) or YES
        cells[HERE] = _here(kernel, devices[name])
        found.append(Row(name, devices[name], cells))
    return tuple(found)


def render() -> str:
    """`rows` as plain text: a line for each kernel, and below it the reasons that its numbers stand for."""
    table = rows()
    features = list(table[0].features)
    reasons = list(dict.fromkeys(cell for row in table for cell in row.features.values() if cell != YES))
    shown = [[*feature.partition(" ")[::2]] for feature in features]
    lines = [["", "", *(above if below else "" for above, below in shown)]]
    lines.append(["kernel", "device", *(below or above for above, below in shown)])
    for row in table:
        cells = (row.features[feature] for feature in features)
        numbers = (cell if cell == YES else str(reasons.index(cell) + 1) for cell in cells)
        lines.append([row.kernel, ", ".join(row.devices), *numbers])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", *(f"{number:>2}  {reason}" for number, reason in enumerate(reasons, 1))])
