"""Predictions against published training runs: an error table, without fitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from simulator.closed_forms import estimate
from simulator.errors import ProfileError, SimulatorError
from simulator.scenario.scenario import Scenario
from simulator.validation.row import Row
from simulator.validation.row_cluster import cluster_of
from simulator.validation.row_model import model_of
from simulator.validation.row_plan import job_of, plan_of

_DATA = Path(__file__).parent / "data"
_FILES = ("training_runs.csv", "training_runs_vtrain_single.csv")
_COLUMNS = [
    "id", "source", "model", "accelerator", "arch", "complete",
    "measured_s", "predicted_s", "relative_error", "assumptions", "skipped",
]  # fmt: skip
_ERRORS = ["rows", "mean_absolute_error", "median_absolute_error", "bias", "worst"]
#: what `summary` writes in place of a source on its last line
MACRO = "macro average over model x accelerator"


def published_runs() -> pd.DataFrame:
    """Return every published training run as the source prints it.

    Returns
    -------
    DataFrame
        One row per measurement. Cells are text, blank where the source prints nothing; `file` says which file holds the
        row. The columns are described in the README beside the files.
    """
    tables = [pd.read_csv(_DATA / name, dtype=str, keep_default_na=False).assign(file=name) for name in _FILES]
    return pd.concat(tables, ignore_index=True)


def scenario_from_row(row: Mapping[str, Any]) -> tuple[Scenario, tuple[str, ...]]:
    """Return the scenario of one published run and what had to be assumed for it.

    Parameters
    ----------
    row : mapping
        A row of `published_runs`: a dict or a Series.

    Returns
    -------
    scenario : Scenario
        One optimizer step of the run. Its price is 0 $/h: money plays no part here.
    assumptions : tuple of str
        What the source does not print, with the value taken, and ``not modelled: ...`` for what it prints and the
        simulator has no operation for.

    Raises
    ------
    ProfileError
        When the run is out of reach, with a short reason that rows can be counted by.
    """
    cells = Row(row)
    cluster = cluster_of(cells)
    model = model_of(cells)
    scenario = Scenario(model=model, cluster=cluster, plan=plan_of(cells, model), job=job_of(cells))
    return scenario, tuple(cells.assumptions)


def measured_step_s(row: Mapping[str, Any]) -> float:
    """Return the measured time of one optimizer step, seconds.

    Notes
    -----
    The derived column when it is filled, the printed step time, or from tokens/s per accelerator::

        step = global batch * sequence length / (tokens/s/accelerator * accelerators)

    Raises
    ------
    ProfileError
        When none of the three is printed.
    """
    cells = Row(row)
    value, metric = cells.text("value"), cells.text("metric")
    try:
        if cells.text("step_time_s_derived"):
            found = float(cells.text("step_time_s_derived"))
        elif metric == "step_time_s":
            found = float(value)
        elif metric == "tokens_per_s_per_gpu":
            found = cells.need("gbs") * cells.need("seq_len") / (float(value) * cells.need("gpus"))
        else:
            raise ProfileError(f"no step time follows from {metric or 'an empty metric'}")
    except (ValueError, ZeroDivisionError):
        raise ProfileError(f"{metric} = {value!r} is not a number") from None
    if not 0 < found < float("inf"):
        raise ProfileError(f"step time {found} s is not positive")
    return found


def validate(
    predict: Callable[[Scenario], float] = estimate,
    rows: pd.DataFrame | None = None,
    complete_only: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Return predicted against measured step times of published runs, one line per run.

    Parameters
    ----------
    predict : callable
        Returns the seconds of one step of a scenario; the closed-form estimate by default.
    rows : DataFrame, optional
        Rows in the columns of `published_runs`; all of them when left out.
    complete_only : bool
        Keep only rows whose source prints every field (``complete = yes``).
    progress : callable, optional
        Called with rows done and rows in all.

    Returns
    -------
    DataFrame
        ``measured_s``, ``predicted_s``, ``relative_error = predicted / measured - 1``, the assumptions joined by ``"; "``,
        and in ``skipped`` the reason why a row has no prediction, else an empty text. A row that cannot be read or
        predicted is skipped, never raised.
    """
    rows = published_runs() if rows is None else rows
    if complete_only:
        rows = rows[rows["complete"] == "yes"]
    lines = []
    for done, row in enumerate(rows.to_dict("records"), start=1):
        lines.append(_line(predict, row))
        if progress is not None:
            progress(done, len(rows))
    return pd.DataFrame(lines, columns=_COLUMNS)


