"""Local runs: their results, their failures, their signals.

This file is also the program that some of the signal tests start.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from seqloom.errors import CommunicationError, ConfigError, PlanError, WorkerError
from seqloom.fabric.launch import distributed, launched, run_local
from seqloom.fabric.local import Cause, Failure, root_first

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


# What the ranks do.


def describe(word: str) -> tuple[str, int, int, float, bool, int]:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    rank, world = dist.get_rank(), dist.get_world_size()
    return (
        f"{word} {os.environ.get('LOCAL_RANK')}",
        rank,
        world,
        float(total),
        launched() == world,
        torch.get_num_threads(),
    )


def meet_until_the_end() -> None:
    for _ in range(1_000_000):
        dist.all_reduce(torch.ones(1))


def fail_on(rank: int, error: Exception) -> None:
    if dist.get_rank() == rank:
        raise error
    meet_until_the_end()


def fail_while_peers_are_busy(rank: int, error: Exception) -> None:
    if dist.get_rank() == rank:
        raise error
    time.sleep(600)


def die_on(rank: int, stamp: Path) -> None:
    if dist.get_rank() == rank:
        stamp.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    meet_until_the_end()


def leave_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    meet_until_the_end()


def peers_race_to_exit(rank: int, stamp: Path) -> None:
    """Every peer falls out of the collective with its own error before the death of `rank` can be seen."""
    if dist.get_rank() == rank:
        dist.destroy_process_group()
        time.sleep(0.5)
        stamp.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    meet_until_the_end()


def tell_ready() -> None:
    os.write(1, b"ready %d\n" % os.getpid())  # in one piece, unlike print, whatever its buffer


def count_terms() -> int:
    """Leave cleanly at SIGTERM, and say how many signals came."""
    heard: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: heard.append(number))
    tell_ready()
    while not heard:
        time.sleep(0.05)
    time.sleep(0.5)
    return len(heard)


def sleep_on() -> None:
    tell_ready()
    time.sleep(600)


def ignore_terms() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep_on()


def signal_caller(number: int, then: Callable[[], Any]) -> Any:
    """Rank 0 signals the process that called run_local, the parent of the nursery, once all ranks listen."""
    if dist.get_rank() == 0:
        nursery = Path(f"/proc/{os.getppid()}/stat").read_text()
        caller = int(nursery.rpartition(")")[2].split()[1])
        threading.Timer(0.5, os.kill, (caller, number)).start()
    return then()


PROGRAMS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (count_terms, ignore_terms)}


def program(name: str) -> None:
    try:
        print("results", run_local(3, PROGRAMS[name]), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)


# Results.


def test_results_in_rank_order() -> None:
    """Results in order of arrival, an argument lost, a rank outside the group, or all cores for every rank."""
    os.environ.pop("OMP_NUM_THREADS", None)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert run_local(3, describe, "rank") == [(f"rank {rank}", rank, 3, 6.0, True, threads) for rank in range(3)]


def test_spawned_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single process that waits for peers; the way ranks start beside CUDA, broken unseen on machines without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # in this process, not in the one it starts
    [(text, rank, world, total, _, _)] = run_local(1, describe, "only")
    assert (text, rank, world, total) == ("only 0", 0, 1, 1.0)


def test_distributed_without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script started by plain python that cannot run, or a group left behind for the next caller."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    for _ in range(2):
        with distributed(10):
            assert dist.get_world_size() == 1
        assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), distributed(10):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's WORLD_SIZE taken for ranks of this run, so that it hangs or trains alone."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() is None
    with pytest.raises(ConfigError, match="lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), distributed(1):
        pass


def test_ranks_that_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare torch error, or a wait without end, when the other ranks are not there."""
    for name, value in zip(VARIABLES, ("0", "2", "0", "127.0.0.1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(CommunicationError, match="Rank 0 did not meet all 2 ranks"), distributed(1):
        pass


# Failures.


def test_raise_on_one_rank() -> None:
    """The echo of a peer ("connection closed") shown in place of the error, or the error without its rank."""
    with pytest.raises(WorkerError) as caught:
        run_local(3, fail_on, 2, ValueError("the number is bad"))
    assert str(caught.value) == "rank 2 failed: ValueError: the number is bad"
    assert caught.value.rank == 2
    assert caught.value.trace.count("the number is bad") == 1 and "in fail_on" in caught.value.trace


def test_own_errors_come_back_as_themselves() -> None:
    """A PlanError that loses its reasons on the way, or whose peers are waited for until they notice."""
    with pytest.raises(PlanError) as caught:
        run_local(2, fail_while_peers_are_busy, 1, PlanError(["7 heads are odd.", "9 tokens too."], "ring=2"))
    assert caught.value.reasons == ("7 heads are odd.", "9 tokens too.") and caught.value.nearest == "ring=2"
    assert str(caught.value) == "7 heads are odd. Also: 9 tokens too. Try ring=2."
    assert any("Raised on rank 1" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("how", [die_on, peers_race_to_exit])
def test_killed_rank(how: Callable[..., None], tmp_path: Path) -> None:
    """Peers that wait for a dead rank until the group's timeout, or are blamed for its death."""
    with pytest.raises(WorkerError) as caught:
        run_local(3, how, 1, tmp_path / "stamp")
    assert time.monotonic() - float((tmp_path / "stamp").read_text()) < 20
    assert str(caught.value) == "rank 1 was killed by SIGKILL (often: out of memory)"


def test_rank_that_leaves_without_a_word() -> None:
    """A rank that calls exit taken for one that is done."""
    with pytest.raises(WorkerError, match="rank 0 left with exit status 3 and no result"):
        run_local(2, leave_on, 0)


def test_root_cause() -> None:
    """An early echo, or an abort, shown in place of what caused it."""

    def failure(rank: int, cause: Cause, when: float) -> Failure:
        return Failure(rank, cause, when, "")

    echo, error, later = failure(0, Cause.PEER, 1.0), failure(1, Cause.RAISED, 2.0), failure(2, Cause.RAISED, 3.0)
    abort, kill = failure(3, Cause.VANISHED, 1.5), failure(4, Cause.KILLED, 4.0)
    assert sorted([later, abort, error, echo, kill], key=root_first) == [kill, error, later, abort, echo]


def test_echo_of_a_peer() -> None:
    """A lost peer taken for the cause because its error was wrapped; a wrong shape taken for a lost peer."""

    def cause(error: Exception, source: Exception | None = None) -> Cause:
        error.__cause__ = source
        return Failure.of(0, error).cause

    gloo = RuntimeError("[third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert cause(gloo) == Cause.PEER
    assert cause(CommunicationError("lost")) == Cause.PEER
    assert cause(ValueError("cannot save"), gloo) == Cause.PEER
    assert cause(RuntimeError("shape '[2, 3]' is invalid for input of size 5")) == Cause.RAISED


# The pool of the test session.


def test_pool_survives_its_tests(pool: Pool) -> None:
    """A failing test that takes the rest of the session with it, or passes because nobody listened."""
    with pytest.raises(WorkerError, match="rank 1 failed: ZeroDivisionError: here") as caught:
        pool.run(3, fail_on, 1, ZeroDivisionError("here"))
    assert "in fail_on" in caught.value.trace
    with pytest.raises(WorkerError, match=r"no answer in 1 s from rank 0, 1;"):
        pool.run(2, time.sleep, 600, timeout_seconds=1)
    for world in (8, 3, 1):
        answers = pool.run(world, describe, "pool")
        assert [answer[1:4] for answer in answers] == [(rank, world, world * (world + 1) / 2) for rank in range(world)]


# Signals.


@contextmanager
def started(name: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The program `name`, once all its ranks are at work, with their process ids. None may outlive the test."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, __file__, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process, [int(process.stdout.readline().removeprefix("ready ")) for _ in range(3)]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_sigterm_reaches_the_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    """A job stopped by its cluster that loses what the ranks would have saved; handlers not put back."""
    before = signal.getsignal(signal.SIGTERM)
    assert run_local(3, signal_caller, signal.SIGTERM, count_terms) == [1, 1, 1]
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_stop_without_a_handler(capfd: pytest.CaptureFixture[str], number: int, raised: type[BaseException]) -> None:
    """Three tracebacks at Ctrl-C, or a caller that reports a killed worker when its user stopped it."""
    with pytest.raises(raised) as caught:
        run_local(3, signal_caller, number, sleep_on)
    assert number == signal.SIGINT or caught.value.args == (143,)
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_heard_once() -> None:
    """A rank that takes the terminal's SIGINT and the caller's word for two Ctrl-C and leaves without saving."""
    with started("count_terms") as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (out.strip(), err, process.returncode) == ("results [1, 1, 1]", "", 0)


def test_second_ctrl_c_kills() -> None:
    """Ranks that do not listen and keep the terminal."""
    with started("ignore_terms") as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        assert all(map(alive, pids)) and process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (out.strip(), err) == ("interrupted", "")
        assert gone(pids, 1)


def test_killed_caller() -> None:
    """Orphans that go on computing, hold the ports, and write to the run's folder."""
    with started("ignore_terms") as (process, pids):
        process.kill()
        assert gone(pids, 5)


if __name__ == "__main__":
    program(sys.argv[1])
