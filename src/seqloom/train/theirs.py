"""Another system's schedule in the words of `train`: its units, its counting and its defaults."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from seqloom.dialects import Ledger
from seqloom.errors import counted
from seqloom.train.batches import Batches

_STYLES = {
    "cosine": "cosine",
    "cosinewithwarmuplr": "cosine",
    "cosineannealinglr": "cosine",
    "linear": "linear",
    "linearwithwarmuplr": "linear",
    "polynomialwithwarmuplr": "linear",
    "constant": "constant",
    "constantwarmuplr": "constant",
    "wsd": "wsd",
}
"""Their schedules that are one of ours."""

_PLAIN = {"weight_decay": "weight_decay", "epsilon": "epsilon", "initial_loss_scale": "initial_loss_scale"}


class Schedule:
    """What settings say of the schedule, under the names of `Translation.train`'s, and what they leave unsaid.

    own: keys of `train` that the user sets, with their values; nothing is made or refused of them. Notes go to the
    ledger, under the names of `train`'s keys.
    """

    def __init__(
        self, ledger: Ledger, said: Mapping[str, Any], unsaid: Mapping[str, Any], own: Mapping[str, Any]
    ) -> None:
        self.ledger, self.said, self.unsaid, self.own = ledger, said, unsaid, own

    def get(self, name: str) -> Any:
        """As said; else their default, noted as such under the key of `train` that it enters."""
        if name in self.said or name not in self.unsaid:
            return self.said.get(name)
        return self.unsaid[name]

    def number(self, name: str) -> float | None:
        """A finite number from 0, None where there is none; anything else is refused."""
        value = self.get(name)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if isinstance(value, bool) or not isfinite(number) or number < 0:
            self.ledger.refuse(f"schedule.{name}", f"The settings' {name} is {str(value)[:60]!r}, no number from 0 on.")
            return None
        return number

    def count(self, name: str) -> int | None:
        """A whole number from 1, None where there is none; -1 and 0 stand for none."""
        if self.get(name) in (-1, "-1"):
            return None
        return int(self.number(name) or 0) or None

    def in_samples(self, name: str, length: int | None) -> int | None:
        """A number of sequences, said as such or in tokens."""
        samples, tokens = self.count(f"{name}samples"), self.count(f"{name}tokens")
        if samples is not None or tokens is None:
            return samples
        if length is None:
            self.ledger.refuse(
                f"schedule.{name}tokens",
                f"The settings count {tokens:,} tokens and do not say how long sequences are; "
                "add data.sequence_length=N.",
            )
            return None
        return max(1, tokens // length)

    def steps(self, batches: Batches, length: int | None) -> int | None:
        """Optimizer steps of the run, None where the settings do not tell."""
        steps, samples = self.count("steps"), self.in_samples("", length)
        if steps is not None or samples is None:
            return steps
        found = steps_to(batches, samples)
        self._note("train.steps", "mapped", f"{counted(found, 'step')} take {counted(samples, 'sequence')}.", found)
        return found

    def keys(self, steps: int, batches: Batches, length: int | None) -> dict[str, Any]:
        """The keys of `train` but for its steps and batches; `steps`: of the whole run."""
        found: dict[str, Any] = self._rate() | self._optimizer()
        style = self.own.get("schedule", found.get("schedule", "cosine"))
        by_samples = self._by_samples(length)
        unit, total = ("samples", batches.consumed(steps)) if by_samples else ("steps", steps)
        end = self.in_samples("decay_", length) if by_samples else self.count("decay_steps")
        warmup = self._warmup(end or total, by_samples, length)
        if warmup:
            found[f"warmup_{unit}"] = warmup
            why = "The first step moves already; there its rate is 0, and warm-up lags behind by this one step."
            self._note("train.warmup", "changed", why, warmup)
        if style == "wsd":
            found |= self._stable(unit)
        elif style != "constant" and ((end is not None and end != total) or (by_samples and not warmup)):
            if (end or total) <= warmup:
                self._refuse(
                    f"decay_{unit}",
                    f"The rate falls until {unit[:-1]} {end}, which is not after {warmup} {unit} of warm-up; "
                    f"set train.decay_{unit}=N.",
                )
            else:
                found[f"decay_{unit}"] = (end or total) - warmup
                why = f"They count to the end of the fall, {end or total:,}; here it is its length after warm-up."
                self._note(f"train.decay_{unit}", "mapped", why, (end or total) - warmup)
        return {key: value for key, value in found.items() if key not in self.own}

    def _by_samples(self, length: int | None) -> bool:
        """Whether the rate follows the sequences consumed: where its own counts do, or the run's alone does."""
        names = ("warmup_", "decay_", "wsd_")
        samples = any(self.count(f"{name}{unit}") for name in names for unit in ("samples", "tokens"))
        steps = any(self.count(f"{name}steps") for name in names)
        if samples and steps:
            self.ledger.refuse(
                "schedule", "The settings count warm-up and decay in steps and in samples; use one unit."
            )
        return samples or (not steps and self.count("steps") is None and self.in_samples("", length) is not None)

    def _warmup(self, total: int, by_samples: bool, length: int | None) -> int:
        share = self.number("warmup_share")
        if share is not None:
            return int(share * total)
        return (self.in_samples("warmup_", length) if by_samples else self.count("warmup_steps")) or 0

    def _rate(self) -> dict[str, Any]:
        """The highest rate, the schedule and its floor."""
        found: dict[str, Any] = {}
        rate, floor, style = self.number("learning_rate"), self.number("final_learning_rate"), self.get("decay")
        if rate is not None:
            found["learning_rate"] = rate
        else:
            self._note("train.learning_rate", "changed", "Not read from these settings: seqloom's default.", None)
        if style is not None:
            named = _STYLES.get(str(style).lower())
            if named is None:
                self._refuse(
                    "schedule",
                    f"The settings' schedule is '{str(style)[:60]}', which train.schedule has not; choose one by "
                    "train.schedule=cosine, linear, constant or wsd.",
                )
            else:
                found["schedule"] = named
                self._defaulted("decay", "schedule", style)
            if str(style).lower().startswith("poly"):
                self._note("train.schedule", "changed", "A polynomial of power 1, its default, is linear.", style)
        else:
            self._note("train.schedule", "changed", "Not read from these settings: seqloom's default, cosine.", None)
        constant = self.own.get("schedule", found.get("schedule")) == "constant"
        if floor is not None and not constant and rate:
            if floor > rate:
                self._refuse(
                    "final_learning_rate_share",
                    f"The rate would fall from {rate:g} up to {floor:g}; set train.final_learning_rate_share=S.",
                )
            else:
                found["final_learning_rate_share"] = floor / rate
                self._defaulted("final_learning_rate", "final_learning_rate_share", 0.0)
        if self.number("first_learning_rate"):
            self._note(
                "train.warmup", "changed", "Warm-up begins at a rate of 0 here.", self.get("first_learning_rate")
            )
        return found

    def _optimizer(self) -> dict[str, Any]:
        """AdamW's numbers, the clip and the seed."""
        name = self.get("optimizer")
        lowered = str(name or "adamw").lower()
        if "adam" not in lowered or "pma" in lowered:
            self.ledger.refuse(
                "schedule.optimizer",
                f"The optimizer is '{str(name)[:60]}'; seqloom trains with AdamW alone, so say that.",
            )
        found: dict[str, Any] = {}
        for name, key in _PLAIN.items():
            if (value := self.number(name)) is not None:
                found[key] = value
                self._defaulted(name, key, value)
        if (window := self.count("loss_scale_window")) is not None:
            found["loss_scale_window"] = window
        betas = self.get("betas")
        if not isinstance(betas, list):
            betas = [self.number("beta1"), self.number("beta2")]
            for name in ("beta1", "beta2"):
                self._defaulted(name, "betas", self.get(name))
        if None not in betas:
            found["betas"] = betas
        clip = self.number("clip")
        if clip is not None or "clipped" in self.said:
            off = self.get("clipped") is False or not clip
            found["clip"] = None if off else clip
            self._defaulted("clipped" if off and "clipped" in self.unsaid else "clip", "clip", found["clip"])
        if (seed := self.number("seed")) is not None:
            found["seed"] = int(seed)
            self._defaulted("seed", "seed", int(seed))
        return found

    def _stable(self, unit: str) -> dict[str, Any]:
        """How long the fall at the end of warm-up-stable-decay is."""
        length = self.count(f"wsd_{unit}")
        if length is None:
            self._refuse(
                f"decay_{unit}", f"The settings do not say how long wsd's fall at the end is; set train.decay_{unit}=N."
            )
            return {}
        why = "The rate falls linearly over the run's last ones, whatever curve theirs takes."
        self._note(f"train.decay_{unit}", "changed", why, length)
        return {f"decay_{unit}": length}

    def _defaulted(self, name: str, key: str, value: Any) -> None:
        if name in self.unsaid and name not in self.said:
            self._note(f"train.{key}", "mapped", f"Not said: {_shown(value)} for {name}, the default there.", value)

    def _note(self, key: str, verdict: Any, why: str, value: Any) -> None:
        """A note, unless the user sets the key."""
        if key.removeprefix("train.") not in self.own:
            self.ledger.note(key, verdict, why, value=value)

    def _refuse(self, key: str, why: str) -> None:
        """Refuse, unless the user sets the key."""
        if key not in self.own:
            self.ledger.refuse(f"train.{key}", why)


def steps_to(batches: Batches, samples: int) -> int:
    """The fewest steps that consume so many sequences.

    >>> steps_to(Batches(8, (4, 2, 20)), 18), steps_to(Batches(8), 17)
    (4, 3)
    """
    low, high = 0, samples  # every step consumes one at least
    while low < high:
        middle = (low + high) // 2
        if batches.consumed(middle) < samples:
            low = middle + 1
        else:
            high = middle
    return low


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
