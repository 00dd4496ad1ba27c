"""What the reference drops out: the coins of a split run, written out densely from their definition.

Of each dropped number a coin is asked: a chain of hashes, key = mix(key + g number), from key = mix(seed + g), over

| what                | numbers, in turn                                                              |
|---------------------|-------------------------------------------------------------------------------|
| attention weights   | row of the run's data, layer, head, position of the query, position of the key |
| other activations   | row, -1 - number of the module, position of the token, channel                |

with mix the finalizer of splitmix64 and g the golden ratio, in 64 bits that wrap around. It stays where the
coin's upper 53 bits, as a number, are at least int(p 2^53), and is divided by 1 - p. The number of a module is its
place in `model.named_modules()`. Nothing of the code that a split run draws with is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


def stays(p: float, seed: int, *numbers: Any) -> Tensor:
    """bool: whether what these numbers name stays; numbers: integers or arrays of them, which broadcast."""
    key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    for number in numbers:
        key = _mix(key + np.asarray(number, np.int64).astype(np.uint64) * _GOLDEN)
    return torch.from_numpy((key >> np.uint64(11)) >= np.uint64(int(p * 2**53)))


class _Coins(TorchFunctionMode):
    """While entered, `dropout` of one whole sequence draws the coins of its row."""

    def __init__(self, seed: int, row: int) -> None:
        super().__init__()
        self.seed, self.row = seed, row
        self.inside: list[tuple[int, nn.Module]] = []  # modules that are being called, each with its number

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass every call on but those of dropout."""
        if func is not nn.functional.dropout:
            return func(*args, **(kwargs or {}))
        return self._dropped(*args, **(kwargs or {}))

    def _dropped(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        if x.dim() == 4:  # attention weights [1, heads, queries, keys]
            layer = next(
                m.layer_idx for _, m in reversed(self.inside) if isinstance(getattr(m, "layer_idx", None), int)
            )
            heads, queries, keys = (np.arange(size) for size in x.shape[1:])
            kept = stays(p, self.seed, self.row, layer, heads[:, None, None], queries[:, None], keys)
        else:  # activations [1, tokens, channels]
            number, _ = self.inside[-1]
            tokens, channels = (np.arange(size) for size in x.shape[1:])
            kept = stays(p, self.seed, self.row, -1 - number, tokens[:, None], channels)
        return x * kept.to(x.device) / (1 - p)


@contextmanager
def coins(model: nn.Module, seed: int, row: int) -> Iterator[None]:
    """While entered, `model`, called with the whole of one sequence, drops out what a split run of it does.

    seed, row: of the batch, and the sequence's number in the run's data.
    """
    mode = _Coins(seed, row)

    def enter(number: int) -> Callable[..., None]:
        return lambda module, _: mode.inside.append((number, module))

    def leave(*_: Any) -> None:
        mode.inside.pop()

    hooks = []
    for number, (_, module) in enumerate(model.named_modules()):
        hooks += [module.register_forward_pre_hook(enter(number)), module.register_forward_hook(leave)]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()
