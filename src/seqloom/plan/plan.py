"""The whole decision of how a run is split, as one value that prints and reads back."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from seqloom.errors import PlanError

Exchange = Literal["ring", "gather", "needed", "rsa"]
LayoutKind = Literal["zigzag", "contiguous", "striped", "balanced"]

MOST = 65_536
"""The largest degree of an axis, and the most processes of a plan."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of every mesh axis, and how attention meets the sequence axes.

    data: copies of the model, each with its own rows of the batch.
    pipeline: stages the layers are cut into.
    ring: ranks a sequence is dealt to, exchanging keys and values.
    ulysses: ranks that trade tokens for heads around attention (DeepSpeed-Ulysses).
    tensor: ranks a layer's weights are split over.
    exchange: how ring ranks see each other's keys and values: `ring` passes them around in steps,
        `gather` collects them all first, `needed` fetches only those that a rank's queries see, `rsa`
        is the ring self-attention of 2021: keys go around, then values.
    inner_ring: neighbouring ring ranks whose blocks go around among themselves before they go on to
        the next such group (a double ring); it divides `ring`. None is one ring.
    layout: which tokens a ring rank holds: `zigzag`, `contiguous`, `striped`, or `balanced`, which evens
        out the work of each batch's documents and windows.

    >>> str(Plan(ring=2, ulysses=2))
    'ring=2 ulysses=2'
    >>> Plan.parse("ring=2 layout=striped") == Plan(ring=2, layout="striped")
    True
    """

    data: int = 1
    pipeline: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    exchange: Exchange = "ring"
    inner_ring: int | None = None
    layout: LayoutKind = "zigzag"

    def __post_init__(self) -> None:
        reasons = [reason for f in fields(self) if (reason := _wrong(f.name, getattr(self, f.name)))]
        if not reasons:
            reasons = [reason for reason in (_wrong_inner_ring(self),) if reason]
        if not reasons and self.world_size > MOST:
            reasons = [f"The plan takes {self.world_size:,} processes; the most is {MOST:,}."]
        if reasons:
            raise PlanError(reasons)

    @property
    def rings(self) -> tuple[int, int]:
        """The ring as (outer, inner): groups of neighbours, and the ranks of one. Without inner_ring (1, ring).

        >>> Plan(ring=8, inner_ring=4).rings
        (2, 4)
        """
        inner = self.inner_ring or self.ring
        return self.ring // inner, inner

    @property
    def world_size(self) -> int:
        """The number of processes the plan takes."""
        return self.data * self.pipeline * self.ring * self.ulysses * self.tensor

    def __str__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(said) or "data=1"

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan as `str` prints it: fields as name=value, in any order, defaults unsaid.

        Raises PlanError with every unreadable part named.
        """
        values: dict[str, Any] = {}
        reasons: list[str] = []
        for part in text.replace(",", " ").split():
            name, equals, value = part.partition("=")
            if not equals or not value:
                reasons.append(f"'{part}' in the plan is not of the form name=value.")
            elif name not in _TYPES:
                reasons.append(f"A plan has no field '{name}'{_did_you_mean(name)}; it has {', '.join(_TYPES)}.")
            elif name in values:
                reasons.append(f"The plan names {name} twice; name it once.")
            else:
                number = not _choices(name) and value.isdecimal() and len(value) < 9
                values[name] = int(value) if number else value
                reasons += filter(None, [_wrong(name, values[name])])
        if reasons:
            raise PlanError(reasons)
        return cls(**values)


_TYPES = get_type_hints(Plan)


def _wrong(name: str, value: object) -> str | None:
    """Why `value` cannot stand in field `name`, or None."""
    if choices := _choices(name):
        return None if value in choices else f"{name}={value} is unknown; it is one of {', '.join(choices)}."
    if value is None and type(None) in get_args(_TYPES[name]):
        return None
    if type(value) is not int or not 1 <= value <= MOST:
        return f"{name}={value} is not a whole number from 1 to {MOST:,}."
    return None


def _choices(name: str) -> tuple[str, ...]:
    """The words a field takes; none where it takes a number."""
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def _wrong_inner_ring(plan: Plan) -> str | None:
    inner, ring = plan.inner_ring, plan.ring
    if inner is None:
        return None
    if ring % inner:
        divisors = [number for number in range(1, ring + 1) if ring % number == 0]
        below, above = max(d for d in divisors if d < inner), min((d for d in divisors if d > inner), default=None)
        near = f"{below} and {above}" if above else f"{below}"
        return f"inner_ring={inner} does not divide ring={ring}; nearest to it do {near}."
    if plan.exchange != "ring":
        return (
            f"inner_ring={inner} cuts the ring of exchange=ring in two, and exchange={plan.exchange} has none; "
            "leave inner_ring out or use exchange=ring."
        )
    return None


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name, _TYPES, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
