"""Worker processes that live as long as the test session, so that a test of several ranks costs milliseconds."""

import faulthandler
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from seqloom.errors import WorkerError
from seqloom.fabric.local import Cause, Failure, root_first

SIZE = 8
MOST_THREADS = 120
"""Of a worker. torch's caches of DTensor keep meshes, and these groups, whose threads look for messages every 10 ms."""

PRELOADED = ["transformers.modeling_utils", "transformers.models.llama.modeling_llama", "hypothesis", "pool"]


class Pool:
    """`SIZE` single-threaded processes; `run` makes the first few of them a fresh process group for one call.

    A test module's own functions can be run: they are found by the file of their module.
    """

    def __init__(self) -> None:
        # The processes are forked from a server that has imported the heavy modules once.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # which pytest has extended
            forkserver.ensure_running()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._calls = 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self,
        world: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_seconds: float = 60,
        collective_seconds: float | None = None,
    ) -> list[Any]:
        """`function(*args)` on ranks 0 .. world-1 inside a fresh gloo group of that size; results in rank order.

        Arguments and results travel by pickle, tensors by value. Raises the root error as `run_local` does:
        SeqloomErrors as themselves, anything else as WorkerError, with the rank's traceback as a note. A rank that
        gives no answer in `timeout_seconds` fails the call, and a collective after `collective_seconds`, if given.
        Workers that hang or died are replaced.
        """
        assert 1 <= world <= SIZE, f"the pool has {SIZE} workers, not {world}"
        if any(len(os.listdir(f"/proc/{process.pid}/task")) > MOST_THREADS for process, _ in self._workers):
            self.close()
        if not self._workers:
            self._start()
        self._calls += 1
        file = getattr(sys.modules[function.__module__], "__file__", None)
        job = (
            self._calls,
            world,
            collective_seconds or timeout_seconds,
            function.__module__,
            file,
            pickle.dumps((function, args)),
        )
        for _, pipe in self._workers[:world]:
            pipe.send(job)
        said = self._collect(world, timeout_seconds)
        failures = [answer for answer in said if isinstance(answer, Failure)]
        if any(answer is None for answer in said) or any(f.cause in (Cause.KILLED, Cause.VANISHED) for f in failures):
            self.close()
        if failures:
            root = min(failures, key=root_first)
            error = root.exception()
            if isinstance(error, WorkerError):
                error.add_note(root.trace)
            raise error
        silent = [rank for rank, answer in enumerate(said) if answer is None]
        if silent:
            who = ", ".join(map(str, silent))
            raise WorkerError(silent[0], f"no answer in {timeout_seconds:g} s from rank {who}; see stderr for where")
        return [pickle.loads(answer) for answer in said]

    def close(self) -> None:
        """End all workers; the next `run` starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        for rank in range(SIZE):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, theirs, self._store.port), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, timeout_seconds: float) -> list[Any]:
        """What each rank said: a pickled result, a Failure, or None if it did not answer in time."""
        said: list[Any] = [None] * world
        deadline = time.monotonic() + timeout_seconds
        while None in said and time.monotonic() < deadline:
            open_ranks = [rank for rank in range(world) if said[rank] is None]
            watched = [x for rank in open_ranks for x in (self._workers[rank][1], self._workers[rank][0].sentinel)]
            ready = wait(watched, max(0.0, deadline - time.monotonic()))
            for rank in open_ranks:
                process, pipe = self._workers[rank]
                if pipe in ready or process.sentinel in ready:
                    said[rank] = _hear(rank, process, pipe)
                if isinstance(said[rank], Failure):
                    deadline = min(deadline, time.monotonic() + 5)  # the others lose their peer at once
        silent = [rank for rank in range(world) if said[rank] is None]
        for rank in silent:
            os.kill(self._workers[rank][0].pid, signal.SIGUSR1)  # shows where it hangs, on stderr
        if silent:
            time.sleep(0.3)
        return said


def _hear(rank: int, process: Any, pipe: Connection) -> Any:
    with suppress(EOFError, OSError):
        if pipe.poll():
            return pipe.recv()
    process.join()
    return Failure.of_death(rank, process.exitcode)


def _serve(rank: int, pipe: Connection, port: int) -> None:
    """Body of a worker: one job after the other until the test session ends."""
    threading.Thread(target=_die_with_session, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    closing: deque[threading.Thread] = deque()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            said: bytes | Failure = _do(rank, store, closing, *job)
        except BaseException as error:
            said = Failure.of(rank, error)
            error.__traceback__ = None  # its frames hold tensors, models and groups
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.manual_seed(0)
        pipe.send(said)


def _do(
    rank: int,
    store: Any,
    closing: deque[threading.Thread],
    call: int,
    world: int,
    timeout_seconds: float,
    module: str,
    file: str | None,
    payload: bytes,
) -> bytes:
    _import(module, file)
    function, args = pickle.loads(payload)
    timeout = timedelta(seconds=timeout_seconds)
    prefix = dist.PrefixStore(f"call {call}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world, timeout=timeout)
    try:
        return pickle.dumps(function(*args))
    finally:
        # gloo takes 10 ms to close each connection, which need not hold up the next call; nor may it pile up.
        groups = list(dist.distributed_c10d._world.pg_map)
        if dist.is_initialized():
            dist.destroy_process_group()
        if len(closing) == 8:
            closing.popleft().join()
        closing.append(threading.Thread(target=groups.clear, daemon=True))
        closing[-1].start()


def _import(module: str, file: str | None) -> None:
    """Import a module by name, or, as pytest does with test modules, from its file."""
    if module in sys.modules:
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        assert file is not None
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[module]
            raise


def _die_with_session() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
