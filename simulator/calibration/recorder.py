"""Where a real step spends its time, by the simulator's own names of kernels and collectives."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Recorder:
    """Seconds per kind of kernel and collective, while it is on.

    Notes
    -----
    On a CPU kernels run when they are called and the clock is read around them. On CUDA events are recorded around them
    and read by `seconds`, so that recording does not wait for the device.
    """

    def __init__(self, device: torch.device):
        self.device, self.on = device, False
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inside: list[float] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count what runs inside under `name`."""
        if not self.on:
            yield
        elif self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
        else:
            self._inside.append(0.0)
            first_s = time.perf_counter()
            yield
            took_s = time.perf_counter() - first_s
            self._seconds[name] += took_s - self._inside.pop()  # a collective inside a kernel is not the kernel's
            if self._inside:
                self._inside[-1] += took_s

    def take(self) -> dict[str, float]:
        """Return seconds per name since the last call, and begin anew."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1e3
        found = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return found
