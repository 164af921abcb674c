"""The user's own network, from YAML or GraphML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import ProfileError
from simulator.network.direct import assembled, scale_up
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.profiles import read_text, read_yaml
from simulator.units import parse_quantity

if TYPE_CHECKING:
    import networkx as nx

_RANGE = re.compile(r"^(.*\S)\s+(\d+)(?:\.\.(\d+))?$")


def own(cluster: Cluster) -> Topology:
    """Return the topology in the file that the fabric names.

    Raises
    ------
    ProfileError
        When the file cannot be read, a link has no rate, an accelerator has no NIC, or the graph is not connected.

    Notes
    -----
    YAML: ``links``, a list of ``{from: accelerator 0..7, to: leaf 0, rate: 400 Gb/s}``; a range on one side or equally long ones
    on both. GraphML: nodes with ``layer`` (``accelerator`` or the name of a layer of switches), edges with ``rate``, as text with
    a unit. Bisection is the smallest cut between the two halves of the accelerators.
    """
    path = cluster.fabric.shape.file
    ends, rates = _from_graphml(path) if path.endswith(".graphml") else _from_yaml(path)
    n = cluster.accelerators
    counts: dict[str, int] = {}
    for layer, number in (vertex for pair in ends for vertex in pair):
        counts[layer] = max(counts.get(layer, 0), number + 1)
    if counts.pop("accelerator", 0) > n:
        raise ProfileError(f"{path} links more accelerators than the {n} of {cluster.name}")
    layers = scale_up(cluster) | counts
    first, at = {"accelerator": 0}, n
    for layer, count in layers.items():
        first[layer], at = at, at + count
    numbers = np.array([[first[layer] + number for layer, number in pair] for pair in ends])
    host, rate = (numbers < n).any(axis=1), np.array(rates)
    cables = [(name, numbers[w, 0], numbers[w, 1], rate[w]) for name, w in (("host", host), ("network", ~host)) if w.any()]
    built = assembled(cluster, layers, cables, None, None)
    problems = built.check()
    if problems:
        raise ProfileError(f"{path}: " + "; ".join(map(str, problems)))
    return built


def _vertices(text: Any, where: str) -> list[tuple[str, int]]:
    match = _RANGE.match(str(text))
    if not match:
        raise ProfileError(f"{where}: {text!r} is no vertex; write a layer and a number, such as leaf 3 or accelerator 0..7")
    layer, low, high = match[1], int(match[2]), int(match[3] or match[2])
    return [(layer, i) for i in range(low, high + 1)]


def _rate(value: Any, where: str) -> float:
    if value is None:
        raise ProfileError(f"{where} has no rate; write one such as rate: 400 Gb/s")
    try:
        return parse_quantity(value, "bytes_per_s")
    except ValueError as error:
        raise ProfileError(f"{where}: rate {error}") from None


def _from_yaml(path: str) -> tuple[list, list[float]]:
    data = read_yaml(path)
    if not isinstance(data.get("links"), list) or not data["links"]:
        raise ProfileError(f"{path} needs links, a list of {{from: accelerator 0..7, to: leaf 0, rate: 400 Gb/s}}")
    ends, rates = [], []
    for i, link in enumerate(data["links"]):
        where = f"{path}: links[{i}]"
        if not isinstance(link, dict) or not {"from", "to"} <= link.keys():
            raise ProfileError(f"{where} needs from and to; found {link!r}")
        one, other = (_vertices(link[side], where) for side in ("from", "to"))
        if len(one) != len(other) and 1 not in (len(one), len(other)):
            raise ProfileError(f"{where}: {len(one)} vertices to {len(other)}; give ranges of the same length, or one vertex")
        pairs = [
            (a, b) for a, b in zip(one * (len(other) if len(one) == 1 else 1), other * (len(one) if len(other) == 1 else 1), strict=True)
        ]
        ends += pairs
        rates += [_rate(link.get("rate"), f"{where} ({link['from']} to {link['to']})")] * len(pairs)
    return ends, rates


def _from_graphml(path: str) -> tuple[list, list[float]]:
    import networkx as nx

    read_text(path)
    try:
        graph: nx.Graph = nx.read_graphml(Path(path))
    except Exception as error:  # networkx passes on whatever its XML parser raises
        raise ProfileError(f"{path} is not GraphML: {error}") from None
    numbers: dict[str, int] = {}
    vertex = {}
    for node, layer in sorted(
        graph.nodes(data="layer"), key=lambda item: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", item[0])]
    ):
        if layer is None:
            raise ProfileError(f"{path}: node {node} has no layer; write accelerator, leaf ...")
        vertex[node] = (layer, numbers.get(layer, 0))
        numbers[layer] = numbers.get(layer, 0) + 1
    edges = list(graph.edges(data="rate"))
    return [(vertex[u], vertex[v]) for u, v, _ in edges], [_rate(rate, f"{path}: link {u} to {v}") for u, v, rate in edges]
