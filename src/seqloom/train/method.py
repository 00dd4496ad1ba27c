"""The settings that say how the weights are changed."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from seqloom.train.batches import Batches
from seqloom.train.fields import Amount, Count, Decay, Rate, Section, Seed, Share

Precision = Literal["float32", "bf16", "fp16", "float64"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]


class TrainConfig(Section):
    """How the weights are changed.

    steps: optimizer steps of the whole run.
    batch: sequences of one optimizer step, over all processes.
    accumulate: micro-batches a batch is cut into, one after another.
    micro_batch: sequences of one micro-batch, over all processes; it and `accumulate` follow from one another.
    rampup: start, increment, samples: see `Batches`.
    learning_rate: of AdamW, at its highest.
    schedule: how the rate falls after warm-up: along a cosine, linearly, not at all, or linearly at the very end (wsd).
    warmup_steps: steps over which the rate rises linearly from 0.
    warmup_samples: the same in sequences consumed; the whole schedule then counts them, and not steps.
    decay_steps: steps over which the rate falls; null is what the run has left.
    decay_samples: the same in sequences consumed.
    final_learning_rate_share: what the rate falls to, as a share of `learning_rate`.
    weight_decay: of AdamW, decoupled; applied to matrices only.
    betas: decay of AdamW's first and second moments.
    epsilon: of AdamW, added to the root of the second moment.
    clip: the largest global gradient norm; null is no limit.
    precision: `float32`; `bf16` or `fp16` for the arithmetic of the model alone; `float64` for everything, as proofs.
    initial_loss_scale: what `fp16` multiplies losses by at first.
    loss_scale_window: steps in a row without overflow after which that scale doubles.
    seed: of the first weights.
    loss_chunk: tokens whose logits exist at the same time.
    gradient_checkpointing: the older word for recompute=full in the plan.
    """

    steps: Count
    batch: Count = 1
    accumulate: Count = 1
    micro_batch: Count = Field(default=1, exclude=True)  # one of the two is enough to read settings back
    rampup: Annotated[tuple[Count, Count, Count], Field(strict=False)] | None = None
    learning_rate: Rate = 3e-4
    schedule: Schedule = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    warmup_samples: Count | None = None
    decay_steps: Count | None = None
    decay_samples: Count | None = None
    final_learning_rate_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    epsilon: Amount = 1e-8
    clip: Amount | None = 1.0
    precision: Precision = "float32"
    initial_loss_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 65536.0
    loss_scale_window: Count = 2000
    seed: Seed = 0
    loss_chunk: Count = 1024
    gradient_checkpointing: bool = False

    @property
    def batches(self) -> Batches:
        """The batch of every step."""
        return Batches(self.batch, self.rampup)

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """How many micro-batches a step may have, fewest first: one number without ramp-up."""
        return tuple(size // self.micro_batch for size in self.batches.sizes)

    @property
    def says_micro_batch(self) -> bool:
        """Whether the size of micro-batches was said, and not how many make a step."""
        return "micro_batch" in self.model_fields_set and "accumulate" not in self.model_fields_set

    @property
    def by_samples(self) -> bool:
        """Whether the learning rate follows the sequences consumed, and not the steps taken."""
        return self.warmup_samples is not None or self.decay_samples is not None

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        # The one that was not said follows, and stays unsaid; past `frozen` as pydantic does it.
        if self.says_micro_batch:
            object.__setattr__(self, "accumulate", max(1, self.batch // self.micro_batch))
        elif "micro_batch" not in self.model_fields_set:
            object.__setattr__(self, "micro_batch", max(1, self.batch // self.accumulate))
        if found := [*self._batch_reasons(), *self._schedule_reasons(), *self._scale_reasons()]:
            raise ValueError(" Also: ".join(found))
        return self

    def _batch_reasons(self) -> Iterator[str]:
        for name, part in (("accumulate", self.accumulate), ("micro_batch", self.micro_batch)):
            if self.batch % part:
                yield (
                    f"train.batch is {self.batch}, which train.{name}={part} does not divide; "
                    f"make it a multiple, such as {-(-self.batch // part) * part}."
                )
                return
        if self.accumulate * self.micro_batch != self.batch:
            yield (
                f"train.batch is {self.batch}, but train.accumulate={self.accumulate} times "
                f"train.micro_batch={self.micro_batch} is {self.accumulate * self.micro_batch}; leave one of them out."
            )
            return
        if self.rampup is None:
            return
        start, increment, _ = self.rampup
        if start >= self.batch:
            yield f"train.rampup starts at {start}, which is not below train.batch={self.batch}; start lower."
        elif (self.batch - start) % increment:
            yield (
                f"train.rampup grows from {start} by {increment}, which misses train.batch={self.batch}; "
                f"make its increment a divisor of {self.batch - start}."
            )
        for what, size in (("start", start), ("increment", increment)):
            if size % self.micro_batch:
                yield (
                    f"train.rampup has the {what} {size}, which micro-batches of {self.micro_batch} sequences do not "
                    f"divide; make it a multiple of {self.micro_batch}, or set a smaller train.micro_batch."
                )

    def _schedule_reasons(self) -> Iterator[str]:
        unit, total, warmup, decay = "steps", self.steps, self.warmup_steps, self.decay_steps
        if self.by_samples:
            if warmup or decay is not None:
                yield "train has warm-up or decay in steps and in samples; give both in one unit."
                return
            unit, total = "samples", self.batches.consumed(self.steps)
            warmup, decay = self.warmup_samples or 0, self.decay_samples
        if warmup > total:
            said = f"train.steps={self.steps}" if unit == "steps" else f"the {total} of train.steps={self.steps}"
            yield f"train.warmup_{unit} is {warmup}, more than {said}; make it at most {total}."
        elif self.schedule == "wsd" and decay is None:
            yield "train.schedule is 'wsd', which falls at the very end; say over how much with train.decay_steps."
        elif self.schedule == "wsd" and decay is not None and warmup + decay > total:
            yield (
                f"train.decay_{unit} is {decay}, but a 'wsd' schedule has {total - warmup} {unit} after warm-up; "
                f"make it at most {total - warmup}."
            )
        if self.schedule == "constant":
            share = TrainConfig.model_fields["final_learning_rate_share"].default
            if decay is not None or self.final_learning_rate_share not in (1, share):
                yield (
                    "train.schedule is 'constant', which never falls, so train.decay_steps, train.decay_samples and "
                    "train.final_learning_rate_share say nothing; leave them out."
                )

    def _scale_reasons(self) -> Iterator[str]:
        for name in ("initial_loss_scale", "loss_scale_window"):
            given, default = getattr(self, name), TrainConfig.model_fields[name].default
            if self.precision != "fp16" and given != default:
                yield f"train.{name} is {given:g}, but only train.precision=fp16 scales losses; leave it out."
