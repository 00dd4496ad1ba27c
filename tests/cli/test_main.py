"""The command line: what it offers, and what it says when it is used wrongly."""

import json
from pathlib import Path

import click
import pytest
import typer

from cli.conftest import Cli, refused
from report.conftest import write_run
from seqloom.cli.main import app
from train.runs import contents, started, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, steps=2)


def commands() -> dict[str, click.Command]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    return dict(group.commands)


FLAGS = {
    "": "--debug --version",
    "train": "config overrides --resume --from --scale --world --dialect-version --keep-rank-order",
    "export": "source out --best",
    "verify": "--plan --model --seq-len --heads --kv-heads --layers --batch --documents --full --window --prefix "
    "--steps --accumulate --dtype --dropout --json",
    "plan": "--check --model --seq-len --world --heads --kv-heads --layers --documents --full --window --prefix "
    "--list --table",
    "report": "folder",
    "translate": "dialect settings --world --dialect-version --keep-rank-order --json",
}


def test_every_flag() -> None:
    """Catches a flag that is renamed or dropped, or comes in without a test: a change here is a change of the face
    that scripts rely on."""
    found = {"": typer.main.get_command(app), **commands()}
    said = {
        name: " ".join("/".join([*p.opts, *p.secondary_opts]) for p in command.params if "--help" not in p.opts)
        for name, command in found.items()
    }
    assert said == FLAGS


@pytest.mark.parametrize("command", [*FLAGS])
def test_help(cli: Cli, command: str) -> None:
    """Catches a command whose help fails, or an option without a word on what it does."""
    code, out, err = cli(*command.split(), "--help")
    assert (code, err) == (0, "")
    for flag in FLAGS[command].split():
        assert flag in out.lower()
    if command:
        for parameter in commands()[command].params:
            assert getattr(parameter, "help", None), parameter.name


