"""The few parameters that datasheets and benchmarks leave open, fitted to the published record: what, within which bounds, and how.

A parameter belongs to a generation of silicon and the power it gets, not to a row, a model or a product: A100 of 40 and 80 GB share
theirs, as do H100, H200 and H800, B200 and B300 in air-cooled hosts, GB200 and GB300 beside Grace. The cold score of a row comes
from parameters fitted without its model on its accelerator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pandas as pd

from simulator.closed_forms import estimate_s, orders
from simulator.errors import ProfileError, SimulatorError
from simulator.fitting import Fitted, Parameter, fit, leave_out
from simulator.pricing.stage_times import price_blocks, stage_times
from simulator.scenario.plan import COLUMNS, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.validation.published import scenario_from_row
from simulator.validation.regimes import common_part, others
from simulator.workload.stages import blocks, stage_blocks

#: beginning of an accelerator's name -> its generation of silicon and its power
SILICON = {"a100": "Ampere", "h100": "Hopper", "h200": "Hopper", "h800": "Hopper", "mi300x": "CDNA 3", "mi325x": "CDNA 3"}
SILICON |= {"mi355x": "CDNA 4"}
#: of one silicon, beside Grace it gets a fifth more power and other processors launch its kernels
SILICON |= {"b200": "Blackwell", "b300": "Blackwell", "gb200": "Grace Blackwell", "gb300": "Grace Blackwell"}
#: parts of ``Accelerator.in_training`` and their bounds: nothing beats its benchmark by more than a newer library could, nor loses
#: more than power caps and cold caches have been seen to cost
_PARTS = {
    "gemm": (0.6, 1.2, 0.15),
    "gemm_low": (0.6, 1.3, 0.2),
    "grouped": (0.5, 1.7, 0.3),
    "attention": (0.4, 1.5, 0.3),
    "memory": (0.4, 1.2, 0.3),
    "scale_out": (0.4, 1.5, 0.3),
}
#: parts that are fitted only where a profile has them: on silicon after the A100 collectives come out at 0.87 to 0.94 of their benchmarks,
#: and predictions of models that are left out gain nothing. Inside a host they come out as fast as their benchmark also on A100 (1.00)
_WHERE_LISTED = ("scale_out",)
#: seconds per launch: what a C++ loop needs at least, and what no eager framework exceeds
_DISPATCH = (5e-6, 200e-6, 0.7)
#: centre of what is assumed beside the rows: kernels as fast as in benchmarks, and 72 us for a module of Transformer Engine to launch one.
#: A bare linear layer, two launches, takes 100 us on Grace (NVIDIA/TransformerEngine issue 2053), and Megatron's modules around it add
#: to that; rows on H100 and on B200 say 77 and 84, so that this centre is not independent of them
_KNOWN = {"dispatch_s": 72e-6}
#: weight of a row that is not complete
_NOTHING = 1e-9
#: step of the finite differences, in the logarithm
_STEP = 0.05


def parameters_of(scenario: Scenario) -> tuple[Parameter, ...]:
    """Return the parameters that the prediction of a scenario rests on, at their present values."""
    present = scenario.cluster.accelerator.in_training
    parts = [
        Parameter(f"in_training.{name}", "1", present.get(name, 1.0), low, high, spread, known=1.0)
        for name, (low, high, spread) in _PARTS.items()
        if name in present or name not in _WHERE_LISTED
    ]
    dispatch = scenario.cluster.host.dispatch_s
    return (*parts, *([Parameter("dispatch_s", "s", dispatch, *_DISPATCH, known=_KNOWN["dispatch_s"])] if dispatch else []))


NAMES = (*(f"in_training.{name}" for name in _PARTS), "dispatch_s")


def slopes(scenario: Scenario) -> dict[str, float]:
    """Return ``d ln(step) / d ln(parameter)`` of the estimate for every one of `NAMES`: one estimate for a column of values.

    It is 0 for parameters that the scenario does not rest on (`parameters_of`).
    """
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    count = 1 + len(NAMES)
    moved = {name: np.where(np.arange(count) == i, np.exp(_STEP), 1.0) for i, name in enumerate(NAMES, start=1)}
    parts = {p.name.split(".")[1]: p.start * moved[p.name] for p in parameters_of(scenario) if p.name != "dispatch_s"}
    dispatch = cluster.host.dispatch_s
    host = cluster.host.model_copy(update={"dispatch_s": None if dispatch is None else dispatch * moved["dispatch_s"]})
    accelerator = cluster.accelerator.model_copy(update={"in_training": parts})
    cluster = cluster.model_copy(update={"accelerator": accelerator, "host": host})
    columns = PlanColumns(**{name: np.full(count, getattr(plan, name)) for name in COLUMNS}, like=plan)
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    if not micro_batches:
        raise ProfileError(f"global_batch = {job.global_batch} is less than one micro-batch on each of {plan.dp} ranks")
    found, stages = blocks(model, columns, job), stage_blocks(model, plan, job)
    prices = price_blocks(found, model, columns, cluster)
    times = stage_times(model, columns, job, cluster, stages, found, prices, orders(plan)(micro_batches))
    seconds = np.broadcast_to(estimate_s(columns, times, micro_batches, orders(plan)), (count,))
    return dict(zip(NAMES, np.log(seconds[1:] / seconds[0]) / _STEP, strict=True))


def _row_slopes(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        scenario, _ = scenario_from_row(row)
        starts = {f"start.{p.name}": p.start for p in parameters_of(scenario)}
        return {"id": row["id"], "silicon": _silicon(scenario.cluster.accelerator.name)} | slopes(scenario) | starts
    except SimulatorError:  # `validate` says why the row has no prediction
        return {"id": row["id"], "silicon": ""}


def _silicon(accelerator: str) -> str:
    return next(silicon for start, silicon in SILICON.items() if accelerator.startswith(start))


def row_slopes(rows: pd.DataFrame, processes: int = 1) -> pd.DataFrame:
    """Return the slopes of published rows, one line per row that can be read.

    Parameters
    ----------
    rows : DataFrame
        In the columns of `simulator.validation.published.published_runs`.
    processes : int
        How many processes share the rows.
    """
    records = rows.to_dict("records")
    if processes > 1 and len(records) > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            lines = list(pool.map(_row_slopes, records, chunksize=16))
    else:
        lines = list(map(_row_slopes, records))
    table = pd.DataFrame(lines)
    return table[table["silicon"] != ""].reset_index(drop=True)


def _by_silicon(table: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame, list[Parameter]]]:
    for silicon, group in table.groupby("silicon"):
        known = [name for name in NAMES if f"start.{name}" in group and group[f"start.{name}"].notna().any()]
        ranges = {f"in_training.{name}": bounds for name, bounds in _PARTS.items()} | {"dispatch_s": _DISPATCH}
        starts = [float(group[f"start.{name}"].median()) for name in known]
        units = ["s" if name == "dispatch_s" else "1" for name in known]
        yield (
            silicon,
            group,
            [Parameter(n, u, s, *ranges[n], known=_KNOWN.get(n, 1.0)) for n, u, s in zip(known, units, starts, strict=True)],
        )


def _joined(table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    kept = table[table["skipped"] == ""].merge(found, on="id")
    kept["group"] = kept["family"] + " on " + kept["accelerator"]
    complete = kept["complete"] == "yes"
    kept["weight"] = np.where(complete, 1 / complete.groupby(kept["group"]).transform("sum").clip(lower=1), _NOTHING)
    kept["miss"] = np.log(kept["measured_s"] / kept["predicted_s"])
    return kept


def fitted(table: pd.DataFrame, found: pd.DataFrame) -> dict[str, tuple[list[Parameter], Fitted]]:
    """Return the parameters of every generation of silicon, fitted to the complete rows of a `validate` table.

    Parameters
    ----------
    table : DataFrame
        As `simulator.validation.published.validate` returns it.
    found : DataFrame
        The `row_slopes` of the same rows.
    """
    kept = _joined(table[table["complete"] == "yes"], found)
    return {silicon: (parameters, fit(parameters, *_arrays(group, parameters))) for silicon, group, parameters in _by_silicon(kept)}


def _arrays(group: pd.DataFrame, parameters: list[Parameter]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return group[[p.name for p in parameters]].to_numpy(), group["miss"].to_numpy(), group["weight"].to_numpy()


def cold(table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Return a `validate` table whose predictions rest on parameters fitted without the row's model on its accelerator.

    Returns
    -------
    DataFrame
        With ``anchor``, too: ``ln(predicted / measured)`` of the other models of the row's release on its accelerator, by the
        same parameters as the row itself (`simulator.validation.regimes.others`); and what pairs of rows need to be
        predicted by common parameters (`simulator.validation.regimes.pairs`): ``silicon``, ``slope.<parameter>`` of the row and
        ``moved.<parameter>`` = ln of what leaving its group out does to each.

    Notes
    -----
    Complete rows of other groups decide; a row that is not complete decides nothing. To first order in the logarithms: the
    shipped parameters are those fitted to all rows, and leaving one group out moves them little.
    """
    kept, columns = _joined(table, found), [*(f"slope.{n}" for n in NAMES), *(f"moved.{n}" for n in NAMES)]
    result = table.set_index("id").assign(anchor=np.nan, silicon="", **dict.fromkeys(columns, 0.0))
    for silicon, group, parameters in _by_silicon(kept):
        slopes, misses, weights = _arrays(group, parameters)
        for name, moved in leave_out(parameters, slopes, misses, weights, group["group"].to_numpy()).items():
            own = (group["group"] == name).to_numpy()
            moves = pd.Series(slopes @ moved, index=group.index)
            rows = group.loc[own, "id"]
            result.loc[rows, "silicon"] = silicon
            result.loc[rows, [f"slope.{p.name}" for p in parameters]] = slopes[own]
            result.loc[rows, [f"moved.{p.name}" for p in parameters]] = moved
            result.loc[rows, "predicted_s"] = (group["predicted_s"] * np.exp(moves))[own].to_numpy()
            near = group[(group["accelerator"] == group.loc[own, "accelerator"].iloc[0]) & group["release"].isin(group.loc[own, "release"])]
            residual = moves.loc[near.index] - near["miss"]
            result.loc[rows, "anchor"] = others(near, residual, of=common_part).loc[rows.index].to_numpy()
    result["relative_error"] = result["predicted_s"] / result["measured_s"] - 1
    return result.reset_index()[[*table.columns, "anchor", "silicon", *columns]]
