"""Published recipes: of every model and accelerator in the record, the layout that its source reports to be fastest."""

from __future__ import annotations

import pandas as pd

from simulator.errors import SimulatorError
from simulator.scenario.scenario import Scenario
from simulator.validation.published import measured_step_s, published_runs, scenario_from_row

#: rows that count although their source prints no step time for the layout: DeepSeek-V3 as trained on 2,048 H800
ALSO = ("dsv3-isca-mpft",)


def recipes(rows: pd.DataFrame | None = None) -> dict[str, Scenario]:
    """Return the fastest published layout of every mixture of experts, accelerator and datatype, by the id of its row.

    Parameters
    ----------
    rows : DataFrame, optional
        As `simulator.validation.published.published_runs`, which is used when left out.

    Notes
    -----
    Fastest: most tokens per second and accelerator among complete rows. Rows that the simulator cannot take are left out.
    """
    rows = published_runs() if rows is None else rows
    kept: dict[object, tuple[float, str, Scenario]] = {}
    for row in rows[(rows["arch"] == "moe") & ((rows["complete"] == "yes") | rows["id"].isin(ALSO))].to_dict("records"):
        try:
            scenario, _ = scenario_from_row(row)
            rate = scenario.job.tokens_per_step / measured_step_s(row, scenario) / scenario.cluster.accelerators
        except SimulatorError:
            continue  # `myriad validate` counts these, with the reason of each
        key = row["id"] if row["id"] in ALSO else (scenario.model.name, scenario.cluster.accelerator.name, scenario.plan.precision.gemm)
        if key not in kept or rate > kept[key][0]:
            kept[key] = rate, row["id"], scenario
    return {name: scenario for _, name, scenario in kept.values()}
