"""How an argument of Megatron-LM that has no meaning here is refused."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from seqloom.errors import ConfigError


def refuse(function: Callable[..., Any], given: Mapping[str, Any], reasons: Mapping[str, str], name: str = "") -> None:
    """Raise ConfigError for the first argument that differs from its default in `function`.

    given: the arguments, by name. reasons: for each that is not honoured one clause that holds the way out. name: what
    users call the function, where that is not its own name.
    """
    for argument, parameter in signature(function).parameters.items():
        if argument in reasons and given[argument] != parameter.default:
            raise ConfigError(
                f"{argument}={given[argument]!r} of {name or function.__name__} is not honoured here: "
                f"{reasons[argument]}."
            )
