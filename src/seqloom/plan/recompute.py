"""What a plan computes again in backward, and which choices go together."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from seqloom.plan.pipeline import cut, pipeline_reasons
from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape


class Unit(NamedTuple):
    """Neighbouring layers of a stage that backward computes again together, from the input of the first.

    start, stop: counted from the stage's first layer. keeps_attention: whether attention's output and
    log-sum-exp are kept too, so that attention runs once.
    """

    start: int
    stop: int
    keeps_attention: bool = False


def choices(plan: Plan) -> tuple[str, ...]:
    """What each stage computes again, in order; one choice alone stands for all of them.

    >>> choices(Plan(pipeline=2, recompute="full/none")), choices(Plan(pipeline=2, recompute="selective"))
    (('full', 'none'), ('selective', 'selective'))
    """
    said = tuple(plan.recompute.split("/"))
    return said * plan.num_stages if len(said) == 1 else said


def units(plan: Plan, stage: int, num_layers: int) -> tuple[Unit, ...]:
    """What is computed again of a stage of `num_layers` layers; layers in no unit keep all they need.

    stage: its number in the order of the layers, from 0.

    >>> units(Plan(recompute="full:uniform:2"), 0, 5)[1:]
    (Unit(start=2, stop=4, keeps_attention=False), Unit(start=4, stop=5, keeps_attention=False))
    >>> units(Plan(recompute="full:block:1"), 0, 5)
    (Unit(start=0, stop=1, keeps_attention=False),)
    """
    word, _, rest = choices(plan)[stage].partition(":")
    how, _, number = rest.partition(":")
    if word == "none":
        return ()
    layers = min(int(number), num_layers) if how == "block" else num_layers
    size = int(number) if how == "uniform" else 1
    bounds = [*range(0, layers, size), layers]
    return tuple(Unit(start, stop, word == "selective") for start, stop in pairwise(bounds))


def run_again(plan: Plan, stage_layers: Sequence[int]) -> tuple[int, int]:
    """How many layers run once more in backward, and in how many of them attention does.

    stage_layers: the layers of each stage, in order.

    >>> run_again(Plan(recompute="full:block:3"), [8]), run_again(Plan(pipeline=2, recompute="selective/full"), [4, 4])
    ((3, 3), (8, 4))
    """
    found = [unit for stage, layers in enumerate(stage_layers) for unit in units(plan, stage, layers)]
    attention = sum(unit.stop - unit.start for unit in found if not unit.keeps_attention)
    return sum(unit.stop - unit.start for unit in found), attention


def recompute_reasons(plan: Plan, model: ModelShape, num_tokens: int | None = None) -> Iterator[str]:
    """Why the plan cannot compute again what it says, or keep what that takes as it says.

    num_tokens: of a sequence, when known; stages are balanced by it.
    """
    said = plan.recompute.split("/")
    if len(said) not in (1, plan.num_stages):
        yield (
            f"recompute={plan.recompute} names {len(said)} stages, but the plan has {plan.num_stages}; name one choice "
            f"for all, or {plan.num_stages}."
        )
    elif any(counts := [int(word.rpartition(":")[2]) if word[-1].isdecimal() else 0 for word in said]):
        yield from _count_reasons(plan, model, num_tokens, counts)
    if set(said) != {"none"} and plan.pipeline > 1 and plan.schedule == "zbv":
        yield (
            f"recompute={plan.recompute} does not go with schedule=zbv, which takes backward apart and would compute "
            "layers again for each part; use schedule=1f1b or recompute=none."
        )
    yield from _kept_reasons(plan, said)


def _count_reasons(plan: Plan, model: ModelShape, num_tokens: int | None, counts: Sequence[int]) -> Iterator[str]:
    """Why there are not as many layers as the choices count; counts: for each stage, or one for all of them."""
    if max(counts) > model.layers:
        yield (
            f"recompute={plan.recompute} counts {max(counts)} layers, but the model has {model.layers}; use at most so "
            "many, or full."
        )
        return
    enough = -(-model.layers // plan.num_stages)  # the largest stage has as many
    if plan.num_stages == 1 or (max(counts) <= enough and len(counts) == 1) or any(pipeline_reasons(plan, model)):
        return
    stages = cut(plan, model, num_tokens)
    if len(counts) == 1 and counts[0] > max(stages):
        yield (
            f"recompute={plan.recompute} counts {counts[0]} layers, but the largest stage has {max(stages)}; use at "
            "most so many, or full."
        )
    for stage, (count, layers) in enumerate(zip(counts, stages, strict=False)):
        if len(counts) > 1 and count > max(layers, 1):  # a stage without layers takes any choice of one
            yield (
                f"recompute={plan.recompute} counts {count} layers in stage {stage}, which has {layers}; use at most "
                "so many there, or full."
            )


def _kept_reasons(plan: Plan, said: list[str]) -> Iterator[str]:
    """Why what is kept cannot lie where `activations` says."""
    if plan.activations == "whole":
        return
    if set(said) == {"none"}:
        yield (
            f"activations={plan.activations} is for the layer inputs that recomputation keeps, and recompute=none "
            "keeps none; use recompute=full or selective, or leave it out."
        )
    if plan.activations == "partitioned" and (
        plan.tensor == 1 or plan.tensor_kind != "1d" or plan.tensor_grid.sequence_parallel
    ):
        if plan.tensor == 1:
            alike = "tensor=1 has one rank a layer"
        elif plan.tensor_kind == "1d":
            alike = "sequence_parallel=true has split them already"
        else:
            alike = f"tensor_kind={plan.tensor_kind} has split them already"
        yield (
            "activations=partitioned splits layer inputs that all tensor ranks hold alike, and "
            f"{alike}; leave it out, or use tensor_kind=1d sequence_parallel=false."
        )
