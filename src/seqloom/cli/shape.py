"""The model of a command line: a built-in shape grown to the plan, or a configuration as it is."""

from typing import Any

from seqloom.errors import ConfigError, ModelError
from seqloom.plan import ALIASES, TINY_SHAPES, Plan, fit, fit_world, read_config


def model_settings(
    source: str, plan: Plan | int, num_tokens: int, heads: int | None, kv_heads: int | None, layers: int | None
) -> dict[str, Any]:
    """The Hugging Face configuration of `--model`, with `--heads`, `--kv-heads` and `--layers` laid over it.

    plan: what a built-in shape grows to; a number stands for every plan of so many processes.
    """
    config = read_config(source)
    if ALIASES.get(source, source) in TINY_SHAPES:
        if isinstance(plan, int):
            return fit_world(config, plan, num_tokens, heads=heads, kv_heads=kv_heads, layers=layers)
        return fit(config, plan, num_tokens, heads=heads, kv_heads=kv_heads, layers=layers)
    if (heads, kv_heads, layers) != (None, None, None):
        raise ModelError(
            f"--heads, --kv-heads and --layers shape the built-in models ({', '.join(TINY_SHAPES)}); "
            f"'{source}' has its own: edit its config.json."
        )
    return config


def document_lengths(documents: str | None) -> tuple[int, ...] | None:
    """The lengths of `--documents`, such as 60,7,61; None where it is left out."""
    if documents is None:
        return None
    parts = documents.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--documents '{documents}' is not a list of lengths of 1 or more; write them as 60,7,61.")
    return tuple(map(int, parts))
