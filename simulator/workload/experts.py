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
    Balanced routing, every expert equally likely. Group-limited routing picks `top_groups` of `groups` groups by the sum of
    their best ``top_k / top_groups`` scores, so a chosen group holds that many picks, not what a draw from the chosen
    groups would leave it with (which may be none): a token touches its groups' parts, or inside each group the parts
    that its picks fall on. Against sampled scores, two or more picks per group: within 2 % where no group is split, else 7 %.

    References
    ----------
    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.1.2 (node-limited routing).
    """
    parts = np.asarray(parts, dtype=float)
    most = np.minimum(parts, experts.top_k)
    if experts.groups == 1:
        return np.clip(_distinct(parts, float(experts.count), experts.top_k), 1.0, most)
    whole, odd = divmod(experts.top_k, experts.top_groups)
    inside, size = np.maximum(parts / experts.groups, 1.0), experts.count / experts.groups
    fine = (experts.top_groups - odd) * _distinct(inside, size, whole) + odd * _distinct(inside, size, whole + 1)
    coarse = _distinct(parts, float(experts.groups), experts.top_groups)
    return np.clip(np.where(parts >= experts.groups, fine, coarse), 1.0, most)


def copies(experts: Experts, fans_out: bool, ranks: Number, inside: Number, domains: Number) -> tuple[Number, Number]:
    """Return the copies of one token that leave its scale-up domain, and that travel inside a domain to another rank.

    Parameters
    ----------
    fans_out : bool
        Whether one copy goes to each remote domain, fanned out there to the ranks that hold the experts, and one to each rank at
        home; else one goes to each expert (`simulator.scenario.plan.Plan.fans_out`).
    ranks, inside, domains : Number
        Ranks of the expert group, how many of them share a domain, and how many domains there are.
    """
    remote = 1.0 - 1.0 / domains
    if fans_out:
        return expected_destinations(experts, domains) * remote, expected_destinations(experts, ranks) * (1.0 - 1.0 / inside)
    return experts.top_k * remote, experts.top_k * (inside - 1) / ranks


def rows_sorted(experts: Experts, fans_out: bool, ranks: Number) -> tuple[Number, Number]:
    """Return the rows per local token that are read and written to sort copies by expert: before they leave, and where they arrive.

    Parameters
    ----------
    fans_out : bool
        Whether tokens are sent as they are, one to each rank, where they are copied to its experts; else the copies of each token are
        written in the order of all experts, sent, and what came from every rank is sorted by local expert.
    ranks : Number
        Ranks of the expert group.

    Notes
    -----
    With top k and D different ranks per token (`expected_destinations`): ``1 + k`` and ``2 k``, or ``0`` and ``D + k``. On
    the way back the same rows are summed up instead of copied. One rank, or one expert on each, has nothing to sort again.

    References
    ----------
    Megatron-Core, megatron/core/transformer/moe/token_dispatcher.py: ``permute`` and ``sort_chunks_by_idxs`` of the
    all-to-all dispatcher; DeepEP, csrc/hybrid_ep/extension/permute.cu.
    """
    ranks = np.asarray(ranks, dtype=float)
    if fans_out:
        return 0.0 * ranks, expected_destinations(experts, ranks) + experts.top_k
    again = (ranks > 1) & (experts.count > ranks)
    return 1.0 + experts.top_k + 0.0 * ranks, np.where(again, 2.0 * experts.top_k, 0.0)
