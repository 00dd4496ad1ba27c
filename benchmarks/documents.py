"""Heavy-tailed documents, as in the packed rows of a real corpus."""

from math import log
from random import Random

MEDIAN, SIGMA = 1024, 1.5


def lengths(num_tokens: int, seed: int, median: int = MEDIAN, sigma: float = SIGMA) -> tuple[int, ...]:
    """Log-normal document lengths that fill a row of `num_tokens`; the last one is cut to fit.

    >>> sum(lengths(65_536, seed=0))
    65536
    """
    random, found, room = Random(seed), [], num_tokens
    while room:
        length = min(room, max(1, round(random.lognormvariate(log(median), sigma))))
        found.append(length)
        room -= length
    return tuple(found)
