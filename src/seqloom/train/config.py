"""The settings of a training run: a YAML file and overrides, checked whole before anything starts."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator
from pydantic_core import ErrorDetails

from seqloom.errors import ConfigError, ModelError, PlanError
from seqloom.plan import ModelShape, Plan, read_config

Precision = Literal["float32", "bf16"]


def _read_plan(value: object) -> Plan:
    if isinstance(value, Plan):
        return value
    if not isinstance(value, str):
        raise ValueError(f"plan is {_shown(value)}; it must be a string such as 'ring=2 ulysses=2'.")
    try:
        return Plan.parse(value)
    except PlanError as error:
        raise ValueError(str(error)) from error


PlanText = Annotated[Plan, PlainValidator(_read_plan), PlainSerializer(str, return_type=str)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class _Section(BaseModel):
    """Frozen; unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(_Section):
    """Which model is trained; `path`, `config` or both.

    path: a folder that holds config.json (and weights, if training goes on from some), a JSON
        file, or the name of a built-in tiny shape. Relative to the working directory.
    config: Hugging Face configuration keys, each replacing the one of `path`.
    """

    path: Annotated[str, Field(min_length=1)] | None = None
    config: dict[str, Any] = {}

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


class DataConfig(_Section):
    """What text is read, and how it becomes sequences.

    files: globs (`**` reaches into folders, `~` is the home folder, `{stdlib}` the folder of this
        Python's standard library). A .jsonl file holds a document a line, any other file is one.
    text_key: the key of a .jsonl line that holds the text.
    tokenizer: `bytes`, or the folder of a Hugging Face tokenizer.
    sequence_length: tokens of one training sequence.
    seed: decides the order in which sequences are visited; nothing else does.
    """

    files: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)]
    text_key: str = "text"
    tokenizer: str = "bytes"
    sequence_length: Count = 4096
    seed: Seed = 0

    @model_validator(mode="after")
    def _tokenizer_exists(self) -> "DataConfig":
        if self.tokenizer != "bytes" and not Path(self.tokenizer).is_dir():
            raise ValueError(
                f"data.tokenizer is '{self.tokenizer}', and there is no such folder; "
                "give 'bytes' or the folder of a Hugging Face tokenizer."
            )
        return self


class TrainConfig(_Section):
    """How the weights are changed.

    steps: optimizer steps of the whole run.
    batch: sequences of one optimizer step, over all processes.
    accumulate: micro-batches a batch is cut into, one after another.
    learning_rate: of AdamW, at its highest.
    warmup_steps: steps over which the rate rises linearly from 0.
    final_learning_rate_share: what the cosine falls to at the last step, as a share of `learning_rate`.
    weight_decay: of AdamW, decoupled; applied to matrices only.
    betas: decay of AdamW's first and second moments.
    clip: the largest global gradient norm; null is no limit.
    precision: `float32`, or `bf16` for the arithmetic of the model.
    seed: of the first weights.
    loss_chunk: tokens whose logits exist at the same time.
    gradient_checkpointing: recompute each layer's activations in backward to save memory.
    """

    steps: Count
    batch: Count = 1
    accumulate: Count = 1
    learning_rate: Rate = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    clip: Amount | None = 1.0
    precision: Precision = "float32"
    seed: Seed = 0
    loss_chunk: Count = 1024
    gradient_checkpointing: bool = False

    @property
    def micro_batch(self) -> int:
        """Sequences of one micro-batch, over all processes."""
        return self.batch // self.accumulate

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        found = []
        if self.batch % self.accumulate:
            found.append(
                f"train.batch is {self.batch}, which train.accumulate={self.accumulate} does not divide; "
                f"make it a multiple, such as {-(-self.batch // self.accumulate) * self.accumulate}."
            )
        if self.warmup_steps > self.steps:
            found.append(
                f"train.warmup_steps is {self.warmup_steps}, more than train.steps={self.steps}; "
                f"make it at most {self.steps}."
            )
        if found:
            raise ValueError(" Also: ".join(found))
        return self


class RunConfig(_Section):
    """Where a run writes, and how long it waits.

    folder: takes metrics and checkpoints. Relative to the working directory.
    save_every: optimizer steps between checkpoints; null saves at the end only.
    keep: newest checkpoints that are kept.
    timeout_seconds: the longest a process waits for another before the run ends.
    """

    folder: Annotated[Path, Field(strict=False)] = Path("runs/train")
    save_every: Count | None = None
    keep: Count = 2
    timeout_seconds: Seconds = 300.0


