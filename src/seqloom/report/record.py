"""What a run folder holds, read and checked: run.json, metrics.jsonl and, once verified, verify.json."""

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError

from seqloom.errors import DataError, SeqloomError, counted
from seqloom.plan import ModelShape, Plan


class _Record(BaseModel):
    """Strict types, so that "4" is not taken for 4; keys a page has no use for are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Text(_Record):
    """The text a run was trained on."""

    files: int
    documents: int
    tokens: int
    sequences: int


class Run(_Record):
    """run.json: the decisions and sizes that hold for the whole run.

    num_tokens: length of one global sequence. batch: global sequences of one micro-batch.
    unigram_entropy: of the text, in nats per token. gradient_checkpointing: of runs
    written before plans said recompute=full, which it stands for.
    """

    plan: str
    world_size: PositiveInt
    model: dict[str, Any]
    num_tokens: PositiveInt
    batch: PositiveInt
    accumulate: PositiveInt
    dtype: Literal["float32", "bfloat16", "bf16", "fp16", "float64"]
    parameters: PositiveInt
    unigram_entropy: float
    steps: PositiveInt
    data: Text
    versions: dict[str, str]
    gradient_checkpointing: bool = False


class Step(_Record):
    """One line of metrics.jsonl. sent_bytes: what rank 0 sent in the step, by mesh axis.

    gradient_norm: infinite where it overflowed, which the file says as null.
    """

    step: PositiveInt
    loss: float
    gradient_norm: Annotated[float, BeforeValidator(lambda norm: inf if norm is None else norm)]
    learning_rate: float
    label_tokens: int
    seconds: float
    tokens_per_second: float
    sent_bytes: dict[str, int]


class ParameterError(_Record):
    """How far one parameter's gradient is from the one-device gradient."""

    name: str
    gradient_error: float


class Verdict(_Record):
    """verify.json: a split run measured against one device."""

    plan: str
    world_size: PositiveInt
    dtype: str
    loss_error: float
    gradient_norm_error: float
    worst_gradient_error: float
    worst_parameter: str
    equal: bool
    parameter_error: float | None = None
    num_tokens: PositiveInt | None = None
    steps: int | None = None
    tolerance: float | None = None
    parameters: tuple[ParameterError, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A run folder's contents, with the plan and the model's shape read from it."""

    path: Path
    run: Run
    plan: Plan
    shape: ModelShape
    steps: tuple[Step, ...]
    verdict: Verdict | None
    verdict_plan: Plan | None


def read_folder(path: Path) -> Folder:
    """Read a run folder.

    A step that stands twice in metrics.jsonl, as after a resume, counts as it was last written.
    Raises DataError where a file is missing or broken; verify.json alone may be missing.
    """
    run_file, metrics_file, verify_file = path / "run.json", path / "metrics.jsonl", path / "verify.json"
    run = _parse(Run, _text(run_file), str(run_file))
    try:
        plan, shape = Plan.parse(run.plan), ModelShape.from_config(run.model)
        plan = replace(plan, recompute="full") if run.gradient_checkpointing else plan
    except SeqloomError as error:
        raise DataError(f"{run_file} does not describe a run: {error}") from error
    if plan.world_size != run.world_size:
        raise DataError(
            f"{run_file} speaks of {counted(run.world_size, 'process')}, but its plan '{plan}' takes "
            f"{plan.world_size}; train again."
        )
    lines = enumerate(_text(metrics_file).splitlines(), start=1)
    steps = [_parse(Step, line, f"{metrics_file} line {number}") for number, line in lines if line.strip()]
    if not steps:
        raise DataError(f"{metrics_file} holds no step; train for at least 1 step before a report.")
    last_written = {step.step: step for step in steps}
    verdict = _parse(Verdict, _text(verify_file), str(verify_file)) if verify_file.exists() else None
    try:
        verdict_plan = Plan.parse(verdict.plan) if verdict else None
    except SeqloomError as error:
        raise DataError(f"{verify_file} does not describe a verified plan: {error}") from error
    ordered = tuple(last_written[number] for number in sorted(last_written))
    return Folder(path, run, plan, shape, ordered, verdict, verdict_plan)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"There is no {path}; training writes it, so give the folder of a run that has trained.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or train again.") from error


R = TypeVar("R", bound=_Record)


def _parse(kind: type[R], text: str, where: str) -> R:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = f"{key}: {first['msg']}" if key else first["msg"]
        raise DataError(f"{where} is broken ({reason}); restore the line or the file, or train again.") from error
