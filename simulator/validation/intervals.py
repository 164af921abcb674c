"""The residual table behind the 80 % intervals: made from a scored table, calibrated and judged with groups left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from simulator.files import write_atomically
from simulator.results.confidence import COVERAGE, RESIDUALS, SCALES, WORDS, quantiles

_REGIMES = ("cold", "anchored")


def residual_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the residual table of a `scored` table: keys, features, and ln(measured / predicted) cold and anchored."""
    table = rows[["id", "source", "model"]].assign(group=rows["family"] + " on " + rows["accelerator"])
    table[[*SCALES, *WORDS]] = rows[[*SCALES, *WORDS]]
    return table.assign(cold=-rows["residual"], anchored=-np.log(rows["anchored_s"] / rows["measured_s"]))


def calibrated(table: pd.DataFrame, regime: str) -> float:
    """Return the central share of weighted residuals that holds 80 % of the rows whose group is left out.

    Notes
    -----
    Rows and groups count half each: the mean of the coverage over rows and of its macro average over groups.
    """

    levels = np.arange(0.3, 0.9996, 0.001)
    ends = quantiles(table, table, regime, levels, leave_out=True)
    held = [sum(coverage(table, regime, ends[:, :, i])) / 2 for i in range(len(levels))]
    return float(levels[np.argmin(np.abs(np.array(held) - COVERAGE))])


def coverage(table: pd.DataFrame, regime: str, ends: np.ndarray) -> tuple[float, float]:
    """Return the share of rows inside their interval, and its mean over groups."""
    known = ~np.isnan(ends[:, 0]) & table[regime].notna().to_numpy()
    inside = pd.Series((table[regime] >= ends[:, 0]) & (table[regime] <= ends[:, 1]))[known]
    return float(inside.mean()), float(inside.groupby(table["group"][known]).mean().mean())


def write(table: pd.DataFrame, path: Path = RESIDUALS) -> dict[str, float]:
    """Calibrate the levels and write the table, whole or not at all; return the levels."""
    levels = {regime: round(calibrated(table, regime), 3) for regime in _REGIMES}
    head = "#" + " ".join(f"{regime}={level}" for regime, level in levels.items()) + "\n"
    write_atomically(path, lambda f: f.write(head + table.to_csv(index=False, float_format="%.7g", lineterminator="\n")))
    return levels


def judged(table: pd.DataFrame, ends: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return how intervals do, per regime.

    Parameters
    ----------
    table : DataFrame
        As `residual_table` returns it.
    ends : mapping
        By regime, the interval of ln(measured / predicted) of each row, shape (N, 2).

    Returns
    -------
    DataFrame
        ``regime``, ``rows``, ``coverage`` of rows and ``coverage_macro`` over groups; ``half_width``, the median over rows of half
        of high over low, less 1; ``score``, the mean interval score of ln(measured / predicted), and ``constant_score``,
        that of the constant interval, of any width around any centre, that would have been best on these very rows.

    References
    ----------
    Gneiting, Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007, equation 43.
    """
    lines = []
    for regime in ends:
        known = ~np.isnan(ends[regime][:, 0]) & table[regime].notna().to_numpy()
        if not known.any():
            continue
        row, group = coverage(table, regime, ends[regime])
        value, low, high = table[regime].to_numpy(dtype=float)[known], *ends[regime][known].T
        constant = score(value, *np.quantile(value, (0.1, 0.9))).mean()  # no constant interval scores better on these rows
        lines.append(
            {
                "regime": regime,
                "rows": int(known.sum()),
                "coverage": row,
                "coverage_macro": group,
                "half_width": float(np.median(np.expm1((high - low) / 2))),
                "score": float(score(value, low, high).mean()),
                "constant_score": float(constant),
            }
        )
    columns = ["regime", "rows", "coverage", "coverage_macro", "half_width", "score", "constant_score"]
    return pd.DataFrame(lines, columns=columns)


def score(value: np.ndarray, low: np.ndarray | float, high: np.ndarray | float) -> np.ndarray:
    """Return the interval score: the width, and ``2 / alpha`` times the distance of a value outside."""
    alpha = 1 - COVERAGE
    return np.asarray(high - low + 2 / alpha * (np.maximum(low - value, 0) + np.maximum(value - high, 0)))