class Config(_Section):
    """Everything a training run is told.

    plan: how it is split over processes, as `Plan` prints; nothing said is one process.
    """

    plan: PlanText = Plan()
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run: RunConfig = RunConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay overrides such as `train.steps=100` over it, and check the whole.

    The value of an override is read as YAML. Raises ConfigError that says everything wrong at once.
    """
    values = _read_yaml(Path(path))
    found = [reason for override in overrides if (reason := _override(values, override))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found += [_sentence(detail) for detail in error.errors()]
    if found:
        raise ConfigError(f"{path}: " + " Also: ".join(dict.fromkeys(found)))
    return config


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in YAML 1.2, and a key said twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.MarkedYAMLError(problem=f"'{twice[0]}' is said twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
# PyYAML calls 3e-4 and 1.5e3 strings: it wants a point and a signed exponent.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


# A date such as 2024-99-99 is a ValueError to PyYAML, and very deep nesting a RecursionError.
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}; give the path of a YAML configuration.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}); give the path of a YAML configuration.") from error
    try:
        values = yaml.load(text, _Loader)
    except _UNREADABLE as error:
        raise ConfigError(f"{path} is not readable as YAML: {_yaml_problem(error)}.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds {_kind(values)}; a configuration has sections: {', '.join(Config.model_fields)}."
        )
    return values


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem or error.context} at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split())


def _override(values: dict[Any, Any], override: str) -> str | None:
    """Lay one `section.key=value` over the values, or say why it cannot be."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        return f"The override '{override}' is not of the form section.key=value."
    try:
        value = yaml.load(text, _Loader)
    except _UNREADABLE as error:
        return f"The value in the override '{override}' is not readable as YAML ({_yaml_problem(error)}); quote it."
    place = values
    for depth, key in enumerate(keys[:-1], start=1):
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            section = ".".join(keys[:depth])
            return f"The override '{override}' reaches into {section}, which is {_shown(inner)}, not a section."
        place = inner
    place[keys[-1]] = value
    return None


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
            guess = _did_you_mean(key, known, "model.config.")
            yield f"model.config.{key} is not a setting of {family.model_type}{guess}."
    try:
        family(**settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        yield f"transformers refuses the model configuration ({' '.join(str(error).split())})."


def _sentence(error: ErrorDetails) -> str:
    """One of pydantic's errors as a sentence with the fact, the limit and the way out."""
    place, kind, limits = error["loc"], error["type"], error.get("ctx", {})
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if kind == "value_error":
        return str(limits["error"])
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(".".join(map(str, place)))
    if kind == "missing" and isinstance(place[-1], int):
        return f"{name.rpartition('[')[0]} has {place[-1]} entries, which is too few."
    if kind == "missing":
        return f"{name} is missing; it has no default."
    if kind in ("too_short", "too_long"):
        bound, number = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"{name} has {limits['actual_length']} entries; it must have {bound} {limits[number]}."
    return f"{name} is {_shown(error['input'])}; it must be {_wanted(kind, limits, error['msg'])}."


def _wanted(kind: str, limits: Mapping[str, Any], message: str) -> str:
    bounds = {
        "greater_than": "above",
        "greater_than_equal": "at least",
        "less_than": "below",
        "less_than_equal": "at most",
    }
    if kind in bounds:
        return f"{bounds[kind]} {next(iter(limits.values())):g}"
    if kind == "literal_error":
        return f"{limits['expected']}"
    return _WANTED.get(kind, message)


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "path_type": "the path of a folder",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
}


def _kind(value: object) -> str:
    """What YAML calls the type of a value, with its article."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a section",
    }
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """A value as its author wrote it, with its type where that is not plain to see."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({_kind(value)})" if isinstance(value, (str, list, dict)) else text


def _unknown(name: str) -> str:
    section, _, key = name.rpartition(".")
    names = list(_names(Config))
    # A key in the wrong section is likelier than a misspelt one.
    moved = [other for other in names if other.rpartition(".")[2] == key]
    if moved:
        return f"{name} is not a setting (did you mean '{moved[0]}'?)."
    siblings = [other.rpartition(".")[2] for other in names if other.rpartition(".")[0] == section]
    guess = _did_you_mean(key, siblings, f"{section}." if section else "")
    return f"{name} is not a setting{guess or '; there are ' + ', '.join(siblings)}."


def _names(section: type[_Section], prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _did_you_mean(name: str, known: Iterable[str], prefix: str) -> str:
    close = get_close_matches(name, known, 1)
    return f" (did you mean '{prefix}{close[0]}'?)" if close else ""