def test_version(cli: Cli) -> None:
    """Catches a version that is not the package's."""
    import seqloom

    assert cli("--version") == (0, f"seqloom {seqloom.__version__}\n", "")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lerning_rate=1", "train.lerning_rate is not a setting (did you mean 'train.learning_rate'?)."),
        ("optimizer.lr=1", "optimizer is not a setting; there are plan, model, data, train, eval, run, curriculum."),
        ("train.steps=ten", "train.steps is 'ten' (a string); it must be a whole number."),
        ("train.steps=0", "train.steps is 0; it must be at least 1."),
        ("plan=ring=two", "ring=two is not a whole number from 1 to 65,536."),
        ("plan=rong=2", "A plan has no field 'rong' (did you mean 'ring'?)"),
        ("train.steps", "The override 'train.steps' is not of the form section.key=value."),
        ("model.path=lama", "There is no model 'lama'"),
        ("data.files=[nowhere.txt]", "No file matches 'nowhere.txt' of data.files"),
        ("data.tokenizer=nowhere", "data.tokenizer is 'nowhere', and there is no such folder"),
        (
            "data.sequence_length=4096",
            "longer than the model's 256 positions; use at most so many",
        ),
        ("plan=ulysses=5", "ulysses=5 is more than the model's 4 query heads, and each rank takes at least one; "),
        ("plan=data=4", "leaves 2 sequences for data=4, which must divide them"),
    ],
)
def test_train_refuses(cli: Cli, config: Path, override: str, says: str) -> None:
    """Catches bad input that is found late, ignored, or told as a traceback; and files written before it was found."""
    before = contents(config.parent)
    assert says in refused(cli("train", str(config), override))
    assert contents(config.parent) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: [1, 2", "config.yaml is not readable as YAML: "),
        ("just words", "config.yaml holds a string; a configuration has sections: plan, model, data, "),
        ("", "config.yaml holds nothing; "),
        ("train: {steps: 1}\nplan: ring=2\n", "model is missing; it has no default. Also: data is missing"),
    ],
)
def test_train_refuses_file(cli: Cli, tmp_path: Path, text: str, says: str) -> None:
    """Catches a file that is no configuration and ends in an error of the YAML reader."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert says in refused(cli("train", str(path)))


def test_train_without_its_file(cli: Cli, tmp_path: Path) -> None:
    """Catches a bare FileNotFoundError."""
    path = tmp_path / "nothing.yaml"
    assert refused(cli("train", str(path))) == f"There is no file {path}; give the path of a YAML configuration."


def test_train_in_a_folder_that_holds_a_run(cli: Cli, config: Path) -> None:
    """Catches a second run over the first, and a broken checkpoint that is overwritten instead of told."""
    checkpoint = config.parent / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    before = contents(config.parent)
    assert "holds a run already (checkpoints); go on with it by --resume" in refused(cli("train", str(config)))
    said = refused(cli("train", str(config), "--resume"))
    assert said.startswith(f"{checkpoint} is not a whole checkpoint: progress.json is missing or broken; ")
    assert contents(config.parent) == before


def test_train_on_empty_text(cli: Cli, config: Path) -> None:
    """Catches a worker's error shown once a rank, with its traceback, or something left in the run's folder."""
    (config.parent / "text.txt").write_text("\n")
    code, out, err = cli("train", str(config))
    assert (code, out.count("\n")) == (2, 1)  # the line that says what is going on
    assert "There is no text to train on" in refused((code, "", err))
    assert [path.name for path in (config.parent / "run").iterdir()] == ["lock"]


def test_debug(cli: Cli, config: Path) -> None:
    """Catches --debug that shows nothing more, is known in one place of the command line only, or is always on."""
    for arguments in (("--debug", "train", str(config), "x=1"), ("train", str(config), "x=1", "--debug")):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "")
        assert "Traceback" in err and "in load_config" in err
        assert err.splitlines()[-1].startswith("Error: ")


VERIFY = ("verify", "--model", "llama")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--plan", "ring=2", "--documents", "60,x"),
            "--documents '60,x' is not a list of lengths of 1 or more; write them as",
        ),
        (("--plan", "ring=2", "--documents", ""), "--documents '' is not a list of lengths"),
        (("--plan", "ring=2", "--documents", "60,0,4"), "--documents '60,0,4' is not a list of lengths"),
        (
            ("--plan", "ring=2", "--documents", "60,8", "--seq-len", "64"),
            "(60, 8) sum to 68; they must be positive and sum to the 64 tokens",
        ),
        (
            ("--plan", "ring=3", "--documents", "3,2"),
            "A sequence of 5 tokens is too short for ring=3 ulysses=1 layout=zigzag",
        ),
        (("--plan", "ring=0"), "ring=0 is not a whole number from 1"),
        (
            ("--plan", "ulysses=8", "--heads", "6", "--kv-heads", "2"),
            "ulysses=8 is more than the model's 6 query heads",
        ),
        (
            ("--plan", "tensor=3", "--heads", "4"),
            "4 query heads cannot be split evenly over tensor=3; use a degree that ",
        ),
        (("--plan", "tensor=6 tensor_kind=2d"), "tensor=6 is no square, as tensor_kind=2d takes without a grid; "),
        (("--plan", "tensor=6 tensor_kind=2d grid=2x2"), "grid=2x2 has 4 ranks, but tensor=6; use tensor=4 or another"),
        (
            ("--plan", "tensor=4 depth=2"),
            "depth=2 belongs to tensor_kind=2.5d, not 1d; leave it out or use tensor_kind",
        ),
        (("--plan", "tensor=4 tensor_kind=5d"), "tensor_kind=5d is unknown; it is one of 1d, 2d, 2.5d, 3d."),
        (
            ("--plan", "tensor=4 tensor_kind=2d sequence_parallel=false"),
            "sequence_parallel=false is possible with tensor_kind=1d only; 2d splits tokens always.",
        ),
        (
            ("--plan", "tensor=4 tensor_kind=2d tensor_overlap=ring"),
            "tensor_overlap=ring cuts the gathers of tensor_kind=1d, not of 2d; leave it out or use 1d.",
        ),
        (
            ("--plan", "tensor=8", "--seq-len", "7"),
            "A sequence of 7 tokens is too short for ring=1 ulysses=1 tensor=8 layout=zigzag",
        ),
        (("--plan", "ring=2", "--dtype", "float8"), "dtype 'float8' is unknown; it is one of float64, float32, bf16."),
        (("--plan", "ring=2", "--steps", "0"), "steps is 0; it must be at least 1."),
        (("--plan", "ring=2", "--batch", "0"), "batch is 0; it must be at least 1."),
        (("--plan", "ring=2", "--accumulate", "-1"), "accumulate is -1; it must be at least 1."),
        (("--plan", "ring=2", "--layers", "0"), "num_hidden_layers is 0, not a whole number above 0."),
    ],
)
def test_verify_refuses(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    """Catches a case that starts processes and fails there, or is bent into another one without a word."""
    assert says in refused(cli(*VERIFY, *arguments))


def test_unknown_model(cli: Cli) -> None:
    """Catches a bare error where a name is misspelt, or options ignored for a model that has its own shape."""
    for command in (("verify", "--plan", "ring=2"), ("plan", "--check", "ring=2", "--seq-len", "64")):
        assert refused(cli(*command, "--model", "lama")).startswith("There is no model 'lama': give one of ")


def test_options_of_built_in_models(cli: Cli, tmp_path: Path) -> None:
    """Catches --heads accepted and ignored beside a configuration that has its own."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama"}))
    said = refused(cli("plan", "--check", "ring=2", "--seq-len", "64", "--model", str(path), "--heads", "8"))
    assert said.startswith("--heads, --kv-heads and --layers shape the built-in models (") and str(path) in said


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


def test_verify_json() -> None:
    """Catches a word on stdout that is not JSON, a key that scripts rely on, and a status that is not the verdict."""
    arguments = ("--plan", "ring=2", "--seq-len", "32", "--documents", "20,12", "--json")
    with started("seqloom.cli.main", *VERIFY, *arguments) as process:
        out, err = process.communicate(timeout=120)
    verdict = json.loads(out)
    assert (process.returncode, err) == (0, "")
    assert verdict.keys() >= KEYS
    assert (verdict["plan"], verdict["world_size"], verdict["dtype"], verdict["equal"]) == (
        "ring=2",
        2,
        "float64",
        True,
    )
    assert 0 <= verdict["worst_gradient_error"] <= 1e-9 and verdict["worst_parameter"]


@pytest.mark.parametrize(
    "arguments",
    [("train",), ("verify",), ("fly",), ("plan", "--check", "ring=2"), (*VERIFY, "--plan", "ring=2", "--lr")],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    """Catches a missing or unknown argument that is passed over."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "") and "Error: " in err and "Traceback" not in err


def test_report_of_nothing(cli: Cli, tmp_path: Path) -> None:
    """Catches a page about no run."""
    assert str(tmp_path) in refused(cli("report", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verified", "says"), [(True, "'ring=2 ulysses=2' equals one device in"), (False, "not verified yet")]
)
def test_report_says_the_verdict(cli: Cli, tmp_path: Path, verified: bool, says: str) -> None:
    """Catches a page whose verdict is known only to those who open it, or a verdict without verification."""
    folder = write_run(tmp_path / "run", verified=verified)
    code, out, err = cli("report", str(folder))
    assert (code, err) == (0, "") and says in out and (folder / "report.html").is_file()
