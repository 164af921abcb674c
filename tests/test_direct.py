"""Oracle: published counts, networkx's distances and minimum cuts; graphs of the user's own, good and bad."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest

from simulator.errors import ProfileError
from simulator.network.build import topology
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.profiles import CLUSTERS, FABRICS
from simulator.scenario.wiring import Dragonfly, Own, SlimFly, Torus
from tests.test_paths import pairs, walks
from tests.test_topology import of, smallest_cut


def wired(family: str, shape, accelerators: int, domain: int = 8) -> Cluster:
    """Return H100 hosts, or single accelerators, on a network of that shape."""
    cluster = CLUSTERS.load("h100-rail-10240")
    fabric = FABRICS.load("dragonfly-400g").model_copy(update={"family": family, "topology": shape})
    host = cluster.host.model_copy(update={"accelerators": min(8, domain), "scale_up_domain": domain})
    return cluster.model_copy(update={"fabric": fabric, "host": host, "accelerators": accelerators})


SMALL = {
    "dragonfly": wired("dragonfly", Dragonfly(endpoints=8, routers=4, global_links=2), 256),
    "dragonfly with spare ports": wired("dragonfly", Dragonfly(endpoints=8, routers=4, global_links=4), 192),
    "dragonfly+": wired("dragonfly+", Dragonfly(endpoints=8, routers=4, spines=4, global_links=4), 256),
    "slim fly 1 mod 4": wired("slim-fly", SlimFly(q=5, endpoints=8), 400),
    "slim fly 3 mod 4": wired("slim-fly", SlimFly(q=7, endpoints=8), 784),
    "torus": wired("torus", Torus(x=8, y=4, z=4, cube=4, link_bytes_per_s="50 GB/s"), 128, domain=1),
}
BUILT = {name: topology(cluster) for name, cluster in SMALL.items()}


def scale_out(t: Topology) -> nx.Graph:
    graph = t.graph()
    return graph.subgraph([v for v, layer in graph.nodes(data="layer") if layer != "scale-up"])


@pytest.mark.parametrize("name", BUILT)
def test_diameter_bisection_and_connection(name):
    t = BUILT[name]
    graph = scale_out(t)
    assert t.check() == []
    length = dict(nx.all_pairs_shortest_path_length(graph))
    assert max(length[a][b] for a in range(t.accelerators) for b in range(t.accelerators)) == t.diameter()
    assert t.bisection_bytes_per_s() == pytest.approx(smallest_cut(t, t.graph()), rel=1e-9)


@pytest.mark.parametrize("routing", ["hashed", "sprayed", "d-mod-k"])
@pytest.mark.parametrize("name", BUILT)
def test_paths_are_shortest_paths(name, routing):
    t = BUILT[name]
    graph, domain = scale_out(t), t.router.domain
    source, target = pairs(t, 40)
    paths = t.router.paths(source, target, routing)
    ends = zip(np.repeat(source, paths.parts).tolist(), np.repeat(target, paths.parts).tolist())
    for (a, b), walk in zip(ends, walks(t, paths)):
        assert (walk[0], walk[-1]) == (a, b)
        assert len(walk) - 1 == (2 if domain > 1 and a // domain == b // domain else nx.shortest_path_length(graph, a, b))


def test_published_counts():
    largest = topology(of("dragonfly-400g", 261632))  # arXiv 2505.09343 Table 3
    assert largest.switches == 16352
    assert largest.cables("router") + largest.cables("global") == 384272
    frontier = topology(wired("dragonfly", Dragonfly(endpoints=16, routers=32, global_links=16), 37888))
    assert frontier.switches == 2368
    assert len(frontier.rate) - 2 * 37888 == frontier.cables("router") + frontier.cables("global")
    tpu = topology(wired("torus", Torus(x=16, y=16, z=16, cube=4, link_bytes_per_s="50 GB/s"), 4096, domain=1))
    assert tpu.passive == {"optical circuit switches": 48}  # TPU v4 paper: 64 cubes of 96 optical links
    assert tpu.cables("optical") == 64 * 96 // 2
    assert tpu.cables("optical") + tpu.cables("electrical") == 3 * 4096
    v5p = topology(wired("torus", Torus(x=16, y=20, z=28, cube=4, link_bytes_per_s="90 GB/s"), 8960, domain=1))
    assert (v5p.accelerators, v5p.diameter()) == (8960, 8 + 10 + 14)


@pytest.mark.parametrize(("q", "d"), [(5, 1), (7, -1), (11, -1), (13, 1)])
def test_slim_fly_has_the_degree_and_diameter_of_its_paper(q, d):
    t = topology(wired("slim-fly", SlimFly(q=q, endpoints=8), 16 * q * q))
    routers = scale_out(t).subgraph(range(t.accelerators + t.layers["scale-up"], t.vertices))
    assert len(routers) == 2 * q * q
    assert {degree for _, degree in routers.degree()} == {(3 * q - d) // 2}
    assert nx.diameter(routers) == 2


def test_numbers_that_give_no_network_are_refused():
    with pytest.raises(ProfileError, match="q = 28 is not an odd prime; use 23 or 29"):
        topology(wired("slim-fly", SlimFly(q=28, endpoints=21), 1024))
    with pytest.raises(ProfileError, match="8 x 8 x 6 is not made of cubes of 4"):
        topology(wired("torus", Torus(x=8, y=8, z=6, cube=4, link_bytes_per_s="50 GB/s"), 384, domain=1))
    with pytest.raises(ProfileError, match="= 512 accelerators, the cluster has 500"):
        topology(wired("torus", Torus(x=8, y=8, z=8, cube=4, link_bytes_per_s="50 GB/s"), 500, domain=1))
    with pytest.raises(ProfileError, match="32 groups need 31 global links each, a group has 8"):
        topology(wired("dragonfly", Dragonfly(endpoints=8, routers=4, global_links=2), 1024))
    data = FABRICS.load("dragonfly-400g").model_dump(mode="json") | {"topology": None}
    with pytest.raises(ProfileError, match="topology: missing; family dragonfly needs endpoints, routers, spines, global_links"):
        FABRICS.build(data, "x", "mine")


def test_a_fault_is_walked_around():
    t = BUILT["dragonfly"].degraded("router 3")
    source, target = pairs(t, 300)
    alive = ~np.isin(source // 8, 3) & ~np.isin(target // 8, 3)
    paths = t.router.paths(source[alive], target[alive], "hashed")
    assert (paths.capacity[paths.links] > 0).all()


OWN = """
links:
  - {from: accelerator 0..7, to: leaf 0, rate: 400 Gb/s}
  - {from: accelerator 8..15, to: leaf 1, rate: 400 Gb/s}
  - {from: leaf 0, to: spine 0..3, rate: 400 Gb/s}
  - {from: leaf 1, to: spine 0..3, rate: 400 Gb/s}
