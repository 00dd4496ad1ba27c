"""A program for Colossal-AI's layers, with `colossalai` replaced by `seqloom.compat.colossalai`.

    torchrun --standalone --nproc_per_node 8 examples/colossalai_mlp.py --mode 2.5d --depth 2
    torchrun --standalone --nproc_per_node 8 examples/colossalai_mlp.py --mode 3d
    torchrun --standalone --nproc_per_node 4 examples/colossalai_mlp.py --mode 2d
    torchrun --standalone --nproc_per_node 2 examples/colossalai_mlp.py --mode 1d
    python examples/colossalai_mlp.py

Each rank prints the sum of squares of its part of the output, and rank 0 the shapes that it holds.
"""

import os

import torch

import seqloom.compat.colossalai.nn as col_nn
from seqloom.compat import colossalai
from seqloom.compat.colossalai.context import ParallelMode
from seqloom.compat.colossalai.core import global_context as gpc
from seqloom.compat.colossalai.utils import get_current_device, print_rank_0

CUTS = {
    "1d": [],
    "2d": [(0, ParallelMode.PARALLEL_2D_COL), (-1, ParallelMode.PARALLEL_2D_ROW)],
    "2.5d": [
        (0, ParallelMode.PARALLEL_2P5D_DEP),
        (0, ParallelMode.PARALLEL_2P5D_COL),
        (-1, ParallelMode.PARALLEL_2P5D_ROW),
    ],
    "3d": [
        (0, ParallelMode.PARALLEL_3D_WEIGHT),
        (0, ParallelMode.PARALLEL_3D_INPUT),
        (-1, ParallelMode.PARALLEL_3D_OUTPUT),
    ],
}
"""Along which dim the input of each mode is split over which group, in order."""


class MLP(torch.nn.Module):
    """Two linears with an activation between them, and dropout."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.dense_1 = col_nn.Linear(dim, 4 * dim)
        print_rank_0(f"Weight of the first linear layer: {tuple(self.dense_1.weight.shape)}")
        self.activation = torch.nn.GELU()
        self.dense_2 = col_nn.Linear(4 * dim, dim)
        print_rank_0(f"Weight of the second linear layer: {tuple(self.dense_2.weight.shape)}")
        self.dropout = col_nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dense_1(x)
        print_rank_0(f"Output of the first linear layer: {tuple(x.shape)}")
        x = self.dense_2(self.activation(x))
        print_rank_0(f"Output of the second linear layer: {tuple(x.shape)}")
        return self.dropout(x)


def main() -> None:
    """Send one batch through the MLP and back."""
    parser = colossalai.get_default_parser()
    parser.add_argument("--mode", choices=list(CUTS), default="1d")
    parser.add_argument("--depth", type=int)
    args = parser.parse_args()
    tensor = dict(size=int(os.environ.get("WORLD_SIZE", "1")), mode=args.mode)
    if args.depth:
        tensor["depth"] = args.depth
    colossalai.launch(
        config=dict(parallel=dict(data=1, pipeline=1, tensor=tensor)),
        rank=args.rank,
        world_size=args.world_size,
        local_rank=args.local_rank,
        host=args.host,
        port=args.port,
    )
    model = MLP()
    x = torch.randn((16, 256), device=get_current_device())
    torch.distributed.broadcast(x, src=0)
    for dim, group in CUTS[args.mode]:
        x = torch.chunk(x, gpc.get_world_size(group), dim=dim)[gpc.get_local_rank(group)]
    out = model(x)
    out.square().sum().backward()
    norm = sum(parameter.grad.square().sum() for parameter in model.parameters())
    print(f"rank {gpc.get_global_rank()} output {out.square().sum():.4f} gradients {norm:.2f}", flush=True)


if __name__ == "__main__":
    main()
