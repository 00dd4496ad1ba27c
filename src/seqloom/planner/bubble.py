"""How long the ranks of a pipeline wait for each other."""

from seqloom.plan import Plan


def bubble_share(plan: Plan, micro_batches: int) -> float:
    """The share of a step in which a pipeline rank waits, with equal stages and backward twice as long as forward.

    A stage's forward and backward of one micro-batch are 3 units of time, of which zbv's backward for inputs and that
    for weights are one each. A rank works 3 x stages x micro-batches, and waits, with P ranks and v stages each:

    | schedule    | units waited                                         | source                       |
    |-------------|------------------------------------------------------|------------------------------|
    | gpipe, 1f1b | 3 (P - 1)                                            | arXiv 2104.04473, section 2.2 |
    | interleaved | the same, of stages v times as small, and 3 (v - 1) for each micro-batch short of P | the same |
    | zbv         | P - 1, or 2 for each micro-batch short of 2 P - 1    | torch's order, arXiv 2401.10241 |

    >>> bubble_share(Plan(pipeline=4), 8), bubble_share(Plan(pipeline=4, schedule="zbv"), 8)
    (0.2727272727272727, 0.058823529411764705)
    """
    ranks, chunks = plan.pipeline, plan.num_stages // plan.pipeline
    waits = 3 * (ranks - 1)
    if plan.schedule == "interleaved":
        waits += 3 * (chunks - 1) * max(0, ranks - micro_batches)
    elif plan.schedule == "zbv":
        waits = max(ranks - 1, 2 * (2 * ranks - 1 - micro_batches))
    return waits / (3 * chunks * micro_batches + waits) if ranks > 1 else 0.0
