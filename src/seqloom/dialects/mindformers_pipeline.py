"""MindFormers' pipelines: their schedules, the layers of each stage, and which of them are computed again."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from seqloom.dialects.ledger import Ledger, as_whole, plain, shown
from seqloom.dialects.mindformers_model import find

SCHEDULERS = ("1f1b", "gpipe", "seqpipe", "seqvpp", "seqsmartvpp", "zero_bubble_v")

_CONFIG = "parallel.pipeline_config."
_MOST_STAGES = 10_000


def schedule(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """schedule and chunks of a plan; their code takes pp_interleave_num as 1 where pipeline_interleave is off."""
    switch, named = _CONFIG + "pipeline_interleave", _CONFIG + "pipeline_scheduler"
    number = find(ledger, "pp_interleave_num") or "model.model_config.pp_interleave_num"
    if pipeline == 1:
        ledger.no_effect("There is one pipeline rank.", switch, named, number)
        return {}
    on, chunks = ledger.flag(switch), ledger.whole(number, most=_MOST_STAGES // pipeline or 1)
    if chunks > 1 and not on:
        ledger.no_effect("Their code takes it as 1 unless pipeline_config.pipeline_interleave is on.", number)
        chunks = 1
    ledger.mapped(f"Interleaved as pp_interleave_num says: chunks={chunks}." if on else "Off.", switch)
    scheduler = ledger.word(named, SCHEDULERS, "1f1b")
    found: dict[str, Any] = {"schedule": "interleaved", "chunks": chunks} if chunks > 1 else {}
    why, verdict = f"schedule={found.get('schedule', '1f1b')}.", "mapped"
    if scheduler == "zero_bubble_v":
        if chunks > 2:
            ledger.refuse(number, f"zero_bubble_v holds 2 stages a rank, not pp_interleave_num {chunks}; use 2.")
        found, why = {"schedule": "zbv"}, "schedule=zbv."
        if chunks == 1:
            why, verdict = "schedule=zbv, with 2 stages a rank; theirs needs pp_interleave_num: 2 for it.", "changed"
    elif scheduler == "gpipe" and chunks == 1:
        found, why = {"schedule": "gpipe"}, "schedule=gpipe."
    elif scheduler != "1f1b":
        pieces = (
            "Pieces of a sequence follow each other there" if scheduler != "gpipe" else "gpipe has one stage a rank"
        )
        why, verdict = f"{pieces}; schedule={found.get('schedule', '1f1b')} here, with the same result.", "changed"
    if scheduler != "1f1b" and not on:
        why, verdict = f"{why} Their documents let it count only with pipeline_interleave on, and it is off.", "changed"
    ledger.each("changed" if verdict == "changed" else "mapped", why, (named,))
    ledger.mapped(f"chunks={chunks}.", *(() if ledger.noted(number) else (number,)))
    return found


def _grid(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(chunks, ranks) of the stages."""
    return fields.get("chunks") or (2 if fields.get("schedule") == "zbv" else 1), fields.get("pipeline", 1)


