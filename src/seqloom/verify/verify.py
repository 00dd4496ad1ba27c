"""Prove that a plan computes what one device computes: same model, same weights, same batches."""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from seqloom.errors import DataError, ModelError, NumericsError
from seqloom.fabric import Fabric, broadcast_
from seqloom.fabric.launch import run_local
from seqloom.geometry import Mask
from seqloom.model import build_model, outline, parallelize, probe, whole_tensors
from seqloom.plan import ModelShape, Plan, check, without_dropout
from seqloom.sequence import Batch
from seqloom.train import apply_gradients, compute_gradients
from seqloom.verify.compare import MEASURES, Verdict, compare, number_error, tensor_errors
from seqloom.verify.lift import Float64Islands
from seqloom.verify.oracle import Trajectory, one_device_steps, visible
from seqloom.verify.parting import Parting, first_parting, later_parting

LEARNING_RATE = 1e-3
CLIP = 1.0
CHUNK_TOKENS = 64  # small, so that even short sequences cross the edges of chunks


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to verify.

    config: a Hugging Face configuration. weights: a folder with the model's weights, or None for
    random ones. num_tokens: length of a sequence. batch: rows of a micro-batch on each data rank.
    accumulate: micro-batches a step. steps: optimizer steps (AdamW, clipped). documents: lengths
    packed into each row. rule: who sees whom inside a document, as `Batch.rule`; its `allowed` must
    be a module-level function, since it travels to processes. dtype: float64, float32 or bf16 (autocast).
    dropout: what every dropout of the configuration is set to, on both sides; the reference then draws the
    coins of the split run. None sets them to 0.
    """

    config: Mapping[str, Any]
    plan: Plan
    num_tokens: int
    weights: Path | None = None
    batch: int = 1
    accumulate: int = 1
    steps: int = 1
    documents: tuple[int, ...] | None = None
    rule: Mask = Mask()
    dtype: str = "float64"
    dropout: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise before any process starts what would fail later."""
        if self.dtype not in MEASURES:
            raise ModelError(f"dtype '{self.dtype}' is unknown; it is one of {', '.join(MEASURES)}.")
        for name in ("batch", "accumulate", "steps", "num_tokens"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}; it must be above 0 and below 1, or left out for none.")
        if self.dropout is not None and not dropouts(self.config):
            raise ModelError(f"{self.config['model_type']} has no dropout that can be split; leave dropout out.")
        check(self.plan, ModelShape.from_config(self.settings), self.num_tokens)
        blind = self.rule.allowed is not None and not visible(self.batches()[0][0], 0).any(1).all()
        if blind:
            raise DataError(
                "The rule allows some tokens to see nothing, of which transformers' attention makes an average of "
                "everything; allow each token at least itself."
            )
        if not all(sum(batch.label_count for batch in step) for step in self.batches()):
            raise DataError("No token predicts another, since every document is one token long; give longer documents.")

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with every dropout at `dropout`."""
        if self.dropout is None:
            return without_dropout(self.config)[0]
        return {**self.config, **dict.fromkeys(dropouts(self.config), self.dropout)}

    def batches(self) -> list[list[Batch]]:
        """For each step its global micro-batches of random tokens."""
        random = torch.Generator().manual_seed(self.seed)
        rows = self.plan.data * self.batch
        documents = [self.documents] * rows if self.documents else None
        vocab = self.config["vocab_size"]
        return [
            [
                Batch.from_tokens(
                    torch.randint(vocab, (rows, self.num_tokens), generator=random),
                    documents,
                    rule=self.rule,
                    first_row=(step * self.accumulate + micro) * rows,
                    seed=self.seed,
                )
                for micro in range(self.accumulate)
            ]
            for step in range(self.steps)
        ]

    def model(self) -> PreTrainedModel:
        """The model, the same on every rank, in float32 or float64."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        return build_model(self.settings, weights=self.weights, dtype=dtype, seed=self.seed)


def dropouts(config: Mapping[str, Any]) -> list[str]:
    """The settings by which this model drops out, where a split run can: its own and its family's."""
    family: dict[str, Any] = AutoConfig.for_model(**config).to_dict()
    asked = {key: 0.5 for key, value in family.items() if isinstance(value, float | int) and _drops(key)}
    named = [said.partition("=")[0] for said in without_dropout(asked)[1]]
    return [key for key in named if not ModelShape.from_config({**without_dropout(config)[0], key: 0.5}).unsupported]


def _drops(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")


def verify(case: Case) -> Verdict:
    """Run `case` on local processes, as many as the plan takes, and compare with one device.

    Raises what `Case.check` finds before any process starts.
    """
    case.check()
    probe(
        outline(case.settings), case.plan
    )  # a model that cannot be built is told in one sentence, not by a process that ends
    return run_local(case.plan.world_size, verify_here, case)[0]


def verify_here(case: Case) -> Verdict:
    """`verify` inside processes that are running already; every rank calls it and gets the verdict."""
    case.check()
    fabric = Fabric.build(case.plan)
    with Float64Islands() if case.dtype == "float64" else nullcontext():
        reference = _reference(case, fabric)
        run = _split(case, fabric)
        verdict = compare(run, reference, fabric, case.dtype)
        if not verdict.equal:
            verdict = replace(verdict, parting=_parting(case, fabric, run, reference))
    fabric.close()
    if case.dropout is not None:
        return replace(verdict, dropouts=tuple(f"{key}={case.dropout}" for key in dropouts(case.config)))
    return replace(verdict, dropouts_off=without_dropout(case.config)[1])


def _parting(case: Case, fabric: Fabric, run: Trajectory, reference: Trajectory) -> Parting:
    """Where the two runs part first; every rank calls it and gets the same."""
    measure = MEASURES[case.dtype]
    oracle = case.model().to(fabric.device) if fabric.rank == 0 else None
    if oracle is not None:
        oracle.set_attn_implementation("eager")  # as the reference ran
    model = parallelize(case.model(), fabric)
    found, order = first_parting(
        oracle, model, case.batches()[0][0], fabric, precision=case.dtype, tolerance=measure.tolerance
    )
    if found is not None:
        return found
    errors = tensor_errors(run.gradients, reference.gradients, measure.floor, fabric).tolist()
    loss = number_error(run.losses[:1], reference.losses[:1], fabric)
    return later_parting(dict(zip(reference.gradients, errors, strict=True)), loss, order, tolerance=measure.tolerance)


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
            run.gradients = {name: g.clone() for name, g in whole_tensors(model, fabric, "gradient").items()}
        with suppress(NumericsError):  # the comparison says where a loss that is no number comes from
            apply_gradients(model, optimizer, report, clip=CLIP)
    run.parameters = whole_tensors(model, fabric, "parameter")
    return run
