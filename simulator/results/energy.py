"""Energy and carbon of a job from the hours of its accelerators; every constant is a middle of published figures."""

from __future__ import annotations

from simulator.scenario.cluster import Cluster

#: share of a host's rated power while it trains: 8 H100 draw at most 8.4 of 10.2 kW = 82 % (Latif et al., IEEE Access 2025), 76 % on
#: the average of intensive workloads (Newkirk et al., arXiv 2506.14551); the middle, published
LOAD = 0.8
#: power of the building over that of its hosts: 1.09 to 1.15 at hyperscalers, about 1.25 in new colocation, 1.54 to 1.58 on the
#: industry's average (Uptime Institute); a new colocation site, assumed
PUE = 1.25
#: kilograms of CO2 equivalent per kWh: the world's grids in 2023 (CodeCarbon's country table: 475 g); published
CARBON_KG_PER_KWH = 0.475


#: what the figures rest on, for people
BASIS = f"rated power of hosts x {LOAD:g} load x {PUE:g} PUE, switches not in it; {CARBON_KG_PER_KWH:g} kg CO2e/kWh"


def host_power_w(cluster: Cluster) -> float:
    """Return the rated power of one host with its accelerators, watts; switches are not in it."""
    return cluster.host.accelerators * cluster.accelerator.tdp_w + cluster.host.overhead_w


def energy_kwh(cluster: Cluster, accelerator_hours: float, load: float = LOAD, pue: float = PUE) -> float:
    """Return the energy that accelerators, their hosts and the building take, kWh.

    Notes
    -----
    ``hours / accelerators per host * rated power * load * PUE``; the same for every plan of one length on one cluster.
    """
    return accelerator_hours / cluster.host.accelerators * host_power_w(cluster) / 1000 * load * pue


def carbon_kg(energy: float, kg_per_kwh: float = CARBON_KG_PER_KWH) -> float:
    """Return the carbon dioxide equivalent of `energy` kWh, kg; location-based, embodied carbon not in it."""
    return energy * kg_per_kwh
