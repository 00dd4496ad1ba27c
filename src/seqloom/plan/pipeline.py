"""How layers are cut into stages, where the stages lie, and which cuts a plan allows."""

from collections.abc import Iterator

from seqloom.errors import counted
from seqloom.plan.plan import Plan
from seqloom.plan.shape import ModelShape

_PLAIN_MLP = ("bloom", "gpt2")
"""Families whose MLP has two matrices; the others have a gate too."""


def stage_rank(plan: Plan, stage: int) -> int:
    """The pipeline rank that computes a stage: in turns, and for `zbv` there and back, so that ends meet.

    >>> [stage_rank(Plan(pipeline=2, schedule="interleaved"), stage) for stage in range(4)]
    [0, 1, 0, 1]
    >>> [stage_rank(Plan(pipeline=2, schedule="zbv"), stage) for stage in range(4)]
    [0, 1, 1, 0]
    """
    turn, place = divmod(stage, plan.pipeline)
    return plan.pipeline - 1 - place if plan.schedule == "zbv" and turn % 2 else place


def stages_of(plan: Plan, rank: int) -> tuple[int, ...]:
    """The stages of a pipeline rank, in order."""
    return tuple(stage for stage in range(plan.num_stages) if stage_rank(plan, stage) == rank)


def micro_batches_needed(plan: Plan, asked: int = 1) -> int:
    """The fewest micro-batches of a step, at least `asked`, that the schedule can order.

    1F1B fills the pipeline before its first backward. Interleaved 1F1B goes in rounds of equal size, each of at
    least as many micro-batches as ranks where there are so many.

    >>> micro_batches_needed(Plan(pipeline=4)), micro_batches_needed(Plan(pipeline=4, schedule="gpipe"), 2)
    (4, 2)
    >>> micro_batches_needed(Plan(pipeline=4, schedule="interleaved"), 9)
    10
    """
    if plan.pipeline == 1:
        return asked
    if plan.schedule == "1f1b":
        return max(asked, plan.pipeline)
    while plan.schedule == "interleaved" and asked % max(1, asked // plan.pipeline):
        asked += 1
    return asked


def cut(plan: Plan, model: ModelShape, num_tokens: int | None = None) -> tuple[int, ...]:
    """How many layers each stage takes, in order; stages given by hand, else the cut whose costliest stage costs least.

    Cost is that of a token's products forward: linears, attention over a sequence of `num_tokens` (left out where
    they are not known), the head on the last stage and, of a width's products, the embedding on the first. The
    ends may be left without layers, where embedding or head fill them; among equal cuts early stages take fewer,
    since they keep the most micro-batches. Raises ValueError where `pipeline_reasons` has reasons.

    >>> from seqloom.plan import fit, read_config
    >>> tiny = ModelShape.from_config(fit(read_config("llama"), Plan(), 64, layers=8))
    >>> cut(Plan(pipeline=2), tiny), cut(Plan(pipeline=2, stages="3-5"), tiny)
    ((4, 4), (3, 5))
    """
    if plan.stages:
        return tuple(map(int, plan.stages.split("-")))
    costs = layer_costs(model, num_tokens)
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    last, layers = plan.num_stages - 1, model.layers
    # For each number of layers taken: the best cut of the stages so far, as (costliest stage, unevenness, layers).
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(last + 1):
        least, extra = int(0 < stage < last), model.hidden if stage == 0 else 0
        most = layers - max(0, last - 1 - stage)  # each later stage but the last needs one
        extra += model.hidden * model.vocab if stage == last else 0
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for taken, (costliest, uneven, chosen) in best.items():
            for stop in range(taken + least, most + 1) if stage < last else (layers,):
                cost = before[stop] - before[taken] + extra
                candidate = max(costliest, cost), uneven + cost**2, (*chosen, stop - taken)
                found[stop] = min(found.get(stop, candidate), candidate)
        best = found
    return best[layers][2]


def layer_costs(model: ModelShape, num_tokens: int | None = None) -> list[float]:
    """For each layer the multiplications of a token's forward pass, its attention over `num_tokens` included.

    Of experts those that a token goes to count, and those that all share; the choice among them does not.
    """
    matrices = 2 if model.family in _PLAIN_MLP else 3
    mlps = [
        matrices * model.hidden * (inside + routed) for inside, routed in zip(model.inside, model.routed, strict=True)
    ]
    tokens = num_tokens or 0
    windows = [tokens if window is None else min(window, tokens) for window in model.windows]
    each = model.heads * (model.head_dim + model.value_dim)  # a query with a key and with a value
    seen = [each * (window - window**2 / (2 * max(1, tokens))) for window in windows]
    linears = _attention_linears(model)
    return [linears + mlp + attention for mlp, attention in zip(mlps, seen, strict=True)]


def _attention_linears(model: ModelShape) -> int:
    """The elements of the weights around attention, each of which meets a token once."""
    queries, values = model.heads * model.head_dim, model.heads * model.value_dim
    if not model.key_latent:
        return model.hidden * (queries + model.kv_heads * (model.head_dim + model.value_dim) + values)
    into = model.hidden * (model.query_latent + model.key_latent + model.shared_key)
    out = (model.query_latent or model.hidden) * queries
    return into + out + model.key_latent * (queries - model.heads * model.shared_key + values) + values * model.hidden


def pipeline_reasons(plan: Plan, model: ModelShape, micro_batches: int | None = None) -> Iterator[str]:
    """Why the plan's stages cannot compute this model, in steps of so many micro-batches where that is known."""
    if plan.pipeline == 1:
        if plan.schedule != "1f1b" or plan.chunks or plan.stages:
            yield "schedule, chunks and stages are for pipeline above 1; leave them out."
        return
    if plan.zero >= 2 and plan.num_stages > plan.pipeline:
        yield (
            f"zero={plan.zero} with several stages on a pipeline rank (schedule={plan.schedule}) is not supported yet; "
            "use zero=1, or schedule=1f1b or gpipe."
        )
    yield from _chunk_reasons(plan)
    yield from _stage_reasons(plan, model)
    if micro_batches is not None and (needed := micro_batches_needed(plan, micro_batches)) > micro_batches:
        yield (
            f"A step of {counted(micro_batches, 'micro-batch')} cannot be ordered by schedule="
            f"{plan.schedule} over pipeline={plan.pipeline}; accumulate {needed}, or use schedule=gpipe."
        )


def _chunk_reasons(plan: Plan) -> Iterator[str]:
    chunks = plan.num_stages // plan.pipeline
    if plan.schedule in ("gpipe", "1f1b") and chunks > 1:
        yield (
            f"schedule={plan.schedule} gives each pipeline rank one stage, not chunks={chunks}; use "
            "schedule=interleaved, or leave chunks out."
        )
    elif plan.schedule == "interleaved" and chunks == 1:
        yield "schedule=interleaved with chunks=1 interleaves nothing; use schedule=1f1b, or chunks=2."
    elif plan.schedule == "zbv" and chunks != 2:
        yield f"schedule=zbv goes over the ranks there and back, 2 stages each, not chunks={chunks}; leave it out."


def _stage_reasons(plan: Plan, model: ModelShape) -> Iterator[str]:
    if plan.stages is None:
        if model.layers < (least := plan.num_stages - 2):
            yield (
                f"{counted(model.layers, 'layer')} cannot be cut into {plan.num_stages} stages: all but the first and "
                f"the last need one each; use a model of at least {least} layers, or fewer stages."
            )
        return
    given = [int(layers) for layers in plan.stages.split("-")]
    if len(given) != plan.num_stages:
        yield (
            f"stages={plan.stages} names {counted(len(given), 'stage')}, but the plan has {plan.num_stages}; name as "
            "many, or leave stages out."
        )
    if sum(given) != model.layers:
        yield (
            f"stages={plan.stages} names {counted(sum(given), 'layer')}, but the model has {model.layers}; make them "
            "add up."
        )
    if 0 in given[1:-1]:
        yield f"stages={plan.stages} leaves a stage between the ends without layers; only the ends may have none."
