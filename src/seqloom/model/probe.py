"""How a model is connected to an attention function, and the proof that it hands the shard on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from seqloom.errors import ModelError, counted
from seqloom.fabric import Fabric
from seqloom.model.adapter import NAME, attend, register
from seqloom.model.bloom import reroute
from seqloom.model.experts import expert_modules
from seqloom.model.tensor import split_model
from seqloom.plan import Plan
from seqloom.tensor import TensorGroup

PROBE = "seqloom_probe"


def connect(model: PreTrainedModel, *, probing: bool = False) -> None:
    """Make every layer of `model` call seqloom's attention, or the probe's."""
    if model.config.model_type == "bloom":
        reroute(model, _witness if probing else attend)
        return
    register()
    AttentionInterface.register(PROBE, _witness)
    model.set_attn_implementation(PROBE if probing else NAME)


@dataclass
class Probe:
    """Stands in for a shard: counts the layers it reaches, and the first whose heads or tokens are not as expected."""

    heads: int
    tokens: int
    calls: int = 0
    wrong: str = ""

    def see(self, module: nn.Module, query: Tensor) -> None:
        """Note what attention is called with; query: [rows, heads, tokens, width]."""
        self.calls += 1
        if (query.shape[1], query.shape[2]) != (self.heads, self.tokens):
            self.wrong = self.wrong or (
                f"{type(module).__name__} views its projections as {counted(query.shape[1], 'head')} of "
                f"{counted(query.shape[2], 'token')} where they hold {self.heads} of {self.tokens}"
            )


def _witness(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    probe = asked.get("sequence")
    if isinstance(probe, Probe):
        probe.see(module, query)
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None


def _all_alike(_module: nn.Module, x: Tensor, _index: Tensor, _weights: Tensor) -> Tensor:
    """Stands in for experts, whose choice has no form on shapes alone."""
    return x


def probe(model: PreTrainedModel, plan: Plan | None = None) -> None:
    """Run the model's code once on shapes alone, split as one rank of `plan` has it.

    Refuses a family that does not hand the shard to attention, or whose code views split projections by other
    numbers than they have. Without it such a model would quietly attend to its own shard only, or mix tokens.
    """
    build: Callable[..., PreTrainedModel] = type(model)
    plan = plan or Plan()
    grid = plan.tensor_grid
    # Tokens that no number of heads divides, so that a wrong view does not pass for a right one.
    scattered, gathered = (grid.axes.get(axis or "", 1) for axis in (grid.inner_only, grid.outer_only))
    held = 7 * scattered
    heads = model.config.num_attention_heads // grid.heads
    witness = Probe(heads, held * gathered // scattered)
    with torch.device("meta"):
        # In bfloat16, which `Float64Islands` leaves as it is; of float32 it would lift a part.
        twin = build(type(model.config).from_dict(model.config.to_dict())).to(torch.bfloat16)
        twin.config.output_router_logits = False  # the balance of experts has no form on shapes alone
        connect(twin, probing=True)
        if next(expert_modules(twin), None) is not None:
            ALL_EXPERTS_FUNCTIONS.register(PROBE, _all_alike)
            twin.set_experts_implementation(PROBE)
        try:
            if plan.tensor > 1:
                split_model(twin, TensorGroup.of(Fabric.sketch(plan)))
            positions = torch.zeros(1, witness.tokens, dtype=torch.int64)
            tokens = torch.zeros(1, held, dtype=torch.int64)
            twin(input_ids=tokens, position_ids=positions, use_cache=False, sequence=witness)
            problem = witness.wrong
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            problem = f"failed: {str(error).splitlines()[0]}"
    layers = model.config.num_hidden_layers
    if problem and plan.tensor > 1:
        raise ModelError(
            f"{type(model).__name__} cannot be split over tensor={plan.tensor}: {problem}; use ring or data."
        )
    if problem or witness.calls != layers:
        reached = problem or f"reached attention in {witness.calls} of {counted(layers, 'layer')}"
        raise ModelError(
            f"{type(model).__name__} cannot be split: a sequence shard given to its forward {reached}, "
            "so its attention would not see the other shards; use a family that calls transformers' AttentionInterface."
        )
