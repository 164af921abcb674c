"""What remedies for uneven experts buy: the same step on every rank with none of them, with each and with all."""

from __future__ import annotations

import pandas as pd

from simulator.errors import ProfileError
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.simulate import simulate_ranks

#: fields of `Routing` that are remedies; its others say how popular the experts are
REMEDIES = ("bias_balance", "capacity_factor", "hosts_per_token", "redundant_experts")


def remedies(scenario: Scenario, variation: Variation | None = None) -> pd.DataFrame:
    """Return the step of `scenario` with its uneven experts under each remedy of its `routing`, and under all of them.

    Parameters
    ----------
    scenario : Scenario
        Its `routing` has an uneven distribution and the remedies to compare.
    variation : Variation, optional
        What else sets ranks apart; nothing by default. All rows have its seed, so the same experts are popular.

    Returns
    -------
    DataFrame
        One row per remedy, ``none`` first and ``all`` last if there are several: ``remedy``, ``value``, ``step_time_s``,
        ``over_balanced`` (step over that of balanced experts), ``heaviest_load`` (most tokens that a rank receives for one layer
        and micro-batch, over the mean), ``activations_bytes`` (most that a rank holds at once), ``dropped_share`` of the tokens.

    Raises
    ------
    ProfileError
        When the scenario has no uneven routing.
    """
    routing = scenario.routing
    if routing is None or routing.distribution == "balanced":
        raise ProfileError("remedies are for uneven experts; give the scenario a routing with distribution: zipf, dirichlet or measured")
    given = {name: getattr(routing, name) for name in REMEDIES if getattr(routing, name) != Routing.model_fields[name].default}
    without = routing.model_copy(update={name: Routing.model_fields[name].default for name in REMEDIES})
    cases: dict[str, dict] = {"none": {}} | {name: {name: value} for name, value in given.items()}
    if len(given) > 1:
        cases["all"] = given
    balanced = simulate_ranks(scenario, variation, Routing()).step_time_s
    rows = []
    for name, fields in cases.items():
        step = simulate_ranks(scenario, variation, without.model_copy(update=fields))
        load = step.durations.uneven.load
        assert load is not None
        value = given.get(name)
        held, seconds = float(step.activations()["peak_bytes"].max()), step.step_time_s
        rows.append((name, value, seconds, seconds / balanced, float(load.max()), held, step.dropped_share))
    columns = ["remedy", "value", "step_time_s", "over_balanced", "heaviest_load", "activations_bytes", "dropped_share"]
    return pd.DataFrame(rows, columns=columns)
