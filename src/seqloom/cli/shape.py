"""The model of a command line: a built-in shape grown to the plan, or a configuration as it is."""

from typing import Any

from seqloom.errors import ModelError
from seqloom.plan import TINY_SHAPES, Plan, fit, read_config


def model_settings(
    source: str, plan: Plan, num_tokens: int, heads: int | None, kv_heads: int | None, layers: int | None
) -> dict[str, Any]:
    """The Hugging Face configuration of `--model`, with `--heads`, `--kv-heads` and `--layers` laid over it."""
    config = read_config(source)
    if source in TINY_SHAPES:
        return fit(config, plan, num_tokens, heads=heads, kv_heads=kv_heads, layers=layers)
    if (heads, kv_heads, layers) != (None, None, None):
        raise ModelError(
            f"--heads, --kv-heads and --layers shape the built-in models ({', '.join(TINY_SHAPES)}); "
            f"'{source}' has its own: edit its config.json."
        )
    return config
