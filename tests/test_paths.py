"""Oracle: networkx's shortest paths; every path is a walk over live cables from source to target."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.errors import ProfileError
from simulator.network.build import topology
from simulator.network.topology import Topology
from simulator.scenario.profiles import CLUSTERS, FABRICS
from tests.test_topology import of

NETWORKS = {
    "single switch": ("single-switch-ndr", 64),
    "clos, two levels": ("ib-ndr-clos", 512),
    "clos, three levels": ("ib-ndr-clos", 3072),
    "rails, two levels": ("ib-ndr-rail", 512),
    "rails, three levels": ("ib-ndr-rail", 2560),
    "separate rails": ("ib-ndr-rail-only", 512),
    "two planes": ("alibaba-hpn7", 2048),
    "oversubscribed": ("roce-meta-24k", 6144),
}
BUILT = {name: topology(of(*which)) for name, which in NETWORKS.items()}
BUILT["seven planes, two cables each"] = topology(CLUSTERS.load("cloudmatrix-384"))
BUILT["rack-wide domains"] = topology(CLUSTERS.load("gb200-nvl72-10368").model_copy(update={"accelerators": 1152}))


def pairs(t: Topology, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    source = random.integers(0, t.accelerators, count)
    return source, (source + random.integers(1, t.accelerators, count)) % t.accelerators


def walks(t: Topology, paths) -> list[list[int]]:
    """Return the vertices that each flow passes."""
    cables = len(t.rate)
    found = []
    for f in range(len(paths)):
        walk = []
        for link in paths.links[paths.indptr[f] : paths.indptr[f + 1]].tolist():
            ends = [int(t.lower[link % cables]), int(t.upper[link % cables])]
            ends = ends if link < cables else ends[::-1]
            assert not walk or walk[-1] == ends[0], "a path without gaps"
            walk += ends[1:] if walk else ends
        found.append(walk)
    return found


@pytest.mark.parametrize("routing", ["hashed", "d-mod-k"])
@pytest.mark.parametrize("name", BUILT)
def test_paths_are_shortest_paths(name, routing):
    t = BUILT[name]
    scale_out = t.graph()
    if not t.router.separate:  # without PXN a path may use the scale-up links only inside a domain
        scale_out = scale_out.subgraph([v for v, layer in scale_out.nodes(data="layer") if layer != "scale-up"])
    source, target = pairs(t, 60)
    paths = t.router.paths(source, target, routing, pxn=False)
    domain = t.router.domain
    for a, b, walk in zip(source.tolist(), target.tolist(), walks(t, paths)):
        assert (walk[0], walk[-1]) == (a, b)
        graph = t.graph() if a // domain == b // domain else scale_out
        assert len(walk) - 1 == nx.shortest_path_length(graph, a, b)


@pytest.mark.parametrize("name", BUILT)
def test_sprayed_paths_are_as_long_as_hashed_ones_and_turn_at_the_same_level(name):
    t = BUILT[name]
    source, target = pairs(t, 300)
    for pxn in (True, False):
        sprayed, hashed = (t.router.paths(source, target, routing, pxn) for routing in ("sprayed", "hashed"))
        assert (sprayed.hops() == hashed.hops()).all()
        assert (sprayed.level == hashed.level).all()


def test_hashed_paths_use_every_equal_path_and_only_those():
    t = BUILT["clos, two levels"]
    many = np.zeros(4000, dtype=int)
    found = t.router.paths(many, many + 100, "hashed", seed=0)
    assert len(set(map(tuple, walks(t, found)))) == 1, "one flow, one path"
    spread = {tuple(walks(t, t.router.paths(many[:1], many[:1] + 100, "hashed", seed=s))[0]) for s in range(300)}
    assert spread == {tuple(p) for p in nx.all_shortest_paths(t.graph(), 0, 100)}


def test_hashed_flows_spread_evenly_over_the_cables_of_a_leaf():
    t = BUILT["clos, three levels"]
    source, target = pairs(t, 200_000)
    paths = t.router.paths(source, target, "hashed")
    used = np.bincount(paths.links, minlength=2 * len(t.rate))
    leaf_up = used[: len(t.rate)][t.tier == t.tiers.index("leaf")]
    assert abs(leaf_up - leaf_up.mean()).max() < 6 * leaf_up.mean() ** 0.5, "as a Poisson count varies"


def test_d_mod_k_keeps_a_shift_permutation_free_of_collisions():
    t = BUILT["clos, two levels"]
    source = np.arange(512)
    for shift in (32, 64, 96, 256):
        paths = t.router.paths(source, (source + shift) % 512, "d-mod-k")
        assert np.bincount(paths.links).max() == 1


def test_pxn_crosses_to_the_rail_of_the_target_inside_the_host():
    t = BUILT["rails, two levels"]
    one, other = np.array([0]), np.array([8 * 3 + 5])  # rail 0 of host 0, rail 5 of host 3, same unit
    with_pxn, without = (t.router.paths(one, other, "hashed", pxn) for pxn in (True, False))
    assert [with_pxn.level[0], without.level[0]] == [0, 1]
    assert walks(t, with_pxn)[0] == [0, 512, 5, t.vertex("leaf 10"), 29]
    assert [t.names([v])[0].split()[0] for v in walks(t, without)[0]] == ["accelerator", "leaf", "spine", "leaf", "accelerator"]


@given(st.integers(0, 31), st.integers(0, 15), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_paths_avoid_what_is_down(spine, cable, seed):
    t = topology(of("ib-ndr-clos", 2560)).degraded(f"spine {spine}", f"leaf 35 -> spine {32 + cable}")
    source, target = pairs(t, 500, seed)
    for routing in ("hashed", "d-mod-k"):
        paths = t.router.paths(source, target, routing)
        assert (paths.capacity[paths.links] > 0).all()


def test_a_cut_off_accelerator_is_named():
    t = BUILT["clos, two levels"].degraded("leaf 2")
    with pytest.raises(ProfileError, match="no live path from accelerator 0 to 70 in 64 draws; 1 flows are cut off"):
        t.router.paths(np.array([0]), np.array([70]), "hashed")


def test_parts_that_are_not_there_are_refused():
    t = BUILT["rails, two levels"]
    with pytest.raises(ProfileError, match="no layer 'spin' in .*; did you mean spine"):
        t.degraded("spin 3")
    with pytest.raises(ProfileError, match="spine 99.*spine 0 to 7"):
        t.degraded("spine 99")
    with pytest.raises(ProfileError, match="rails 0 to 7"):
        t.degraded("rail 9")
    with pytest.raises(ProfileError, match="no planes"):
        t.degraded("plane 0")
    with pytest.raises(ProfileError, match="no cable 'leaf 0 -> leaf 1'"):
        t.degraded("leaf 0 -> leaf 1")
    with pytest.raises(ProfileError, match="keeps 0 .down. to 1"):
        t.degraded("spine 0", factor=2)


def test_degraded_parts_lose_what_they_should():
    t = BUILT["two planes"]
    assert t.degraded("plane 1").bisection_bytes_per_s() == pytest.approx(t.bisection_bytes_per_s() / 2)
    rails = BUILT["separate rails"]
    assert rails.degraded("rail 3", factor=0.5).bisection_bytes_per_s() == pytest.approx(rails.bisection_bytes_per_s() * 15 / 16)
    clos = BUILT["clos, two levels"]
    gone = clos.degraded("spine 0")
    assert gone.bisection_bytes_per_s() == pytest.approx(clos.bisection_bytes_per_s() * 7 / 8)
    assert [p.rule for p in clos.degraded("accelerator 5").check()] == ["the graph is connected"]
    assert [p.rule for p in rails.degraded("rail 3").check()] == ["every accelerator has a NIC"]
    assert FABRICS.load("ib-ndr-rail").shape.groups == "rail"
