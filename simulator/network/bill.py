"""What a network is bought from: switches and cables with their optics, watts and dollars."""

from __future__ import annotations

import numpy as np
import pandas as pd

from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.part import Part
from simulator.scenario.profiles import PARTS


def bill_of_materials(built: Topology, cluster: Cluster) -> pd.DataFrame:
    """Return one row per kind of switch and of cable of the scale-out network.

    Parameters
    ----------
    built : Topology
    cluster : Cluster
        Whose fabric names the parts.

    Returns
    -------
    DataFrame
        ``item``, ``part``, ``count``, ``ports`` (in use, of all of them), ``power_w``, ``price_usd``, and ``grade`` and ``date``
        of the price. A cable has an optic at both ends; NaN where the fabric names no part or no figure was read. NICs belong
        to the hosts; fibre, racks and management networks are not counted.
    """
    fabric, rows = cluster.fabric, []
    degree = np.bincount(np.concatenate([built.lower, built.upper]), minlength=built.vertices)
    named = {tier.name: tier for tier in fabric.tiers}
    at = built.accelerators
    for layer, count in built.layers.items():
        used = int(degree[at : at + count].sum())
        at += count
        if layer != "scale-up" and count:
            rows.append((f"{layer} switches", count, used, 1, named[layer].switch if layer in named else None))
    for tier in built.tiers:
        if tier != "scale-up":
            optic = fabric.host_optic if tier == "host" else named[tier].optic if tier in named else None
            rows.append((f"{tier} cables", built.cables(tier), 2 * built.cables(tier), 2, optic))
    return pd.DataFrame([_row(*row) for row in rows])


def _row(item: str, count: int, ports: int, each: int, name: str | None) -> dict:
    part: Part | None = PARTS.load(name) if name else None
    power, price = (getattr(part, f, None) for f in ("power_w", "price_usd"))
    source = next((s for s in part.sources if "price_usd" in s.facts), None) if part else None
    return {
        "item": item,
        "part": name or "",
        "count": count,
        "ports": ports,
        "power_w": np.nan if power is None else float(count * each * power),
        "price_usd": np.nan if price is None else float(count * each * price),
        "grade": source.grade if source else "",
        "date": source.date if source else "",
    }
