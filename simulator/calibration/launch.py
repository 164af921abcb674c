"""Run a function on several ranks, each a process of its own with one thread for kernels."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simulator.errors import SimulatorError

#: what a rank is started with: freed memory is kept, because new pages cost more than most kernels; large pages, because the optimizer
#: was seen at 15 to 31 GB/s on small ones, as the heap was older or fresher, and at 18 to 19 on large ones (one two-core machine; glibc
#: before 2.35 or a kernel without them passes the wish by); one thread
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "KINETO_LOG_LEVEL": "99",
}
#: how long a rank waits for the others
PATIENCE = timedelta(seconds=120)

Tell = Callable[..., None]


class RankError(SimulatorError):
    """A rank ended with an error; the text is its traceback."""


@contextmanager
def _environment() -> Iterator[None]:
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value


def device_of(kind: str, rank: int) -> torch.device:
    """Return the device of a rank."""
    return torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")


def own_core(rank: int, world: int) -> None:
    """Bind this process to a core of its own.

    Seen without: the same small collective takes 0.4 or 4 ms, and no model of its size can tell which. The longer one is a tick of
    the scheduler; that the thread which moves the data then waits behind the other rank's kernels is our reading, not measured.
    """
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if world <= len(cores):
            os.sched_setaffinity(0, {cores[rank * len(cores) // world]})


def _end_with_parent() -> None:
    """End this process when the one that started it has ended: killed, that cannot end its ranks, and they would go on measuring."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _rank(function: Callable, rank: int, world: int, kind: str, store: str, said: Any, touched: int, args: tuple) -> None:
    """Body of a process: join the others, run, and hand back the result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(1)
        if kind == "cuda":
            torch.cuda.set_device(rank)
        else:
            own_core(rank, world)
        torch.ones(touched // 4)  # the first use of a page costs more than most kernels: not while we measure
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=PATIENCE)
        result = function(rank, world, lambda *what: said.put(("told", rank, what)), *args)
        dist.barrier()
        dist.destroy_process_group()
        said.put(("done", rank, result))
    except Exception:  # whatever it is, the parent raises it
        said.put(("failed", rank, traceback.format_exc()))


def run_ranks(function: Callable, world: int, *args: Any, kind: str = "cpu", tell: Tell | None = None, touched: int = 0) -> list[Any]:
    """Return what ``function(rank, world, tell, *args)`` returns on each of `world` processes.

    Parameters
    ----------
    function : callable
        At the top level of a module; everything that it takes and returns must pickle.
    world : int
        Processes.
    kind : str
        ``cpu`` (gloo) or ``cuda`` (NCCL).
    tell : callable, optional
        Called here with what rank 0 tells.
    touched : int
        Memory that each rank touches first, bytes.

    Raises
    ------
    RankError
        When a rank fails or dies; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    said, results = context.Queue(), {}
    with tempfile.TemporaryDirectory() as folder, _environment():
        store = str(Path(folder) / "store")
        processes = [
            context.Process(target=_rank, args=(function, r, world, kind, store, said, touched, args), daemon=True) for r in range(world)
        ]
        for process in processes:
            process.start()
        try:
            while len(results) < world:
                try:
                    what, rank, value = said.get(timeout=1.0)
                except queue.Empty:
                    dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in results]
                    if dead:
                        raise RankError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}: out of memory?") from None
                    continue
                if what == "failed":
                    raise RankError(f"rank {rank} failed:\n{value}")
                if what == "done":
                    results[rank] = value
                elif rank == 0 and tell:
                    tell(*value)
        finally:
            for process in processes:
                if len(results) < world:
                    process.terminate()
                process.join(timeout=10)
    return [results[r] for r in range(world)]
