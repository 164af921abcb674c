"""Where a real step spends its time, by the simulator's own names of kernels and collectives."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

#: cycles that a GPU is kept busy so that its host gets ahead of it, 1 ms at 2 GHz, whenever it is within so many regions of the host
LEAD_CYCLES, BEHIND = 2_000_000, 8
#: the simulator's names of datatypes
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "int64"}


class Spent(NamedTuple):
    """Seconds on the clock, and seconds that the thread computed: less where another process had the core, or it waited.

    Of a region on a GPU: seconds of the device, and what launching took its host.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def plus(self, other: Spent) -> Spent:
        """Return the sum."""
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def less(self, other: Spent) -> Spent:
        """Return the difference."""
        return Spent(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


def now() -> Spent:
    """Return the clocks."""
    return Spent(time.perf_counter(), time.thread_time())


class Call(NamedTuple):
    """One collective: kind and datatype as ``all_gather.bf16``, bytes as the simulator counts them, seconds by the clock, axis."""

    name: str
    size: int
    seconds: float
    axis: str


class Recorder:
    """Time per kind of kernel and collective, while it is on; and every collective call by itself.

    Notes
    -----
    On a CPU kernels run when they are called and the clocks are read around them. On CUDA events are recorded around them
    and read by `take`, so that recording does not wait for the device.

    Attributes
    ----------
    on : bool
        Whether it records.
    ahead : bool
        On CUDA, whether the device is kept busy before a region that would else wait for its host between kernels: what is recorded
        is then the time of the kernels alone, and what the host takes is another figure, `simulator.calibration.measure.dispatch`.
    """

    def __init__(self, device: torch.device):
        self.device, self.on, self.ahead = device, False, False
        self._spent: dict[str, Spent] = defaultdict(Spent)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event, str | None, float]] = []  # the name around it, the host's time
        self._led = 0  # events when the host last got ahead
        self._open: list[str] = []
        self._inside: list[Spent] = []
        self._calls: list[tuple[str, int, int | float, str]] = []

    @contextmanager
    def call(self, axis: str, kind: str, dtype: torch.dtype, size: int) -> Iterator[None]:
        """Count a collective of `size` bytes under ``axis.kind``, and note the call."""
        with self.region(f"{axis}.{kind}"):
            begin = time.perf_counter()
            yield
            took = time.perf_counter() - begin
        if self.on:
            # on CUDA the seconds are those of the region's events, the last ones recorded
            self._calls.append((f"{kind}.{_SHORT.get(dtype, str(dtype))}", size, len(self._events) - 1 if self._events else took, axis))

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count what runs inside under `name`."""
        if not self.on:
            yield
        elif self.device.type == "cuda":
            if self.ahead and not self._open:
                self._lead()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            self._open.append(name)
            begin = time.thread_time()
            yield
            host_s = time.thread_time() - begin
            self._open.pop()
            last.record()
            self._events.append((name, first, last, self._open[-1] if self._open else None, host_s))
        else:
            self._inside.append(Spent())
            begin = now()
            yield
            took = now().less(begin)
            self._spent[name] = self._spent[name].plus(took.less(self._inside.pop()))  # a collective inside a kernel is not the kernel's
            if self._inside:
                self._inside[-1] = self._inside[-1].plus(took)

    def _lead(self) -> None:
        """Let the host get ahead of the device, if it is not."""
        near = max(len(self._events) - BEHIND, self._led)  # none from before the last time: these were done then
        if not self._events or self._events[near][2].query():
            torch.cuda._sleep(LEAD_CYCLES)
            self._led = len(self._events)

    def take(self) -> dict[str, Spent]:
        """Return the time per name since the last call, and begin anew."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, first, last, around, host_s in self._events:
            took = Spent(first.elapsed_time(last) / 1e3, host_s)
            self._spent[name] = self._spent[name].plus(took)
            if around:
                self._spent[around] = self._spent[around].less(took)
        found = dict(self._spent)
        self._spent.clear()
        self._events.clear()
        self._led = 0
        self._calls.clear()
        return found

    def calls(self) -> list[Call]:
        """Return the collectives since the last `take`, in order."""
        if self._events:
            torch.cuda.synchronize(self.device)
        found = []
        for name, size, at, axis in self._calls:
            seconds = self._events[int(at)][1].elapsed_time(self._events[int(at)][2]) / 1e3 if self._events else at
            found.append(Call(name, size, float(seconds), axis))
        return found
