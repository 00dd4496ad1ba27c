"""`colossalai.booster.plugin`: arguments of a plugin as a plan, by the rules of `seqloom.dialects`."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import set_seed

from seqloom.compat.colossalai.state import tell
from seqloom.dialects import Note
from seqloom.dialects.colossalai import translate_plugin
from seqloom.dialects.colossalai_options import HYBRID
from seqloom.errors import ConfigError
from seqloom.fabric import Axis, Fabric

__all__ = ["GeminiPlugin", "HybridParallelPlugin", "LowLevelZeroPlugin", "MoeHybridParallelPlugin", "TorchDDPPlugin"]


class _Stages:
    """What their `stage_manager` is asked for."""

    def __init__(self, pipeline: Axis) -> None:
        self.stage, self.num_stages = pipeline.rank, pipeline.size

    def is_first_stage(self, *_: Any, **__: Any) -> bool:
        """Whether this rank is the pipeline's first."""
        return self.stage == 0

    def is_last_stage(self, *_: Any, **__: Any) -> bool:
        """Whether this rank is the pipeline's last."""
        return self.stage == self.num_stages - 1


class _Plugin:
    """A plan and its fabric, made of keyword arguments.

    plan: seqloom's. notes: what became of each argument. fabric: the groups, made when the plugin is. tp_group and the
    like: as theirs, of this process alone where the degree is 1. stage_manager: None without a pipeline.
    """

    def __init__(self, **arguments: Any) -> None:
        """Every process makes the plugin together. Raises DialectError with every reason why there is no plan."""
        if not distributed.is_initialized():
            raise ConfigError(f"{type(self).__name__} was made before launch; call launch_from_torch() first.")
        found = translate_plugin(type(self).__name__, arguments, world=distributed.get_world_size())
        self.plan, self.settings, self.notes = found.plan, found.train, (*found.notes, *_absent(arguments))
        tell(self.notes, distributed.get_rank())
        self.fabric = Fabric.build(self.plan)
        self.stage_manager = _Stages(self.fabric.pipeline) if self.plan.pipeline > 1 else None
        self.tp_size, self.pp_size, self.dp_size = self.plan.tensor, self.plan.pipeline, self.plan.data
        self.sp_size = self.plan.ring * self.plan.ulysses
        alone, sequence = self.fabric.alone(), self.fabric.ring if self.plan.ring > 1 else self.fabric.ulysses
        if self.plan.sequence_parallel and self.plan.tensor > 1:
            sequence = self.fabric.tensor
        self.tp_group, self.pp_group = self.fabric.tensor.group or alone, self.fabric.pipeline.group or alone
        self.dp_group, self.sp_group = self.fabric.data.group or alone, sequence.group or alone

    def prepare_dataloader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 1024,
        drop_last: bool = False,
        pin_memory: bool = False,
        num_workers: int = 0,
        distributed_sampler_cls: Callable[..., Any] | None = None,
        **others: Any,
    ) -> DataLoader[Any]:
        """A loader of `batch_size` rows on each data rank, the same on ranks that share a sequence or a pipeline.

        seed: of its worker processes; the order is the sampler's own. others: of torch's DataLoader.
        """
        kind = distributed_sampler_cls or DistributedSampler
        data = self.fabric.data
        sampler = kind(dataset, num_replicas=data.size, rank=data.rank, shuffle=shuffle)
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            pin_memory=pin_memory,
            num_workers=num_workers,
            worker_init_fn=lambda _: set_seed(seed),
            **others,
        )


def _absent(arguments: dict[str, Any]) -> list[Note]:
    """A note where flash-attn is asked for and not there."""
    name = "enable_flash_attention"
    if not arguments.get(name) or find_spec("flash_attn") is not None:
        return []
    why = "flash-attn is not installed; seqloom takes another kernel, which builds no matrix of scores either."
    return [Note(name, True, "no effect", why)]


class HybridParallelPlugin(_Plugin):
    """Tensor, pipeline, sequence and data parallelism with ZeRO 0 to 2, as the arguments say."""

    def __init__(self, *placed: Any, **arguments: Any) -> None:
        """The arguments of theirs, by place in their order or by name."""
        super().__init__(**dict(zip(HYBRID, placed, strict=False)), **arguments)


class MoeHybridParallelPlugin(HybridParallelPlugin):
    """The same with experts dealt to `ep_size` ranks."""

    def __init__(self, **arguments: Any) -> None:
        """The arguments of theirs by name, whose order changed between releases."""
        super().__init__(**arguments)


class GeminiPlugin(_Plugin):
    """ZeRO 3, with tensor parallelism where it is asked for."""


class LowLevelZeroPlugin(_Plugin):
    """ZeRO 1 or 2 over all processes."""


class TorchDDPPlugin(_Plugin):
    """Data parallelism alone."""
