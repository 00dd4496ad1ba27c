"""A training run that another system's settings describe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from seqloom.dialects import UNSAID, Ledger, Note, Translation, long_enough
from seqloom.errors import counted
from seqloom.plan import Plan, few_micro_batches, reduced, shortest, shrunk
from seqloom.train.batches import Batches
from seqloom.train.config import Config
from seqloom.train.fields import read_plan
from seqloom.train.reading import checked, overriding
from seqloom.train.theirs import Schedule
from seqloom.train.tokenizer import load_tokenizer

Scale = Literal["full", "tiny"]

PROCESSES = 8
"""The most processes of a reduced run, where no launcher says how many there are."""

_LENGTH, _STEPS, _ROWS = 256, 20, 2
"""The most tokens of a sequence, steps of a run and rows of a data rank's micro-batch at reduced size."""


@dataclass(frozen=True)
class TranslatedRun:
    """A checked configuration, and a note for everything that translating settings into it took or changed."""

    config: Config
    notes: tuple[Note, ...]


def translated(
    dialect: str, found: Translation, overrides: Sequence[str], *, scale: Scale = "full", world: int | None = None
) -> TranslatedRun:
    """The run that a translation describes, with overrides such as `data.files=[a.txt]` laid over it.

    scale: `tiny` keeps the axes of the plan and the features of the model, and reduces degrees, sizes, lengths,
    batches and steps to what a small machine runs. world: processes that a launcher has started.
    Raises DialectError for what the settings leave open or seqloom has not, unless an override says it; ConfigError
    for overrides that are wrong.
    """
    return _Run(dialect, found, overrides, scale, world).made()


