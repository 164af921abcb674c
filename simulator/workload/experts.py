"""Where the router sends tokens: how many hosts and ranks a token visits."""

from __future__ import annotations

import numpy as np

from simulator.scenario.model import Experts
from simulator.units import Number


def _distinct(bins: Number, experts: Number, top_k: int) -> Number:
    """Return how many of `bins` equal parts of `experts` a uniform draw of `top_k` different experts touches.

    Notes
    -----
    ``M (1 - C(E - E/M, k) / C(E, k))``, the ratio as a product over the draws.
    """
    missed = np.ones_like(np.asarray(bins, dtype=float))
    for draw in range(top_k):
        missed = missed * np.maximum(experts - experts / bins - draw, 0.0) / np.maximum(experts - draw, 1.0)
    return bins * (1.0 - missed)


def expected_destinations(experts: Experts, parts: Number) -> Number:
    """Return the mean number of different parts that hold one token's experts.

    Parameters
    ----------
    experts : Experts
    parts : Number
        Equal parts that the experts of one layer are divided into (hosts, scale-up domains or ranks of an expert
        group).

    Returns
    -------
    Number
        Between 1 and ``min(parts, top_k)``.

    Notes
    -----
    Balanced routing, every expert equally likely. Group-limited routing draws from `top_groups` of `groups` groups: a
    part at least as fine as a group narrows the draw to the parts of those groups; of coarser parts a token touches as
    many as its groups do, when each holds a pick.

    References
    ----------
    DeepSeek-AI, "Insights into DeepSeek-V3", 2025, section 4.3 (node-limited routing).
    """
    parts = np.asarray(parts, dtype=float)
    free = _distinct(parts, float(experts.count), experts.top_k)
    if experts.groups == 1:
        return free
    share = experts.top_groups / experts.groups
    fine = _distinct(np.maximum(parts * share, 1.0), experts.count * share, experts.top_k)
    picked = _distinct(float(experts.top_groups), experts.count * share, experts.top_k)
    coarse = _distinct(parts, float(experts.groups), experts.top_groups) * picked / experts.top_groups
    return np.clip(np.where(parts >= experts.groups, fine, coarse), 1.0, parts)


def copies(experts: Experts, dispatcher: str, ranks: Number, inside: Number, domains: Number) -> tuple[Number, Number]:
    """Return the copies of one token that leave its scale-up domain, and that travel inside a domain to another rank.

    Parameters
    ----------
    dispatcher : str
        ``alltoall`` sends a copy per expert; ``deepep`` one per remote domain, fanned out there to the ranks that hold
        its experts, and one per rank at home.
    ranks, inside, domains : Number
        Ranks of the expert group, how many of them share a domain, and how many domains there are.
    """
    remote = 1.0 - 1.0 / domains
    if dispatcher == "deepep":
        return expected_destinations(experts, domains) * remote, expected_destinations(experts, ranks) * (1.0 - 1.0 / inside)
    return experts.top_k * remote, experts.top_k * (inside - 1) / ranks
