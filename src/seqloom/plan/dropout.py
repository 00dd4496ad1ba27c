"""The dropouts of a configuration."""

from collections.abc import Mapping
from typing import Any


def without_dropout(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A Hugging Face configuration with every dropout at 0, and the settings which that changed, as name=value.

    >>> without_dropout({"attention_dropout": 0.1, "resid_pdrop": 0.0, "hidden_size": 8})
    ({'attention_dropout': 0.0, 'resid_pdrop': 0.0, 'hidden_size': 8}, ('attention_dropout=0.1',))
    """
    active = {
        key: value
        for key, value in config.items()
        if ("dropout" in key or key.endswith("pdrop"))
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and value > 0
    }
    return {**config, **dict.fromkeys(active, 0.0)}, tuple(f"{key}={value}" for key, value in active.items())
