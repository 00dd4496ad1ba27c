"""`seqloom verify` as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pool import Pool
from seqloom.cli import main as cli
from seqloom.errors import ModelError
from seqloom.geometry import Mask
from seqloom.plan import TINY_SHAPES, Plan
from seqloom.verify import Case, Parting, Verdict, verify, verify_here

KEYS = {
    "plan",
    "world_size",
    "dtype",
    "loss_error",
    "gradient_norm_error",
    "worst_gradient_error",
    "worst_parameter",
    "equal",
}
EXTRAS = {
    "steps",
    "tolerance",
    "parameter_error",
    "parameters",
    "num_tokens",
    "mask",
    "parting",
    "dropouts",
    "dropouts_off",
}


def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A real process, as from a shell."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "seqloom.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same inside this process; the exit status."""
    monkeypatch.setattr(sys, "argv", ["seqloom", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_json_of_a_real_run() -> None:
    """Catches keys that scripts read and do not find, text beside the JSON, and a nonzero status of an equal run."""
    done = typed("verify", "--model", "llama", "--plan", "ring=2 layout=striped", "--documents", "6,1,9", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert set(verdict) == KEYS | EXTRAS
    assert verdict["plan"] == "ring=2 layout=striped" and verdict["world_size"] == 2 and verdict["dtype"] == "float64"
    assert verdict["equal"] is True and verdict["num_tokens"] == 16
    assert verdict["mask"] == "causal, 3 documents" and verdict["parting"] is None and verdict["dropouts_off"] == []
    assert 0 <= max(verdict["loss_error"], verdict["gradient_norm_error"], verdict["worst_gradient_error"]) <= 1e-9
    assert verdict["worst_parameter"].startswith(("model.", "lm_head."))


def test_a_run_of_a_configuration_that_drops_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pool: Pool, tmp_path: Path
) -> None:
    """Catches masks or families that work in Python alone, and dropout that is switched off without a word."""
    monkeypatch.setattr("seqloom.verify.verify", lambda case: pool.run(case.plan.world_size, verify_here, case)[0])
    (tmp_path / "config.json").write_text(json.dumps({**TINY_SHAPES["gemma2"], "attention_dropout": 0.1}))
    flags = ["--full", "--window", "12", "--prefix", "3", "--documents", "20,33", "--plan"]
    assert call(monkeypatch, "verify", "--model", str(tmp_path), *flags, "ring=2 exchange=needed layout=balanced") == 0
    first, *_, last = capsys.readouterr().out.rstrip().splitlines()
    assert "53 tokens, full, window 12, prefix 3, 2 documents, float64: equals one device" in first
    assert last == "Dropout was off on both sides; the model has attention_dropout=0.1."
    assert call(monkeypatch, "verify", "--model", str(tmp_path), "--dropout", "0.25", *flags, "tensor=2") == 0
    assert capsys.readouterr().out.endswith("Both sides dropped out alike, with attention_dropout=0.25.\n")


TENSOR = [
    ("llama", "tensor=4"),
    ("qwen3", "tensor=4 sequence_parallel=false"),
    ("llama", "tensor=4 tensor_kind=2d"),
    ("qwen2", "tensor=8 tensor_kind=2.5d depth=2"),
    ("llama", "tensor=8 tensor_kind=3d"),
    ("gpt2", "tensor=2 ring=2 data=2"),
    ("bloom", "tensor=2 ulysses=2"),
]


@pytest.mark.parametrize(("family", "plan"), TENSOR)
def test_tensor_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pool: Pool, family: str, plan: str
) -> None:
    """Catches a plan or a family that works in Python alone, and a built-in shape that does not grow to the grid."""
    monkeypatch.setattr("seqloom.verify.verify", lambda case: pool.run(case.plan.world_size, verify_here, case)[0])
    assert call(monkeypatch, "verify", "--model", family, "--plan", plan, "--json") == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["equal"] is True and verdict["plan"] == str(Plan.parse(plan))
    assert verdict["worst_gradient_error"] < 1e-11


PLACE = Parting(where="activation", module="model.norm", rank=1, row=0, position=7, error=0.5)


def fake(monkeypatch: pytest.MonkeyPatch, error: float) -> list[Case]:
    """Answer every case with a verdict of this error; the cases asked for are noted."""
    asked: list[Case] = []

    def answer(case: Case) -> Verdict:
        asked.append(case)
        return Verdict(
            plan=str(case.plan),
            world_size=case.plan.world_size,
            dtype=case.dtype,
            steps=case.steps,
            tolerance=1e-9,
            loss_error=0.0,
            gradient_norm_error=0.0,
            worst_gradient_error=error,
            worst_parameter="lm_head.weight",
            parameter_error=0.0,
            parting=PLACE if error > 0 else None,
        )

    monkeypatch.setattr("seqloom.verify.verify", answer)
    return asked


@pytest.mark.parametrize("form", [["--json"], []])
@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (1e-3, 1), (float("nan"), 1)])
def test_status_of_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float, status: int, form: list[str]
) -> None:
    """Catches a script that goes on after a run that was not equal."""
    fake(monkeypatch, error)
    assert call(monkeypatch, "verify", "--model", "llama", "--plan", "ring=2", *form) == status
    said = capsys.readouterr().out
    if form:
        values = json.loads(said)
        assert values["equal"] is (status == 0)
        assert values["parting"] is None or (values["parting"]["rank"], values["parting"]["position"]) == (1, 7)
        assert (values["parting"] is None) == (not error > 0)
    else:
        assert ("equals one device" in said, "DIFFERS FROM one device" in said) == (status == 0, status == 1)
        assert said.count("OVER") == status
        assert said.rstrip().endswith(f"{PLACE}") == (error > 0)


