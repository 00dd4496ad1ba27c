"""What the other systems take of a schedule where their settings do not say it."""

from typing import Any

UNSAID: dict[str, dict[str, Any]] = {
    "colossalai": {"clip": 0.0},  # of the plugin; the rest a program makes itself, and it is not read
    "megatron": {
        "decay": "linear",
        "final_learning_rate": 0.0,
        "weight_decay": 0.01,
        "clip": 1.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "seed": 1234,
    },
    "mindformers": {
        "final_learning_rate": 0.0,
        "weight_decay": 0.0,
        "clipped": False,
        "clip": 1.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
    },
}
"""By dialect, under the names of `train.schedule`: the defaults of Megatron-LM's arguments, and those of MindFormers'
AdamW, schedules and training cell."""
