"""A program as Colossal-AI's users have them: a Llama whose sequences go around a ring.

seqloom train --from colossalai examples/from_colossalai.py --world 8 "data.files=['{stdlib}/*.py']" --scale tiny

It is read as text and never run: the plugin, the model and the batch are what counts.
"""

import colossalai
import torch
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin
from colossalai.nn.optimizer import HybridAdam
from transformers import AutoModelForCausalLM, LlamaConfig

colossalai.launch_from_torch()
model = AutoModelForCausalLM.from_config(
    LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=65_536,
    )
)
plugin = HybridParallelPlugin(
    tp_size=2,
    pp_size=1,
    sp_size=2,
    enable_sequence_parallelism=True,
    sequence_parallelism_mode="ring_attn",
    zero_stage=1,
    precision="bf16",
    max_norm=1.0,
)
booster = Booster(plugin=plugin)
texts: torch.utils.data.Dataset = ...
loader = plugin.prepare_dataloader(texts, batch_size=4, shuffle=True)
model, optimizer, _, loader, _ = booster.boost(model, HybridAdam(model.parameters(), lr=3e-4), dataloader=loader)
