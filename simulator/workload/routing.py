"""Tokens per expert as a distribution: how many each expert-parallel rank receives, per layer and micro-batch.

Shapes: L MoE layers, M micro-batches, G expert groups of one stage, P ranks in a group (ep), E experts, S = E + redundant
ones, the slots that hold a copy of an expert's weights, S / P on each rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.errors import PlanError, Problem
from simulator.scenario.model import Experts, Model
from simulator.scenario.routing import Routing


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """What the ranks of one pipeline stage receive; a token counts once for each of its experts.

    Parameters
    ----------
    received : ndarray of int, shape (L, M, G, P)
        Tokens that a rank computes, dropped ones left out.
    dropped : ndarray of int, shape (L, M, G)
        Tokens over the capacity of their expert.
    even : float
        What every rank would receive if all were even.
    """

    received: np.ndarray
    dropped: np.ndarray
    even: float

    @property
    def load(self) -> np.ndarray:
        """Tokens of each rank over the mean, shape (L, M, G, P)."""
        return self.received / self.even

    @property
    def dropped_share(self) -> float:
        """Share of all tokens that were dropped."""
        return float(self.dropped.sum() / (self.dropped.sum() + self.received.sum()))


def moe_layer_count(model: Model) -> int:
    """Return how many layers of `model` route tokens, multi-token-prediction layers included."""
    kinds = model.layer_kinds
    return sum(kind.moe for kind in kinds) + model.mtp_layers * kinds[-1].moe


def popularity(routing: Routing, layers: int, experts: Experts, random: np.random.Generator) -> np.ndarray:
    """Return how likely each expert of each layer is to be one of a token's picks, shape (L, E); rows add up to `top_k`.

    Notes
    -----
    A token picks an expert at most once: what exceeds 1 goes to the others, in proportion to theirs.
    """
    count = experts.count
    if routing.distribution == "zipf":
        assert routing.exponent is not None
        law = np.arange(1, count + 1) ** -float(routing.exponent)
        share = np.stack([random.permutation(law) for _ in range(layers)])
    elif routing.distribution == "dirichlet":
        assert routing.concentration is not None
        share = random.dirichlet(np.full(count, routing.concentration), size=layers)
    elif routing.distribution == "measured":
        share = _measured(routing, layers, experts)
    else:
        share = np.ones((layers, count))
    share = share / share.sum(axis=1, keepdims=True)
    share = (1.0 - routing.bias_balance) * share + routing.bias_balance / count
    return np.stack([_at_most_once(row, experts.top_k) for row in share])


def _measured(routing: Routing, layers: int, experts: Experts) -> np.ndarray:
    counts = np.array(routing.counts, dtype=float)
    if counts.shape != (layers, experts.count):
        numbers = (
            f"the table has {counts.shape[0]} layers x {counts.shape[1]} experts, the model {layers} MoE layers x {experts.count} experts"
        )
        raise PlanError([Problem("measured routing fits the model", numbers, "give one row per MoE layer, one column per expert")])
    total, most = counts[0].sum(), counts.max()
    if total % experts.top_k or most > total / experts.top_k:
        layer, expert = np.unravel_index(counts.argmax(), counts.shape)
        tokens = total / experts.top_k
        numbers = (
            f"each layer adds up to {total:.0f}, which is {tokens:g} tokens of top_k = {experts.top_k}; "
            f"expert {expert} of layer {layer} has {most:.0f}"
        )
        remedy = "a layer adds up to whole tokens times top_k, and an expert gets a token at most once"
        raise PlanError([Problem("measured token counts add up", numbers, remedy)])
    return counts


def _at_most_once(share: np.ndarray, top_k: int) -> np.ndarray:
    """Return the chance of each expert to be among `top_k` different picks: shares scaled up, none above 1."""
    chance, full = share * top_k, np.zeros(len(share), dtype=bool)
    while (chance > 1).any():
        full |= chance >= 1
        rest = share[~full].sum()
        left = top_k - full.sum()
        others = share * (left / rest) if rest > 0 else np.full(len(share), left / max((~full).sum(), 1))
        chance = np.where(full, 1.0, others)
    return chance


def placement(chance: np.ndarray, ranks: int, redundant: int) -> np.ndarray:
    """Return which expert each slot of each rank holds, shape (P, S / P).

    Parameters
    ----------
    chance : ndarray of shape (E,)
        Popularity of the experts of one layer.
    ranks : int
        Ranks of an expert group.
    redundant : int
        Copies to hand out; 0 leaves the experts in order.

    Notes
    -----
    Greedy, as EPLB's global policy: each copy goes to the expert with the most tokens per copy; then slots are packed,
    heaviest first, onto the lightest rank that has room.

    References
    ----------
    DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB, 2025, ``replicate_experts`` and ``balanced_packing``.
    """
    experts = np.arange(len(chance))
    if not redundant:
        return experts.reshape(ranks, -1)
    copies = np.ones(len(chance))
    for _ in range(redundant):
        copies[np.argmax(chance / copies)] += 1
    slots = np.repeat(experts, copies.astype(int))
    weight = (chance / copies)[slots]
    room, held = len(slots) // ranks, [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for slot in np.argsort(-weight, kind="stable"):
        rank = int(np.argmin(load))
        held[rank].append(int(slots[slot]))
        load[rank] = load[rank] + weight[slot] if len(held[rank]) < room else np.inf
    return np.array([sorted(row) for row in held])


def route(routing: Routing, experts: Experts, layers: int, tokens: np.ndarray, ranks: int, random: np.random.Generator) -> RoutedTokens:
    """Return the tokens that every expert-parallel rank receives.

    Parameters
    ----------
    routing : Routing
    experts : Experts
    layers : int
        MoE layers of the model.
    tokens : ndarray of int, shape (M, G)
        Tokens of each expert group in each micro-batch.
    ranks : int
        Ranks of an expert group.
    random : Generator

    Raises
    ------
    PlanError
        When slots do not divide over ranks, or a measured table does not fit the model.

    Notes
    -----
    The picks of a group's T tokens are multinomial over the slots, each expert's copies sharing it evenly; conserved
    exactly: ``received + dropped = T top_k``. A slot keeps at most ``ceil(capacity_factor T top_k / S)``. Without capacity
    the multinomial is drawn over the ranks at once, which is the same distribution. Picks of one token are taken as
    independent of those of the next; topics that hold for a whole micro-batch would spread wider.
    """
    slots = experts.count + routing.redundant_experts
    if slots % ranks:
        numbers = f"{experts.count} experts + {routing.redundant_experts} redundant ones = {slots} slots do not divide over ep = {ranks}"
        remedy = f"use redundant_experts of {-experts.count % ranks} plus a multiple of {ranks}"
        raise PlanError([Problem("expert slots divide by ep", numbers, remedy)])
    chance = popularity(routing, layers, experts, random)
    picks, sampled = tokens * experts.top_k, routing.sampled and routing.distribution != "balanced"
    received = np.empty((layers, *tokens.shape, ranks), dtype=np.int64)
    for layer, row in enumerate(chance):
        home = placement(row, ranks, routing.redundant_experts)
        weight = (row / np.bincount(home.ravel(), minlength=len(row)))[home]
        if routing.capacity_factor is None:
            received[layer] = _split(picks, weight.sum(axis=1), random if sampled else None)
            continue
        received[layer] = _capped(picks, weight, routing.capacity_factor / slots, random if sampled else None)
    return RoutedTokens(received, picks - received.sum(axis=-1), float(picks.mean() / ranks))


def _capped(picks: np.ndarray, weight: np.ndarray, share: float, random: np.random.Generator | None) -> np.ndarray:
    """Return what each rank receives, shape (M, G, P), when a slot keeps at most ``ceil(share * picks)``.

    Parameters
    ----------
    weight : ndarray of shape (P, slots)
        Popularity of the slots of each rank.

    Notes
    -----
    Slots of a rank that cannot fill up are drawn as one, and so are those that must: a sum of multinomial counts is
    multinomial. "Cannot" and "must" are Chernoff's bounds of a chance of ``exp(-34)``: np + sqrt(68 np) + 23 above, np -
    sqrt(68 np) below (Mitzenmacher, Upfal, "Probability and Computing", 2005, chapter 4).
    """
    capacity, chance = np.ceil(share * picks).astype(np.int64), weight / weight.sum()
    free = full = np.zeros(weight.shape, dtype=bool)
    if random is not None:
        mean = picks.min() * chance
        free = mean + np.sqrt(68 * mean) + 23 <= share * picks.min()
        full = mean - np.sqrt(68 * mean) >= share * picks.min() + 1
    alone, rank = ~(free | full), np.arange(len(weight))
    part = np.concatenate([(chance * free).sum(axis=1), (chance * full).sum(axis=1), chance[alone]])
    no_limit = np.full(len(weight), picks.max())
    slots = np.concatenate([no_limit, full.sum(axis=1), np.ones(alone.sum(), dtype=np.int64)])
    drawn = _many(picks, part, random) if random is not None else np.moveaxis(_split(picks, part, None), -1, 0)
    kept = np.zeros((len(weight), *picks.shape), dtype=np.int64)
    for counts, most, owner in zip(drawn, slots, np.concatenate([rank, rank, np.nonzero(alone)[0]]), strict=True):
        kept[owner] += np.minimum(counts, most * capacity)
    return np.moveaxis(kept, 0, -1)


def _many(picks: np.ndarray, weight: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return `picks` divided by `weight`, shape (len(weight), M, G): drawn, many at a time where counts are large.

    Notes
    -----
    A multinomial count is binomial in what the counts before it leave, n of chance q; one of variance ``n q (1 - q)`` of 100 or
    more is drawn by Cornish and Fisher's expansion of its quantile, ``n q + sqrt(n q (1 - q)) z + (1 - 2 q) (z^2 - 1) / 6`` with
    z standard normal, to whole picks: within 0.0002 of the binomial's cumulative probabilities.

    References
    ----------
    Cornish, Fisher, "Moments and Cumulants in the Specification of Distributions", 1937.
    """
    chance = weight / weight.sum()
    some = np.flatnonzero(chance)
    rest = np.append(chance[some][::-1].cumsum()[::-1], 0.0)
    if some.size < 2 or picks.min() * (chance[some] * rest[1:] / rest[:-1])[:-1].min() < 100:
        return np.moveaxis(_split(picks, weight, random), -1, 0)
    counts = np.zeros((len(weight), *picks.shape), dtype=np.int64)
    left, normal = picks.astype(float), random.standard_normal((some.size - 1, *picks.shape))
    for part, z, q in zip(some, normal, chance[some] / rest[:-1], strict=False):
        drawn = np.rint(left * q + np.sqrt(left * (q * (1 - q))) * z + (1 - 2 * q) / 6 * (z * z - 1))
        counts[part] = drawn = np.maximum(np.minimum(drawn, left), 0.0)
        left -= drawn
    counts[some[-1]] = left
    return counts


def _split(picks: np.ndarray, weight: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Return `picks` divided by `weight`, shape (M, G, len(weight)): drawn, or expected and rounded by largest remainder."""
    share = weight / weight.sum()
    if random is not None:
        return random.multinomial(picks, share)
    quota = picks[..., None] * share
    whole = np.floor(quota).astype(np.int64)
    order = np.argsort(whole - quota, axis=-1, kind="stable")
    place = np.argsort(order, axis=-1, kind="stable")
    return whole + (place < (picks - whole.sum(axis=-1))[..., None])
