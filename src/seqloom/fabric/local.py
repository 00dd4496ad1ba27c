"""Processes of this machine as one family: started together, ended together, one error for all of them.

    caller ──spawn──> nursery ──fork──> rank 0 … rank world-1

The nursery is a fresh process that imports what the ranks need once, forks them, and watches them. A fork of the
caller would copy its threads' locks and its CUDA state; `world` fresh interpreters would each import torch and
transformers (12 s against 3 s for 4 ranks on 2 cores). Where CUDA is used the nursery spawns its ranks instead.

Nobody outlives the caller: every rank watches a pipe (the lifeline) whose other end only the caller holds.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Literal

from seqloom.errors import CommunicationError, SeqloomError, WorkerError

Method = Literal["fork", "spawn"]

_STOPS = (signal.SIGINT, signal.SIGTERM)
_SETTLE_SECONDS = 0.25  # time for an earlier error of another rank to arrive once one is known
_PEER_SETTLE_SECONDS = 2.0  # the same while all we know is that peers lost somebody


class Cause(IntEnum):
    """How a rank failed; of several failures the lowest cause, then the earliest, is the root."""

    KILLED = 0  # by a signal from outside
    RAISED = 1
    VANISHED = 2  # aborted, or left without a result
    PEER = 3  # a collective failed, so most likely because of another rank


@dataclass(frozen=True)
class Failure:
    """Why `rank` has no result. `error` is a pickled SeqloomError (see `_dump`), or None for anything else."""

    rank: int
    cause: Cause
    when: float  # seconds of the monotonic clock, which all processes of a machine share
    message: str
    trace: str = ""
    error: bytes | None = None

    @classmethod
    def of(cls, rank: int, error: BaseException) -> "Failure":
        """The failure of a rank that raised `error`, seen from inside that rank."""
        trace = "".join(traceback.format_exception(error))
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        cause = Cause.PEER if _from_a_peer(error) else Cause.RAISED
        return cls(rank, cause, time.monotonic(), f"rank {rank} failed: {text}", trace, _dump(error))

    @classmethod
    def of_death(cls, rank: int, exitcode: int | None) -> "Failure":
        """The failure of a rank that ended without a word."""
        aborted = exitcode is None or exitcode >= 0 or exitcode == -signal.SIGABRT
        message = f"rank {rank} {_ending(exitcode)}"
        return cls(rank, Cause.VANISHED if aborted else Cause.KILLED, time.monotonic(), message)

    def exception(self) -> SeqloomError:
        """The rank's own SeqloomError again, the remote traceback as its note; WorkerError for anything else."""
        if self.error is None:
            return WorkerError(self.rank, self.message, self.trace)
        kind, args, state = pickle.loads(self.error)
        error: SeqloomError = kind.__new__(kind, *args)  # not through __init__, whose arguments are not `args`
        error.__dict__.update(state)
        error.add_note(f"Raised on rank {self.rank}:\n{self.trace}")
        return error


def root_first(failure: Failure) -> tuple[Cause, float]:
    """Sorting key: of several failures the root cause comes first."""
    return failure.cause, failure.when


@dataclass(frozen=True)
class _Outcome:
    """What the nursery tells the caller at the end: every rank's pickled result, the root failure, or a stop."""

    results: tuple[bytes, ...] = ()
    failure: Failure | None = None
    stopped: bool = False


