"""Links that transfers of a running simulation share: rates change only when one begins or ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import simpy

from simulator.errors import NetworkError


@dataclass(eq=False, slots=True)
class _Transfer:
    links: tuple[int, ...]
    left: float
    done: simpy.Event
    rate: float = field(default=0.0)


class SharedLinks:
    """Max-min fair sharing of links among transfers that begin when the simulation says so.

    Parameters
    ----------
    env : simpy.Environment
    capacity : sequence of float
        Bytes/s of each link.
    solve : callable
        `simulator.network.flows.fair_rates`, given by the caller: the engine has no physics of its own.

    Notes
    -----
    One timer, for the next completion. A change of rates raises the version, and a timer of an older version that goes off does
    nothing; transfers that begin at one instant are solved together, at its end.
    """

    def __init__(self, env: simpy.Environment, capacity: Sequence[float], solve):
        self.env, self.capacity, self._solve = env, np.asarray(capacity, dtype=float), solve
        self._active: list[_Transfer] = []
        self._version, self._since, self._waiting = 0, 0.0, False
        self.link_bytes = np.zeros(len(self.capacity))

    def send(self, links: Sequence[int], size_bytes: float, latency_s: float = 0.0) -> simpy.Event:
        """Return an event that succeeds when `size_bytes` have crossed `links`, which they begin to share after `latency_s`.

        Raises
        ------
        NetworkError
            When a link is not there or has no rate, or the size or latency is negative.
        """
        used = tuple(int(link) for link in links)
        bad = [link for link in used if not 0 <= link < len(self.capacity) or not self.capacity[link] > 0]
        if bad:
            raise NetworkError(f"link {bad[0]} has no rate; the links are 0 to {len(self.capacity) - 1}, above 0 bytes/s each")
        if not (np.isfinite(size_bytes) and size_bytes >= 0 and latency_s >= 0):
            raise NetworkError(f"a transfer of {size_bytes:g} bytes after {latency_s:g} s; neither may be negative or endless")
        transfer = _Transfer(used, float(size_bytes), self.env.event())
        self.env.process(self._begin(transfer, latency_s))
        return transfer.done

    def _begin(self, transfer: _Transfer, latency_s: float) -> Iterator[simpy.Event]:
        yield self.env.timeout(latency_s)
        if not transfer.links or transfer.left == 0:
            transfer.done.succeed()
            return
        self._move()
        self.link_bytes[list(transfer.links)] += transfer.left
        self._active.append(transfer)
        if not self._waiting:
            self._waiting = True
            yield self.env.timeout(0)
            self._waiting = False
            self._share()

    def _move(self) -> None:
        """Take off what has been sent since rates last changed."""
        for transfer in self._active:
            transfer.left = max(transfer.left - transfer.rate * (self.env.now - self._since), 0.0)
        self._since = self.env.now

    def _share(self) -> None:
        """Solve rates anew and set the timer for the next completion."""
        self._move()
        self._version += 1
        if not self._active:
            return
        lengths = [len(t.links) for t in self._active]
        rates = self._solve(np.cumsum([0, *lengths]), np.concatenate([t.links for t in self._active]), self.capacity)
        for transfer, rate in zip(self._active, rates.tolist(), strict=True):
            transfer.rate = rate
        self.env.process(self._timer(self._version, min(t.left / t.rate for t in self._active)))

    def _timer(self, version: int, wait_s: float) -> Iterator[simpy.Event]:
        end = self.env.now + wait_s
        yield self.env.timeout(wait_s)
        if version != self._version:
            return
        self._move()
        ended = [t for t in self._active if t.left <= t.rate * max(end, 1e-9) * 1e-12]
        self._active = [t for t in self._active if t not in ended]
        for transfer in ended:
            transfer.done.succeed()
        self._share()
