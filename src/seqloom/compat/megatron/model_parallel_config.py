"""The settings that Megatron-LM's linears are handed as `config`."""

from dataclasses import dataclass
from typing import Any

import torch

from seqloom.errors import ConfigError

REFUSED = {
    "gradient_accumulation_fusion": "autograd adds gradients to weight.grad, and there is no main_grad; leave it out",
    "defer_embedding_wgrad_compute": "each weight's gradient is computed in its own backward; leave it out",
    "cpu_offloading": "these linears keep their inputs where they are; use Plan(activations='offloaded')",
    "tp_comm_overlap": "the input's gradient always travels while the weight's is computed; leave it out",
}
"""Settings that would change how a linear works, each with why it is not honoured and the way out."""


DEGREES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
"""Settings that `initialize_model_parallel` decides; a config may repeat them."""


@dataclass(init=False)
class ModelParallelConfig:
    """What the linears read of Megatron-LM's class of this name; its other settings are refused by name.

    tensor_model_parallel_size and the other degrees: those of the groups, or 1 where they are not said.
    sequence_parallel: whether tokens between the linears are split over the tensor group. params_dtype: of
    parameters. perform_initialization: whether the init_method is called and biases are zeroed.
    use_cpu_initialization: whether parameters stay in host memory; the whole weight is drawn there either way, and
    cut, so that it depends on no degree. An object of Megatron-LM's own class will do in its place.
    """

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    sequence_parallel: bool
    params_dtype: torch.dtype
    perform_initialization: bool
    use_cpu_initialization: bool

    def __init__(
        self,
        *,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        context_parallel_size: int = 1,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        perform_initialization: bool = True,
        use_cpu_initialization: bool = False,
        **other: Any,
    ) -> None:
        """Take the settings. Raises ConfigError for one that is not among them."""
        self.tensor_model_parallel_size = tensor_model_parallel_size
        self.pipeline_model_parallel_size = pipeline_model_parallel_size
        self.context_parallel_size = context_parallel_size
        self.sequence_parallel = sequence_parallel
        self.params_dtype = params_dtype
        self.perform_initialization = perform_initialization
        self.use_cpu_initialization = use_cpu_initialization
        for name, value in other.items():
            if name not in REFUSED:
                raise ConfigError(
                    f"{name}={value!r} of ModelParallelConfig is not honoured here: these linears do not read it; "
                    "leave it out."
                )
            setattr(self, name, value)
        check(self)


def check(config: Any, sizes: tuple[int, int, int] | None = None) -> None:
    """Raise ConfigError for a setting, of Megatron-LM's class or of ours, that would change how a linear works.

    sizes: of the tensor, pipeline and context groups there are, where they are known.
    """
    for name, reason in REFUSED.items():
        if getattr(config, name, False):
            raise ConfigError(f"{name}=True of ModelParallelConfig is not honoured here: {reason}.")
    for name, size in zip(DEGREES, sizes or (), strict=False):
        if getattr(config, name, 1) not in (1, size):
            raise ConfigError(
                f"{name}={getattr(config, name)} of ModelParallelConfig is not the degree that "
                f"initialize_model_parallel made groups of, {size}; pass the same to both."
            )
