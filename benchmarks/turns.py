"""Contenders made ready in one set of processes, and timed in turns, so that a disturbance hits all alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.attention import ROUND, rotated, timed
from benchmarks.tensor_contenders import Contender, Prepared, Unavailable


def ready(
    contenders: Sequence[Contender], case: Any, names: Sequence[str]
) -> Iterator[tuple[Contender, Prepared | str]]:
    """Those named, each with what runs it, or why it cannot run here."""
    for contender in contenders:
        if contender.name in names:
            try:
                yield contender, contender.prepare(case)
            except Unavailable as reason:
                yield contender, str(reason)


def take_turns(
    contenders: Sequence[Contender],
    case: Any,
    names: Sequence[str],
    repeats: int,
    first: Callable[[Prepared], dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """On each rank: what every contender's first runs say, which warm up too, and its rounds by the keys of ROUND."""
    torch.set_num_threads(1)
    said: dict[str, dict[str, Any]] = {}
    running: dict[str, Prepared] = {}
    for contender, prepared in ready(contenders, case, names):
        if isinstance(prepared, str):
            said[contender.name] = {"skipped": prepared}
        else:
            said[contender.name] = {"kind": contender.kind, **{key: [] for key in ROUND}}
            running[contender.name] = prepared
    for name, prepared in running.items():
        said[name] |= first(prepared)
    for number in range(repeats):
        for name in rotated(list(running), number):
            for key, value in zip(ROUND, timed(running[name]), strict=True):
                said[name][key].append(value)
    for prepared in running.values():
        prepared.close()
    return said
