"""seqloom inside a loop of one's own: a tiny Llama learns the bytes of a file, its sequences split as a plan says.

    python examples/own_loop.py FILE
    torchrun --standalone --nproc_per_node 4 examples/own_loop.py FILE "ring=2 ulysses=2"

Both print the same losses.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seqloom import Batch, Fabric, Plan, parallelize, shard_batch, sum_gradients, token_loss
from seqloom.fabric import all_reduce_
from seqloom.fabric.launch import distributed

STEPS, ROWS, LENGTH = 10, 2, 256

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)


def main(file: str, plan: str = "data=1") -> None:
    """Train on the bytes of `file` under `plan`, which takes as many processes as there are."""
    text = torch.tensor(list(Path(file).read_bytes()))
    torch.manual_seed(0)  # every process draws the same weights and the same batches
    with distributed():
        fabric = Fabric.build(Plan.parse(plan))
        model = parallelize(LlamaForCausalLM(TINY), fabric)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(1, STEPS + 1):
            starts = torch.randint(len(text) - LENGTH, [ROWS, 1])
            batch = Batch.from_tokens(text[starts + torch.arange(LENGTH)])  # the whole batch, on every process
            local, shard = shard_batch(batch, fabric)  # this process's tokens of each sequence
            loss = token_loss(model, local, shard)  # its share: the shares of all sum to the mean
            loss.backward()
            sum_gradients(model, fabric)
            optimizer.step()
            optimizer.zero_grad()
            mean = all_reduce_(loss.detach(), fabric.world)
            if fabric.rank == 0:
                print(f"step {step}  loss {mean:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
