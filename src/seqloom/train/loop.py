"""A training run, from a checked configuration to its last checkpoint."""

import json
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from transformers import PreTrainedModel

from seqloom import __version__
from seqloom.errors import CheckpointError, counted
from seqloom.fabric import Fabric, all_reduce_, naming_others
from seqloom.model import (
    Float64Islands,
    build_model,
    clear_gradients,
    outline,
    parallelize,
    weights_folder,
    without_progress_bars,
)
from seqloom.sequence import Batch
from seqloom.train.checkpoint import Progress, load, newest, read_progress
from seqloom.train.config import Config
from seqloom.train.curriculum import Stretch, stretches
from seqloom.train.data import load_text
from seqloom.train.evaluate import HeldOut, evaluate
from seqloom.train.finite import check_finite
from seqloom.train.method import TrainConfig
from seqloom.train.optimizer import adamw
from seqloom.train.packing import PackedText, order
from seqloom.train.prepare import CHECKPOINTS, compare_text, run_settings, sole_writer
from seqloom.train.progress import Display, Metrics, MetricsFile
from seqloom.train.saving import Saves
from seqloom.train.scale import LossScale
from seqloom.train.schedule import learning_rate
from seqloom.train.step import apply_gradients, compute_gradients
from seqloom.train.stop import StopRequest
from seqloom.train.tokenizer import Tokenizer, load_tokenizer

