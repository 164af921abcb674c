"""Where independent work runs: any `concurrent.futures.Executor`, or one that is named by a short text.

Work that dies with its worker is tried again, alone, so that one scenario that takes its process along does not take
its neighbours.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from simulator.errors import ProfileError, SimulatorError

#: tasks in flight for each worker: enough to keep it busy, few enough that an end comes soon
AHEAD = 4
#: and for an executor that was passed, which does not say how many workers it has
UNKNOWN = 256
#: seconds to wait for a scheduler to answer
PATIENCE_S = 10.0
_FORMS = "write serial, process, process:4 (workers) or dask://HOST:PORT, or pass an Executor"


@contextmanager
def opened(engine: str) -> Iterator[tuple[Executor, int]]:
    """Yield the executor that `engine` names and how many workers it has.

    Parameters
    ----------
    engine : str
        ``serial``; ``process`` or ``process:N`` for N local processes; ``dask://HOST:PORT`` for a Dask scheduler.

    Raises
    ------
    ProfileError
        When the text is none of these, or no scheduler answers there.
    """
    kind, colon, rest = engine.partition(":")
    if engine == "serial":
        with ThreadPoolExecutor(1) as executor:
            yield executor, 1
    elif kind == "process" and (not colon or (rest.isdecimal() and int(rest) > 0)):
        workers = int(rest) if colon else os.cpu_count() or 1
        # a fresh interpreter: a fork would copy the threads of BLAS in whatever state they are
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as executor:
            yield executor, workers
    elif kind == "dask" and rest.startswith("//") and rest.strip("/"):
        with _dask(rest.strip("/")) as found:
            yield found
    else:
        raise ProfileError(f"engine {engine!r} is not known; {_FORMS}")


@contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError:
        raise ProfileError(f"engine dask://{address} needs Dask; pip install 'myriad-simulator[dask]'") from None
    try:
        client = Client(f"tcp://{address}", timeout=PATIENCE_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"no Dask scheduler answers at {address} within {PATIENCE_S:g} s ({type(error).__name__}); "
            "start one with 'dask scheduler' and workers with 'dask worker', or use engine process"
        ) from None
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise ProfileError(f"the Dask scheduler at {address} has no workers; start some with 'dask worker {address}'")
        yield client.get_executor(pure=False), workers


def finished(work: Callable[[Any], Any], tasks: Mapping[str, Any], engine: str | Executor) -> Iterator[tuple[str, Any]]:
    """Yield ``(key, work(task))`` of every task as it ends, in no order; an exception in place of a result that never came.

    Parameters
    ----------
    work : callable
        A function of a module, so that other processes find it. What it raises counts as the death of its worker.
    tasks : mapping
        Arguments by key.
    engine : str or Executor
        As for `opened`. A pool named by text is opened again when it breaks; an executor that was passed is not.

    Raises
    ------
    SimulatorError
        When an executor that was passed breaks.
    """
    waiting, alone = deque(tasks), deque[str]()
    while waiting or alone:
        if isinstance(engine, Executor):
            yield from _through(engine, UNKNOWN, work, tasks, waiting, alone)
            if waiting or alone:
                raise SimulatorError("the executor broke: a worker died; open a new one and run again")
        else:
            with opened(engine) as (executor, workers):
                yield from _through(executor, AHEAD * workers, work, tasks, waiting, alone)


def _through(
    executor: Executor, window: int, work: Callable[[Any], Any], tasks: Mapping[str, Any], waiting: deque[str], alone: deque[str]
) -> Iterator[tuple[str, Any]]:
    """Yield what ends until nothing waits or the executor breaks; what was in flight then goes to `alone`."""
    flying: dict[Future, str] = {}
    suspect = None
    while waiting or alone or flying:
        try:
            if alone and not flying:
                suspect = alone.popleft()
                flying[executor.submit(work, tasks[suspect])] = suspect
            while not alone and waiting and len(flying) < window:
                flying[executor.submit(work, tasks[waiting[0]])] = waiting[0]
                waiting.popleft()
        except BrokenExecutor:
            if not flying:
                return
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        broken = False
        for future in done:
            key = flying.pop(future)
            error = future.exception()
            broken = broken or isinstance(error, BrokenExecutor)
            if error is None:
                yield key, future.result()
            elif key == suspect:
                yield key, error  # it died alone, too
            else:
                alone.append(key)
        suspect = suspect if suspect in flying.values() else None
        if broken:
            alone.extend(flying.values())
            return