def test_options_reach_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option accepted and ignored, and a built-in shape that does not grow to fit the plan."""
    asked = fake(monkeypatch, 0.0)
    options = "--seq-len 96 --heads 6 --kv-heads 3 --layers 3 --batch 2 --documents 60,7,29 --steps 4 --accumulate 5"
    arguments = ["verify", "--model", "qwen3", "--plan", "ring=2 ulysses=3", *options.split(), "--dtype", "bf16"]
    assert call(monkeypatch, *arguments) == 0
    case = asked[0]
    assert (case.num_tokens, case.batch, case.steps, case.accumulate, case.dtype) == (96, 2, 4, 5, "bf16")
    assert case.documents == (60, 7, 29) and str(case.plan) == "ring=2 ulysses=3" and case.weights is None
    config = case.config
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]) == (6, 3, 3)
    assert config["hidden_size"] == 6 * config["head_dim"] and config["max_position_embeddings"] >= 96
    assert case.rule == Mask()
    assert call(monkeypatch, "verify", "--model", "llama", "--plan", "ulysses=8 data=2", "--batch", "3") == 0
    assert asked[1].config["num_attention_heads"] >= 8 and len(asked[1].batches()[0][0].tokens) == 6
    assert call(monkeypatch, "verify", "--model", "llama", "--plan", "ring=5", "--documents", "3, 7,10") == 0
    assert asked[2].num_tokens == 20
    line = "verify --model bloom --plan ring=64 --full --window 5 --prefix 2 --heads 7"
    assert call(monkeypatch, *line.split()) == 0
    assert asked[3].rule == Mask(causal=False, window=5, prefix=2) and asked[3].config["n_head"] == 7
    assert [each.dropout for each in asked] == [None] * 4
    assert call(monkeypatch, "verify", "--model", "gpt2", "--plan", "tensor=3 ring=2", "--dropout", "0.5") == 0
    assert asked[4].dropout == 0.5 and asked[4].config["n_head"] % 3 == 0
    assert asked[3].num_tokens == 128  # the shortest that gives each rank of a zigzag its two chunks


REFUSED = {
    "--model llama --plan ring=2 --seq-len 1": ["A sequence of 1 token is too short", "ring=2"],
    "--model llama --plan ring=x": ["ring=x is not a whole number"],
    "--model llama --plan rnig=2": ["'rnig'", "did you mean 'ring'"],
    "--model lama --plan ring=2": [
        "no model 'lama'",
        "bloom, deepseek_v2, deepseek_v3, gemma2, gemma3_text, gpt2, gpt_oss, llama",
    ],
    "--model llama --plan ulysses=16 --heads 12": ["12", "ulysses=16", "Try"],
    "--model llama --plan ring=2 --window 0": ["window of 0"],
    "--model llama --plan ring=2 --prefix -1": ["prefix of -1"],
    "--model llama --plan ring=3,inner_ring=2": ["inner_ring=2 does not divide ring=3"],
    "--model llama --plan ring=2,exchange=gather,inner_ring=2": ["inner_ring=2", "exchange=ring"],
    "--model bloom --plan ring=2 --kv-heads 2": ["bloom", "key/value head"],
    "--model llama --plan pipeline=2,stages=1-1-2": ["names 3 stages, but the plan has 2"],
    "--model llama --plan tensor=3 --heads 4": ["4 query heads", "tensor=3", "1, 2, 4"],
    "--model llama --plan tensor=6,tensor_kind=2d": ["tensor=6 is no square", "grid=3x2"],
    "--model llama --plan tensor=4,depth=2": ["depth=2 belongs to tensor_kind=2.5d"],
    "--model gpt2 --plan tensor=4,tensor_kind=2d": ["gpt2", "tensor_kind=1d"],
    "--model gpt_oss --plan tensor=2,expert_tensor=2": ["gpt_oss", "use expert_tensor=1"],
    "--model llama --plan ring=2 --dropout 1": ["dropout is 1.0"],
    "--model llama --plan ring=2 --dropout -0.1": ["dropout is -0.1"],
    "--model llama --plan ring=2 --documents 3,x": ["3,x", "60,7,61"],
    "--model llama --plan ring=2 --documents 3,4 --seq-len 8": ["(3, 4) sum to 7", "8 tokens"],
    "--model llama --plan ring=2 --dtype float16": ["float16", "float64, float32, bf16"],
    "--model llama --plan ring=2 --steps 0": ["steps is 0"],
    "--model {folder} --plan ring=2": ["no model"],
    "--model {folder}/broken.json --plan ring=2": ["broken.json", "JSON"],
    "--model {folder}/falcon.json --plan ring=2": ["falcon"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str
) -> None:
    """Catches a traceback, two lines where one does, status 1 (which says that a check ran), or a process started."""
    monkeypatch.setattr("seqloom.fabric.launch.run_local", None)
    monkeypatch.setattr(sys.modules["seqloom.verify.verify"], "run_local", None)
    (tmp_path / "broken.json").write_text("{")
    settings = {"model_type": "falcon", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "falcon.json").write_text(json.dumps(settings))
    arguments = [part.replace("{folder}", str(tmp_path)) for part in line.split()]
    assert call(monkeypatch, "verify", *arguments, "--json") == 2
    out, said = capsys.readouterr()
    assert out == "" and said.startswith("Error: ") and said.count("\n") == 1
    assert said.rstrip().endswith((".", ".)"))
    for part in REFUSED[line]:
        assert part in said, said


def test_a_traceback_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches --debug that shows nothing more, and a traceback without it."""
    arguments = ["verify", "--model", "llama", "--plan", "ring=2", "--seq-len", "1"]
    assert call(monkeypatch, *arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert call(monkeypatch, "--debug", *arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.rstrip().splitlines()[-1].startswith("Error: ")


def test_a_missing_option_is_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches usage errors that look like a verdict."""
    assert call(monkeypatch, "verify", "--model", "llama") == 2
    assert "--plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gemma3_text", {"hidden_size": 24, "num_attention_heads": 5, "num_key_value_heads": 5}, "cannot build"),
        ("bloom", {"hidden_size": 41, "n_head": 5}, "cannot be cut into 5 heads"),
        ("gpt_oss", {"num_experts_per_tok": 9}, "is more than the 4 experts"),
    ],
)
def test_configurations_that_cannot_be_built(family: str, changes: dict[str, object], said: str) -> None:
    """Catches a model that fails in a worker, in another library's words, after processes have started."""
    config = {**TINY_SHAPES[family], **changes}
    with pytest.raises(ModelError, match=said) as caught:
        verify(Case(config=config, plan=Plan(), num_tokens=16))
    assert "\n" not in str(caught.value)
