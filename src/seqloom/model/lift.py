"""Lift the float32 islands of transformers models to float64, so that a comparison can be exact."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64Islands(TorchFunctionMode):
    """While entered, every request for float32 becomes one for float64.

    Models compute norms, softmax and rotary angles in float32 whatever their own type, and sit 1e-7
    from exact for it. Requests are `.float()`, `.to(torch.float32)` and `dtype=torch.float32`.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass the call on with float64 where float32 was asked for."""
        if func is torch.Tensor.float:
            return args[0].double()
        lifted = {key: _lift(value) for key, value in (kwargs or {}).items()}
        return func(*map(_lift, args), **lifted)


def _lift(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