"""


def mine(tmp_path, text: str, suffix: str = "yaml") -> Cluster:
    file = tmp_path / f"net.{suffix}"
    file.write_text(text)
    return wired("own", Own(file=str(file)), 16)


def test_own_graph_from_yaml(tmp_path):
    t = topology(mine(tmp_path, OWN))
    assert (t.layers, t.cables("host"), t.cables("network")) == ({"scale-up": 2, "leaf": 2, "spine": 4}, 16, 8)
    assert t.bisection_bytes_per_s() == pytest.approx(4 * 50e9, rel=1e-5)
    assert t.diameter() == 4
    sent = t.router.paths(np.arange(8), np.arange(8, 16), "sprayed")
    assert (sent.hops() == 4).all()


def test_own_graph_from_graphml_is_the_same(tmp_path):
    graph = nx.Graph()
    names = {f"a{i}": "accelerator" for i in range(16)} | {f"l{i}": "leaf" for i in range(2)} | {f"s{i}": "spine" for i in range(4)}
    for name, layer in names.items():
        graph.add_node(name, layer=layer)
    links = [(f"a{i}", f"l{i // 8}") for i in range(16)] + [(f"l{i}", f"s{j}") for i in range(2) for j in range(4)]
    graph.add_edges_from(links, rate="400 Gb/s")
    nx.write_graphml(graph, tmp_path / "net.graphml")
    ours = topology(wired("own", Own(file=str(tmp_path / "net.graphml")), 16))
    same = topology(mine(tmp_path, OWN))
    assert nx.utils.graphs_equal(nx.Graph(ours.graph().edges), nx.Graph(same.graph().edges))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("leaf 1, to: spine 0..3", "leaf 0, to: spine 0..3", "falls into 2 parts; nothing joins accelerator"),
        ("accelerator 8..15", "accelerator 8..14", "1 of 16 accelerators of .* have no live link to a switch, first 15"),
        ("leaf 0, rate: 400 Gb/s", "leaf 0", r"links\[0\] \(accelerator 0..7 to leaf 0\) has no rate; write one such as rate: 400 Gb/s"),
        ("rate: 400 Gb/s", "rate: 400", "rate 400 has no unit"),
        ("accelerator 8..15", "accelerator 8..25", "links more accelerators than the 16"),
        ("to: leaf 1,", "to: leaf,", "'leaf' is no vertex; write a layer and a number"),
        ("leaf 1, to", "leaf 0..1, to", "2 vertices to 4; give ranges of the same length"),
        ("links:", "cables:", "needs links, a list of"),
    ],
)
def test_bad_graphs_are_refused(tmp_path, old, new, says):
    with pytest.raises(ProfileError, match=says):
        topology(mine(tmp_path, OWN.replace(old, new)))
