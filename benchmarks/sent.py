"""What a library hands to the network, counted alike for all of them, ours included.

Every collective of torch.distributed is an operator, whether it is called plainly or by a DTensor, and a dispatch
mode sees it with its tensors. Counted is what leaves a rank under the bandwidth-optimal form of each, as
`seqloom.fabric.meter` has it.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan", "barrier", "monitored_barrier_", "recv_")


def _bytes(given: Tensor | Sequence[Any]) -> int:
    return given.nbytes if isinstance(given, Tensor) else sum(map(_bytes, given))


def _shares(ranks: int) -> dict[str, tuple[int, Fraction]]:
    """Of each operator the argument that counts, and how much of it leaves the rank."""
    others = Fraction(ranks - 1)
    reduced = (0, 2 * others / ranks)
    return {
        "send": (0, Fraction(1)),
        "allreduce_": reduced,
        "all_reduce": reduced,
        "all_reduce_": reduced,
        "_allgather_base_": (1, others),
        "allgather_": (1, others),
        "all_gather_into_tensor": (0, others),
        "_reduce_scatter_base_": (1, others / ranks),
        "reduce_scatter_": (1, others / ranks),
        "reduce_scatter_tensor": (0, others / ranks),
        "alltoall_base_": (1, others / ranks),
        "all_to_all_single": (0, others / ranks),
    }


class Sent(TorchDispatchMode):
    """While entered, counts into `bytes` what this rank sends, and into `calls` by how many operators.

    All groups are taken to have `ranks` ranks. Raises NotImplementedError for a collective it has no rule for.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.bytes, self.calls = Fraction(0), 0
        self._shares = _shares(ranks)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, and pass the call on. A DTensor's own collectives come by when it makes them."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        space, _, name = str(func._schema.name).partition("::")
        if space in SPACES and name not in _SILENT:
            if name not in self._shares:
                raise NotImplementedError(f"No rule says what {space}.{name} sends; add one to benchmarks/sent.py.")
            place, share = self._shares[name]
            self.bytes += _bytes(args[place]) * share
            self.calls += 1
        return func(*args, **(kwargs or {}))


def sent_by(run: Callable[[], object], ranks: int) -> int:
    """The bytes this rank sends in one run, rounded down."""
    with Sent(ranks) as counted:
        run()
    return int(counted.bytes)
