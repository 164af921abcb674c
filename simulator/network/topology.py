"""The graph of a cluster: accelerators, switches, and every cable between them, as arrays and as a networkx graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from simulator.errors import Problem, ProfileError, nearest
from simulator.units import readable

if TYPE_CHECKING:
    import networkx as nx

    from simulator.network.paths import Router


@dataclass(frozen=True)
class Topology:
    """Vertices and cables of one cluster; accelerators come first, then switches layer by layer.

    Parameters
    ----------
    name : str
        Of the cluster.
    family : str
        Of its fabric.
    accelerators : int
        The first vertices.
    layers : dict of str to int
        Switches of each layer, in the order of their vertices: ``scale-up``, ``leaf``, ``spine`` ...
    tiers : tuple of str
        Names of the tiers of cables, from the accelerator outwards: ``scale-up``, ``host``, ``leaf``, ``spine`` ...; a tier
        is named after the layer that its cables leave upwards.
    lower, upper, tier : ndarray of shape (cables,)
        The two ends of each cable and its tier.
    rate : ndarray of shape (cables,)
        Bytes per second, each direction; 0 for a dead cable.
    router : Router
        Which links join two accelerators.
    passive : dict of str to int
        Devices on the way that forward nothing by themselves, such as optical circuit switches.

    Notes
    -----
    Directed links: cable c carries link c upwards (from `lower` to `upper`) and link ``cables + c`` downwards.
    """

    name: str
    family: str
    accelerators: int
    layers: dict[str, int]
    tiers: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    tier: np.ndarray
    rate: np.ndarray
    router: Router
    passive: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        switches = ", ".join(f"{count:,} {layer}" for layer, count in self.layers.items() if count)
        return f"Topology({self.name}: {self.accelerators:,} accelerators, {switches} switches, {len(self.rate):,} cables)"

    @property
    def vertices(self) -> int:
        """Accelerators and switches."""
        return self.accelerators + sum(self.layers.values())

    @property
    def switches(self) -> int:
        """Switches of the scale-out network."""
        return sum(count for layer, count in self.layers.items() if layer != "scale-up")

    @cached_property
    def capacity(self) -> np.ndarray:
        """Line rate of every directed link, bytes/s; shape (2 cables,)."""
        return np.concatenate([self.rate, self.rate])

    def cables(self, tier: str) -> int:
        """Return how many cables of a tier there are."""
        return int(np.count_nonzero(self.tier == self.tiers.index(tier)))

    @cached_property
    def _first_of_layer(self) -> dict[str, int]:
        starts, at = {}, self.accelerators
        for layer, count in self.layers.items():
            starts[layer], at = at, at + count
        return starts

    def vertex(self, name: str) -> int:
        """Return the number of a vertex from its name, such as ``leaf 3`` or ``accelerator 17``."""
        layer, _, number = name.rpartition(" ")
        first = {"accelerator": 0} | self._first_of_layer
        count = {"accelerator": self.accelerators} | self.layers
        if layer not in first:
            raise ProfileError(f"no layer {layer or name!r} in {self.name}; {nearest(layer or name, first)}")
        if not number.isdigit() or int(number) >= count[layer]:
            raise ProfileError(f"{name!r}: {self.name} has {layer} 0 to {count[layer] - 1}")
        return first[layer] + int(number)

    def names(self, vertices: Iterable[int]) -> list[str]:
        """Return the names of vertices."""
        starts = [("accelerator", 0), *self._first_of_layer.items()]
        found = []
        for v in vertices:
            layer, first = next((layer, first) for layer, first in reversed(starts) if v >= first)
            found.append(f"{layer} {v - first}")
        return found

    def link_names(self, links: Iterable[int]) -> list[str]:
        """Return ``from -> to`` of directed links."""
        count, text = len(self.rate), []
        for link in links:
            cable = link % count
            ends = self.names((self.lower[cable], self.upper[cable]))
            text.append(" -> ".join(ends if link < count else ends[::-1]))
        return text

    def graph(self) -> nx.Graph:
        """Return the networkx graph: vertices with ``layer``, edges with ``capacity`` (bytes/s), ``cables`` and ``tier``.

        Parallel cables are one edge; dead ones are none.
        """
        import networkx as nx

        made = nx.Graph(name=self.name, family=self.family)
        made.add_nodes_from(range(self.accelerators), layer="accelerator")
        for layer, count in self.layers.items():
            first = self._first_of_layer[layer]
            made.add_nodes_from(range(first, first + count), layer=layer)
        live = self.rate > 0
        lower, upper, rate, tier = (x[live] for x in (self.lower, self.upper, self.rate, self.tier))
        key = lower.astype(np.int64) * self.vertices + upper
        pairs, first, index, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        total = np.bincount(index.reshape(-1), weights=rate)
        columns = (pairs // self.vertices, pairs % self.vertices, total, count, tier[first])
        made.add_edges_from(
            (u, v, {"capacity": c, "cables": n, "tier": self.tiers[t]}) for u, v, c, n, t in zip(*(x.tolist() for x in columns))
        )
        return made

    def check(self) -> list[Problem]:
        """Return why this graph cannot carry a step: parts that nothing joins, accelerators without a NIC."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        live = self.rate > 0
        problems = []
        out = self.tiers.index("scale-up") if "scale-up" in self.tiers else -1
        bare = np.setdiff1d(np.arange(self.accelerators), np.concatenate([x[live & (self.tier != out)] for x in (self.lower, self.upper)]))
        shape = (self.vertices, self.vertices)
        _, part = connected_components(coo_array((live[live], (self.lower[live], self.upper[live])), shape=shape), directed=False)
        parts, members = np.unique(part[: self.accelerators], return_counts=True)
        if len(parts) > 1:
            apart = int(np.flatnonzero(part[: self.accelerators] != parts[members.argmax()])[0])
            problems.append(
                Problem(
                    "the graph is connected",
                    f"{self.name} falls into {len(parts)} parts; nothing joins accelerator {apart} to the largest",
                    "add the missing link",
                )
            )
        elif len(bare) and self.switches:
            problems.append(
                Problem(
                    "every accelerator has a NIC",
                    f"{len(bare)} of {self.accelerators} accelerators of {self.name} have no live link to a switch, first {bare[0]}",
                    "link it to a leaf",
                )
            )
        return problems

    def degraded(self, *parts: str, factor: float = 0.0) -> Topology:
        """Return this topology with parts at `factor` of their rate; 0 is down.

        Parameters
        ----------
        parts : str
            A switch or accelerator (``spine 3``: all its cables), a cable (``leaf 2 -> spine 3``: all parallel ones), a rail
            (``rail 5``: the leaves that serve it) or a plane (``plane 1``).
        factor : float
            Share of the rate that is left.

        Raises
        ------
        ProfileError
            When there is no such part.
        """
        if not 0 <= factor <= 1:
            raise ProfileError(f"factor = {factor}: a degraded part keeps 0 (down) to 1 (all) of its rate")
        hit = np.zeros(len(self.rate), dtype=bool)
        for part in parts:
            hit |= self._hit(part)
        rate = np.where(hit, self.rate * factor, self.rate)
        what = f"{', '.join(parts)} {'down' if factor == 0 else f'at {factor:g}'}"
        return replace(self, name=f"{self.name} with {what}", rate=rate, router=self.router.with_rate(rate))

    def _hit(self, part: str) -> np.ndarray:
        ends = [end.strip() for end in part.split("->")]
        if len(ends) == 2:
            u, v = (self.vertex(end) for end in ends)
            hit = ((self.lower == u) & (self.upper == v)) | ((self.lower == v) & (self.upper == u))
            if not hit.any():
                raise ProfileError(f"{self.name} has no cable {part!r}; {ends[0]} leads to {', '.join(self._neighbours(u)[:6])}")
            return hit
        kind, _, number = part.partition(" ")
        if kind in ("rail", "plane"):
            found = self.router.part(kind)
            if not number.isdigit() or found is None or not (found == int(number)).any():
                has = f"{kind}s 0 to {int(found.max())}" if found is not None else f"no {kind}s"
                raise ProfileError(f"{part!r}: {self.name} has {has}")
            return found == int(number)
        vertex = self.vertex(part)
        return (self.lower == vertex) | (self.upper == vertex)

    def _neighbours(self, vertex: int) -> list[str]:
        near = np.concatenate([self.upper[self.lower == vertex], self.lower[self.upper == vertex]])
        return self.names(np.unique(near))

    def bisection_bytes_per_s(self) -> float:
        """Return the bandwidth between two halves of the accelerators, scale-out links only, one direction, bytes/s.

        Notes
        -----
        A closed form of the family; its range of validity is in the router's docstring. Equal to the smallest cut between
        the first and the second half of the hosts.
        """
        return self.router.bisection_bytes_per_s()

    def diameter(self) -> int:
        """Return the most cables on a shortest path between two accelerators, scale-up links included."""
        return self.router.diameter()

    def summary(self) -> pd.Series:
        """Return the counts: accelerators, switches and cables by layer, bisection, diameter."""
        rows: dict[str, object] = {"family": self.family, "accelerators": self.accelerators, "switches": self.switches}
        rows |= {f"{layer} switches": count for layer, count in self.layers.items()}
        rows |= {f"{tier} cables": self.cables(tier) for tier in self.tiers}
        rows |= {"bisection": readable(self.bisection_bytes_per_s(), "bytes_per_s"), "diameter": self.diameter()}
        return pd.Series(rows, name=self.name)
