"""Prove that a plan computes what one device computes: same model, same weights, same batches."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from seqloom.errors import DataError, ModelError
from seqloom.fabric import Fabric, broadcast_
from seqloom.fabric.launch import run_local
from seqloom.model import build_model, parallelize
from seqloom.plan import ModelShape, Plan, check
from seqloom.sequence import Batch
from seqloom.train import apply_gradients, compute_gradients
from seqloom.verify.compare import MEASURES, Verdict, compare
from seqloom.verify.lift import Float64Islands
from seqloom.verify.oracle import Trajectory, one_device_steps

LEARNING_RATE = 1e-3
CLIP = 1.0
CHUNK_TOKENS = 64  # small, so that even short sequences cross the edges of chunks


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to verify.

    config: a Hugging Face configuration. weights: a folder with the model's weights, or None for
    random ones. num_tokens: length of a sequence. batch: rows of a micro-batch on each data rank.
    accumulate: micro-batches a step. steps: optimizer steps (AdamW, clipped). documents: lengths
    packed into each row. dtype: float64, float32 or bf16 (autocast).
    """

    config: Mapping[str, Any]
    plan: Plan
    num_tokens: int
    weights: Path | None = None
    batch: int = 1
    accumulate: int = 1
    steps: int = 1
    documents: tuple[int, ...] | None = None
    dtype: str = "float64"
    seed: int = 0

    def check(self) -> None:
        """Raise before any process starts what would fail later."""
        if self.dtype not in MEASURES:
            raise ModelError(f"dtype '{self.dtype}' is unknown; it is one of {', '.join(MEASURES)}.")
        for name in ("batch", "accumulate", "steps", "num_tokens"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        check(self.plan, ModelShape.from_config(self.config), self.num_tokens)
        if not all(sum(batch.label_count for batch in step) for step in self.batches()):
            raise DataError("No token predicts another, since every document is one token long; give longer documents.")

    def batches(self) -> list[list[Batch]]:
        """For each step its global micro-batches of random tokens."""
        random = torch.Generator().manual_seed(self.seed)
        rows = self.plan.data * self.batch
        documents = [self.documents] * rows if self.documents else None
        vocab = self.config["vocab_size"]
        return [
            [
                Batch.from_tokens(torch.randint(vocab, (rows, self.num_tokens), generator=random), documents)
                for _ in range(self.accumulate)
            ]
            for _ in range(self.steps)
        ]

    def model(self) -> PreTrainedModel:
        """The model, the same on every rank, in float32 or float64."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        return build_model(self.config, weights=self.weights, dtype=dtype, seed=self.seed)


def verify(case: Case) -> Verdict:
    """Run `case` on local processes, as many as the plan takes, and compare with one device.

    Raises what `Case.check` finds before any process starts.
    """
    case.check()
    return run_local(case.plan.world_size, verify_here, case)[0]


def verify_here(case: Case) -> Verdict:
    """`verify` inside processes that are running already; every rank calls it and gets the verdict."""
    case.check()
    fabric = Fabric.build(case.plan)
    with Float64Islands() if case.dtype == "float64" else nullcontext():
        reference = _reference(case, fabric)
        verdict = compare(_split(case, fabric), reference, fabric, case.dtype)
    fabric.close()
    return verdict


def _optimizer(model: PreTrainedModel, dtype: str) -> torch.optim.Optimizer:
    epsilon = MEASURES[dtype].adam_epsilon
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, eps=epsilon)


def _reference(case: Case, fabric: Fabric) -> Trajectory:
    """The one-device run, made by rank 0 and given to all."""
    model = case.model().to(fabric.device)
    if fabric.rank == 0:
        run = one_device_steps(model, _optimizer(model, case.dtype), case.batches(), clip=CLIP, precision=case.dtype)
    else:
        empty = {name: torch.empty_like(p) for name, p in model.named_parameters() if p.requires_grad}
        run = Trajectory([0.0] * case.steps, [0.0] * case.steps, empty, {name: t.clone() for name, t in empty.items()})
    numbers = torch.tensor([run.losses, run.norms], dtype=torch.float64, device=fabric.device)
    for tensor in (numbers, *run.gradients.values(), *run.parameters.values()):
        broadcast_(tensor, fabric.world)
    losses, norms = numbers.tolist()
    return replace(run, losses=losses, norms=norms)


def _split(case: Case, fabric: Fabric) -> Trajectory:
    """The same steps under the plan, by the code that trains."""
    model = parallelize(case.model(), fabric)
    optimizer = _optimizer(model, case.dtype)
    run = Trajectory()
    for micro_batches in case.batches():
        report = compute_gradients(model, micro_batches, fabric, precision=case.dtype, chunk_tokens=CHUNK_TOKENS)
        run.losses.append(report.loss)
        run.norms.append(report.gradient_norm)
        if not run.gradients:
            run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        apply_gradients(model, optimizer, report, clip=CLIP)
    run.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run
