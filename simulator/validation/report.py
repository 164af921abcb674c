"""Everything that ``myriad validate`` says: predictions of all rows, scored, with their intervals and the worst of them explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from simulator.results.confidence import quantiles, residuals
from simulator.simulate import simulate_step
from simulator.validation.choosing import choosing, sweeps
from simulator.validation.collectives import summarise_collectives, validate_collectives
from simulator.validation.intervals import judged, residual_table, write
from simulator.validation.memory import memory_summary, published_memory, validate_memory
from simulator.validation.parameters import cold, predictions
from simulator.validation.peers import peers, plausible
from simulator.validation.published import published_runs, roomy, scenario_from_row, validate
from simulator.validation.regimes import GROUP, errors, floor, kinds, regimes, scored
from simulator.validation.scaling import slopes

#: what rows are told apart by, beside source and accelerator: name -> value of a row
_PARALLEL: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "tensor parallel": lambda r: r["tp"] > 1,
    "pipeline parallel": lambda r: r["pp"] > 1,
    "context parallel": lambda r: r["cp"] > 1,
    "expert parallel": lambda r: r["ep"] > 1,
    "sharded parameters": lambda r: r["sharding"] == "parameters",
}
#: columns of a row in JSON
_JSON = ("id", "source", "complete", "measured_s", "predicted_s", "relative_error", "anchored_s", "skipped")


@dataclass(frozen=True)
class Report:
    """Predictions against measurements.

    Parameters
    ----------
    table : DataFrame
        As `simulator.validation.published.validate` returns it, published rows and a user's own.
    levels : mapping
        Levels of the interval quantiles, by regime.
    own : bool
        Whether the rows are a user's: their intervals come from the shipped residuals, and not from each other's.
    memory : DataFrame
        As `simulator.validation.memory.validate_memory` returns it.
    collectives : DataFrame
        As `simulator.validation.collectives.validate_collectives` returns it.
    """

    table: pd.DataFrame
    levels: Mapping[str, float]
    own: bool = False
    memory: pd.DataFrame = field(default_factory=lambda: validate_memory(published_memory().head(0)))
    collectives: pd.DataFrame = field(default_factory=pd.DataFrame)

    @cached_property
    def _ends(self) -> dict[str, np.ndarray]:
        """The 80 % intervals of ln(measured / predicted), by regime, shape (rows, 2)."""
        asked = residual_table(self._scored)
        known = residuals()[0] if self.own else asked
        return {regime: quantiles(asked, known, regime, self.levels[regime], leave_out=not self.own) for regime in ("cold", "anchored")}

    @cached_property
    def _scored(self) -> pd.DataFrame:
        return scored(self.table)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The predicted rows, scored, with the 80 % interval of the cold prediction: ``low_s``, ``high_s``."""
        rows = self._scored.copy()
        rows[["low_s", "high_s"]] = rows[["predicted_s"]].to_numpy() * np.exp(self._ends["cold"])
        return rows

    @cached_property
    def regimes(self) -> pd.DataFrame:
        """Errors cold, anchored and relative."""
        return regimes(self.rows)

    @cached_property
    def kinds(self) -> pd.DataFrame:
        """Relative errors by what the rows of a pair share."""
        return kinds(self.rows)

    @cached_property
    def floor(self) -> tuple[float, float]:
        """Median and 90th percentile of how far repeated measurements of a configuration are apart, over all software."""
        return floor(self.rows, ["configuration"])

    @cached_property
    def by_feature(self) -> pd.DataFrame:
        """Errors of complete rows by source, accelerator, architecture, precision, recompute and parallel axes."""
        rows = self.rows[self.rows["complete"] == "yes"]
        lines = []
        for feature in ("source", "accelerator", "arch", "precision", "recompute", *_PARALLEL):
            values = _PARALLEL[feature](rows).map({True: "yes", False: "no"}) if feature in _PARALLEL else rows[feature]
            for value, group in rows.groupby(values):
                cold, anchored = errors(group["relative_error"], group), errors(group["anchored_error"], group)
                worst = group.loc[group["relative_error"].abs().idxmax()]
                lines.append(
                    {"feature": feature, "value": value}
                    | {k: cold[k] for k in ("rows", "groups", "mean", "median", "bias")}
                    | {"anchored_mean": anchored["mean"], "worst": worst["relative_error"], "worst_row": worst["id"]}
                )
        return pd.DataFrame(lines)

    @cached_property
    def choosing(self) -> pd.DataFrame:
        """Rank correlation and regret over the sweeps of layouts, for each source that has them and for all."""
        sources = self.rows.groupby("source")
        parts = [(name, rows) for name, rows in sources if len(sweeps(rows))]
        return pd.DataFrame([{"source": name} | choosing(rows) for name, rows in [*parts, ("all", self.rows)]])

    @cached_property
    def slopes(self) -> pd.DataFrame:
        """Slope of the error per doubling of the accelerators."""
        return slopes(self.rows)

    @cached_property
    def peers(self) -> pd.DataFrame:
        """Errors on the rows that other simulators published theirs on."""
        return peers(self.rows)

    @cached_property
    def plausible(self) -> pd.DataFrame:
        """Errors of the published rows that leave something out, for every plausible value of it."""
        return plausible(published_runs())

    @cached_property
    def intervals(self) -> pd.DataFrame:
        """Coverage, width and score of the 80 % intervals on left-out rows."""
        return judged(residual_table(self._scored), self._ends)

    @cached_property
    def skipped(self) -> pd.Series:
        """Why rows have no prediction, and how many."""
        return self.table.loc[self.table["skipped"] != "", "skipped"].value_counts()

    def worst(self, count: int) -> pd.DataFrame:
        """Return the worst complete rows, one for each model, accelerator and source.

        Returns
        -------
        DataFrame
            ``id``, ``source``, ``model``, ``accelerator``, ``measured_s``, ``predicted_s``, ``relative_error``,
            ``anchored_error``, ``assumptions``; by the size of ln(predicted / measured), so that 2 and 1/2 are as bad.
        """
        rows = self.rows[self.rows["complete"] == "yes"]
        ordered = rows.reindex(rows["residual"].abs().sort_values(ascending=False, kind="stable").index)
        ordered = ordered.drop_duplicates([*GROUP, "source"])
        columns = ["id", "source", "model", "accelerator", "measured_s", "predicted_s", "relative_error", "anchored_error", "assumptions"]
        return ordered[columns].head(count).reset_index(drop=True)

    def json(self) -> dict[str, Any]:
        """Return the report as JSON-ready data: ``summary`` of tables and ``rows``."""
        summary = {
            "regimes": _records(self.regimes),
            "relative": _records(self.kinds),
            "repeated_measurements": _records(pd.DataFrame([self.floor], columns=["median", "p90"])),
            "by_feature": _records(self.by_feature),
            "choosing": _records(self.choosing),
            "scaling": _records(self.slopes),
            "peers": _records(self.peers),
            "intervals": _records(self.intervals),
            "memory": _records(memory_summary(self.memory)),
            "collectives": [] if self.collectives.empty else _records(summarise_collectives(self.collectives)),
        }
        ends = self.rows.set_index("id")[["low_s", "high_s", "anchored_s"]]
        rows = self.table.drop(columns="anchored_s", errors="ignore").join(ends, on="id")
        records = [
            {name: record[name] for name in _JSON}
            | {"interval_80_s": None if record["low_s"] is None else [record["low_s"], record["high_s"]]}
            | {"assumptions": record["assumptions"].split("; ") if record["assumptions"] else []}
            for record in _records(rows)
        ]
        return {"summary": summary, "rows": records, "memory_rows": _records(self.memory), "collective_rows": _records(self.collectives)}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as dicts, None where there is no number."""
    return [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()} for row in table.to_dict("records")]


def confront(
    own: Mapping[str, pd.DataFrame] | None = None,
    processes: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Return the report on the published rows, or on a user's own.

    Parameters
    ----------
    own : mapping, optional
        Rows of a user by kind, as `simulator.validation.user_rows.read_user_rows` returns them; a kind that is not there has
        no part in the report.
    processes : int
        As in `simulator.validation.published.validate`.
    progress : callable, optional
        Called with what is being done, rows done and rows in all.
    """
    tell = progress or (lambda stage, done, total: None)
    runs, peaks = (published_runs(), None) if own is None else (own.get("data"), own.get("memory"))
    runs = published_runs().head(0) if runs is None else runs
    if own is None:
        table = cold(*predictions(runs, processes, partial(tell, "step times")))
    else:  # rows that shaped nothing
        table = validate(rows=runs, complete_only=False, progress=partial(tell, "step times"), processes=processes)
    report = Report(table, residuals()[1], own=own is not None)
    if own is None or peaks is not None:
        report = replace(report, memory=validate_memory(peaks, partial(tell, "memory")))
    if own is None or "collectives" in own:
        report = replace(report, collectives=validate_collectives(own=own["collectives"] if own else None))
    return report


def refreshed(report: Report) -> Report:
    """Write the residual table that intervals come from, calibrated anew, and return the report with those intervals."""
    write(residual_table(report.rows))
    residuals.cache_clear()
    return replace(report, levels=residuals()[1])


def breakdown(row: Mapping[str, Any]) -> pd.DataFrame:
    """Return where the step of a published row goes, simulated, whether or not the model says that it fits in memory."""
    return simulate_step(roomy(scenario_from_row(row)[0])).breakdown()
