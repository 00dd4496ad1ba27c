"""What `benchmarks.training` times: a whole training step by seqloom's plans, by torch composed by hand, by Trainer.

All start from the same weights and take the same batch: forward, the mean loss over all labels, backward, sums of
gradients, clipping by the global norm, AdamW. A peer that is missing is skipped with a message.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from benchmarks.tensor_contenders import Contender, Prepared, Unavailable, nothing
from benchmarks.tensor_peers import llama_plan
from benchmarks.tensor_problems import Llama, Results
from seqloom import Batch, Fabric, Plan, parallelize
from seqloom.model import Float64Islands
from seqloom.train import adamw, apply_gradients, compute_gradients

RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BASE = "one process"


@dataclass(frozen=True)
class Step(Llama):
    """One training step of a Llama on `rows` sequences of `tokens` tokens each, float32."""

    rows: int = 4

    @property
    def title(self) -> str:
        """The problem in words."""
        return f"{super().title} in each of {self.rows} sequences; clip and AdamW"

    def batch(self) -> Batch:
        """The same tokens in every process."""
        draw = torch.Generator().manual_seed(self.tokens)
        return Batch.from_tokens(torch.randint(self.vocabulary, (self.rows, self.tokens), generator=draw))

    def losses(self, steps: int) -> list[float]:
        """What each of the first steps loses, in float64 on one device."""
        with Float64Islands():
            run = _plain_step(self.model(torch.float64), self.batch())
            return [float(run()["loss"]) for _ in range(steps)]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)


def _loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mean over all labels of these rows, by the model's own forward."""
    positions = torch.arange(batch.num_tokens)[None]
    logits = model(input_ids=batch.tokens, position_ids=positions, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def _plain_step(model: PreTrainedModel, batch: Batch) -> Callable[[], Results]:
    """A step of a model whose parameters an optimizer and a norm may take as they are."""
    optimizer = _optimizer(model)

    def run() -> Results:
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(model, batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, norm)
        optimizer.step()
        return {"loss": loss.detach()}

    return run


def _one_process(case: Step) -> Prepared:
    """The untouched model in the first process; the others wait."""
    if distributed.get_rank() > 0:
        return Prepared(nothing, nothing)
    return Prepared(_plain_step(case.model(), case.batch()), lambda found: found)


def _ours(case: Step, plan: str) -> Prepared:
    fabric = Fabric.build(Plan.parse(plan), "cpu")
    model = parallelize(case.model(), fabric)
    optimizer = adamw(model, fabric, learning_rate=RATE, weight_decay=DECAY, betas=BETAS)
    batch = case.batch()

    def run() -> Results:
        report = compute_gradients(model, [batch], fabric, precision="float32", chunk_tokens=1024)
        apply_gradients(model, optimizer, report, clip=CLIP)
        return {"loss": torch.tensor(report.loss)}

    return Prepared(run, lambda found: found, close=fabric.close)


def _torch(case: Step, data: int, tensor: int) -> Prepared:
    """FSDP2 over `data` groups of `tensor` ranks under torchtitan's tensor plan with sequence parallelism."""
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    model, batch = case.model(), case.batch()
    if tensor > 1:
        parallelize_module(model, mesh["tensor"], llama_plan(case.layers, sequence_parallel=True, split_loss=False))
    if data > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    mine = slice(*(case.rows * (mesh["data"].get_local_rank() + end) // data for end in (0, 1)))
    run = _plain_step(model, Batch(batch.tokens[mine], batch.labels[mine]))

    def whole(found: Results) -> Results:
        loss = found["loss"].clone()
        distributed.all_reduce(loss)  # every row has as many labels, so a mean of means is the mean
        return {"loss": loss / distributed.get_world_size()}

    return Prepared(run, whole)


def _trainer(case: Step) -> Prepared:
    """Trainer's own step in the first process, as if it had been started alone; the others wait."""
    if find_spec("accelerate") is None:
        raise Unavailable("transformers' Trainer takes accelerate, which is not installed here")
    if distributed.get_rank() > 0:
        return Prepared(nothing, nothing)
    batch = case.batch()
    with patch.dict(os.environ):
        for name in LAUNCHED:
            os.environ.pop(name, None)
        trainer, folder = _made_trainer(case)
    trainer.current_gradient_accumulation_steps = 1  # which its loop sets
    inputs = {"input_ids": batch.tokens, "labels": batch.tokens}  # Trainer's model shifts them itself

    def run() -> Results:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, dict(inputs))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        return {"loss": loss.detach()}

    return Prepared(run, lambda found: found, close=folder.cleanup)


def _made_trainer(case: Step) -> "tuple[Any, TemporaryDirectory[str]]":
    from transformers import Trainer, TrainingArguments

    folder = TemporaryDirectory()
    arguments = TrainingArguments(
        output_dir=folder.name,
        use_cpu=True,
        learning_rate=RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        per_device_train_batch_size=case.rows,
        report_to=[],
        save_strategy="no",
    )
    model = case.model()
    return Trainer(model=model, args=arguments, optimizers=(_optimizer(model), None)), folder


def contenders(ranks: int) -> tuple[Contender, ...]:
    """Who computes a step on so many processes."""
    plans = {
        1: ("data=1",),
        2: ("data=2", "data=2 zero=3", "ring=2", "ulysses=2", "tensor=2"),
        4: ("data=4 zero=3", "data=2 tensor=2", "data=2 zero=3 tensor=2", "ring=2 tensor=2"),
    }[ranks]
    torchs = {1: (), 2: ((2, 1), (1, 2)), 4: ((4, 1), (2, 2))}[ranks]
    return (
        Contender(BASE, "one", _one_process),
        Contender("Hugging Face Trainer, one process", "one", _trainer),
        *(Contender(f"seqloom {plan}", "ours", partial(_ours, plan=plan)) for plan in plans),
        *(Contender(_name(data, tensor), "peer", partial(_torch, data=data, tensor=tensor)) for data, tensor in torchs),
    )


def _name(data: int, tensor: int) -> str:
    parts = [f"FSDP2 {data}"] * (data > 1) + [f"DTensor tp+sp {tensor}"] * (tensor > 1)
    return "torch " + " x ".join(parts)