def run_family(
    world: int, body: Callable[..., Any], args: Sequence[Any], method: Method, grace_seconds: float
) -> list[Any]:
    """Run `body(rank, *args)` in `world` processes and return the results in rank order.

    body and args are pickled, and the results too, by value. `grace_seconds` lie between SIGTERM and SIGKILL for
    the ranks that remain when one has failed. Signals and errors: see `seqloom.fabric.launch.run_local`.
    """
    payload = pickle.dumps((body, args))
    context = multiprocessing.get_context("spawn")
    control, nursery_end = context.Pipe()
    lifeline, caller_end = context.Pipe(duplex=False)
    nursery = context.Process(target=_nursery, args=(world, payload, method, grace_seconds, nursery_end, lifeline))
    with contextlib.ExitStack() as stack:
        stack.callback(_end, [nursery], grace_seconds)  # runs after the lifeline below is cut
        stack.enter_context(caller_end)
        stack.enter_context(control)
        with _blocked_stops():  # the nursery keeps them blocked for good: it obeys the caller alone
            nursery.start()
        nursery_end.close()
        lifeline.close()
        with _forwarding(control) as received:
            outcome = _await(control, nursery, received)
        if outcome.stopped:
            raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
        if outcome.failure is not None:
            raise outcome.failure.exception()
        return [pickle.loads(result) for result in outcome.results]
    raise AssertionError("unreachable")  # no context above swallows an exception


def _await(control: Connection, nursery: BaseProcess, received: list[int]) -> _Outcome:
    """Wait for the nursery's word, or its death."""
    started = False
    while True:
        # A short wait until the ranks exist: a stop that comes before then needs no farewell.
        ready = wait([control, nursery.sentinel], None if started else 0.1)
        with contextlib.suppress(EOFError, OSError):
            if control.poll():
                message = control.recv()
                if isinstance(message, _Outcome):
                    return message
                started = True
                continue
        if received and not started:
            nursery.kill()
            return _Outcome(stopped=True)
        if nursery.sentinel in ready:
            nursery.join()
            how = f"The process that starts the ranks {_ending(nursery.exitcode)} before any rank's result was known."
            return _Outcome(failure=Failure(0, Cause.VANISHED, time.monotonic(), how))


@contextlib.contextmanager
def _forwarding(control: Connection) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the nursery; yields the list of those received so far.

    Python lets only the main thread set handlers, so a run started from another thread leaves signals alone.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(OSError):  # the nursery has already ended
            control.send("stop")

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, forward) for number in _STOPS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _blocked_stops() -> Iterator[None]:
    """Block SIGINT and SIGTERM in this thread and in the processes it starts meanwhile."""
    resource_tracker.ensure_running()  # which a first spawn would do, and unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _nursery(
    world: int, payload: bytes, method: Method, grace_seconds: float, control: Connection, lifeline: Connection
) -> None:
    """Body of the nursery: import once, start the ranks, watch them, tell the caller."""
    try:
        pickle.loads(payload)  # for its imports, which the ranks inherit
    except BaseException as error:
        outcome = _Outcome(failure=Failure.of(0, error))
    else:
        context = multiprocessing.get_context(method)
        processes: list[BaseProcess] = []
        reports: list[Connection] = []
        for rank in range(world):
            report, rank_end = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, payload, rank_end, lifeline))  # type: ignore[attr-defined]
            process.start()
            rank_end.close()
            processes.append(process)
            reports.append(report)
        with contextlib.suppress(OSError):  # the caller has died, as _watch will see
            control.send("started")
        outcome = _watch(processes, reports, control)
        unhurried = outcome.failure is None and not outcome.stopped
        _end(processes, grace_seconds, ask=not unhurried)
    with contextlib.suppress(OSError):  # the caller has died
        control.send(outcome)


