"""Every legal plan against one device: loss, gradient norm, gradients and parameters after three steps, in float64.

    python -m benchmarks.parity [--worlds 2 4 8] [--models llama mixtral] [--every 1] [--sixteen]
        [--rows F] [--kept] [--out F]

Each plan of `seqloom plan --list` trains three steps of at least two micro-batches with clipping, as `seqloom verify`
does, and is held against one device. Worlds of 16 run the plans named below. The page is written anew; a plan that
differs or fails is written there too, and the program ends with status 1. With `--rows`, what ran is kept in that file,
a row a line, and a program that was stopped goes on where it was; with `--kept` the page tells of these alone.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from time import perf_counter

from seqloom.errors import SeqloomError
from seqloom.fabric.launch import run_local
from seqloom.plan import ModelShape, Plan, every_plan, fit, fit_world, read_config, reasons
from seqloom.verify import Case, Trajectory, verify_here

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
TOLERANCE = 1e-9
STEPS, MICRO_BATCHES = 3, 2
SIXTEEN = (
    "data=2 pipeline=2 ring=2 ulysses=2",
    "pipeline=2 ring=2 ulysses=2 tensor=2",
    "data=2 ring=2 ulysses=2 tensor=2",
    "data=2 pipeline=2 ulysses=2 tensor=2",
    "data=2 pipeline=2 ring=2 tensor=2",
    "data=2 pipeline=2 zero=3 ring=2 ulysses=2",
)
CHUNK = 48
"""Plans that one set of processes runs before another takes over: what leaks would otherwise add up."""


@dataclass(frozen=True)
class Row:
    """What became of one plan and model. Errors are relative; `failed` is a sentence where it did not run."""

    model: str
    world: int
    plan: str
    loss: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0
    parameter: float = 0.0
    failed: str = ""

    @property
    def worst(self) -> float:
        """The largest of the four errors."""
        return _worst((self.loss, self.norm, self.gradient, self.parameter))

    @property
    def equal(self) -> bool:
        """Whether the plan ran and every error is within the tolerance; a NaN never is."""
        return not self.failed and all(
            error <= TOLERANCE for error in (self.loss, self.norm, self.gradient, self.parameter)
        )


@dataclass(frozen=True)
class Listed:
    """What `seqloom plan --list` names for a model and a number of processes.

    count: how many plans it names. plans: those to run, of 16 processes the ones named above. dropped: the others
    that were to run, which the model that grew to the plan alone, and not to the number of processes, refuses.
    """

    model: str
    world: int
    count: int
    plans: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str, world: int, num_tokens: int) -> "Listed":
        """What is listed of a built-in model."""
        grown = ModelShape.from_config(fit_world(read_config(model), world, num_tokens))
        every = [str(plan) for plan in every_plan(grown, num_tokens, world=world)]
        plans: dict[bool, list[str]] = {True: [], False: []}
        for text in SIXTEEN if world == 16 else every:
            plan = Plan.parse(text)
            plans[not reasons(plan, _shape(model, plan, num_tokens), num_tokens)].append(text)
        return cls(model, world, len(every), tuple(plans[True]), tuple(plans[False]))


def _worst(errors: Iterable[float]) -> float:
    """The largest error; a NaN is the worst of all."""
    return max(errors, key=lambda error: (isnan(error), error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8], help="numbers of processes")
    parser.add_argument("--models", nargs="+", default=["llama", "mixtral"], help="built-in models")
    parser.add_argument("--tokens", type=int, default=47, help="tokens of a sequence")
    parser.add_argument("--every", type=int, default=1, help="run only every so many-th plan")
    parser.add_argument("--sixteen", action="store_true", help="plans of 16 processes too")
    parser.add_argument("--rows", type=Path, help="a file of rows, read and added to")
    parser.add_argument("--kept", action="store_true", help="run nothing: the page of the rows that are kept")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    asked = parser.parse_args(arguments)
    kept = {}
    if asked.rows is not None and asked.rows.exists():
        found = [Row(**json.loads(line)) for line in asked.rows.read_text(encoding="utf-8").splitlines()]
        kept = {(row.model, row.plan): row for row in found}
    rows: list[Row] = []
    listed = []
    for model in asked.models:
        for world in [*asked.worlds, *([16] if asked.sixteen else [])]:
            listed.append(Listed.of(model, world, asked.tokens))
            for plan in listed[-1].dropped:
                print(f"NOT RUN {model} '{plan}': the model grown to it refuses it")
            plans = listed[-1].plans[:: asked.every if world < 16 else 1]
            group = [kept[model, plan] for plan in plans if (model, plan) in kept]
            missing = [plan for plan in plans if (model, plan) not in kept and not asked.kept]
            # Those that share the run on one device stand together.
            missing.sort(key=lambda plan: _case(model, plan, asked.tokens).on_one_device)
            for start in range(0, len(missing), CHUNK):
                new = ran(model, world, missing[start : start + CHUNK], asked.tokens)
                if asked.rows is not None:
                    with asked.rows.open("a", encoding="utf-8") as file:
                        file.writelines(json.dumps(asdict(row)) + "\n" for row in new)
                group += new
                print(f"{model} {world}: {min(start + CHUNK, len(missing))} of {len(missing)}", flush=True)
            rows += sorted(group, key=lambda row: listed[-1].plans.index(row.plan))
    asked.out.write_text("\n".join(page(rows, listed, asked)) + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row.equal]
    for row in wrong:
        print(f"NOT EQUAL {row.model} '{row.plan}': {row.failed or asdict(row)}")
    print(f"{len(rows) - len(wrong)} of {len(rows)} plans equal one device; the table is in {asked.out.name}.")
    return 1 if wrong else 0


def _shape(model: str, plan: Plan, num_tokens: int) -> ModelShape:
    return ModelShape.from_config(fit(read_config(model), plan, num_tokens))


def ran(model: str, world: int, plans: Sequence[str], num_tokens: int) -> list[Row]:
    """The rows of some plans; where the processes end, each plan runs by itself, so that one is to blame."""
    try:
        return run_local(world, judged, model, tuple(plans), num_tokens, timeout_seconds=300)[0]
    except SeqloomError as error:
        if len(plans) == 1:
            return [Row(model, world, plans[0], failed=" ".join(str(error).split())[:200])]
        return [row for plan in plans for row in ran(model, world, [plan], num_tokens)]


def judged(model: str, plans: Sequence[str], num_tokens: int) -> list[Row]:
    """The rows of some plans, made by processes that are running; every rank calls it."""
    found = []
    known: dict[str, Trajectory] = {}
    for text in plans:
        case = _case(model, text, num_tokens)
        verdict = verify_here(case, known)
        errors = (verdict.loss_error, verdict.gradient_norm_error)
        found.append(
            Row(model, case.plan.world_size, text, *errors, verdict.worst_gradient_error, verdict.parameter_error)
        )
    return found


def _case(model: str, text: str, num_tokens: int) -> Case:
    """What is verified of a plan."""
    plan = Plan.parse(text)
    config = fit(read_config(model), plan, num_tokens)
    return Case(config=config, plan=plan, num_tokens=num_tokens, steps=STEPS, accumulate=MICRO_BATCHES)


def page(rows: Sequence[Row], listed: Sequence[Listed], asked: argparse.Namespace) -> Iterator[str]:
    """docs/parity.md."""
    yield "# Plans beside one device"
    yield ""
    wrong = sum(not row.equal for row in rows)
    few = [each for each in listed if each.world < 16]  # of 16 processes only the chosen plans run
    ran_of_few, of_few, of_many = (
        sum(row.world < 16 for row in rows),
        sum(each.count for each in few),
        sum(each.count for each in listed) - sum(each.count for each in few),
    )
    yield (
        f"{ran_of_few:,} of the {of_few:,} plans that `seqloom plan --list` names for "
        f"{', '.join(map(str, sorted({each.world for each in few})))} processes ran"
        f"{f', one of every {asked.every}' if asked.every > 1 else ''}"
        f"{f', and {len(rows) - ran_of_few} chosen ones of {of_many:,} for 16' if of_many else ''}. "
        f"{len(rows) - wrong:,} of these {len(rows):,} equal one device to {TOLERANCE:.0e} in float64: the loss, the "
        f"gradient norm, every gradient and every parameter after {STEPS} steps of at least {MICRO_BATCHES} "
        f"micro-batches with clipping, at {asked.tokens} tokens a sequence. The models are the built-in ones, grown to "
        "each plan. Written by `python -m benchmarks.parity`."
    )
    yield ""
    yield "| model | processes | plans listed | run | not equal | worst error |"
    yield "|---|---|---|---|---|---|"
    groups = {(each.model, each.world): each for each in listed}
    for (model, world), each in groups.items():
        some = [row for row in rows if (row.model, row.world) == (model, world)]
        yield (
            f"| {model} | {world} | {each.count:,} | {len(some):,} | {sum(not row.equal for row in some)} | "
            f"{f'{_worst(row.worst for row in some):.1e}' if some else ''} |"
        )
    if any(each.dropped for each in listed):
        yield ""
        yield "Listed and not run, since the model that grew to the plan alone refuses it:"
        yield ""
        yield from (f"- {each.model}: `{plan}`" for each in listed for plan in each.dropped)
    for model, world in groups:
        yield from ("", f"## {model}, {world} processes", "")
        yield "| plan | loss | gradient norm | worst gradient | parameters |"
        yield "|---|---|---|---|---|"
        for row in rows:
            if (row.model, row.world) == (model, world):
                errors = " | ".join(f"{e:.0e}" for e in (row.loss, row.norm, row.gradient, row.parameter))
                yield f"| `{row.plan}` | {row.failed + ' | | |' if row.failed else errors} |"


if __name__ == "__main__":
    started = perf_counter()
    status = main()
    print(f"{perf_counter() - started:.0f} s")
    sys.exit(status)
