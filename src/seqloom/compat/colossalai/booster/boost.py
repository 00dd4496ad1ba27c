"""`colossalai.booster.Booster`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from seqloom.compat.colossalai.booster.checkpoint import load, save_folder, save_one
from seqloom.compat.colossalai.booster.model import BoostedModel
from seqloom.compat.colossalai.booster.optimizer import BoostedOptimizer, adopt, names
from seqloom.compat.colossalai.booster.plugin import TorchDDPPlugin, _Plugin
from seqloom.compat.colossalai.booster.resume import load_plain, load_stepped, save_plain, save_stepped
from seqloom.compat.colossalai.state import LOGGER
from seqloom.errors import ConfigError


class Booster:
    """Puts a model and what trains it under a plugin's plan."""

    def __init__(self, device: Any = None, mixed_precision: Any = None, plugin: _Plugin | None = None) -> None:
        """device: no effect. mixed_precision: fp16 or bf16 with TorchDDPPlugin; other plugins say it themselves."""
        if plugin is None:
            raise ConfigError(
                "Booster was made without a plugin; give one of seqloom.compat.colossalai.booster.plugin."
            )
        if mixed_precision is not None and isinstance(plugin, TorchDDPPlugin):
            if mixed_precision not in ("fp16", "bf16"):
                raise ConfigError(f"mixed_precision is {mixed_precision!r}; give 'fp16' or 'bf16'.")
            plugin.settings = {**plugin.settings, "precision": mixed_precision}
            mixed_precision = None
        for name, value in (("device", device), ("mixed_precision", mixed_precision)):
            if value is not None:
                LOGGER.warning("%s: no effect. The plugin says it.", name)
        self.plugin = plugin

    def boost(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Callable[..., Any] | None = None,
        dataloader: Any = None,
        lr_scheduler: Any = None,
    ) -> tuple[BoostedModel, BoostedOptimizer | None, Callable[..., Any] | None, Any, Any]:
        """The model split, the optimizer of its parts, and the rest as it was given, in this order.

        Every rank calls it together. The optimizer's settings and its scheduler go on holding. Raises ModelError for
        what is no transformers causal language model, or cannot be split exactly, PlanError where the plan does not
        fit it.
        """
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"{type(model).__name__} is no transformers model; split models of your own with "
                "seqloom.compat.colossalai.nn, or give a PreTrainedModel."
            )
        before = names(model)
        boosted = BoostedModel(model, self.plugin)
        wrapped = None
        if optimizer is not None:
            adopt(optimizer, boosted, before)
            wrapped = BoostedOptimizer(optimizer, boosted, self.plugin.settings["schedule"])
        return boosted, wrapped, criterion, dataloader, lr_scheduler

    def backward(self, loss: Tensor, optimizer: BoostedOptimizer) -> None:
        """Add the gradients of a loss that a boosted model gave."""
        optimizer.backward(loss)

    @contextmanager
    def no_sync(self, model: BoostedModel | None = None, optimizer: BoostedOptimizer | None = None) -> Iterator[None]:
        """Nothing is to be held back inside: gradients are summed once, at the optimizer's step."""
        yield

    def execute_pipeline(
        self,
        data_iter: Iterator[dict[str, Tensor]],
        model: BoostedModel,
        criterion: Callable[[Any, Any], Any],
        optimizer: BoostedOptimizer | None = None,
        return_loss: bool = True,
        return_outputs: bool = False,
    ) -> dict[str, Any]:
        """Run the next batch through the pipeline, forward and, with an optimizer, backward.

        criterion: takes (outputs, inputs) and gives outputs.loss or outputs[0]. The loss is that of all label tokens
        of the batch, on every rank. Raises ConfigError for a criterion of another loss, and for return_outputs.
        """
        if self.plugin.plan.pipeline == 1:
            raise ConfigError("execute_pipeline needs pp_size above 1; call the model, and booster.backward.")
        if return_outputs:
            raise ConfigError("return_outputs=True would hold logits of all tokens; a pipeline gives its loss alone.")
        given = next(data_iter)
        _the_loss_itself(criterion, given)
        if optimizer is not None:
            optimizer.begin()
        loss = model.run_stages(
            given,
            self._micro_batches(len(given["input_ids"])),
            backward=optimizer is not None,
            scale=optimizer.scale.value if optimizer is not None else 1.0,
        )
        if optimizer is not None:
            optimizer.end(loss)
        return {"loss": loss if return_loss else None, "outputs": None}

    def _micro_batches(self, rows: int) -> int:
        settings = self.plugin.settings
        if settings["accumulate"]:
            return int(settings["accumulate"])
        if not settings["micro_batch"]:
            raise ConfigError("A pipeline needs num_microbatches or microbatch_size; give the plugin one of them.")
        return max(1, rows // settings["micro_batch"])

    def save_model(
        self,
        model: BoostedModel,
        checkpoint: str | Path,
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_safetensors: bool = False,
        use_async: bool = False,
    ) -> None:
        """Whole weights under their Hugging Face names: one file, or, with shard, a folder for `from_pretrained`.

        gather_dtensor: no effect. size_per_shard: in megabytes. use_safetensors: of one file, whose ending may say it
        too; folders hold safetensors always. Every rank calls it together. Raises ConfigError for a prefix and for
        use_async.
        """
        _refuse("save_model", prefix=prefix, use_async=use_async)
        if shard:
            save_folder(model, Path(checkpoint), size_per_shard)
        else:
            save_one(model, Path(checkpoint), safe=use_safetensors or str(checkpoint).endswith(".safetensors"))

    def load_model(
        self,
        model: BoostedModel,
        checkpoint: str | Path,
        strict: bool = True,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """Weights that `save_model` or transformers saved. Raises CheckpointError where they do not fit.

        low_cpu_mem_mode, num_threads: no effect.
        """
        if not strict:
            raise ConfigError("strict=False would leave weights as they are; give a file that holds all of them.")
        load(model, Path(checkpoint))

    def save_optimizer(
        self,
        optimizer: BoostedOptimizer,
        checkpoint: str | Path,
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_async: bool = False,
    ) -> None:
        """The optimizer's state, its groups' settings and fp16's loss scale, in a folder `checkpoint`.

        shard, gather_dtensor, size_per_shard: no effect; each rank writes what it steps. Every rank calls it together.
        Raises ConfigError for a prefix, for use_async and for state that is not of its parameter's shape.
        """
        _refuse("save_optimizer", prefix=prefix, use_async=use_async)
        save_stepped(optimizer, Path(checkpoint))

    def load_optimizer(
        self,
        optimizer: BoostedOptimizer,
        checkpoint: str | Path,
        low_cpu_mem_mode: bool = True,
        num_threads: int = 1,
    ) -> None:
        """What `save_optimizer` saved, under whatever plan. Raises CheckpointError where it does not fit.

        low_cpu_mem_mode, num_threads: no effect.
        """
        load_stepped(optimizer, Path(checkpoint))

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | Path) -> None:
        """The scheduler's own state, in one file that rank 0 writes. Every rank calls it together."""
        save_plain(lr_scheduler.state_dict(), Path(checkpoint), self.plugin.fabric.world)

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | Path) -> None:
        """What `save_lr_scheduler` saved; the rate itself comes with the optimizer. Raises CheckpointError."""
        lr_scheduler.load_state_dict(load_plain(Path(checkpoint)))

    def __getattr__(self, name: str) -> object:
        """Say which methods there are."""
        there = ", ".join(one for one in vars(Booster) if not one.startswith("_"))
        raise AttributeError(f"seqloom's Booster has no '{name}'; it has {there} (docs/compat.md).")


def _refuse(name: str, **given: object) -> None:
    """Raise ConfigError for arguments that are given and not done."""
    if strange := [other for other, value in given.items() if value]:
        raise ConfigError(f"{name} does not do {', '.join(strange)}; leave it out.")


def _the_loss_itself(criterion: Callable[[Any, Any], Any], given: dict[str, Tensor]) -> None:
    """Raise ConfigError for a criterion that gives anything but the model's own loss."""
    loss = torch.ones(())
    try:
        found = criterion(CausalLMOutputWithPast(loss=loss), given)
    except Exception as error:
        raise ConfigError(f"The criterion reads more than the model's loss ({error}); give outputs.loss.") from error
    if found is not loss:
        raise ConfigError(
            "The criterion gives another loss than the model's own; give outputs.loss, and scale the rate."
        )