def _watch(processes: list[BaseProcess], reports: list[Connection], control: Connection) -> _Outcome:
    """Collect what every rank reports until all have, or until the root of a failure is known."""
    results: dict[int, bytes] = {}
    failures: dict[int, Failure] = {}
    stopping = False
    deadline: float | None = None
    while len(results) + len(failures) < len(processes):
        open_ranks = [rank for rank in range(len(processes)) if rank not in results and rank not in failures]
        sources: list[Any] = [control]
        for rank in open_ranks:
            sources += [reports[rank], processes[rank].sentinel]
        ready = wait(sources, None if deadline is None else max(0.0, deadline - time.monotonic()))
        if deadline is not None and time.monotonic() >= deadline:
            break
        if control in ready:
            if stopping or not _asked_to_stop(control):  # asked twice, or the caller has died
                for process in processes:
                    process.kill()
                return _Outcome(stopped=True)
            stopping = True
            for process in processes:
                process.terminate()
        for rank in open_ranks:
            if reports[rank] in ready or processes[rank].sentinel in ready:
                said = _hear(rank, processes[rank], reports[rank])
                if isinstance(said, Failure):
                    failures[rank] = said
                else:
                    results[rank] = said
        if failures:
            known = min(failure.cause for failure in failures.values()) < Cause.PEER
            first = min(failure.when for failure in failures.values())
            deadline = first + (_SETTLE_SECONDS if known else _PEER_SETTLE_SECONDS)
    if not failures:
        return _Outcome(results=tuple(results[rank] for rank in range(len(processes))))
    root = min(failures.values(), key=root_first)
    ended = root.cause == Cause.PEER or processes[root.rank].exitcode == -signal.SIGTERM
    return _Outcome(failure=root, stopped=stopping and ended)


def _asked_to_stop(control: Connection) -> bool:
    try:
        return bool(control.recv() == "stop")
    except (EOFError, OSError):
        return False


def _hear(rank: int, process: BaseProcess, report: Connection) -> bytes | Failure:
    """The pickled result or the failure that a rank reported, or what its death says."""
    with contextlib.suppress(EOFError, OSError):
        if report.poll():  # also after its death: the pipe keeps what it wrote
            said: bytes | Failure = report.recv()
            return said
    process.join()
    return Failure.of_death(rank, process.exitcode)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"left with exit status {code} and no result"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was killed by {name}{' (often: out of memory)' if -code == signal.SIGKILL else ''}"


def _end(processes: list[BaseProcess], grace_seconds: float, ask: bool = False) -> None:
    """Wait `grace_seconds` for the processes to leave, after SIGTERM if `ask`; then kill. None is left unreaped."""
    started = [process for process in processes if process.pid is not None]
    if ask:
        for process in started:
            process.terminate()
    deadline = time.monotonic() + grace_seconds
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in started:
        if process.exitcode is None:
            process.kill()
            process.join()


def _rank(rank: int, payload: bytes, report: Connection, lifeline: Connection) -> None:
    """Body of one rank: run the function, report its result or its error."""
    threading.Thread(target=_die_with_caller, args=(lifeline,), name="lifeline", daemon=True).start()
    # SIGINT stays blocked: Ctrl-C in a terminal reaches the whole process group, and the caller passes it on as
    # SIGTERM, so that a rank hears of it exactly once.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    said: bytes | Failure
    try:
        body, args = pickle.loads(payload)
        said = pickle.dumps(body(rank, *args))
    except BaseException as error:
        said = Failure.of(rank, error)
    with contextlib.suppress(OSError):  # the nursery has died, so the lifeline is about to be cut
        report.send(said)
    if isinstance(said, Failure):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)  # threads of a broken communicator may never join


def _die_with_caller(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.poll(None)
    os._exit(1)


def _dump(error: BaseException) -> bytes | None:
    """A SeqloomError as bytes: its type, args and attributes, whatever the arguments of its __init__ are."""
    if not isinstance(error, SeqloomError) or isinstance(error, WorkerError):
        return None
    state = {name: value for name, value in vars(error).items() if name != "__notes__"}
    try:
        return pickle.dumps((type(error), error.args, state))
    except Exception:  # an attribute that cannot travel: the message still does
        return None


def _from_a_peer(error: BaseException) -> bool:
    """Whether this is the echo of another rank's end: a collective's own error, or one raised from it."""
    said = str(error)
    raw = type(error).__module__.startswith("torch.distributed") or any(
        sign in said for sign in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )
    if isinstance(error, CommunicationError) or (isinstance(error, RuntimeError) and raw):
        return True
    return error.__cause__ is not None and _from_a_peer(error.__cause__)
