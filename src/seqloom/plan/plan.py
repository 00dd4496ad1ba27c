"""The whole decision of how a run is split, as one value that prints and reads back."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isqrt, prod
from typing import Any, Literal, get_args, get_origin, get_type_hints

from seqloom.errors import PlanError
from seqloom.plan.grid import Grid, TensorKind

Exchange = Literal["ring", "gather", "needed", "rsa"]
LayoutKind = Literal["zigzag", "contiguous", "striped", "balanced"]
TokenAxis = Literal["ring", "ulysses"]
Overlap = Literal["backward", "ring", "none"]

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
    tensor_kind: how: `1d` (Megatron), `2d` (Optimus, by one gather where SUMMA broadcasts), `2.5d`
        (Tesseract) or `3d`.
    depth: of 2.5d, the copies of its weights, each with its own tokens.
    grid: rows x columns of 2d and 2.5d, as `3x2`, or output x input x weight of 3d, where it is not square.
    sequence_parallel: whether 1d splits tokens between its linears (Megatron sequence parallelism);
        the other kinds always do.
    tensor_tokens: the axis that the token axes of 2d, 2.5d and 3d join for attention: `ring` or `ulysses`.
    tensor_overlap: `backward` computes weight gradients while input gradients are on their way, `ring`
        cuts gather and product of 1d in steps that overlap, `none` does one after the other.
    regather: whether backward gathers a linear's input again, rather than keep it gathered.
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
    tensor_kind: TensorKind = "1d"
    depth: int = 1
    grid: str | None = None
    sequence_parallel: bool = True
    tensor_tokens: TokenAxis = "ring"
    tensor_overlap: Overlap = "backward"
    regather: bool = True
    exchange: Exchange = "ring"
    inner_ring: int | None = None
    layout: LayoutKind = "zigzag"

    def __post_init__(self) -> None:
        reasons = [reason for f in fields(self) if (reason := _wrong(f.name, getattr(self, f.name)))]
        if not reasons:
            reasons = list(_wrong_tensor(self)) or list(_wrong_inner_ring(self))
        if not reasons and self.world_size > MOST:
            reasons = [f"The plan takes {self.world_size:,} processes; the most is {MOST:,}."]
        if reasons:
            raise PlanError(reasons)

    @property
    def tensor_grid(self) -> Grid:
        """The axes of the tensor group; square or cubic unless `grid` says otherwise.

        >>> Plan(tensor=8, tensor_kind="2.5d", depth=2).tensor_grid.axes
        {'depth': 2, 'row': 2, 'col': 2}
        """
        sizes = tuple(map(int, self.grid.split("x"))) if self.grid else _even_grid(self)
        return Grid(
            self.tensor_kind, (self.depth, *sizes) if self.tensor_kind == "2.5d" else sizes, self.sequence_parallel
        )

    @property
    def attention_ring(self) -> int:
        """The ranks that keys and values go around: `ring`, and the token axes of the tensor grid that join it."""
        return self.ring * (self.tensor_grid.tokens if self.tensor_tokens == "ring" else 1)

    @property
    def attention_ulysses(self) -> int:
        """The ranks that trade tokens for heads: `ulysses`, and the token axes of the tensor grid that join it."""
        return self.ulysses * (self.tensor_grid.tokens if self.tensor_tokens == "ulysses" else 1)

    @property
    def rings(self) -> tuple[int, int]:
        """attention_ring as (outer, inner): groups of neighbours, and the ranks of one. Without inner_ring (1, all).

        >>> Plan(ring=8, inner_ring=4).rings
        (2, 4)
        """
        inner = self.inner_ring or self.attention_ring
        return self.attention_ring // inner, inner

    @property
    def world_size(self) -> int:
        """The number of processes the plan takes."""
        return self.data * self.pipeline * self.ring * self.ulysses * self.tensor

    def __str__(self) -> str:
        said = [f"{f.name}={_word(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
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
                values[name] = _read(name, value)
                reasons += filter(None, [_wrong(name, values[name])])
        if reasons:
            raise PlanError(reasons)
        return cls(**values)


_TYPES = get_type_hints(Plan)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(name: str, text: str) -> object:
    """The value that a word of a plan stands for; the word itself where it stands for none."""
    if _TYPES[name] is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    number = int in (_TYPES[name], *get_args(_TYPES[name])) and text.isdecimal() and len(text) < 9
    return int(text) if number else text


def _wrong(name: str, value: object) -> str | None:
    """Why `value` cannot stand in field `name`, or None."""
    if choices := _choices(name):
        return None if value in choices else f"{name}={value} is unknown; it is one of {', '.join(choices)}."
    if _TYPES[name] is bool:
        return None if isinstance(value, bool) else f"{name}={value} is unknown; it is true or false."
    if value is None and type(None) in get_args(_TYPES[name]):
        return None
    if name == "grid":
        sizes = value.split("x") if isinstance(value, str) else []
        if len(sizes) in (2, 3) and all(size.isdecimal() and len(size) < 6 and size[0] != "0" for size in sizes):
            return None
        return f"grid={value} is no grid; write rows x columns as in grid=3x2."
    if type(value) is not int or not 1 <= value <= MOST:
        return f"{name}={value} is not a whole number from 1 to {MOST:,}."
    return None


def _choices(name: str) -> tuple[str, ...]:
    """The words a field takes; none where it takes a number."""
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def _even_grid(plan: Plan) -> tuple[int, ...]:
    """The square or cubic grid of a tensor degree, without the depth; its product falls short where there is none."""
    if plan.tensor_kind == "1d":
        return (plan.tensor,)
    if plan.tensor_kind == "3d":
        return (round(plan.tensor ** (1 / 3)),) * 3
    return (isqrt(plan.tensor // plan.depth),) * 2


def _wrong_tensor(plan: Plan) -> Iterator[str]:
    """Why the tensor fields do not go together."""
    kind, tensor = plan.tensor_kind, plan.tensor
    if plan.depth > 1 and kind != "2.5d":
        yield f"depth={plan.depth} belongs to tensor_kind=2.5d, not {kind}; leave it out or use tensor_kind=2.5d."
    if kind == "1d":
        if plan.grid:
            yield f"grid={plan.grid} belongs to tensor_kind 2d, 2.5d and 3d, not 1d; leave it out or name the kind."
        if plan.tensor_tokens != "ring":
            yield (
                f"tensor_tokens={plan.tensor_tokens} is for the token axes of tensor_kind 2d, 2.5d and 3d, and 1d has "
                "none; leave it out or name the kind."
            )
    elif not plan.sequence_parallel:
        yield f"sequence_parallel=false is possible with tensor_kind=1d only; {kind} splits tokens always."
    elif plan.tensor_overlap == "ring":
        yield f"tensor_overlap=ring cuts the gathers of tensor_kind=1d, not of {kind}; leave it out or use 1d."
    if kind == "1d" or (plan.depth > 1 and kind != "2.5d"):
        return
    numbers = 3 if kind == "3d" else 2
    if plan.grid and len(plan.grid.split("x")) != numbers:
        meant = "output x input x weight, as 2x2x3" if kind == "3d" else "rows x columns, as 3x2"
        yield f"grid={plan.grid} does not fit tensor_kind={kind}, whose grid is {meant}."
        return
    sizes = plan.tensor_grid.sizes
    if prod(sizes) == tensor:
        return
    if plan.grid:
        yield (
            f"grid={plan.grid}{f' depth={plan.depth}' if plan.depth > 1 else ''} has {prod(sizes)} ranks, but "
            f"tensor={tensor}; use tensor={prod(sizes)} or another grid."
        )
    elif kind == "3d":
        yield (
            f"tensor={tensor} is no cube, as tensor_kind=3d takes without a grid; use {_near(tensor, 3, 1)}, or name "
            f"output x input x weight, such as grid={_some_grid(tensor, 3)}."
        )
    else:
        deep = f" times depth={plan.depth}" if plan.depth > 1 else ""
        named = (
            ""
            if tensor % plan.depth
            else f", or name rows x columns, such as grid={_some_grid(tensor // plan.depth, 2)}"
        )
        yield (
            f"tensor={tensor} is no square{deep}, as tensor_kind={kind} takes without a grid; use "
            f"{_near(tensor, 2, plan.depth)}{named}."
        )


def _near(tensor: int, power: int, depth: int) -> str:
    """The degrees next to `tensor` that have an even grid, in words."""
    root = 1
    while depth * (root + 1) ** power < tensor:
        root += 1
    return " or ".join(f"tensor={depth * side**power}" for side in (root, root + 1))


def _some_grid(ranks: int, numbers: int) -> str:
    """A grid of so many ranks, as even as can be, the most first.

    >>> _some_grid(12, 3), _some_grid(8, 2), _some_grid(7, 2)
    ('3x2x2', '4x2', '7x1')
    """
    sides = []
    for left in range(numbers, 1, -1):
        side = max(d for d in range(1, ranks + 1) if d**left <= ranks and ranks % d == 0)
        sides.append(side)
        ranks //= side
    return "x".join(map(str, sorted([*sides, ranks], reverse=True)))


def _wrong_inner_ring(plan: Plan) -> Iterator[str]:
    inner, ring = plan.inner_ring, plan.attention_ring
    if inner is None:
        return
    if ring % inner:
        divisors = [number for number in range(1, ring + 1) if ring % number == 0]
        below, above = max(d for d in divisors if d < inner), min((d for d in divisors if d > inner), default=None)
        near = f"{below} and {above}" if above else f"{below}"
        joined = f" with the {ring // plan.ring} token ranks of the grid" if ring > plan.ring else ""
        yield f"inner_ring={inner} does not divide ring={plan.ring}{joined}; nearest to it do {near}."
    elif plan.exchange != "ring":
        yield (
            f"inner_ring={inner} cuts the ring of exchange=ring in two, and exchange={plan.exchange} has none; "
            "leave inner_ring out or use exchange=ring."
        )


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name, _TYPES, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
