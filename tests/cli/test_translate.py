"""seqloom translate: what it prints, and how it ends."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cli.conftest import Cli, refused
from seqloom.plan import Plan
from train.runs import environment

FLAGS = (
    "--tensor-model-parallel-size 2 --context-parallel-size 4 --context-parallel-algo hybrid_cp_algo "
    "--ulysses-degree-in-cp 2"
)


def test_a_layout(cli: Cli) -> None:
    """Catches flags eaten by the command line, and a plan that is not the one of the notes."""
    for settings in (("--", *FLAGS.split()), (FLAGS,), tuple(FLAGS.split())):
        code, out, err = cli("translate", "megatron", "--world", "8", *settings)
        assert (code, err) == (0, "")
        assert out.startswith("Plan: 'ring=2 ulysses=2 tensor=2 sequence_parallel=false' on 8 processes.\n")
        assert "  --ulysses-degree-in-cp 2: context 4 / ulysses 2 = ring 2.\n" in out


def test_a_flag_of_several_values(cli: Cli) -> None:
    """Catches values that are shown as JSON, which nobody wrote."""
    _, out, _ = cli("translate", "megatron", "--rampup-batch-size 8 8 100 --global-batch-size 16 --micro-batch-size 1")
    assert "  --rampup-batch-size 8 8 100: " in out


def test_json_holds_everything(cli: Cli) -> None:
    """Catches a field of Plan left out, and JSON that is not alone on stdout."""
    code, out, err = cli("translate", "megatron", FLAGS, "--world", "8", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"plan", "world_size", "model", "train", "notes"}
    assert set(found["plan"]) == {field.name for field in fields(Plan)}
    assert found["world_size"] == 8 and Plan(**found["plan"]) == Plan(
        ring=2, ulysses=2, tensor=2, sequence_parallel=False
    )
    assert {"sequence_length", "micro_batch", "global_batch", "ramp_up", "recompute", "precision", "schedule"} <= set(
        found["train"]
    )
    assert all(set(note) == {"option", "value", "verdict", "why"} for note in found["notes"])


def test_a_refusal(cli: Cli) -> None:
    """Catches a refusal that ends with 0, and one whose notes are lost with --json."""
    assert "no multiple of tensor 3" in refused(
        cli("translate", "megatron", "--tensor-model-parallel-size 3", "--world", "8")
    )
    code, out, err = cli("translate", "megatron", "--tensor-model-parallel-size 3", "--world", "8", "--json")
    assert code == 2 and err.startswith("Error: ")
    found = json.loads(out)
    assert found["plan"] is None and any(note["verdict"] == "refused" for note in found["notes"])


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("colossalai", "HybridParallelPlugin(tp_size=2, pp_size=1)"),
        ("mindformers", "parallel_config: {model_parallel: 2}"),
        ("megatron", "python a.py --tensor-model-parallel-size 2"),
    ],
)
def test_translating_leaves_torch_unloaded(tmp_path: Path, dialect: str, text: str) -> None:
    """Catches an import on the way that costs seconds before the first word."""
    path = tmp_path / "settings.txt"
    path.write_text(text)
    program = (
        "import sys; from seqloom.cli.main import main\n"
        "try: main()\nfinally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, "translate", dialect, str(path), "--world", "2"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0].startswith("Plan: 'tensor=2 sequence_parallel=false' on 2")
    assert ended.stdout.splitlines()[-1] == "[]"
