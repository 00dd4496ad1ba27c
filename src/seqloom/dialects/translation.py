"""From another system's degrees to a plan with notes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from seqloom.dialects.ledger import Ledger, Note, plain, shown
from seqloom.dialects.models import full
from seqloom.errors import DialectError, ModelError, PlanError, counted
from seqloom.plan import ModelShape, Plan, reasons

OURS = ("tensor", "ulysses", "ring", "data", "pipeline")
"""The axes in seqloom's own rank order, fastest first."""

MOST_LAYERS = 100_000
"""The most layers of a model that is read."""

MOST_RANKS = 65_536
"""The largest degree that is read."""


@dataclass(frozen=True)
class Translation:
    """Another system's settings as seqloom's.

    model: a Hugging Face configuration, or None where the settings name no model that is known.
    train: sequence_length, micro_batch (rows a data rank), accumulate, global_batch, ramp_up, recompute,
        precision and schedule, as far as they are said.
    """

    plan: Plan
    model: dict[str, Any] | None
    train: dict[str, Any]
    notes: tuple[Note, ...]

    @property
    def world_size(self) -> int:
        """The number of processes the plan takes."""
        return self.plan.world_size

    def as_json(self) -> dict[str, Any]:
        """The whole as JSON can hold it."""
        return {
            "plan": {field.name: getattr(self.plan, field.name) for field in fields(self.plan)},
            "world_size": self.world_size,
            "model": plain(self.model),
            "train": plain(self.train),
            "notes": notes_as_json(self.notes),
        }


def notes_as_json(notes: Sequence[Any]) -> list[dict[str, Any]]:
    """Notes as JSON can hold them."""
    return [{"option": n.option, "value": n.value, "verdict": n.verdict, "why": n.why} for n in notes]


@dataclass(frozen=True)
class Draft:
    """What a dialect has read: fields of Plan, the model, the training, and their rank order.

    order: the axes in their rank order, fastest first; those of one rank do not matter. peculiar: what in
    their rank order no order of axes tells, in words, or None.
    """

    plan: Mapping[str, Any]
    model: dict[str, Any] | None
    train: dict[str, Any]
    order: tuple[str, ...] = OURS
    peculiar: str | None = None


def conclude(ledger: Ledger, draft: Draft, keep_order: bool) -> Translation:
    """The plan of a draft, with what the model and seqloom's own legality say about it as notes.

    Raises DialectError with every reason why there is none.
    """
    ledger.stop()
    try:
        plan = Plan(**_shares(ledger, dict(draft.plan)))
    except PlanError as error:
        raise DialectError(error.reasons, ledger.notes) from error
    plan = _order(ledger, plan, draft, keep_order)
    if plan.pipeline > 1 and plan.stages is None:
        why = "Not said: there stages have as many layers each, as far as that goes; here they balance their cost."
        ledger.note("stages", "changed", f"{why} stages= in the plan says it.")
    length = draft.train.get("sequence_length")
    model = long_enough(ledger, draft.model, length)
    if model is not None:
        _legality(ledger, plan, model, length)
    ledger.stop()
    return Translation(plan, model, draft.train, tuple(ledger.notes))


def _shares(ledger: Ledger, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with ZeRO where it shares something out, and with shares where some wait in host memory."""
    ranks = fields.get("data", 1) * fields.get("ring", 1) * fields.get("ulysses", 1)
    groups, stage = fields.get("zero_replicas", 1), fields.get("zero", 0)
    if stage and groups >= ranks:
        one = "one rank" if ranks == 1 else f"each of {ranks} ranks"
        ledger.note("zero", "no effect", f"Stage {stage} would share out among what is {one}; zero=0.", value=stage)
        fields |= {"zero": 0, "zero_replicas": 1}
    if fields.get("offload") and fields.get("zero", 0) < 2:
        fields |= {"zero": 2} if ranks > 1 else {"offload": False}
        why = "Shares wait in host memory, so zero=2 shares gradients out too; the result is the same."
        alone = "seqloom offloads shares of ZeRO, and there is one rank; nothing waits in host memory."
        ledger.note("offload", "changed", why if ranks > 1 else alone, value=True)
    return fields


def _order(ledger: Ledger, plan: Plan, draft: Draft, keep: bool) -> Plan:
    """The plan with their rank order where it is asked for; else a note where it differs."""
    degrees = {axis: getattr(plan, axis) for axis in OURS}
    theirs = [axis for axis in draft.order if degrees[axis] > 1]
    ours = [axis for axis in OURS if degrees[axis] > 1]
    if theirs == ours and draft.peculiar is None:
        return plan
    said = draft.peculiar or f"{', '.join(theirs)} (fastest first)"
    if not keep:
        way = f"order={'-'.join(draft.order)} in the plan, as --keep-rank-order writes it, keeps theirs."
        ledger.note(
            "rank order",
            "changed",
            f"The degrees are kept, the rank order is not: theirs is {said}, ours {', '.join(ours)}; "
            + ("no order of axes tells theirs." if draft.peculiar else way),
            value="-".join(theirs),
        )
        return plan
    if draft.peculiar is not None:
        ledger.refuse("rank order", f"Their rank order cannot be kept: it is {said}, ours {', '.join(ours)}.")
        return plan
    try:
        kept = replace(plan, order="-".join(draft.order))
    except PlanError as error:
        ledger.refuse("rank order", f"Their rank order {said} cannot be kept: {error}")
        return plan
    ledger.note("rank order", "mapped", f"order={kept.order}: ranks sit where they sit there.", value=kept.order)
    return kept


def long_enough(ledger: Ledger, model: dict[str, Any] | None, length: int | None) -> dict[str, Any] | None:
    """The model with positions for the sequence: there no table of positions refuses a longer one."""
    if model is None or length is None:
        return model
    key = "n_positions" if model["model_type"] == "gpt2" else "max_position_embeddings"
    if model["model_type"] != "bloom" and isinstance(model.get(key), int) and model[key] < length:
        ledger.note(key, "changed", f"Raised from {model[key]:,} to the sequence length, {length:,}.", value=model[key])
        return {**model, key: length}
    return model


def _legality(ledger: Ledger, plan: Plan, model: dict[str, Any], length: int | None) -> None:
    """What legality says: that it cannot run yet is a note, that it never can a refusal."""
    layers = full(model).get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        ledger.refuse("model", f"A model of {shown(layers)} layers is not read; the most are {MOST_LAYERS:,}.")
        return
    try:
        shape = ModelShape.from_config(model)
    except ModelError as error:
        ledger.note("model", "mapped", f"The layout is theirs; this version cannot run the model: {error}")
        return
    uneven = plan.attention_ulysses > 1 and plan.tensor_grid.heads * plan.attention_ulysses
    said = any("do not divide evenly" in note.why for note in ledger.notes)
    if uneven and not said and (shape.heads % uneven or shape.kv_heads % uneven):
        ledger.note(
            "heads",
            "mapped",
            f"{shape.heads} query and {counted(shape.kv_heads, 'key/value head')} over {uneven} ranks do not divide "
            "evenly; seqloom deals them out unevenly or repeats key/value heads, exactly.",
            value=shape.heads,
        )
    for reason in reasons(plan, shape, length):
        if reason in shape.unsupported or " yet" in reason:
            ledger.note(
                "plan", "mapped", f"The layout is theirs; this version cannot run it: {reason}", value=str(plan)
            )
        else:
            ledger.refuse("plan", reason)
