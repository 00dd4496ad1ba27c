"""A YAML file and overrides as a checked configuration, with everything that is wrong said at once."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from seqloom.errors import ConfigError, counted
from seqloom.train.config import Config
from seqloom.train.fields import Section
from seqloom.train.wording import did_you_mean, kind, shown


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, lay overrides such as `train.steps=100` over it, and check the whole.

    The value of an override is read as YAML. Raises ConfigError that says everything wrong at once.
    """
    return checked(_read_yaml(Path(path)), overrides, str(path))


def checked(values: dict[Any, Any], overrides: Sequence[str], title: str) -> Config:
    """The configuration of plain values with overrides laid over them; title: what an error calls them."""
    found = [reason for override in overrides if (reason := _override(values, override))]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found += [_sentence(detail) for detail in error.errors()]
    if found:
        raise ConfigError(f"{title}: " + " Also: ".join(dict.fromkeys(found)))
    return config


def overriding(overrides: Sequence[str]) -> dict[Any, Any]:
    """What overrides alone say, as nested sections; those that cannot be read are left to `checked`."""
    values: dict[Any, Any] = {}
    for override in overrides:
        _override(values, override)
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in YAML 1.2, 010 is not 8, nor 1:30 90, and a key said twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.MarkedYAMLError(problem=f"'{twice[0]}' is said twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _INT]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
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
            f"{path} holds {kind(values)}; a configuration has sections: {', '.join(Config.model_fields)}."
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
            return f"The override '{override}' reaches into {section}, which is {shown(inner)}, not a section."
        place = inner
    place[keys[-1]] = value
    return None


def _sentence(error: ErrorDetails) -> str:
    """One of pydantic's errors as a sentence with the fact, the limit and the way out."""
    place, kind, limits = error["loc"], error["type"], error.get("ctx", {})
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if kind == "value_error":
        return str(limits["error"])
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(".".join(map(str, place)))
    if kind == "missing" and isinstance(place[-1], int):
        return f"{name.rpartition('[')[0]} has {counted(int(place[-1]), 'entry')}, which is too few."
    if kind == "missing":
        return f"{name} is missing; it has no default."
    if kind in ("too_short", "too_long"):
        bound, number = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"{name} has {counted(limits['actual_length'], 'entry')}; it must have {bound} {limits[number]}."
    return f"{name} is {shown(error['input'])}; it must be {_wanted(kind, limits, error['msg'])}."


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


def _unknown(name: str) -> str:
    section, _, key = name.rpartition(".")
    names = list(_names(Config))
    # A key in the wrong section is likelier than a misspelt one.
    moved = [other for other in names if other.rpartition(".")[2] == key]
    if moved:
        return f"{name} is not a setting (did you mean '{moved[0]}'?)."
    siblings = [other.rpartition(".")[2] for other in names if other.rpartition(".")[0] == section]
    guess = did_you_mean(key, siblings, f"{section}." if section else "")
    return f"{name} is not a setting{guess or '; there are ' + ', '.join(siblings)}."


def _names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind_of in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind_of, type) and issubclass(kind_of, Section):
                yield from _names(kind_of, f"{prefix}{name}.")
