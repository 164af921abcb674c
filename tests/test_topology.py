"""Oracle: published counts of switches and cables; networkx's minimum cut, connectivity and distances."""

from __future__ import annotations

import csv
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from simulator.errors import ProfileError
from simulator.network.build import topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.profiles import CLUSTERS, FABRICS, HOSTS

DATA = Path(__file__).parent / "data" / "topologies.csv"
ROWS = list(csv.DictReader(line for line in DATA.read_text().splitlines() if not line.startswith("#")))


def of(fabric: str, accelerators: int, cluster: str = "h100-rail-10240") -> Cluster:
    """Return a shipped cluster of another size on another fabric."""
    return CLUSTERS.load(cluster).model_copy(update={"fabric": FABRICS.load(fabric), "accelerators": accelerators})


@pytest.mark.parametrize("row", ROWS, ids=[r["id"] for r in ROWS])
def test_published_counts(row):
    t = topology(of(row["fabric"], int(row["accelerators"]), row["cluster"]))
    layers = [count for layer, count in t.layers.items() if layer != "scale-up"] + [0, 0]
    tiers = [t.cables(tier) for tier in t.tiers if tier != "scale-up"] + [0, 0]
    for published, built in zip(("leaves", "spines", "cores"), layers):
        assert row[published] in ("", str(built)), published
    for published, built in zip(("host_cables", "leaf_cables", "spine_cables"), tiers):
        assert row[published] in ("", str(built)), published


SMALL = [
    ("single-switch-ndr", 64), ("ib-ndr-clos", 512), ("ib-ndr-rail", 512), ("ib-ndr-rail-only", 512), ("ib-ndr-rail-deepseek", 512),
    ("alibaba-hpn7", 2048), ("ib-ndr-clos-2to1", 512), ("ib-xdr-rail", 576),
]  # fmt: skip
DEEP = [("ib-ndr-clos", 4096), ("ib-ndr-clos-2to1", 4096), ("ib-ndr-rail", 2560), ("roce-meta-24k", 6144)]


def smallest_cut(t, graph: nx.Graph) -> float:
    """Return networkx's minimum cut between the two halves of the hosts, over the scale-out links."""
    scale_out = graph.copy()
    scale_out.remove_nodes_from([v for v, layer in graph.nodes(data="layer") if layer == "scale-up"])
    half = t.accelerators // 16 * 8
    scale_out.add_edges_from(("first", a) for a in range(half))  # without capacity: unlimited
    scale_out.add_edges_from((a, "second") for a in range(half, t.accelerators))
    return nx.maximum_flow_value(scale_out, "first", "second", flow_func=nx.algorithms.flow.preflow_push)


@pytest.mark.parametrize(("fabric", "accelerators"), SMALL)
def test_bisection_is_the_minimum_cut(fabric, accelerators):
    t = topology(of(fabric, accelerators))
    assert t.bisection_bytes_per_s() == pytest.approx(smallest_cut(t, t.graph()), rel=1e-9)


@pytest.mark.parametrize(
    ("fabric", "accelerators", "share"),
    [("ib-ndr-rail", 8192, 1.0), ("ib-ndr-clos", 8192, 1.0), ("ib-ndr-clos-2to1", 10240, 0.5), ("roce-meta-24k", 24576, 9 / 8 / 7)],
)
def test_bisection_of_a_large_network_is_half_of_its_nics_over_the_oversubscription(fabric, accelerators, share):
    assert topology(of(fabric, accelerators)).bisection_bytes_per_s() == pytest.approx(accelerators / 2 * 50e9 * share, rel=1e-9)


@pytest.mark.parametrize(("fabric", "accelerators"), SMALL + DEEP)
def test_diameter_and_connection(fabric, accelerators):
    t = topology(of(fabric, accelerators))
    graph = t.graph()
    assert nx.is_connected(graph)
    assert t.check() == []
    corners = [0, 1, accelerators // 2, accelerators - 1]
    far = [nx.single_source_shortest_path_length(graph, a) for a in corners]
    assert max(max(d[a] for a in range(accelerators)) for d in far) == t.diameter()


def test_ports_suffice():
    for fabric in FABRICS.names():
        cluster = of(fabric, min(4096, FABRICS.load(fabric).tiers[-1].accelerators))
        t = topology(cluster)
        degree = np.bincount(np.concatenate([t.lower, t.upper]), minlength=t.vertices)
        at = t.accelerators
        for (layer, count), tier in zip(list(t.layers.items()), (None, *cluster.fabric.tiers)):
            if tier is not None:
                assert degree[at : at + count].max(initial=0) <= tier.ports, (fabric, layer)
            at += count


def test_too_many_accelerators_for_the_ports_says_so():
    fabric = FABRICS.load("ib-ndr-rail-deepseek")
    wide = fabric.model_copy(update={"tiers": (fabric.tiers[0], fabric.tiers[1].model_copy(update={"accelerators": 10**6}))})
    with pytest.raises(ProfileError, match="80 leaves are more than the 64 ports of a spine switch; add a third tier"):
        topology(of("ib-ndr-rail", 20480).model_copy(update={"fabric": wide}))


def test_unknown_family_names_the_nearest():
    data = FABRICS.load("ib-ndr-rail").model_dump(mode="json")
    with pytest.raises(ProfileError, match="family: unknown 'rail-optimized'; did you mean rail-optimised"):
        FABRICS.build(data | {"family": "rail-optimized"}, "x", "mine")


def test_optical_modules_of_cloudmatrix():
    """Huawei's 6,912 modules of 400 Gb/s: two first-to-second-level links share one at each end; the RDMA network has two tiers of 384."""
    t = topology(CLUSTERS.load("cloudmatrix-384"))
    assert t.cables("L1") // 2 * 2 + 384 * 2 * 2 == 6912
    assert t.bisection_bytes_per_s() == pytest.approx(384 / 2 * 14 * 28e9)
    assert t.diameter() == 4
    nic = np.bincount(t.lower[t.tier == 0], t.rate[t.tier == 0])
    assert nic == pytest.approx(392e9)


def test_loopback_is_a_switch_between_two_processes():
    t = topology(of("cpu-loopback", 2).model_copy(update={"host": HOSTS.load("cpu-process")}))
    assert (t.switches, t.cables("host"), t.diameter(), t.check()) == (1, 2, 2, [])
    assert t.bisection_bytes_per_s() == pytest.approx(4.7e9)