class _Run:
    """What is needed on the way from a translation to a configuration."""

    def __init__(
        self, dialect: str, found: Translation, overrides: Sequence[str], scale: Scale, world: int | None
    ) -> None:
        self.dialect, self.found, self.overrides = dialect, found, overrides
        self.tiny, self.world = scale == "tiny", world
        self.own = overriding(overrides)
        self.ledger = Ledger({})

    def made(self) -> TranslatedRun:
        """The configuration and its notes."""
        plan = self._plan()
        length = self._length(plan)
        model = self._model(plan, length)
        train = self._train(plan, length)
        self.ledger.stop()
        values = {"plan": str(plan), "model": model, "data": {"sequence_length": length}, "train": train}
        if "seed" in train and "seed" not in self.section("data"):
            values["data"]["seed"] = train["seed"]
        return TranslatedRun(checked(values, self.overrides, f"--from {self.dialect}"), tuple(self.ledger.notes))

    def section(self, name: str) -> Mapping[str, Any]:
        """What the user says of a section."""
        found = self.own.get(name)
        return found if isinstance(found, dict) else {}

    def _plan(self) -> Plan:
        """Theirs, reduced where that is asked for; or the user's own."""
        plan = self.found.plan
        if "plan" in self.own:
            self.ledger.note("plan", "changed", f"'{plan}' gives way to the plan of the command.")
            try:
                return read_plan(self.own["plan"])
            except ValueError:
                return plan  # `checked` says what is wrong
        if not self.tiny:
            return plan
        small = reduced(plan, self.world or PROCESSES)
        if self.world and self.world % small.world_size == 0:
            small = replace(small, data=small.data * (self.world // small.world_size))
        for field in fields(Plan):
            before, after = getattr(plan, field.name), getattr(small, field.name)
            if before != after:
                self.ledger.note(f"plan.{field.name}", "changed", f"{_word(after)} at reduced size.", value=before)
        return small

    def _length(self, plan: Plan) -> int | None:
        """Tokens of a sequence."""
        said, own = self.found.train.get("sequence_length"), self.section("data").get("sequence_length")
        if type(own) is int:
            return own
        if self.tiny:
            length = max(min(said or _LENGTH, _LENGTH), shortest(plan))
            if length != said:
                self.ledger.note("data.sequence_length", "changed", f"{length:,} at reduced size.", value=said)
            return length
        if said is None:
            self.ledger.refuse(
                "data.sequence_length",
                "The settings do not say how long sequences are; add data.sequence_length=N, in tokens.",
            )
        return said

    def _model(self, plan: Plan, length: int | None) -> dict[str, Any]:
        """The section `model`: what the settings describe, unless the user names another one."""
        model, own = self.found.model, self.section("model")
        if "path" in own:
            if model is not None:
                self.ledger.note("model", "changed", "The settings' model gives way to model.path.")
            return {}
        if model is None:
            if "config" in own:
                return {}
            self.ledger.refuse(
                "model",
                "The settings name no model that is known; add model.path=FOLDER, or model.config.KEY=VALUE for each.",
            )
            return {}
        kept = {key: value for key, value in model.items() if key not in ("dtype", "torch_dtype")}
        for key in model.keys() - kept.keys():
            self.ledger.note(f"model.{key}", "no effect", "Weights are float32; train.precision sets the arithmetic.")
        if self.tiny and length is not None:
            vocab = load_tokenizer(str(self.section("data").get("tokenizer", "bytes")), model_vocab=2**31).vocab_size
            small = shrunk(kept, plan, length, vocab=vocab)
            for key, value in small.items():
                if kept.get(key) != value:
                    self.ledger.note(f"model.{key}", "changed", f"{value} at reduced size.", value=kept.get(key))
            return {"config": small}
        return {"config": long_enough(self.ledger, kept, length)}

    def _train(self, plan: Plan, length: int | None) -> dict[str, Any]:
        """The section `train`."""
        own, said = self.section("train"), self.found.train
        batch = self._batch()
        rampup = batch.pop("rampup", None)
        batches = Batches(batch["batch"], rampup)
        schedule = Schedule(self.ledger, said.get("schedule") or {}, UNSAID[self.dialect], own)
        theirs = schedule.steps(batches, said.get("sequence_length") or length)
        mine = own["steps"] if type(own.get("steps")) is int and own["steps"] > 0 else None
        steps = mine or (min(theirs or _STEPS, _STEPS) if self.tiny else theirs)
        if steps is None:
            epochs = (said.get("schedule") or {}).get("epochs")
            passes = f" (their {epochs} epochs count passes over their data)" if epochs else ""
            self.ledger.refuse(
                "train.steps", f"The settings do not say how many steps the run has{passes}; add train.steps=N."
            )
            return {}
        if steps != theirs:
            where = "as the command says" if mine else "at reduced size"
            self.ledger.note("train.steps", "changed", f"{steps:,}, {where}.", value=theirs)
        found = schedule.keys(theirs or steps, batches, said.get("sequence_length") or length)
        found |= {"steps": steps, "precision": said.get("precision") or "float32"}
        self._scales(found, own.get("precision", found["precision"]))
        if self.tiny:
            small, ramp = self._few(plan, batch, rampup, steps)
            self._shorten(found, theirs, steps, batches, Batches(small["batch"], ramp))
            batch, rampup = small, ramp
        if rampup is not None:
            batch["rampup"] = rampup
        return found | self._fitting(batch, own)

    def _batch(self) -> dict[str, Any]:
        """Sequences of a step and of a micro-batch over all processes, and ramp-up."""
        said, data = self.found.train, self.found.plan.data
        rows, parts, batch = said.get("micro_batch"), said.get("accumulate"), said.get("global_batch")
        if rows is None and "batch" not in self.section("train"):
            self.ledger.note("train.micro_batch", "changed", "Not said: one row on each data rank.")
        rows = rows or (max(1, batch // (data * (parts or 1))) if batch else 1)
        found: dict[str, Any] = {"batch": batch or rows * data * (parts or 1), "micro_batch": rows * data}
        made = found["batch"] // found["micro_batch"]
        if parts is not None and made != parts:
            cut = f"{counted(made, 'micro-batch')} of {counted(rows, 'row')} a data rank"
            why = f"{cut}, since {parts} does not divide the batch."
            self.ledger.note("train.accumulate", "changed", why, value=parts)
        if ramp := said.get("ramp_up"):
            if ramp["start"] < found["batch"]:
                found["rampup"] = (ramp["start"], ramp["increment"], ramp["samples"])
            else:
                self.ledger.note("train.rampup", "no effect", "It starts at the full batch, so nothing grows.")
        return found

    def _scales(self, found: dict[str, Any], precision: Any) -> None:
        """Leave out what only fp16 has."""
        for key in ("initial_loss_scale", "loss_scale_window"):
            if precision != "fp16" and found.pop(key, None) is not None:
                self.ledger.note(f"train.{key}", "no effect", "Only train.precision=fp16 scales losses.")

    def _few(
        self, plan: Plan, batch: Mapping[str, int], rampup: tuple[int, int, int] | None, steps: int
    ) -> tuple[dict[str, Any], tuple[int, int, int] | None]:
        """The batch at reduced size, and a ramp-up that is over halfway through the run."""
        data = self.found.plan.data
        rows, parts = min(_ROWS, batch["micro_batch"] // data), batch["batch"] // batch["micro_batch"]
        micro, few = rows * plan.data, few_micro_batches(plan, parts)
        found = {"batch": micro * few * (2 if rampup else 1), "micro_batch": micro}
        for key, value in found.items():
            if value != batch[key]:
                self.ledger.note(f"train.{key}", "changed", f"{value} at reduced size.", value=batch[key])
        if rampup is None:
            return found, None
        start = micro * few
        ramp = (start, start, start * max(1, steps // 2))
        self.ledger.note("train.rampup", "changed", f"{list(ramp)} at reduced size.", value=list(rampup))
        return found, ramp

    def _shorten(self, found: dict[str, Any], theirs: int | None, steps: int, before: Batches, after: Batches) -> None:
        """Give warm-up and decay the share of the run that they have there."""
        for kind in ("warmup", "decay"):
            for unit in ("steps", "samples"):
                key = f"{kind}_{unit}"
                if not found.get(key):
                    continue
                old, new = theirs or steps, steps
                if unit == "samples":
                    old, new = before.consumed(old), after.consumed(new)
                value = max(1, min(round(found[key] * new / old), new // 2 if kind == "warmup" else new))
                if value != found[key]:
                    self.ledger.note(f"train.{key}", "changed", f"{value:,} at reduced size.", value=found[key])
                found[key] = value

    def _fitting(self, batch: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """The batch's keys without those that the user's own make superfluous."""
        said = own.keys() & {"batch", "accumulate", "micro_batch"}
        number = own.get("accumulate")
        if said == {"accumulate"} and type(number) is int:
            return batch | {"batch": batch["micro_batch"] * number}
        if len(said) > 1 or "micro_batch" in said:
            batch.pop("micro_batch")
        return batch


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
