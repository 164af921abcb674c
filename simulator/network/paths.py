"""From pairs of accelerators to the links between them, vectorised: what every family's router shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

#: how a flow chooses among equally short paths
Routing = Literal["sprayed", "hashed", "d-mod-k"]


@dataclass(frozen=True)
class Paths:
    """The links of many flows, in compressed rows.

    Parameters
    ----------
    indptr : ndarray of shape (flows + 1,)
        Flow f uses ``links[indptr[f]:indptr[f + 1]]``.
    links : ndarray
        Numbers into `capacity`.
    capacity : ndarray
        Line rate of what `links` counts, bytes/s: directed links, or under ideal spraying bundles of equivalent links.
    level : ndarray of shape (flows,)
        Tier of switches at which each path turns, as an index into the fabric's tiers; -1 inside a scale-up domain.
    bundles : tuple of str
        Name of the kind of every bundle under spraying; empty when `links` are links of the topology.
    parts : int
        Consecutive rows that are one flow together.
    """

    indptr: np.ndarray
    links: np.ndarray
    capacity: np.ndarray
    level: np.ndarray
    bundles: tuple[tuple[str, int], ...] = ()
    parts: int = 1

    def __len__(self) -> int:
        return len(self.level)

    def hops(self) -> np.ndarray:
        """Return the links on each path."""
        return np.diff(self.indptr)

    def name(self, link: int, link_names) -> str:
        """Return what `link` is called; `link_names` names links of the topology."""
        for kind, first in reversed(self.bundles):
            if link >= first:
                return f"{kind} {link - first}"
        return link_names([link])[0]


class Router(Protocol):
    """What a family must answer."""

    def paths(self, source: np.ndarray, target: np.ndarray, routing: Routing, pxn: bool, seed: int) -> Paths:
        """Return the links from every source to its target accelerator."""

    def with_rate(self, rate: np.ndarray) -> Router:
        """Return the router of the same graph at other rates."""

    def part(self, kind: str) -> np.ndarray | None:
        """Return the rail or plane of every cable, -1 for none; None when the family has no such thing."""

    def bisection_bytes_per_s(self) -> float:
        """Return the closed-form bisection, one direction."""

    def diameter(self) -> int:
        """Return the most cables between two accelerators."""


def mixed(*keys: np.ndarray | int) -> np.ndarray:
    """Return 64 well-mixed bits of the keys of a flow, as the hash of a switch does (SplitMix64's finaliser).

    References
    ----------
    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    bits = np.uint64(0)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = bits * np.uint64(0x9E3779B97F4A7C15) + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def modulo(bits: np.ndarray, count: int) -> np.ndarray:
    """Return the remainder of hashed bits as an index."""
    return (bits % np.uint64(count)).astype(np.int64)


def rows(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (indptr, links) of a table with one row per flow and -1 where it has no link."""
    used = columns >= 0
    indptr = np.zeros(len(columns) + 1, dtype=np.int64)
    np.cumsum(used.sum(axis=1), out=indptr[1:])
    return indptr, columns[used]
