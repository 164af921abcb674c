"""From a cluster to its graph: one builder per family."""

from __future__ import annotations

from simulator.network import clos_paths, direct, own
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.wiring import Clos, Dragonfly, Own, RailClos, SeparateRails, SlimFly, Torus

_BUILDERS = {
    Clos: clos_paths.build,
    RailClos: clos_paths.build,
    SeparateRails: clos_paths.build,
    Dragonfly: direct.dragonfly,
    SlimFly: direct.slim_fly,
    Torus: direct.torus,
    Own: own.own,
}


def topology(cluster: Cluster) -> Topology:
    """Return the graph of a cluster: accelerators, switches and cables of its fabric, and its scale-up domains.

    Parameters
    ----------
    cluster : Cluster
        Its `fabric.family` decides the wiring, `fabric.tiers` and `fabric.topology` the numbers, `degraded` what is broken.

    Raises
    ------
    ProfileError
        When the numbers of the fabric do not give a network for that many accelerators.
    """
    built = _BUILDERS[type(cluster.fabric.shape)](cluster)
    for part, factor in cluster.degraded.items():
        built = built.degraded(part, factor=factor)
    return built
