"""seqloom plan --list"""

from collections.abc import Iterator

from seqloom.cli.shape import model_settings
from seqloom.errors import PlanError, counted


def legal_lines(
    source: str,
    num_tokens: int | None,
    world: int,
    asked: str | None,
    heads: int | None,
    kv_heads: int | None,
    layers: int | None,
) -> Iterator[str]:
    """All legal plans of a world for a model, one a line; before them what speaks against the plan asked about."""
    from seqloom.plan import ModelShape, Plan, check, every_plan
    from seqloom.plan.legality import impossible_world

    if impossible := impossible_world(world):
        raise PlanError(impossible)
    shape = ModelShape.from_config(model_settings(source, world, num_tokens or 1, heads, kv_heads, layers))
    if asked is not None:
        try:
            check(Plan.parse(asked), shape, num_tokens, world=world)
            yield f"Legal: '{Plan.parse(asked)}'."
        except PlanError as error:
            yield f"Not legal: '{asked}'. {error}"
    found = list(every_plan(shape, num_tokens, world=world))
    yield from map(str, found)
    length = f" and sequences of {counted(num_tokens, 'token')}" if num_tokens else ""
    yield (
        f"{counted(len(found), 'legal plan')} of {counted(world, 'process')} for {shape.family} of "
        f"{counted(shape.heads, 'query head')} and {counted(shape.layers, 'layer')}{length}."
    )
