"""Placement by the bytes of the step: the order of the axes, and of the hosts, that sends fewest bytes across the dearest links."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
import pandas as pd

from simulator.errors import PlanError
from simulator.feasibility import structure
from simulator.scenario.mesh import accelerator_of, members
from simulator.scenario.placement import AXES, FEWEST_BYTES, ORDER
from simulator.scenario.plan import INTERLEAVED, Plan
from simulator.scenario.scenario import Scenario
from simulator.workload.build import build_step
from simulator.workload.classes import rank_classes
from simulator.workload.experts import expected_destinations

#: clusters of at most so many hosts are searched host by host, too
HOSTS_EXCHANGED = 48
#: a saving below this share of the bytes is rounding
_ROUNDING = 1e-9

#: (axis, kind of collective) -> bytes per rank and step
Traffic = dict[tuple[str, str], float]


def step_traffic(scenario: Scenario) -> Traffic:
    """Return the bytes of the collectives of one step by axis and kind: the mean buffer per rank, as `Op.bytes` counts it."""
    plan = scenario.plan
    same = np.ones(plan.world)
    program = build_step(scenario.model, plan, scenario.job, rank_classes(plan, same, same))
    runs = np.bincount(program.task, program.classes.count[np.asarray(program.rank_class)] / plan.world, len(program.tasks))
    found: Traffic = {}
    for task, times in zip(program.tasks, runs.tolist(), strict=True):
        for op in task.ops:
            if op.stream != "compute":
                found[op.axis, op.kind] = found.get((op.axis, op.kind), 0.0) + times * float(op.bytes)
    return found


def tier_bytes(scenario: Scenario, traffic: Traffic | None = None) -> pd.DataFrame:
    """Return the bytes of one step that leave the blocks of each tier, dearest tier first.

    Parameters
    ----------
    scenario : Scenario
    traffic : dict, optional
        As `step_traffic` returns it; it does not depend on the placement.

    Returns
    -------
    DataFrame
        ``tier`` that is left, ``accelerators`` of one of its blocks, ``oversubscription`` of all tiers up to it, ``crossing_bytes``.

    Notes
    -----
    A ring enters every block that it lies over once per pass; an all-to-all sends to every member alike, of experts a copy per
    expert or (others) per domain; a pipeline sends to the next stage. The dearest tier is the most oversubscribed one, among equals
    the innermost, which what leaves the outer ones passes, too.
    """
    plan, cluster, traffic = scenario.plan, scenario.cluster, traffic if traffic is not None else step_traffic(scenario)
    where = accelerator_of(plan, cluster.host.accelerators)
    domain = cluster.host.scale_up_domain
    tiers, over = [("scale-up", domain, 1.0)], 1.0
    for tier in cluster.fabric.tiers[:-1]:
        over *= tier.oversubscription
        tiers.append((tier.name, tier.accelerators, over))
    tiers = [t for t in tiers if t[1] < cluster.accelerators]
    rows = {name: 0.0 for name, *_ in tiers}
    for (axis, kind), size in traffic.items():
        number = members(plan, axis)
        places = where[np.argsort(number, kind="stable")].reshape(int(number.max()) + 1, -1)
        if kind == "all_to_all" and axis == "ep":
            size = size * _copies(scenario, places // domain)
        for name, block, _ in tiers:
            rows[name] += size * _crossings(places // block, kind, plan)
    table = pd.DataFrame(tiers, columns=["tier", "accelerators", "oversubscription"])
    table["crossing_bytes"] = list(rows.values())
    return table.sort_values("oversubscription", ascending=False, kind="stable", ignore_index=True)


def _copies(scenario: Scenario, domain: np.ndarray) -> float:
    """Return the copies of a token that an expert all-to-all makes, one that stays included."""
    experts = scenario.model.experts
    assert experts is not None
    apart = float(_distinct(domain).mean())
    return float(expected_destinations(experts, apart)) if scenario.plan.fans_out else float(experts.top_k)


def _distinct(block: np.ndarray) -> np.ndarray:
    ordered = np.sort(block, axis=1)
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)


def _crossings(block: np.ndarray, kind: str, plan: Plan) -> float:
    """Return how many times a rank's buffer crosses between blocks, over all groups; shape of `block` (groups, members)."""
    size = block.shape[1]
    if kind == "send":
        turns = plan.schedule in INTERLEAVED
        pairs = block != np.roll(block, -1, axis=1)
        return float(pairs.sum()) if turns else float(pairs[:, :-1].sum() * size / max(size - 1, 1))
    if kind == "all_to_all":
        ordered = np.sort(block, axis=1)
        at = np.arange(size)
        starts = np.maximum.accumulate(np.where(np.diff(ordered, axis=1, prepend=-1) != 0, at, 0), axis=1)
        together = 2 * (at - starts).sum() + block.size  # ordered pairs in one block
        return float(block.size - together / size)
    apart = _distinct(block)
    return float((2 if kind == "all_reduce" else 1) * (size - 1) / size * apart[apart > 1].sum())


