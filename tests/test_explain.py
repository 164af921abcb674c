"""Explanations of a search hold by arithmetic."""

from __future__ import annotations

import pytest
from small import Small, cluster, dense, job

from simulator.errors import ProfileError
from simulator.planning.explain import constraint_costs, why
from simulator.planning.search import search
from simulator.planning.space import Space
from simulator.scenario.plan import Plan

TINY = {"zero": (1,), "schedule": ("1f1b",), "recompute": ("none",), "layout": ("balanced",), "micro_batch": (1,), "vpp": (1,)}


def question() -> Small:
    return Small(model=dense(4, 1024), cluster=cluster(8), plan=Plan(), job=job(16))


def test_the_runner_up_takes_longer_by_the_sum_of_its_terms():
    found = search(question(), top=2, space=Space(**TINY))
    first, second = (result.step_time_s for result in found.results)
    assert why(found)["seconds"].sum() == pytest.approx(second - first, abs=1e-12)
    with pytest.raises(ProfileError, match="search with top=2"):
        why(search(question(), top=1, space=Space(**TINY)))


def test_a_constraint_costs_what_lifting_it_saves():
    tight = search(question(), top=1, space=Space(**TINY, tp=(4,)))
    free = search(question(), top=1, space=Space(**TINY)).best.step_time_s
    costs = constraint_costs(tight).set_index("constraint")
    assert costs.loc["tp", "step_time_s"] == free
    assert costs.loc["tp", "costs_s"] == pytest.approx(tight.best.step_time_s - free)
    assert costs.loc["tp", "costs_s"] > 0
    assert (costs["costs_s"] >= -1e-12).all()
    assert costs.index[-1] == "memory"
