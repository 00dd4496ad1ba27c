"""A program for Colossal-AI's Booster, with `colossalai` replaced by `seqloom.compat.colossalai`.

    torchrun --standalone --nproc_per_node 4 examples/colossalai_booster.py --tp 2 --sp 2 --mode ring_attn
    torchrun --standalone --nproc_per_node 4 examples/colossalai_booster.py --tp 2 --sp 2 --mode all_to_all
    torchrun --standalone --nproc_per_node 4 examples/colossalai_booster.py --tp 4 --mode split_gather
    torchrun --standalone --nproc_per_node 4 examples/colossalai_booster.py --pp 2 --tp 2
    torchrun --standalone --nproc_per_node 4 examples/colossalai_booster.py --ep 2 --sp 2 --mode all_to_all
    python examples/colossalai_booster.py

All of the first four and the last print the same losses, but for rounding; --ep trains a mixture of experts.
"""

import argparse

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from seqloom.compat import colossalai
from seqloom.compat.colossalai.accelerator import get_accelerator
from seqloom.compat.colossalai.booster import Booster
from seqloom.compat.colossalai.booster.plugin import HybridParallelPlugin, MoeHybridParallelPlugin
from seqloom.compat.colossalai.nn.optimizer import HybridAdam

SHAPE = dict(
    max_position_embeddings=4096,
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=1000,
)


class RandomTokens(Dataset):
    """Samples of random tokens, the same on every process."""

    def __init__(self, samples: int, length: int, vocab: int) -> None:
        self.ids = torch.randint(0, vocab, (samples, length), device=get_accelerator().get_current_device())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.ids[i]}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tp", "sp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--mode", help="of sequence parallelism, off without it")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2, help="rows of a step on all processes together")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--experts", action="store_true", help="the model of --ep, also without it")
    parser.add_argument("--exact", action="store_true", help="float64 throughout, rather than bf16")
    return parser.parse_args()


def make_plugin(args: argparse.Namespace) -> HybridParallelPlugin | MoeHybridParallelPlugin:
    """The plugin that the command line describes."""
    given = dict(
        tp_size=args.tp or 1,
        pp_size=args.pp or 1,
        zero_stage=args.zero,
        enable_all_optimization=True,
        precision="fp32" if args.exact else "bf16",
    )
    if args.mode:
        given |= dict(sp_size=args.sp or 1, enable_sequence_parallelism=True, sequence_parallelism_mode=args.mode)
    if args.pp:
        given |= dict(num_microbatches=args.pp)
    return MoeHybridParallelPlugin(ep_size=args.ep, **given) if args.ep else HybridParallelPlugin(**given)


def main() -> None:
    """Train for a few steps, the same tokens whatever the plan."""
    args = arguments()
    colossalai.launch_from_torch()
    kind = MixtralConfig if args.ep or args.experts else LlamaConfig
    more = dict(num_local_experts=4, num_experts_per_tok=2) if kind is MixtralConfig else {}
    config = kind(**SHAPE, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64 if args.exact else torch.bfloat16)
    if args.exact and kind is MixtralConfig:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    optimizer = HybridAdam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    plugin = make_plugin(args)
    booster = Booster(plugin=plugin)
    loader = plugin.prepare_dataloader(
        RandomTokens(args.batch * args.steps, args.length, config.vocab_size),
        batch_size=args.batch // plugin.dp_size,
        shuffle=True,
        drop_last=True,
        seed=42,
    )
    model, optimizer, criterion, loader, scheduler = booster.boost(
        model, optimizer, lambda outputs, inputs: outputs.loss, loader, scheduler
    )
    batches = iter(loader)
    for step in tqdm(range(args.steps), desc="Step", disable=dist.get_rank() != 0):
        if plugin.pp_size > 1:
            loss = booster.execute_pipeline(batches, model, criterion, optimizer, return_loss=True)["loss"]
        else:
            outputs = model(**next(batches))
            loss = outputs[0]
            del outputs
            booster.backward(loss, optimizer)
        if dist.get_rank() == dist.get_world_size() - 1:
            print(f"Step {step} loss: {loss.item():.15g}", flush=True)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


if __name__ == "__main__":
    main()