def fewest_bytes(scenario: Scenario) -> Scenario:
    """Return `scenario` with the placement that sends fewest bytes across the dearest tier, then across the next.

    Parameters
    ----------
    scenario : Scenario
        Its spare hosts stay spare; hosts that its placement names are used in any order.

    Raises
    ------
    PlanError
        When the plan is not legal in any order of the axes.

    Notes
    -----
    All 120 orders are tried; on up to `HOSTS_EXCHANGED` hosts the best is improved by exchanging hosts, two at a time, while that
    saves bytes. `tier_bytes` says what is counted.
    """
    named = scenario.plan.placement.hosts
    scenario = _with(scenario, order=ORDER, hosts=tuple(sorted(named)) if named else named)
    traffic = step_traffic(scenario)
    best, cost = None, None
    for tokens in (ORDER.split("-"), *permutations(AXES)):  # among equals the usual order stays
        tried = _with(scenario, order="-".join(tokens))
        if structure(tried):
            continue
        now = tier_bytes(tried, traffic)["crossing_bytes"].tolist()
        if best is None or cost is None or _less(now, cost):
            best, cost = tried, now
    if best is None or cost is None:
        raise PlanError(structure(scenario))
    hosts = scenario.ranks(scenario.plan) // scenario.cluster.host.accelerators
    return _exchanged(best, cost, traffic) if hosts <= HOSTS_EXCHANGED and best.plan.placement.accelerators is None else best


def _with(scenario: Scenario, **changes: object) -> Scenario:
    place = scenario.plan.placement.model_copy(update=changes)
    return scenario.model_copy(update={"plan": scenario.plan.model_copy(update={"placement": place})})


def _less(now: list[float], before: list[float]) -> bool:
    for a, b in zip(now, before, strict=True):
        if abs(a - b) > _ROUNDING * max(a, b):
            return a < b
    return False


def _exchanged(scenario: Scenario, cost: list[float], traffic: Traffic) -> Scenario:
    """Exchange two hosts as long as that saves bytes."""
    place, per_host = scenario.plan.placement, scenario.cluster.host.accelerators
    hosts = list(place.hosts or range(-(-scenario.ranks(scenario.plan) // per_host)))
    saved = True
    while saved:
        saved = False
        for swapped in _swaps(hosts):
            tried = _with(scenario, hosts=tuple(swapped), spare_hosts=0)
            now = tier_bytes(tried, traffic)["crossing_bytes"].tolist()
            if _less(now, cost):
                scenario, cost, hosts, saved = tried, now, swapped, True
                break
    return scenario


def _swaps(hosts: list[int]) -> Iterator[list[int]]:
    for i, j in combinations(range(len(hosts)), 2):
        swapped = list(hosts)
        swapped[i], swapped[j] = hosts[j], hosts[i]
        yield swapped


def settled(scenario: Scenario) -> Scenario:
    """Return `scenario` with its placement decided, where it asks for the one of fewest bytes."""
    return fewest_bytes(scenario) if scenario.plan.placement.order == FEWEST_BYTES else scenario
