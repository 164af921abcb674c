"""From a cluster to its graph: one builder per family."""

from __future__ import annotations

from simulator.errors import ProfileError
from simulator.network import clos_paths
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.wiring import Clos


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
    if not isinstance(cluster.fabric.shape, Clos):
        raise ProfileError(f"family {cluster.fabric.family} has no graph yet; choose a folded Clos")
    built = clos_paths.build(cluster)
    for part, factor in cluster.degraded.items():
        built = built.degraded(part, factor=factor)
    return built