RECENT = 10  # steps the closing loss is averaged over: a step of few sequences says little alone


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    step: optimizer steps taken. loss: mean of the last `averaged` steps, at most `RECENT`, None where
    none was taken.
    stopped: the run was asked to stop before its last step.
    """

    step: int
    steps: int
    loss: float | None
    averaged: int
    unigram_entropy: float
    stopped: bool
    folder: Path


def train(config: Config, resume: bool, stretch: Stretch | None = None) -> Summary:
    """Run training; every rank calls it inside `distributed`, after `prepare` has passed in their launcher.

    stretch: which of the run's `stretches` to train; it is the first by default.
    """
    whole, stretch = config, stretch or stretches(config)[0]
    config = stretch.config
    fabric = Fabric.build(config.plan)
    settings = config.model.settings()
    tokenizer = load_tokenizer(config.data.tokenizer, model_vocab=settings["vocab_size"])
    text = load_text(config.data, tokenizer)
    held_out = _held_out(config, tokenizer)
    weights, exact = weights_folder(config.model.path), config.train.precision == "float64"
    with Float64Islands() if exact else nullcontext():
        dtype = torch.float64 if exact else torch.float32
        model = build_model(settings, weights=weights, dtype=dtype, seed=config.train.seed)
        model = parallelize(model, fabric, num_tokens=config.data.sequence_length)
        optimizer = _optimizer(model, config.train, fabric)
        scale = LossScale(config.train.initial_loss_scale) if config.train.precision == "fp16" else None
        run = _Run(whole, stretch, fabric, text, held_out, tokenizer, model, optimizer, scale)
        progress = _restore(config, text, model, optimizer, fabric) if resume else None
        if progress is not None:
            run.take_up(progress)
        with naming_others(fabric):
            summary = run.go(progress.step if progress is not None else 0)
    fabric.close()
    return summary


@dataclass
class _Run:
    """What a run holds while it goes on.

    whole: the settings of all its stretches. scale: None where losses are not scaled.
    """

    whole: Config
    stretch: Stretch
    fabric: Fabric
    text: PackedText
    held_out: HeldOut | None
    tokenizer: Tokenizer
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scale: LossScale | None
    note: str | None = None

    @property
    def config(self) -> Config:
        """The settings of this stretch."""
        return self.stretch.config

    def take_up(self, progress: Progress) -> None:
        """Go on with what the checkpoint says beside the weights."""
        said = progress.running
        if self.scale is not None and "loss_scale" in said:
            self.scale = LossScale(said["loss_scale"], int(said["finite_steps"]))
        if self.held_out is not None:
            self.note = self.held_out.take_up(said)

    def go(self, done: int) -> Summary:
        """Take the steps from number `done` on."""
        config, held_out, leader = self.config, self.held_out, self.fabric.rank == 0
        train, folder = config.train, config.run.folder
        losses, step = [], done
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(speaks=leader))
            if leader:
                stack.enter_context(sole_writer(folder))
                display = stack.enter_context(Display(train.steps, done))
                self._introduce(folder, display)
                metrics = MetricsFile(folder / "metrics.jsonl", done)
                stack.callback(metrics.close)
            saves = stack.enter_context(self._saves(stack))
            stopped = stop.agreed(self.fabric)
            while step < self.stretch.until and not stopped:
                line = self._step(step)
                step = line.step
                if held_out is not None and (step == train.steps or _due(step, config.eval and config.eval.every)):
                    line = replace(line, evaluation_loss=self._evaluate(held_out, step))
                losses.append(line.loss)
                if leader:
                    metrics.write(line)
                    display.show(line)
                stopped = stop.agreed(self.fabric)
                best = held_out is not None and held_out.step == step
                if best or stopped or step == self.stretch.until or _due(step, config.run.save_every):
                    saves.save(self._progress(step), self.model, self.optimizer, best=best)
                saves.check()
        if step == train.steps:
            with without_progress_bars():
                self.model.save_pretrained(folder / "model")
        if step == train.steps and leader:
            self.tokenizer.save(folder / "model")
        recent = losses[-RECENT:]
        loss = sum(recent) / len(recent) if recent else None
        return Summary(
            step,
            train.steps,
            loss,
            len(recent),
            self.text.unigram_entropy,
            stopped and step < self.stretch.until,
            folder,
        )

    def _evaluate(self, held_out: HeldOut, step: int) -> float:
        """The loss on the held-out text, the best so far noted."""
        train = self.config.train
        loss = evaluate(
            self.model,
            held_out.text,
            self.fabric,
            sequences=held_out.sequences,
            micro_batch=train.micro_batch,
            precision=train.precision,
            chunk_tokens=train.loss_chunk,
        )
        held_out.see(loss, step)
        return loss

    def _step(self, step: int) -> Metrics:
        train, scale, started = self.config.train, self.scale, perf_counter()
        self.fabric.meter.reset()
        rate = learning_rate(train, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        report = compute_gradients(
            self.model,
            self._batches(step),
            self.fabric,
            precision=train.precision,
            chunk_tokens=train.loss_chunk,
            loss_scale=1.0 if scale is None else scale.value,
        )
        skipped = scale is not None and scale.overflowed(report)
        if skipped:
            clear_gradients(self.model)  # a checkpoint is not to meet them
        else:
            check_finite(self.model, report, self.fabric, step=step + 1)
            apply_gradients(self.model, self.optimizer, report, clip=train.clip)
        if scale is not None:
            self.scale = scale.after(report, train.loss_scale_window)
        seconds = perf_counter() - started
        return Metrics(
            step=step + 1,
            loss=report.loss,
            gradient_norm=None if skipped else report.gradient_norm,
            learning_rate=rate,
            label_tokens=report.label_count,
            seconds=seconds,
            tokens_per_second=train.batches.at(step)[1] * self.config.data.sequence_length / seconds,
            sent_bytes=self.fabric.meter.sent,
            loss_scale=None if scale is None else scale.value,
        )

    def _batches(self, step: int) -> list[Batch]:
        """The global micro-batches of a step; they depend on the data order and the step alone."""
        train, seed = self.config.train, self.config.data.seed
        first, size = train.batches.at(step - self.stretch.start)
        numbers = order(seed, self.text.num_sequences, first, size)
        # Dropout draws by a row's place in the order of data, which no plan changes.
        return [
            replace(self.text.batch(part), first_row=self.stretch.rows + first + micro * train.micro_batch, seed=seed)
            for micro, part in enumerate(numbers.reshape(-1, train.micro_batch))
        ]

    def _saves(self, stack: ExitStack) -> Saves:
        run, fabric = self.config.run, self.fabric
        beside = stack.enter_context(fabric.second_world(run.timeout_seconds)) if run.save_async else None
        return Saves(run.folder / CHECKPOINTS, fabric, keep=run.keep, beside=beside)

    def _progress(self, step: int) -> Progress:
        running: dict[str, float] = {}
        if self.scale is not None:
            running |= {"loss_scale": self.scale.value, "finite_steps": self.scale.finite_steps}
        if self.held_out is not None:
            running |= self.held_out.running()
        return Progress(step=step, text=self.text.fingerprint, config=run_settings(self.whole), running=running)

    def _introduce(self, folder: Path, display: Display) -> None:
        """Write what the run is, for the report and for `verify`, and say it."""
        config, text = self.config, self.text
        whole = outline(config.model.settings())  # this rank may hold parts
        parameters = whole.num_parameters()
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        described = {
            "plan": str(config.plan),
            "world_size": config.plan.world_size,
            "model": config.model.settings(),
            "num_tokens": config.data.sequence_length,
            "batch": config.train.micro_batch,
            "accumulate": config.train.accumulate,
            "dtype": config.train.precision,
            "parameters": parameters,
            "unigram_entropy": text.unigram_entropy,
            "steps": config.train.steps,
            "tokenizer": config.data.tokenizer,
            "data": {
                "files": text.num_files,
                "documents": text.num_documents,
                "tokens": text.num_tokens,
                "sequences": text.num_sequences,
            },
            "versions": {"seqloom": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        }
        (folder / "run.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
        for note in (*text.notes, *filter(None, [self.note])):
            display.say(note)
        display.say(
            f"{type(whole).__name__} of {parameters:,} parameters, plan '{config.plan}' on "
            f"{counted(config.plan.world_size, 'process')}, {counted(text.num_sequences, 'sequence')} of "
            f"{counted(text.sequence_length, 'token')} from {counted(text.num_files, 'file')}."
        )
        display.say(
            f"Guessing each token from how often it occurs would cost {text.unigram_entropy:.3f} nats "
            "(the text's unigram entropy)."
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _held_out(config: Config, tokenizer: Tokenizer) -> HeldOut | None:
    if config.eval is None:
        return None
    text = load_text(config.eval.as_data(config.data), tokenizer)
    return HeldOut(text, min(text.num_sequences, config.eval.sequences or text.num_sequences))


def _optimizer(model: PreTrainedModel, train: TrainConfig, fabric: Fabric) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and leaves norms and biases alone."""
    return adamw(
        model,
        fabric,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        betas=train.betas,
        epsilon=train.epsilon,
        only_matrices=True,
    )


def _restore(
    config: Config, text: PackedText, model: PreTrainedModel, optimizer: torch.optim.Optimizer, fabric: Fabric
) -> Progress | None:
    """Load the newest checkpoint, if there is one; returns how far it had come."""
    folder = config.run.folder
    path = newest(folder / CHECKPOINTS)
    progress = read_progress(path) if path is not None else None
    step = progress.step if progress is not None else 0
    extremes = torch.tensor([step, -step], device=fabric.device)
    most, least = all_reduce_(extremes, fabric.world, "max").tolist()
    if most != -least:
        raise CheckpointError(
            f"The ranks see checkpoints of step {-least} and of step {most}; {folder} must be one folder, "
            "shared by all machines."
        )
    if path is None or progress is None:
        return None
    compare_text(path, progress, text)  # what this machine holds of it
    load(path, model, optimizer, fabric, seed=config.train.seed)
    return progress
