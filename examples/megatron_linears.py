"""An MLP of Megatron-LM's column- and row-parallel linears, held against one device.

    torchrun --standalone --nproc_per_node 4 examples/megatron_linears.py

Tokens come first, [sequence, batch, hidden], and 13 of them need not divide by the ranks.
"""

import torch
from torch import distributed, nn
from torch.nn.functional import gelu, linear

from seqloom.compat.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    initialize_model_parallel,
    parallel_state,
    scatter_to_sequence_parallel_region,
)

TOKENS, ROWS, HIDDEN = 13, 2, 64


class MLP(nn.Module):
    """Hidden to four times as many and back, on sequence-first tensors of which each rank holds some tokens."""

    def __init__(self, config: ModelParallelConfig) -> None:
        """Draw the weights, whole on each rank, and keep this rank's parts."""
        super().__init__()
        self.up = ColumnParallelLinear(HIDDEN, 4 * HIDDEN, config=config, init_method=nn.init.xavier_normal_)
        self.down = RowParallelLinear(
            4 * HIDDEN,
            HIDDEN,
            config=config,
            init_method=nn.init.xavier_normal_,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens in, this rank's tokens out."""
        return self.down(gelu(self.up(x)[0]))[0]


def main() -> None:
    """Compute output and a gradient over the ranks and alone, and print how far they are apart."""
    distributed.init_process_group("gloo")
    initialize_model_parallel(tensor_model_parallel_size=distributed.get_world_size())
    torch.manual_seed(0)  # all ranks draw the same whole weights, and keep their parts
    mlp = MLP(ModelParallelConfig(sequence_parallel=True, params_dtype=torch.float64, use_cpu_initialization=True))
    x = torch.randn(TOKENS, ROWS, HIDDEN, dtype=torch.float64)

    mine = mlp(scatter_to_sequence_parallel_region(x))
    mine.square().sum().backward()
    out = gather_from_sequence_parallel_region(mine.detach())

    torch.manual_seed(0)  # the same draws, for one device
    up, down = torch.empty(4 * HIDDEN, HIDDEN).double(), torch.empty(HIDDEN, 4 * HIDDEN).double()
    up, down = (nn.init.xavier_normal_(weight).requires_grad_() for weight in (up, down))
    alone = linear(gelu(linear(x, up)), down)
    alone.square().sum().backward()

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    part = up.grad.chunk(size)[rank]
    apart = (out - alone).abs().max(), (mlp.up.weight.grad - part).abs().max()
    lines = [None] * size
    distributed.all_gather_object(
        lines,
        f"rank {rank}: {len(mine)} of {TOKENS} tokens, up {tuple(mlp.up.weight.shape)}, down "
        f"{tuple(mlp.down.weight.shape)}; apart from one device: output {apart[0]:.0e}, gradient {apart[1]:.0e}",
    )
    if rank == 0:
        print(*lines, sep="\n")
    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
