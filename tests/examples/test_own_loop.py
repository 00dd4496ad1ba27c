"""The example that the README quotes."""

import subprocess
import sys
from pathlib import Path

from architecture.source import ROOT
from train.runs import environment, write_text

PROGRAM = str(ROOT / "examples" / "own_loop.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4")


def losses(*command: str) -> list[float]:
    ended = subprocess.run(
        [sys.executable, *command], env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["step", str(step), "loss"] for step in range(1, len(lines) + 1)]
    return [float(line[3]) for line in lines]


def test_one_and_four_processes(tmp_path: Path) -> None:
    """Catches an example that does not run, does not learn, or shows another loss when its sequences are split."""
    text = str(write_text(tmp_path / "text.txt"))
    alone = losses(PROGRAM, text)
    split = losses(*TORCHRUN, PROGRAM, text, "ring=2 ulysses=2")
    assert len(alone) == len(split) >= 10
    assert max(abs(a - b) for a, b in zip(alone, split, strict=True)) < 2e-3
    assert alone[-1] < 0.8 * alone[0]
