"""The whole decision of how a run is split, as one value that prints and reads back."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isqrt, prod
from typing import Any, Literal, get_args, get_origin, get_type_hints

from seqloom.errors import PlanError, counted
from seqloom.plan.grid import Grid, TensorKind, divisors

Exchange = Literal["ring", "gather", "needed", "rsa"]
LayoutKind = Literal["zigzag", "contiguous", "striped", "balanced"]
TokenAxis = Literal["ring", "ulysses"]
Overlap = Literal["backward", "ring", "none"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv"]
Kept = Literal["whole", "partitioned", "offloaded"]

MOST = 65_536
"""The largest degree of an axis, and the most processes of a plan."""

ORDER = "tensor-ulysses-ring-data-pipeline"
"""How ranks are numbered where a plan does not say: those of a tensor group are neighbours."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Degrees of every mesh axis, and how attention meets the sequence axes.

    data: copies of the model, each with its own rows of the batch.
    zero: what data x ring x ulysses share out instead of holding it alike: 1 the optimizer's state, 2 the
        gradients too, 3 the parameters too (ZeRO).
    zero_replicas: groups among which shares are repeated, each holding all of them (hybrid sharding).
    offload: whether parameters, gradients and the optimizer's state wait in host memory.
    pipeline: ranks the layers are dealt to, each computing its stages of them.
    schedule: in which order a pipeline's stages work: `gpipe`, `1f1b`, `interleaved` or `zbv` (zero bubble).
    chunks: stages a pipeline rank holds; None is 2 for `interleaved` and `zbv`, else 1.
    stages: layers of each stage, in order, as `3-5`; None balances their cost.
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
    expert: ranks the experts of a layer are dealt to, taken from data x ring x ulysses x tensor.
    expert_tensor: ranks that each expert's weights are split over: 1, or all of `tensor`.
    recompute: what backward computes again: `none`, `selective` (all but attention), `full`,
        `full:uniform:N` (N layers at a time) or `full:block:N` (the first N layers of a stage, or all of one that
        has fewer); one for each stage as `full/none`.
    activations: what is kept for that is kept `whole` on each rank, `partitioned` over the tensor ranks, or
        `offloaded` to host memory.
    exchange: how ring ranks see each other's keys and values: `ring` passes them around in steps,
        `gather` collects them all first, `needed` fetches only those that a rank's queries see, `rsa`
        is the ring self-attention of 2021: keys go around, then values.
    inner_ring: neighbouring ring ranks whose blocks go around among themselves before they go on to
        the next such group (a double ring); it divides `ring`. None is one ring.
    layout: which tokens a ring rank holds: `zigzag`, `contiguous`, `striped`, or `balanced`, which evens
        out the work of each batch's documents and windows.
    order: the axes that neighbouring ranks share, fastest first, as `ulysses-tensor-ring-pipeline-data`; None is
        `tensor-ulysses-ring-data-pipeline`. Other systems number their ranks otherwise.

    >>> str(Plan(ring=2, ulysses=2))
    'ring=2 ulysses=2'
    >>> Plan.parse("ring=2 layout=striped") == Plan(ring=2, layout="striped")
    True
    """

    data: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    zero_replicas: int = 1
    offload: bool = False
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    chunks: int | None = None
    stages: str | None = None
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
    expert: int = 1
    expert_tensor: int = 1
    recompute: str = "none"
    activations: Kept = "whole"
    exchange: Exchange = "ring"
    inner_ring: int | None = None
    layout: LayoutKind = "zigzag"
    order: str | None = None

    def __post_init__(self) -> None:
        reasons = [reason for f in fields(self) if (reason := _wrong(f.name, getattr(self, f.name)))]
        if not reasons:
            reasons = list(_wrong_tensor(self)) or [*_wrong_inner_ring(self), *_wrong_order(self)]
        if not reasons and self.world_size > MOST:
            reasons = [f"The plan takes {self.world_size:,} processes; the most is {MOST:,}."]
        if reasons:
            raise PlanError(reasons)

    @property
    def axis_order(self) -> tuple[str, ...]:
        """The axes of the mesh by how fast the rank's number runs along them, fastest first."""
        return tuple((self.order or ORDER).split("-"))

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
    def replicas(self) -> int:
        """The ranks that hold the same weights, or share them out: data x ring x ulysses."""
        return self.data * self.ring * self.ulysses

    @property
    def num_stages(self) -> int:
        """The stages of the pipeline, over all its ranks.

        >>> Plan(pipeline=2, schedule="zbv").num_stages
        4
        """
        chunks = self.chunks or (2 if self.pipeline > 1 and self.schedule in ("interleaved", "zbv") else 1)
        return self.pipeline * chunks

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
    whole = int in (_TYPES[name], *map(type, _choices(name)), *get_args(_TYPES[name]))
    number = whole and text.isdecimal() and len(text) < 9
    return int(text) if number else text


