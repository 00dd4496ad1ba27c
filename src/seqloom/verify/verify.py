"""Prove that a plan computes what one device computes: same model, same weights, same batches."""

from collections.abc import Mapping, MutableMapping
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
from seqloom.model import Float64Islands, build_model, outline, parallelize, probe, whole_tensors
from seqloom.plan import ModelShape, Plan, check, micro_batches_needed, without_dropout
from seqloom.sequence import Batch
from seqloom.train import adamw, apply_gradients, compute_gradients
from seqloom.verify.compare import MEASURES, Verdict, compare, number_error, tensor_errors
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
    accumulate: micro-batches a step, at
    least: see `micro_batches`. steps: optimizer steps (AdamW, clipped). documents: lengths
    packed into each row. rule: who sees whom inside a document, as `Batch.rule`; its `allowed` must
    be a module-level function, since it travels to processes. dtype: float64, float32 or bf16 (autocast).
    dropout: what every dropout of the model is set to, on both sides; the reference then drops what the
    plan's coins say. None sets them to 0.
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
        check(self.plan, ModelShape.from_config(without_dropout(self.config)[0]), self.num_tokens)
        if self.dropout is not None and not 0 < self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}; it must be above 0 and below 1, or left out for none.")
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
        """The configuration with its dropouts at `dropout`."""
        without = without_dropout(self.config)[0]
        if self.dtype == "float64" and without.get("reorder_and_upcast_attn"):
            # GPT-2's scores in float32 where it attends by itself, which it insists on; here they are wider.
            without["reorder_and_upcast_attn"] = False
        return without if self.dropout is None else {**without, **dict.fromkeys(self.dropouts, self.dropout)}

    @property
    def dropouts(self) -> tuple[str, ...]:
        """The settings by which the model's family drops out, those left out that no split run can have."""
        without = without_dropout(self.config)[0]
        numbers = {
            key: value
            for key, value in AutoConfig.for_model(**without).to_dict().items()
            if isinstance(value, float | int) and not isinstance(value, bool)
        }
        off = without_dropout(dict.fromkeys(numbers, 0.5))[1]  # of all its numbers those that are dropouts
        keys = sorted(said.partition("=")[0] for said in off)
        return tuple(key for key in keys if not ModelShape.from_config({**without, key: 0.5}).unsupported)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step: `accumulate`, or more where the plan's schedule needs more."""
        return micro_batches_needed(self.plan, self.accumulate)

    @property
    def on_one_device(self) -> str:
        """What its run on one device depends on; cases of equal words share that run."""
        plan = Plan(data=self.plan.data) if self.dropout is None else self.plan  # the plan's coins say what drops
        return repr(replace(self, plan=plan, accumulate=self.micro_batches))

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
                    first_row=(step * self.micro_batches + micro) * rows,
                    seed=self.seed,
                )
                for micro in range(self.micro_batches)
            ]
            for step in range(self.steps)
        ]

    def model(self) -> PreTrainedModel:
        """The model, the same on every rank, in float32 or float64."""
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        return build_model(self.settings, weights=self.weights, dtype=dtype, seed=self.seed)


def verify(case: Case) -> Verdict:
    """Run `case` on local processes, as many as the plan takes, and compare with one device.

    Raises what `Case.check` finds before any process starts.
    """
    case.check()
    # A model that cannot be built or split is told in one sentence, not by a process that ends.
    probe(outline(case.settings), case.plan)
    return run_local(case.plan.world_size, verify_here, case)[0]


def verify_here(case: Case, known: MutableMapping[str, Trajectory] | None = None) -> Verdict:
    """`verify` inside processes that are running already; every rank calls it and gets the verdict.

    known: runs on one device by `Case.on_one_device`, the same on every rank; read, and added to.
    """
    case.check()
    fabric = Fabric.build(case.plan)
    with Float64Islands() if case.dtype == "float64" else nullcontext():
        reference = (known or {}).get(case.on_one_device) or _reference(case, fabric)
        if known is not None:
            known[case.on_one_device] = reference
        run = _split(case, fabric)
        verdict = compare(run, reference, fabric, case.dtype)
        if not verdict.equal:
            verdict = replace(verdict, parting=_parting(case, fabric, run, reference))
    fabric.close()
    on = {} if case.dropout is None else dict.fromkeys(case.dropouts, f"={case.dropout}")
    off = [said for said in without_dropout(case.config)[1] if said.partition("=")[0] not in on]
    return replace(verdict, dropouts=tuple(key + value for key, value in on.items()), dropouts_off=tuple(off))


def _parting(case: Case, fabric: Fabric, run: Trajectory, reference: Trajectory) -> Parting:
    """Where the two runs part first; every rank calls it and gets the same."""
    measure = MEASURES[case.dtype]
    oracle = case.model().to(fabric.device) if fabric.rank == 0 else None
    if oracle is not None:
        oracle.set_attn_implementation("eager")  # as the reference ran
    model = parallelize(case.model(), fabric, num_tokens=case.num_tokens)
    found, order = first_parting(
        oracle, model, case.batches()[0][0], fabric, precision=case.dtype, tolerance=measure.tolerance
    )
    if found is not None:
        return found
    errors = tensor_errors(run.gradients, reference.gradients, measure.floor, fabric).tolist()
    loss = number_error(run.losses[:1], reference.losses[:1], fabric)
    return later_parting(dict(zip(reference.gradients, errors, strict=True)), loss, order, tolerance=measure.tolerance)


def _optimizer(model: PreTrainedModel, dtype: str, fabric: Fabric | None = None) -> torch.optim.Optimizer:
    epsilon = MEASURES[dtype].adam_epsilon
    return adamw(model, fabric, learning_rate=LEARNING_RATE, weight_decay=0.1, epsilon=epsilon)


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
    model = parallelize(case.model(), fabric, num_tokens=case.num_tokens)
    optimizer = _optimizer(model, case.dtype, fabric)
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