def layers_of_stages(ledger: Ledger, fields: Mapping[str, Any], layers: int | None) -> list[list[int]] | None:
    """How many layers each chunk of each rank takes by `offset`, None where that is not said or not known.

    Theirs is layers // stages + offset, which may be one number, one for each rank, or one for each chunk and rank.
    """
    name, (chunks, ranks) = find(ledger, "offset"), _grid(fields)
    if name is None or ranks == 1:
        ledger.no_effect("There is one pipeline rank.", *((name,) if name else ()))
        return None
    rows = _rows(ledger.get(name), chunks, ranks)
    if rows is None:
        ledger.refuse(
            name,
            f"{name} is {shown(ledger.given[name])}; it is one whole number, {ranks} of them"
            + (f", or {chunks} lists of {ranks}." if chunks > 1 else "."),
        )
        return None
    if layers is None:
        ledger.changed("The layers of the model are not known here, so stages balance their cost.", name)
        return None
    left, counts = layers % (chunks * ranks), [[layers // (chunks * ranks) + each for each in row] for row in rows]
    if sum(map(sum, rows)) != left:
        ledger.refuse(
            name,
            f"{name} adds up to {sum(map(sum, rows))}, and {layers} layers in {chunks * ranks} stages leave {left}; "
            "make them equal.",
        )
        return None
    flat = [each for row in counts for each in row]
    if min(flat) < 0 or 0 in flat[1:-1]:
        ledger.refuse(name, f"{name} leaves a stage between the ends without layers; only the ends may have none.")
        return None
    return counts


def _rows(given: Any, chunks: int, ranks: int) -> list[list[int]] | None:
    """An offset for each chunk and rank; None where it has another shape."""
    if type(given) is int:
        return [[given] * ranks] * chunks
    if not isinstance(given, list):
        return None
    rows = [given] * chunks if all(type(each) is int for each in given) else given
    if len(rows) != chunks or not all(isinstance(row, list) and len(row) == ranks for row in rows):
        return None
    return rows if all(type(each) is int and abs(each) < 10**6 for row in rows for each in row) else None


def even(fields: Mapping[str, Any], layers: int | None) -> list[list[int]] | None:
    """The layers of each chunk of each rank where all have as many; None where they cannot or are not known."""
    chunks, ranks = _grid(fields)
    if layers is None or ranks == 1 or layers % (chunks * ranks):
        return None
    return [[layers // (chunks * ranks)] * ranks] * chunks


def stages(fields: Mapping[str, Any], counts: Sequence[Sequence[int]]) -> str:
    """`stages` of a plan: in the order of the layers, which zbv's second chunk meets from the last rank on."""
    return "-".join(map(str, _in_order(fields, counts)))


def _in_order(fields: Mapping[str, Any], rows: Sequence[Sequence[Any]]) -> list[Any]:
    back = fields.get("schedule") == "zbv"
    return [each for turn, row in enumerate(rows) for each in (reversed(row) if back and turn % 2 else row)]


def again(given: Sequence[Any], fields: Mapping[str, Any], counts: Sequence[Sequence[int]] | None) -> str | None:
    """`recompute` of a plan by a list: layers of each rank, dealt to its chunks in turns, or of each chunk and rank.

    counts: the layers there are, where that is known. None where the list has another shape.
    """
    chunks, ranks = _grid(fields)
    most = counts or [[100_000] * ranks] * chunks
    if all(type(each) in (int, bool) for each in given) and len(given) <= ranks:
        asked = [100_000 if each is True else int(each) for each in given] + [0] * (ranks - len(given))
        if min(asked) < 0:
            return None
        rows = [[0] * ranks for _ in range(chunks)]
        for rank, number in enumerate(asked):
            column = [row[rank] for row in most]
            for turn in range(chunks):
                rows[turn][rank] = _dealt(min(number, sum(column)), column, turn)
    else:
        rows = [_row(row, most[turn]) for turn, row in enumerate(given[:chunks])]
        if len(given) != chunks or any(len(row) != ranks for row in rows):
            return None
    words = [
        "none" if not number else "full" if number >= 100_000 else f"full:block:{number}"
        for number in _in_order(fields, rows)
    ]
    return "/".join(words) if len(set(words)) > 1 else words[0]


def again_of_layers(given: Any, fields: Mapping[str, Any]) -> str | None:
    """`recompute` of a plan by the numbers of layers, as ['0-3', '8'].

    None where they are not the first of each stage, or the stages are not known.
    """
    spans = [str(plain(each)).partition("-") for each in given] if isinstance(given, list) else []
    bounds = [(as_whole(first), as_whole(last or first)) for first, _, last in spans]
    asked = bytearray(_MOST_STAGES)
    for start, stop in bounds:
        if start is None or stop is None or not 0 <= start <= stop < _MOST_STAGES:
            return None
        asked[start : stop + 1] = b"\1" * (stop + 1 - start)
    if fields.get("pipeline", 1) > 1 and "stages" not in fields:
        return None
    sizes = [int(each) for each in str(fields.get("stages", _MOST_STAGES)).split("-")]
    words, first = [], 0
    for size in sizes:
        here = asked[first : first + size]
        number = sum(here)
        if sum(here[:number]) != number:
            return None
        words.append(f"full:block:{number}" if number else "none")
        first += size
    return "/".join(words) if len(set(words)) > 1 else words[0]


def _dealt(number: int, column: Sequence[int], turn: int) -> int:
    """What chunk `turn` takes of so many layers when they are dealt one by one to the chunks that have room."""
    if number >= 100_000 or len(column) == 1:
        return min(number, column[turn])
    rounds = 0  # full rounds, in which each chunk takes one if it has room
    while sum(min(rounds + 1, room) for room in column) <= number and rounds < max(column):
        rounds += 1
    rest = number - sum(min(rounds, room) for room in column)
    waiting = [place for place, room in enumerate(column) if room > rounds]
    return min(rounds, column[turn]) + (turn in waiting[:rest])


def _row(given: Any, most: Sequence[int]) -> list[int]:
    """Layers of each rank of one chunk; empty where it is no list of them."""
    if isinstance(given, bool):
        return list(most) if given else [0] * len(most)
    if not isinstance(given, list) or len(given) != len(most):
        return []
    if not all(type(each) in (int, bool) and int(each) >= 0 for each in given):
        return []
    return [room if each is True else min(int(each), room) for each, room in zip(given, most, strict=True)]


_P = "parallelism."


def newer_schedule(ledger: Ledger, pipeline: int) -> dict[str, Any]:
    """schedule, chunks and stages of a plan by the newer `parallelism`."""
    named, number = _P + "pipeline_parallel_schedule", _P + "pipeline_parallel_interleave_num"
    listed = _P + "pipeline_parallel_layers_per_stage"
    if pipeline == 1:
        ledger.no_effect("There is one pipeline rank.", named, number, listed)
        return {}
    chunks = ledger.whole(number, most=_MOST_STAGES // pipeline or 1)
    given = str(plain(ledger.get(named) or "1f1b"))
    word = {"1f1b": "1f1b", "gpipe": "gpipe", "interleaved1f1b": "interleaved", "interleaved": "interleaved"}.get(
        re.sub(r"[^a-z0-9]", "", given.lower()), "zbv" if re.search("zbv|zerobubblev", given.lower()) else ""
    )
    kind = "interleaved" if chunks > 1 and word != "zbv" else "1f1b" if word in ("", "interleaved") else word
    same = word == kind or (word == "1f1b" and kind == "interleaved")
    ledger.each("mapped" if same else "changed", f"schedule={kind}; the result is the same.", (named,))
    ledger.mapped(f"chunks={chunks}.", number)
    found: dict[str, Any] = {} if kind == "1f1b" else {"schedule": kind}
    if kind == "interleaved":
        found["chunks"] = chunks
    layers = ledger.get(listed)
    if layers not in (None, "auto"):
        counts = _spans(layers, *_grid(found | {"pipeline": pipeline}), back=kind == "zbv")
        if counts is None:
            ledger.refuse(
                listed,
                f"{listed} is {shown(layers)}; it is a list of each rank's layers as '0-3,8-11', which together are "
                "all layers in order.",
            )
        else:
            found["stages"] = stages(found, counts)
            ledger.mapped(f"stages={found['stages']}.", listed)
    ledger.no_effect("Stages balance their cost.", *(() if ledger.noted(listed) else (listed,)))
    return found


def _spans(given: Any, chunks: int, ranks: int, *, back: bool) -> list[list[int]] | None:
    """The layers of each chunk of each rank from words such as '0-3,8-11'; None where they are not all in order.

    back: whether the second chunk goes from the last rank to the first.
    """
    words = given.split("|") if isinstance(given, str) else given
    if not isinstance(words, list) or len(words) != ranks:
        return None
    parts = [str(plain(word)).replace(" ", "").split(",") for word in words]
    if any(len(part) != chunks for part in parts):
        return None
    counts, following = [[0] * ranks for _ in range(chunks)], 0
    for turn in range(chunks):
        for rank in reversed(range(ranks)) if back and turn % 2 else range(ranks):
            first, _, last = parts[rank][turn].partition("-")
            start, stop = as_whole(first), as_whole(last or first)
            if start != following or stop is None or not start <= stop < 100_000:
                return None
            counts[turn][rank], following = stop - start + 1, stop + 1
    return counts
