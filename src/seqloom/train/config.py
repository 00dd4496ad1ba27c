"""The settings of a training run, checked whole before anything starts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from seqloom.errors import ModelError
from seqloom.plan import ModelShape, Plan, read_config
from seqloom.train.fields import Count, Globs, PlanText, Seconds, Section, Seed
from seqloom.train.method import TrainConfig
from seqloom.train.wording import did_you_mean


class ModelConfig(Section):
    """Which model is trained; `path`, `config` or both.

    path: a folder that holds config.json (and weights, if training goes on from some), a JSON
        file, or the name of a built-in tiny shape. Relative to the working directory.
    config: Hugging Face configuration keys, each replacing the one of `path`.
    """

    path: Annotated[str, Field(min_length=1)] | None = None
    config: dict[str, Any] = Field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The Hugging Face configuration asked for: that of `path` with `config` laid over it."""
        return (read_config(self.path) if self.path is not None else {}) | self.config

    @model_validator(mode="after")
    def _complete(self) -> "ModelConfig":
        if self.path is None and not self.config:
            raise ValueError("model is empty; give model.path, model.config or both.")
        try:
            settings = self.settings()
        except ModelError as error:
            raise ValueError(f"model.path: {error}") from error
        found = list(_family_reasons(self.config, settings)) if self.config else []
        try:
            ModelShape.from_config(settings)
        except ModelError as error:
            found.append(str(error))
        if found:
            raise ValueError(" Also: ".join(found))
        return self


def _one_source(section: str, files: tuple[str, ...], dataset: str | None, split: str | None) -> None:
    if bool(files) == (dataset is not None):
        raise ValueError(
            f"{section}.files and {section}.dataset are {'both given' if files else 'both missing'}; "
            "name the text by one of them."
        )
    if split is not None and dataset is None:
        raise ValueError(
            f"{section}.split is '{split}', but only {section}.dataset has splits, not files; leave it out."
        )


class DataConfig(Section):
    """What text is read, and how it becomes sequences.

    files: globs (`**` reaches into folders, `~` is the home folder, `{stdlib}` the folder of this
        Python's standard library). A .jsonl file holds a document a line, a .parquet or .arrow file one a row,
        any other file is one.
    dataset: in place of `files`, a folder that the library datasets wrote by save_to_disk, or a name on the hub.
    split: of that dataset, where it has several; none said is train.
    text_key: the key of a .jsonl line, or the column of a table, that holds the text.
    tokenizer: `bytes`, or the folder of a Hugging Face tokenizer.
    sequence_length: tokens of one training sequence.
    seed: decides the order in which sequences are visited; nothing else does.
    """

    files: Globs = ()
    dataset: Annotated[str, Field(min_length=1)] | None = None
    split: str | None = None
    text_key: str = "text"
    tokenizer: str = "bytes"
    sequence_length: Count = 4096
    seed: Seed = 0

    @model_validator(mode="after")
    def _tokenizer_exists(self) -> "DataConfig":
        _one_source("data", self.files, self.dataset, self.split)
        if self.tokenizer != "bytes" and not Path(self.tokenizer).is_dir():
            raise ValueError(
                f"data.tokenizer is '{self.tokenizer}', and there is no such folder; "
                "give 'bytes' or the folder of a Hugging Face tokenizer."
            )
        return self


class EvalConfig(Section):
    """What text the loss is measured on beside training, and when.

    files: globs as those of `data`, whose other settings hold here too.
    dataset: in place of `files`, as that of `data`.
    split: of that dataset; none said is test.
    every: optimizer steps between evaluations; the last step is always followed by one.
    sequences: how many of the text's sequences are taken, from its start; null is all.
    """

    files: Globs = ()
    dataset: Annotated[str, Field(min_length=1)] | None = None
    split: str | None = None
    every: Count | None = None
    sequences: Count | None = None

    def as_data(self, data: DataConfig) -> DataConfig:
        """The held-out text as `load_text` takes it."""
        return data.model_copy(update={"files": self.files, "dataset": self.dataset, "split": self.split or "test"})

    @model_validator(mode="after")
    def _has_text(self) -> "EvalConfig":
        _one_source("eval", self.files, self.dataset, self.split)
        return self


def _expanded(folder: Path) -> Path:
    return Path(expanduser(folder))


class RunConfig(Section):
    """Where a run writes, and how long it waits.

    folder: takes metrics and checkpoints. Relative to the working directory; `~` is the home folder.
    save_every: optimizer steps between checkpoints; null saves at the end only.
    save_async: whether checkpoints are written while training goes on, of copies in host memory.
    keep: newest checkpoints that are kept, beside the best one.
    timeout_seconds: the longest a process waits for another before the run ends.
    """

    folder: Annotated[Path, Field(strict=False), AfterValidator(_expanded)] = Path("runs/train")
    save_every: Count | None = None
    save_async: bool = False
    keep: Count = 2
    timeout_seconds: Seconds = 300.0