def _line(predict: Callable[[Scenario], float], row: dict[str, Any]) -> dict[str, Any]:
    cells = Row(row)
    line: dict[str, Any] = {c: cells.text(c) for c in ("id", "source", "model", "arch", "complete")}
    line |= dict.fromkeys(("measured_s", "predicted_s", "relative_error"), float("nan"))
    line |= {"accelerator": cells.text("gpu"), "assumptions": "", "skipped": ""}
    try:
        line["measured_s"] = measured_step_s(row)
        scenario, assumptions = scenario_from_row(row)
        line |= {"accelerator": scenario.cluster.accelerator.name, "assumptions": "; ".join(assumptions)}
        predicted = float(predict(scenario))
        if not 0 < predicted < float("inf"):
            raise ProfileError(f"predicted {predicted} s")
        line |= {"predicted_s": predicted, "relative_error": predicted / line["measured_s"] - 1}
    except SimulatorError as error:
        line["skipped"] = " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001 - one bad row among two thousand must not cost the table
        line["skipped"] = f"{type(error).__name__}: {error}"
    return line


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the errors of a `validate` table by source, accelerator and architecture, and their macro average.

    Parameters
    ----------
    table : DataFrame
        As `validate` returns it; skipped rows are counted and otherwise left out.

    Returns
    -------
    DataFrame
        Per source x accelerator x arch: ``rows`` predicted, ``skipped``, mean and median of the absolute relative error,
        ``bias`` (mean of the signed one) and ``worst`` (the signed one that is largest in size). The last line, named
        `MACRO`, averages mean, median and bias over the groups of equal model and accelerator, so that a source with
        many rows does not speak louder than one with few; its ``worst`` is that of the whole table.
    """
    keys = ["source", "accelerator", "arch"]
    kept = table[table["skipped"] == ""]
    by_key = kept.groupby(keys, sort=True)["relative_error"]
    result = pd.DataFrame([dict(zip(keys, key, strict=True)) | _errors(group) for key, group in by_key], columns=[*keys, *_ERRORS])
    skipped = table[table["skipped"] != ""].groupby(keys).size().rename("skipped").reset_index()
    result = result.merge(skipped, on=keys, how="outer").sort_values(keys, ignore_index=True)
    result[["rows", "skipped"]] = result[["rows", "skipped"]].fillna(0).astype(int)
    groups = pd.DataFrame([_errors(g) for _, g in kept.groupby(["model", "accelerator"])["relative_error"]], columns=_ERRORS)
    macro = {"source": MACRO, "accelerator": "", "arch": "", "rows": len(kept), "skipped": len(table) - len(kept)}
    macro |= groups[_ERRORS[1:4]].mean().to_dict() | {"worst": _errors(kept["relative_error"])["worst"] if len(kept) else float("nan")}
    return pd.concat([result, pd.DataFrame([macro])], ignore_index=True)[[*keys, "rows", "skipped", *_ERRORS[1:]]]


def _errors(relative: pd.Series) -> dict[str, float]:
    size = relative.abs()
    return {
        "rows": len(relative),
        "mean_absolute_error": size.mean(),
        "median_absolute_error": size.median(),
        "bias": relative.mean(),
        "worst": relative.loc[size.idxmax()],
    }
