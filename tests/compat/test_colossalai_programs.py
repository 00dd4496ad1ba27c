"""Whole programs for Colossal-AI under torchrun: what one process prints, four and eight print."""

import re
import subprocess
import sys
from functools import cache

import pytest

from architecture.source import ROOT
from train.runs import environment

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(900)]

LLAMA = [
    (4, "--tp 4 --mode split_gather"),
    (4, "--tp 4 --mode ring"),
    (4, "--tp 2 --sp 2 --mode all_to_all"),
    (4, "--tp 2 --sp 2 --mode ring_attn"),
    (4, "--sp 2 --mode ring_attn --zero 2"),
    (4, "--pp 2 --tp 2"),
    (8, "--tp 2 --sp 4 --mode ring_attn"),
    (8, "--tp 2 --sp 2 --mode all_to_all --zero 1"),
    (8, "--pp 2 --tp 2 --sp 2 --mode ring_attn --zero 1"),
]
EXPERTS = [
    (4, "--ep 2 --sp 2 --mode all_to_all"),
    (4, "--ep 2 --sp 2 --mode ring_attn"),
    (8, "--ep 2 --tp 2 --mode split_gather --zero 1"),
    (8, "--ep 2 --tp 2 --mode ring"),
]
GRIDS = {
    (2, "--mode 1d"): ((256, 512), (512, 256), (16, 512), (16, 256)),
    (4, "--mode 1d"): ((256, 256), (256, 256), (16, 256), (16, 256)),
    (4, "--mode 2d"): ((128, 512), (512, 128), (8, 512), (8, 128)),
    (8, "--mode 2.5d --depth 2"): ((128, 512), (512, 128), (4, 512), (4, 128)),
    (8, "--mode 3d"): ((128, 256), (512, 64), (4, 512), (4, 128)),
}
"""Processes and mode, and the shapes of the two weights and outputs that their tutorial prints."""


@cache
def said(world: int, program: str, arguments: str) -> str:
    """What a program prints when so many processes run it."""
    launcher = (*TORCHRUN, f"--nproc_per_node={world}") if world > 1 else ()
    ended = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / program), *arguments.split()],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def losses(world: int, arguments: str) -> list[float]:
    text = said(world, "colossalai_booster.py", f"--batch 8 --length 250 {arguments}")
    return [float(value) for value in re.findall(r"Step \d+ loss: (\S+)", text)]


@pytest.mark.parametrize(("world", "arguments"), [*LLAMA, *EXPERTS])
def test_a_booster_program_prints_the_losses_of_one_process(world: int, arguments: str) -> None:
    """Catches a mode, pipeline, ZeRO stage or expert degree under which a program of theirs trains something else."""
    alone = losses(1, "--exact --experts" if "--ep" in arguments else "--exact")
    split = losses(world, f"--exact {arguments}")
    assert len(alone) == len(split) == 3
    assert max(abs(one / other - 1) for one, other in zip(alone, split, strict=True)) < 1e-9


def test_in_bf16_they_differ_by_rounding_alone() -> None:
    """Catches weights that are kept in bf16, which three steps of a small rate would leave as they were."""
    alone, split = losses(1, ""), losses(4, "--tp 2 --sp 2 --mode ring_attn")
    assert max(abs(one - other) for one, other in zip(alone, split, strict=True)) < 2e-3
    assert len({round(loss, 6) for loss in split}) == 3


@pytest.mark.parametrize(("world", "arguments"), list(GRIDS))
def test_the_mlp_prints_the_shapes_of_the_tutorial_and_the_output_of_one_process(world: int, arguments: str) -> None:
    """Catches a weight that lies as [out, in], a direction that does not alternate, and dropout that depends on it."""
    text = said(world, "colossalai_mlp.py", arguments)
    shapes = [tuple(map(int, found)) for found in re.findall(r"layer: \((\d+), (\d+)\)", text)]
    assert tuple(shapes) == GRIDS[world, arguments]
    parts = [float(found) for found in re.findall(r"output (\S+)", text)]
    (alone,) = (float(found) for found in re.findall(r"output (\S+)", said(1, "colossalai_mlp.py", "")))
    whole = parts[0] if "1d" in arguments else sum(parts)
    assert len(parts) == world
    assert abs(whole / alone - 1) < 1e-4