class Phase(Section):
    """A part of a curriculum: what is not said is the run's.

    until_step: the step at whose end the phase is over.
    plan: of the phase, in place of the run's.
    sequence_length: in place of `data.sequence_length`; each phase reads the text from its beginning, cut anew.
    batch: in place of `train.batch`.
    accumulate: in place of `train.accumulate`.
    micro_batch: in place of `train.micro_batch`; where neither of the two is said, the one that `train` says stays.
    """

    until_step: Count
    plan: PlanText | None = None
    sequence_length: Count | None = None
    batch: Count | None = None
    accumulate: Count | None = None
    micro_batch: Count | None = None

    def sizes(self, train: TrainConfig) -> dict[str, int]:
        """`batch`, `accumulate` and `micro_batch` of the phase; raises ValueError where they do not multiply."""
        batch = self.batch or train.batch
        if self.micro_batch or (self.accumulate is None and train.says_micro_batch):
            size = self.micro_batch or train.micro_batch
            parts, said = self.accumulate or max(1, batch // size), f"micro_batch={size}"
        else:
            parts = self.accumulate or train.accumulate
            size, said = max(1, batch // parts), f"accumulate={parts}"
        if parts * size != batch:
            both = f" times accumulate={parts} is not" if self.accumulate and self.micro_batch else " does not divide"
            raise ValueError(f"curriculum has a phase of batch={batch}, which {said}{both}; give the phase its own.")
        return {"batch": batch, "accumulate": parts, "micro_batch": size}


class Config(Section):
    """Everything a training run is told.

    plan: how it is split over processes, as `Plan` prints; nothing said is one process. With
        train.gradient_checkpointing it has recompute=full.
    curriculum: phases of the run, one after the other; the last ends at train.steps.
    """

    plan: PlanText = Plan()
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig | None = None
    run: RunConfig = RunConfig()
    curriculum: Annotated[tuple[Phase, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _phases_fit(self) -> "Config":
        if not self.curriculum:
            return self
        ends, train = [phase.until_step for phase in self.curriculum], self.train
        if ends != sorted(set(ends)) or ends[-1] != train.steps:
            raise ValueError(
                f"curriculum has phases until the steps {', '.join(map(str, ends))}; they must rise and end at "
                f"train.steps={train.steps}."
            )
        if train.rampup is not None or train.by_samples:
            raise ValueError(
                "curriculum sets each phase's batch, beside which train.rampup and schedules by samples are not "
                "supported; leave them out."
            )
        for phase in self.curriculum:
            phase.sizes(train)
        return self

    @model_validator(mode="after")
    def _recomputing(self) -> "Config":
        if self.train.gradient_checkpointing:
            phases = tuple(
                phase.model_copy(update={"plan": phase.plan and _recomputed(phase.plan)}) for phase in self.curriculum
            )
            for name, value in (("plan", _recomputed(self.plan)), ("curriculum", phases)):
                object.__setattr__(self, name, value)  # pydantic's way past `frozen`
        return self


def _recomputed(plan: Plan) -> Plan:
    """The plan as train.gradient_checkpointing has it."""
    if plan.recompute not in ("none", "full"):
        raise ValueError(
            "train.gradient_checkpointing is true, which is the older word for recompute=full, but the plan "
            f"'{plan}' has recompute={plan.recompute}; leave train.gradient_checkpointing out."
        )
    return replace(plan, recompute="full")


def _family_reasons(given: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Keys that the model family would carry along and never read, and values it refuses.

    A family that transformers does not know is left to the legality of plans.
    """
    # These take seconds to load, and only inline keys need them.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if settings.get("model_type") not in CONFIG_MAPPING:
        return
    family = CONFIG_MAPPING[settings["model_type"]]
    # head_dim is read by every family here, declared or not; the rope keys are the older spelling of rope_parameters.
    known = {*family().to_dict(), *family.attribute_map, "head_dim", "rope_theta", "rope_scaling"}
    for key in given:
        if key in ("dtype", "torch_dtype"):
            yield f"model.config.{key} has no effect, since weights are float32; set train.precision to bf16 instead."
        elif key not in known:
            guess = did_you_mean(key, known, "model.config.")
            yield f"model.config.{key} is not a setting of {family.model_type}{guess}."
    try:
        family(**settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        yield f"transformers refuses the model configuration ({' '.join(str(error).split())})."
