"""The dropouts of a configuration."""

from collections.abc import Mapping
from typing import Any

_DEFAULTS: dict[str, dict[str, float]] = {"gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}}
"""The dropouts that a family has where its configuration does not name them; in the others they are 0."""

_OTHER_HEADS = ("summary_first_dropout", "classifier_dropout")
"""Dropouts of heads that a language model does not have."""


def without_dropout(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A Hugging Face configuration with every dropout at 0, and the settings which that changed, as name=value.

    Those that the family has by default are turned off by name, too.

    >>> without_dropout({"attention_dropout": 0.1, "resid_pdrop": 0.0, "hidden_size": 8})
    ({'attention_dropout': 0.0, 'resid_pdrop': 0.0, 'hidden_size': 8}, ('attention_dropout=0.1',))
    >>> without_dropout({"model_type": "gpt2", "attn_pdrop": 0.0, "embd_pdrop": 0.2})[1]
    ('embd_pdrop=0.2', 'resid_pdrop=0.1')
    """
    settings = {
        **config,
        **{k: v for k, v in _DEFAULTS.get(str(config.get("model_type")), {}).items() if k not in config},
    }
    active = {
        key: value
        for key, value in settings.items()
        if ("dropout" in key or key.endswith("pdrop"))
        and key not in _OTHER_HEADS
        and isinstance(value, float | int)
        and not isinstance(value, bool)
        and value > 0
    }
    return {**config, **dict.fromkeys(active, 0.0)}, tuple(f"{key}={value}" for key, value in active.items())
