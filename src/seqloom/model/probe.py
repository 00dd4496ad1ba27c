"""How a model is connected to an attention function, and the proof that it hands the shard on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from seqloom.errors import ModelError
from seqloom.model.adapter import NAME, attend, register
from seqloom.model.bloom import reroute

PROBE = "seqloom_probe"


def connect(model: PreTrainedModel, *, probing: bool = False) -> None:
    """Make every layer of `model` call seqloom's attention, or the probe's."""
    if model.config.model_type == "bloom":
        reroute(model, _witness if probing else attend)
        return
    register()
    AttentionInterface.register(PROBE, _witness)
    model.set_attn_implementation(PROBE if probing else NAME)


class Probe:
    """Stands in for a shard and counts the layers it reaches."""

    def __init__(self) -> None:
        self.calls = 0


def _witness(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    probe = asked.get("sequence")
    if isinstance(probe, Probe):
        probe.calls += 1
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(1, 2), None


def probe(model: PreTrainedModel) -> None:
    """Run the model's code once on shapes alone and refuse a family that does not hand the shard to attention.

    Without it such a model would quietly attend to its own shard only.
    """
    build: Callable[..., PreTrainedModel] = type(model)
    with torch.device("meta"):
        # In bfloat16, since the grouped product of experts has only that on the meta device.
        twin = build(type(model.config).from_dict(model.config.to_dict())).to(torch.bfloat16)
        connect(twin, probing=True)
        witness = Probe()
        tokens = torch.zeros(1, 2, dtype=torch.int64)
        try:
            twin(input_ids=tokens, position_ids=tokens, use_cache=False, sequence=witness)
            problem = None
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            problem = str(error).splitlines()[0]
    layers = model.config.num_hidden_layers
    if problem or witness.calls != layers:
        reached = f"reached attention in {witness.calls} of {layers} layers" if not problem else f"failed: {problem}"
        raise ModelError(
            f"{type(model).__name__} cannot be split: a sequence shard given to its forward {reached}, "
            "so its attention would not see the other shards; use a family that calls transformers' AttentionInterface."
        )
