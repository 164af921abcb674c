"""The few parameters that datasheets and benchmarks leave open, fitted to the published record: what, within which bounds, and how.

A parameter belongs to a generation of silicon and the power it gets, not to a row, a model or a product: A100 of 40 and 80 GB share
theirs, as do H100, H200 and H800, B200 and B300 in air-cooled hosts, GB200 and GB300 beside Grace. The cold score of a row comes
from parameters fitted without its model on its accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from simulator.closed_forms import estimates
from simulator.fitting import Fitted, Parameter, fit, leave_out
from simulator.scenario.scenario import Scenario
from simulator.validation.published import step_s, validate
from simulator.validation.regimes import common_part, others

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
#: to that; rows on H100 and on B200 say 77 and 85, so that this centre is not independent of them
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
    """Return ``d ln(step) / d ln(parameter)`` of the estimate for every one of `NAMES`.

    It is 0 for parameters that the scenario does not rest on (`parameters_of`).
    """
    return _slopes(_moved_s(scenario))


def _slopes(seconds: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, np.log(seconds[1:] / seconds[0]) / _STEP, strict=True))


def _moved_s(scenario: Scenario) -> np.ndarray:
    """Return the estimated step as it is, and with each of `NAMES` moved by `_STEP`: one estimate for columns of their values."""
    cluster = scenario.cluster
    moved = {name: np.where(np.arange(1 + len(NAMES)) == i, np.exp(_STEP), 1.0) for i, name in enumerate(NAMES, start=1)}
    parts = {p.name.split(".")[1]: p.start * moved[p.name] for p in parameters_of(scenario) if p.name != "dispatch_s"}
    dispatch = cluster.host.dispatch_s
    host = cluster.host.model_copy(update={"dispatch_s": None if dispatch is None else dispatch * moved["dispatch_s"]})
    accelerator = cluster.accelerator.model_copy(update={"in_training": parts})
    cluster = cluster.model_copy(update={"accelerator": accelerator, "host": host})
    return estimates(scenario.model_copy(update={"cluster": cluster}))


def sensitive(scenario: Scenario) -> dict[str, Any]:
    """Return what `validate` tells of a row and a fit asks for: ``predicted_s`` (`step_s`), `slopes`, silicon and present values."""
    seconds = _moved_s(scenario)
    predicted = float(seconds[0]) if scenario.job.routing == "balanced" else step_s(scenario)
    starts = {f"start.{p.name}": p.start for p in parameters_of(scenario)}
    return {"predicted_s": predicted, "silicon": _silicon(scenario.cluster.accelerator.name)} | _slopes(seconds) | starts


def _silicon(accelerator: str) -> str:
    return next(silicon for start, silicon in SILICON.items() if accelerator.startswith(start))


def predictions(
    rows: pd.DataFrame, processes: int = 1, progress: Callable[[int, int], None] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the `validate` table of published rows, complete or not, and the slopes of those that can be predicted.

    Parameters
    ----------
    rows : DataFrame
        In the columns of `simulator.validation.published.published_runs`.
    processes, progress
        As for `simulator.validation.published.validate`.
    """
    both = validate(sensitive, rows, complete_only=False, progress=progress, processes=processes)
    columns = [name for name in both if name == "silicon" or name.removeprefix("start.") in NAMES]
    return both.drop(columns=columns), both.loc[both["skipped"] == "", ["id", *columns]].reset_index(drop=True)


def row_slopes(rows: pd.DataFrame, processes: int = 1) -> pd.DataFrame:
    """Return the slopes of published rows, one line per row that can be predicted; parameters as for `predictions`."""
    return predictions(rows, processes)[1]


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
