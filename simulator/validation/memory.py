"""Predicted against measured peaks of device memory, and what fits against what ran out of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simulator.errors import ProfileError, SimulatorError
from simulator.feasibility import memory
from simulator.validation.published import published_runs
from simulator.validation.row import Row
from simulator.validation.row_memory import memory_scenario, metric_of
from simulator.workload.memory import METRICS

_DATA = Path(__file__).parent / "data" / "memory.csv"
GIB = 2.0**30
#: parts that a source calls the state of the training
STATES = ("weights", "gradients", "optimizer")
_COLUMNS = [
    "id", "source", "model", "arch", "complete", "metric", "measured_bytes", "predicted_bytes", "relative_error",
    "fits_measured", "fits_predicted", "needed_bytes", "capacity_bytes", "assumptions", "skipped",
]  # fmt: skip
#: distance from capacity, as a share of it, within which fitting is a matter of chance
NEAR = 0.1


def published_memory() -> pd.DataFrame:
    """Return every published peak of memory and every published failure, as the source prints it.

    Returns
    -------
    DataFrame
        One row per measurement, cells are text; ``value_GiB`` is blank where the run did not fit. The columns are described
        in the README beside the file.
    """
    return pd.read_csv(_DATA, dtype=str, keep_default_na=False)


def timed_runs() -> pd.DataFrame:
    """Return the published training runs that are complete and no memory row names: they ran, so they fitted."""
    runs = published_runs()
    known = set(published_memory()["training_run_id"])
    return runs[(runs["complete"] == "yes") & ~runs["id"].isin(known)].assign(metric="timed run", outcome="fits", value_GiB="")


def validate_memory(rows: pd.DataFrame | None = None, progress: Callable[[int, int], None] | None = None) -> pd.DataFrame:
    """Return predicted against measured memory, one line per row.

    Parameters
    ----------
    rows : DataFrame, optional
        Rows in the columns of `published_memory`; when left out all of them, and the `timed_runs`.
    progress : callable, optional
        Called with rows done and rows in all.

    Returns
    -------
    DataFrame
        ``measured_bytes`` and ``predicted_bytes`` as the `metric` counts them (see `simulator.workload.memory.METRICS`),
        ``relative_error = predicted / measured - 1``; ``needed_bytes`` that the device shows on the fullest stage, its
        ``capacity_bytes``, ``fits_measured`` (None where the row says nothing about a device) and ``fits_predicted``; the
        assumptions, and why a row was ``skipped``.
    """
    runs = {row["id"]: row for row in published_runs().to_dict("records")}
    if rows is None:
        rows = pd.concat([published_memory(), timed_runs()], ignore_index=True).fillna("")
    lines = []
    for done, row in enumerate(rows.to_dict("records"), start=1):
        lines.append(_line(row, runs))
        if progress is not None:
            progress(done, len(rows))
    return pd.DataFrame(lines, columns=_COLUMNS)


def _line(row: dict[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cells = Row(row)
    line: dict[str, Any] = {c: cells.text(c) for c in ("id", "source", "model", "arch", "complete", "metric")}
    line |= dict.fromkeys(("measured_bytes", "predicted_bytes", "relative_error", "needed_bytes", "capacity_bytes"), float("nan"))
    line |= {"fits_measured": None, "fits_predicted": None, "assumptions": "", "skipped": ""}
    try:
        scenario, assumptions = memory_scenario(row, runs)
        parts = memory(scenario)
        needed, capacity = float(parts["total"].max()), scenario.cluster.accelerator.hbm_bytes
        line |= {"needed_bytes": needed, "capacity_bytes": capacity, "assumptions": "; ".join(assumptions)}
        line["fits_predicted"] = needed <= capacity
        line["fits_measured"] = _fitted(cells)
        if cells.text("value_GiB"):
            line |= {"metric": metric_of(cells.text("metric")), "measured_bytes": _measured(cells)}
            line["predicted_bytes"] = _counted(parts, line["metric"])
            line["relative_error"] = line["predicted_bytes"] / line["measured_bytes"] - 1
    except SimulatorError as error:
        line["skipped"] = " ".join(str(error).split())
    return line


def _fitted(cells: Row) -> bool | None:
    """Return whether the run fitted, None where the figures are a calculation."""
    if cells.has("analytical", "notes"):
        return None
    return {"fits": True, "OOM": False}.get(cells.text("outcome"))


def _measured(cells: Row) -> float:
    text = cells.text("value_GiB")
    try:
        value = float(text)
    except ValueError:
        raise ProfileError(f"value_GiB = {text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise ProfileError(f"value_GiB = {text} is not positive")
    return value * GIB


def _counted(parts: Mapping[str, np.ndarray], metric: str) -> float:
    """Return bytes as `metric` counts them: on the fullest rank; states on a middle one, activations on the first."""
    if metric == "activations":
        return float(parts["activations"][0])
    if metric in ("states", "optimizer"):
        return float(np.median(sum(parts[name] for name in (STATES if metric == "states" else ("optimizer",)))))
    return float(np.max(sum(parts[name] for name in METRICS[metric])))


def memory_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the errors of a `validate_memory` table by source, complete rows and others apart, MoE models alone, and all.

    Returns
    -------
    DataFrame
        ``peaks`` measured, mean and median of their absolute relative error, ``bias`` and ``worst`` (signed); runs that
        ``fits`` and ``fails``, the shares of both that are predicted right, their mean ``balanced_accuracy`` (of one where
        the other does not occur), the same ``outside`` of `NEAR` around capacity, and rows ``skipped``.
    """
    groups = [(source, group) for source, group in table.groupby("source", sort=True)]
    complete = table["complete"] == "yes"
    groups += [("complete rows", table[complete]), ("other rows", table[~complete]), ("MoE models", table[table["arch"] == "moe"])]
    groups += [("all rows", table)]
    return pd.DataFrame([{"source": name} | _scores(group) for name, group in groups])


def _scores(group: pd.DataFrame) -> dict[str, Any]:
    kept = group[group["skipped"] == ""]
    error = kept["relative_error"].dropna()
    outcome = kept[kept["fits_measured"].notna()]
    outside = outcome[(outcome["needed_bytes"] / outcome["capacity_bytes"] - 1).abs() > NEAR]
    size = error.abs()
    return {
        "peaks": len(error),
        "mean_absolute_error": size.mean(),
        "median_absolute_error": size.median(),
        "bias": error.mean(),
        "worst": error.loc[size.idxmax()] if len(error) else float("nan"),
        **_balanced(outcome, ""),
        **_balanced(outside, "_outside"),
        "skipped": len(group) - len(kept),
    }


def _balanced(outcome: pd.DataFrame, suffix: str) -> dict[str, Any]:
    right = outcome["fits_predicted"] == outcome["fits_measured"]
    fits = outcome["fits_measured"].astype(bool)
    shares = [right[which].mean() for which in (fits, ~fits)]
    known = [share for share in shares if share == share]
    return {
        f"fits{suffix}": int(fits.sum()),
        f"fails{suffix}": int((~fits).sum()),
        f"fits_right{suffix}": shares[0],
        f"fails_right{suffix}": shares[1],
        f"balanced_accuracy{suffix}": float(np.mean(known)) if known else float("nan"),
    }
