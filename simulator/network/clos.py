"""Folded Clos networks: plain, rail-optimised, rail-only, multi-plane, dual-plane; sizes, cables and paths by arithmetic.

Notes
-----
A leaf has U cables up; cable c goes to spine ``c mod S`` of the leaf's group. A spine has V cables up; spine j of a group
belongs to core set ``j mod Q`` and its cable c goes to core ``c mod C`` of that set. S divides U, Q divides S, C divides V,
so cables spread evenly; S, Q and C are the smallest that the ports allow. This rule reproduces the published counts of
DGX SuperPOD (A100 to B300), DeepSeek's multi-plane network, k-ary fat trees and HPN 7.0 (tests/data/topologies.csv).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.errors import ProfileError
from simulator.scenario.cluster import Cluster, Tier
from simulator.scenario.wiring import Clos


def divisor_from(number: int, least: int) -> int | None:
    """Return the smallest divisor of `number` that is at least `least`; None when `least` is above it."""
    return next((d for d in range(max(least, 1), number + 1) if number % d == 0), None)


@dataclass(frozen=True)
class Sizes:
    """How many of everything, and where each accelerator is plugged in.

    Parameters
    ----------
    levels : int
        Levels of switches, 0 to 3.
    rail, leaf : ndarray of shape (accelerators,)
        Rail of each accelerator, and its leaf, counted within one plane.
    group : ndarray of shape (leaves,)
        Group of each leaf.
    component : ndarray of shape (groups,)
        Which of the networks that never meet a group belongs to.
    leaves, groups, spines, sets, cores : int
        Leaves and groups of a plane, spines of a group (S), core sets (Q) of a component, cores of a set (C).
    up, up2 : int
        Cables up of a leaf (U) and of a spine (V).
    rate, rate2 : float
        Rate of one of them, bytes/s.
    """

    levels: int
    rail: np.ndarray
    leaf: np.ndarray
    group: np.ndarray
    component: np.ndarray
    leaves: int
    groups: int = 1
    spines: int = 0
    sets: int = 0
    cores: int = 0
    up: int = 0
    up2: int = 0
    rate: float = 0.0
    rate2: float = 0.0


def sizes(cluster: Cluster) -> Sizes:
    """Return the sizes of the smallest network of the cluster's fabric that joins all of its accelerators.

    Raises
    ------
    ProfileError
        When the ports do not suffice, or rails and hosts do not fit each other.
    """
    fabric, n, per_host = cluster.fabric, cluster.accelerators, cluster.host.accelerators
    shape: Clos = fabric.shape
    rails = shape.rails or per_host
    rail, leaf, leaves = _plugged_in(cluster, shape, rails)
    if n <= cluster.host.scale_up_domain:
        return Sizes(0, rail, leaf, np.zeros(leaves, int), np.zeros(1, int), leaves)
    networks = rails if shape.separate else 1
    if leaves == networks:
        return Sizes(1, rail, leaf, np.arange(leaves), np.arange(leaves), leaves, groups=leaves)
    first, port = fabric.tiers[0], cluster.host.nic_bytes_per_s / shape.planes
    rate = first.up_bytes_per_s or port
    down = _down(cluster, rails)
    up, rate = _up(first, down, port, rate)
    if len(fabric.tiers) < 2:
        raise ProfileError(f"{fabric.name}: {leaves} leaves need a second tier to join them; add one")
    second = fabric.tiers[1]
    each = leaves // networks
    common = {"rail": rail, "leaf": leaf, "leaves": leaves, "up": up, "rate": rate}
    if each <= _ports(second, cluster, rails):
        spines = divisor_from(up, -(-each * up // _ports(second, cluster, rails)))
        group = np.arange(leaves) // each
        return Sizes(2, group=group, component=np.arange(networks), groups=networks, spines=spines or up, **common)
    return _three_levels(cluster, shape, rails, each, networks, common)


def _three_levels(cluster: Cluster, shape: Clos, rails: int, each: int, networks: int, common: dict) -> Sizes:
    fabric, leaves, up, rate = cluster.fabric, common["leaves"], common["up"], common["rate"]
    if len(fabric.tiers) < 3:
        ports = _ports(fabric.tiers[1], cluster, rails)
        raise ProfileError(
            f"{fabric.name}: {each} leaves are more than the {ports} ports of a {fabric.tiers[1].name} switch; add a third tier"
        )
    first, second, third = fabric.tiers[:3]
    most = second.down or _ports(second, cluster, rails) // 2
    if shape.groups == "rail":  # the leaves of one rail fill as few groups as they can, evenly
        of_rail = leaves // rails
        parts = -(-of_rail // most)
        at = np.arange(leaves)
        group = at // of_rail * parts + at % of_rail * parts // of_rail
    else:  # groups are built whole, as the tiers say
        most = min(most, second.accelerators // first.accelerators * (leaves // _units(cluster)))
        group = np.arange(leaves) // most
    in_group = int(np.bincount(group).max()) if shape.groups == "rail" else most
    spines = divisor_from(up, -(-in_group * up // (second.down or most)))
    if spines is None:
        raise ProfileError(f"{fabric.name}: {in_group} leaves do not fit the {second.down} ports down of a {second.name} switch")
    port = second.up_bytes_per_s or rate
    up2, rate2 = _up(second, in_group * (up // spines), rate, port)
    groups = int(group.max()) + 1
    component = np.arange(groups) * networks // groups
    ports = _ports(third, cluster, rails)
    sets, cores = _core_sets(spines, up2, groups // networks, ports, fabric.name)
    return Sizes(3, group=group, component=component, groups=groups, spines=spines, sets=sets, cores=cores, up2=up2, rate2=rate2, **common)


def _core_sets(spines: int, up: int, groups: int, ports: int, name: str) -> tuple[int, int]:
    """Return the fewest core switches, as (sets, cores of a set) with the most sets."""
    fits = [
        (q * c, -q, c)
        for q in range(1, spines + 1)
        if spines % q == 0
        for c in range(1, up + 1)
        if up % c == 0 and groups * (spines // q) * (up // c) <= ports
    ]
    if not fits:
        raise ProfileError(f"{name}: {groups} groups are more than the {ports} ports of a core switch can join")
    _, sets, cores = min(fits)
    return -sets, cores


def _units(cluster: Cluster) -> int:
    return -(-cluster.accelerators // cluster.fabric.tiers[0].accelerators)


def _plugged_in(cluster: Cluster, shape: Clos, rails: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the rail and the leaf of every accelerator, and the number of leaves of a plane."""
    per_host, reach = cluster.host.accelerators, cluster.fabric.tiers[0].accelerators
    if rails > 1 and (per_host % rails or reach % per_host):
        raise ProfileError(
            f"{cluster.fabric.name}: {rails} rails and a leaf reach of {reach} do not fit hosts of {per_host}; "
            f"use rails that divide {per_host} and a reach that it divides"
        )
    a, units = np.arange(cluster.accelerators), _units(cluster)
    unit, inside = a // reach, a % reach
    if rails > 1:
        rail = a % rails
        nth = inside // per_host * (per_host // rails) + a % per_host // rails  # of the NICs of this unit and rail
    else:
        rail, nth = np.zeros_like(a), inside
    down = cluster.fabric.tiers[0].down or -(-reach // rails)
    several = -(-(reach // rails) // down)  # leaves that share a rail of a unit
    leaf = nth // down
    block = rail * units + unit if shape.groups == "rail" or shape.separate else unit * rails + rail
    return rail, block * several + leaf, rails * units * several


def _down(cluster: Cluster, rails: int) -> int:
    first = cluster.fabric.tiers[0]
    return first.down or -(-first.accelerators // rails)


def _ports(tier: Tier, cluster: Cluster, rails: int) -> int:
    """Return the ports of one switch of `tier`; where the file says nothing, as many as its reach needs."""
    if tier.ports:
        return tier.ports
    first = cluster.fabric.tiers[0]
    return max(rails * -(-tier.accelerators // first.accelerators), 2)


def _up(tier: Tier, down: int, rate_down: float, rate_up: float) -> tuple[int, float]:
    """Return the cables up of one switch and their rate: what the oversubscription leaves, never above the line."""
    if tier.up:
        return tier.up, rate_up
    wanted = down * rate_down / tier.oversubscription
    up = max(1, int(np.ceil(wanted / rate_up - 1e-3)))
    return up, min(rate_up, wanted / up)
