"""A folded Clos in a few lines, for oracles: XGFT(down; up) with D-mod-k routes, as SimGrid's fat trees are built and routed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LINK, HOP = 50e9, 0.5e-6  # bytes/s, seconds


@dataclass(frozen=True)
class FatTree:
    """`down[i]` children of each switch of level i + 1, `up[i]` parents of each node of level i; links of 50 GB/s and 0.5 us."""

    down: tuple[int, ...]
    up: tuple[int, ...]

    @property
    def hosts(self) -> int:
        return int(np.prod(self.down))

    def paths(self, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return indptr, links, capacities and latencies (s) of the routes from `source` to `target`."""
        levels = len(self.down)
        below = np.cumprod((1, *self.down))  # hosts below a switch of each level
        planes = np.cumprod((1, *self.up))  # switches of each level above one host
        top = sum((source // b != target // b).astype(int) for b in below[:-1])
        hops = []
        for level in range(levels):
            # at each level the plane is picked by the digits of the target
            climbs = top > level
            plane = np.where(climbs, target % planes[level + 1], 0)
            wires = self.hosts // below[level] * planes[level + 1]
            hops.append((climbs, source // below[level] * planes[level + 1] + plane, wires))
        begins = np.cumsum([0] + [w for _, _, w in hops])
        columns = [(c, begins[k] + wire) for k, (c, wire, _) in enumerate(hops)]
        for level in reversed(range(levels)):
            climbs, _, _ = hops[level]
            plane = target % planes[level + 1]
            columns.append((climbs, begins[-1] + begins[level] + target // below[level] * planes[level + 1] + plane))
        used = np.stack([c for c, _ in columns], axis=1)
        links = np.stack([w for _, w in columns], axis=1)[used]
        lengths = used.sum(axis=1)
        return np.concatenate([[0], np.cumsum(lengths)]), links, np.full(2 * begins[-1], LINK), HOP * lengths


TWO_LEVELS = FatTree((32, 32), (1, 32))  # 1,024 hosts
THREE_LEVELS = FatTree((16, 16, 32), (1, 16, 16))  # 8,192 hosts


def all_to_all(hosts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sources and targets of every ordered pair of the first `hosts` hosts."""
    source, target = np.divmod(np.arange(hosts * hosts), hosts)
    return source[source != target], target[source != target]