def _wrong(name: str, value: object) -> str | None:
    """Why `value` cannot stand in field `name`, or None."""
    if choices := _choices(name):
        known = any(value == choice and type(value) is type(choice) for choice in choices)
        return None if known else f"{name}={value} is unknown; it is one of {', '.join(map(str, choices))}."
    if _TYPES[name] is bool:
        return None if isinstance(value, bool) else f"{name}={value} is unknown; it is true or false."
    if value is None and type(None) in get_args(_TYPES[name]):
        return None
    if name in _PATTERNS:
        pattern, meant = _PATTERNS[name]
        return None if isinstance(value, str) and pattern.fullmatch(value) else f"{name}={value} is no {meant}."
    if name == "grid":
        sizes = value.split("x") if isinstance(value, str) else []
        if len(sizes) in (2, 3) and all(size.isdecimal() and len(size) < 6 and size[0] != "0" for size in sizes):
            return None
        return f"grid={value} is no grid; write rows x columns as in grid=3x2."
    if type(value) is not int or not 1 <= value <= MOST:
        return f"{name}={value} is not a whole number from 1 to {MOST:,}."
    return None


_RECOMPUTED = r"(none|selective|full(:(uniform|block):[1-9]\d{0,4})?)"
_PATTERNS = {
    "order": (re.compile(r"[a-z]+(-[a-z]+)*"), f"order of axes; it names each of them once, as {ORDER}"),
    "stages": (re.compile(r"\d{1,5}(-\d{1,5})*"), "list of layers; write those of each stage in order, as stages=3-5"),
    "recompute": (
        re.compile(f"{_RECOMPUTED}(/{_RECOMPUTED})*"),
        "choice; it is none, selective, full, full:uniform:N or full:block:N, or one for each stage as full/none",
    ),
}
"""What the words of some fields look like, and how a refusal says it."""


def _choices(name: str) -> tuple[str | int, ...]:
    """The words or numbers a field takes, where it takes a few; else none."""
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
            f"grid={plan.grid}{f' depth={plan.depth}' if plan.depth > 1 else ''} has {counted(prod(sizes), 'rank')}, "
            f"but tensor={tensor}; use tensor={prod(sizes)} or another grid."
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
        side = max(d for d in divisors(ranks) if d**left <= ranks)
        sides.append(side)
        ranks //= side
    return "x".join(map(str, sorted([*sides, ranks], reverse=True)))


def _wrong_inner_ring(plan: Plan) -> Iterator[str]:
    inner, ring = plan.inner_ring, plan.attention_ring
    if inner is None:
        return
    if ring % inner:
        degrees = divisors(ring)
        below, above = max(d for d in degrees if d < inner), min((d for d in degrees if d > inner), default=None)
        near = f"{below} and {above}" if above else f"{below}"
        joined = f" with the {ring // plan.ring} token ranks of the grid" if ring > plan.ring else ""
        yield f"inner_ring={inner} does not divide ring={plan.ring}{joined}; nearest to it do {near}."
    elif plan.exchange != "ring":
        yield (
            f"inner_ring={inner} cuts the ring of exchange=ring in two, and exchange={plan.exchange} has none; "
            "leave inner_ring out or use exchange=ring."
        )


def _wrong_order(plan: Plan) -> Iterator[str]:
    if sorted(plan.axis_order) != sorted(ORDER.split("-")):
        yield f"order={plan.order} is no order of axes; it names each of them once, as {ORDER}."
    elif plan.tensor_kind != "1d" and plan.axis_order[0] != "tensor":
        yield (
            f"order={plan.order} does not begin with tensor, as tensor_kind={plan.tensor_kind} needs, whose token axes "
            "join those of attention; put tensor first, or use tensor_kind=1d."
        )


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name, _TYPES, 1)
    return f" (did you mean '{close[0]}'?)" if close else ""
