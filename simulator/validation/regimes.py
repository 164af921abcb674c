"""Scores of predictions in three regimes: cold, anchored and relative, beside the replicate floor and a baseline.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

#: the regimes, in the order in which they are shown
REGIMES = ("cold", "anchored", "relative")
#: what a row is scored in: how many rows decide nothing, how many models and accelerators do
GROUP = ["family", "accelerator"]
_FACTOR = ["release", "accelerator"]


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Return the predicted rows of a `predictions` table with what each regime makes of them.

    Parameters
    ----------
    table : DataFrame
        As `simulator.validation.published.validate` returns it. ``relative_error`` in it is already that of parameters
        which rows of the same model and accelerator did not shape; ``anchor``, where it has one, is what the other models of
        the release come out at by the same parameters (`simulator.validation.parameters.cold`).

    Returns
    -------
    DataFrame
        The rows without ``skipped``, and ``residual`` = ln(predicted / measured), ``factor`` of the release (NaN where
        no other model of the release ran on the accelerator), ``anchored_s``, ``anchored_error``, ``baseline_s``,
        ``baseline_anchored_s``, ``weight`` = 1 / rows of its (family, accelerator).

    Notes
    -----
    The factor is what the *other* models of the release on the accelerator have in common (`common_part`), each by the median of
    its residuals, so that neither the row's model nor a big sweep decides it. It multiplies the prediction.
    """
    kept = table[table["skipped"] == ""].reset_index(drop=True)
    kept["residual"] = np.log(kept["predicted_s"] / kept["measured_s"])
    anchor = others(kept, kept["residual"], of=common_part)
    kept["factor"] = np.exp(-(kept["anchor"].fillna(anchor) if "anchor" in kept else anchor))
    kept["anchored_s"] = kept["predicted_s"] * kept["factor"]
    kept["anchored_error"] = kept["anchored_s"] / kept["measured_s"] - 1
    kept["baseline_s"] = _baseline(kept)
    rest = np.log(kept["baseline_s"] / kept["measured_s"])
    kept["baseline_anchored_s"] = kept["baseline_s"] * np.exp(-others(kept, rest))
    return kept


def others(
    table: pd.DataFrame, residual: pd.Series, keys: list[str] | None = None, of: Callable[[np.ndarray], float] = np.median
) -> pd.Series:
    """Return, for each row, what the other families' median residuals among rows of equal `keys` have in common.

    Parameters
    ----------
    table : DataFrame
        With ``family`` and the keys.
    residual : Series
        By row of `table`.
    keys : list of str
        Columns that rows must share: release and accelerator by default.
    of : callable
        From the other families' medians to one number.

    Returns
    -------
    Series
        NaN where no other family shares the keys.
    """
    keys = _FACTOR if keys is None else keys
    frame = table[[*keys, "family"]].assign(residual=residual)
    medians = frame.groupby([*keys, "family"])["residual"].median().reset_index()
    found: dict[tuple, float] = {}
    for _, group in medians.groupby(keys):
        for own in group.itertuples(index=False):
            rest = group.loc[group["family"] != own.family, "residual"].to_numpy()
            found[tuple(own[:-1])] = float(of(rest)) if len(rest) else np.nan
    return pd.Series([found[key] for key in frame[[*keys, "family"]].itertuples(index=False, name=None)], index=table.index)


def common_part(residuals: np.ndarray) -> float:
    """Return the logarithm of the factor that a release puts on its models: the median of theirs and of 0, what is known without.

    Parameters
    ----------
    residuals : ndarray of shape (models,)
        ln(predicted / measured), one per model.

    Notes
    -----
    One model says as much about itself as about its release, and half of what it says is believed; of two that disagree, the one
    nearer to 0 is, so that a model which a release had not been tuned for does not stand for the others; three or more decide.
    """
    return float(np.median(np.append(residuals, 0.0)))


def _baseline(kept: pd.DataFrame) -> pd.Series:
    """Return the seconds at one model FLOP rate per accelerator and precision, fitted on the other models.

    Notes
    -----
    Constant MFU: ``step = model FLOP per accelerator / rate``. Where no other model ran on the accelerator in the precision,
    the rate is that of the precision on any accelerator, as a share of the peak, then that of all rows.
    """
    share = np.log(kept["flop"] / kept["measured_s"] / kept["peak_flop_per_s"])
    rate = others(kept, share, ["accelerator", "precision"])
    for keys in (["precision"], ["skipped"]):
        rate = rate.fillna(others(kept, share, keys))
    return kept["flop"] / (kept["peak_flop_per_s"] * np.exp(rate))


def macro(values: pd.Series, groups: pd.DataFrame, of: Callable[[pd.Series], float]) -> float:
    """Return the mean over (family, accelerator) of `of` within each, so that no sweep drowns the rest."""
    return float(values.groupby([groups[k] for k in GROUP]).agg(of).mean()) if len(values) else float("nan")


def errors(error: pd.Series, rows: pd.DataFrame) -> dict[str, float]:
    """Return the count of rows and groups, and the macro averages of mean, median and bias.

    Parameters
    ----------
    error : Series
        Relative errors, signed; NaN is left out and not counted.
    rows : DataFrame
        With the columns of `GROUP`.
    """
    error = error.dropna()
    rows = rows.loc[error.index]
    return {
        "rows": len(error),
        "groups": rows.groupby(GROUP).ngroups,
        "mean": macro(error.abs(), rows, lambda e: e.mean()),
        "median": macro(error.abs(), rows, lambda e: e.median()),
        "bias": macro(error, rows, lambda e: e.mean()),
    }


def pairs(rows: pd.DataFrame, keys: list[str] | None = None) -> pd.DataFrame:
    """Return all pairs of rows that share `keys` (by default the release): positions ``i`` < ``j`` and what sets them apart.

    Returns
    -------
    DataFrame
        ``i``, ``j``; ``error`` = how far the predicted ratio of the two is from the measured one, ``|ln|``; ``baseline_error``
        likewise; ``measured`` = how far apart the measurements themselves are, ``|ln|``.

    Notes
    -----
    Both rows of a pair are predicted by the same parameters, fitted without the groups of either: to first order in the logarithms
    those move by the sum of what each group's absence moves (`simulator.validation.parameters.cold`), so that the residual of a row,
    which its own group's absence already shaped, moves by ``slopes . moved`` of the other's. Rows of different silicon have no
    parameter in common, and rows of one group are left out together already.
    """
    keys = ["release"] if keys is None else keys
    columns: dict[str, list[np.ndarray]] = {c: [] for c in ("i", "j", "error", "baseline_error", "measured")}
    apart, measured = _apart(rows), np.log(rows["measured_s"].to_numpy())
    baseline = np.log(rows["baseline_s"].to_numpy()) - measured
    for place in rows.reset_index(drop=True).groupby(keys).indices.values():
        i, j = (place[k] for k in np.triu_indices(len(place), 1))
        columns["i"].append(i)
        columns["j"].append(j)
        columns["error"].append(np.abs(apart(i, j)))
        columns["baseline_error"].append(np.abs(baseline[i] - baseline[j]))
        columns["measured"].append(np.abs(measured[i] - measured[j]))
    return pd.DataFrame({name: np.concatenate(parts) if parts else np.empty(0) for name, parts in columns.items()})


def _apart(rows: pd.DataFrame) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return the function of positions ``(i, j)`` that gives ``ln`` of the predicted over the measured ratio of two rows."""
    residual = rows["residual"].to_numpy()
    slope, moved = (rows[[c for c in rows.columns if c.startswith(start)]].to_numpy(dtype=float) for start in ("slope.", "moved."))
    group = rows.groupby(GROUP).ngroup().to_numpy()
    silicon = rows["silicon"].to_numpy() if "silicon" in rows else np.zeros(len(rows))

    def apart(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        shared = (group[i] != group[j]) & (silicon[i] == silicon[j])
        return residual[i] - residual[j] + shared * ((slope[i] * moved[j]).sum(axis=1) - (slope[j] * moved[i]).sum(axis=1))

    return apart


def kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the relative errors of complete rows by what the two rows of a pair share beside the release.

    Returns
    -------
    DataFrame
        ``arch``, ``shared`` (the pairs: all, or those of the same model, accelerator, both or neither), ``pairs``, and ``rows``,
        ``groups``, ``mean``, ``median`` as `regimes` has them: of the pairs of a group, then averaged over groups;
        ``pooled_median`` counts every pair once.
    """
    lines = []
    for arch in ("moe", "dense"):
        some = rows[(rows["complete"] == "yes") & (rows["arch"] == arch)].reset_index(drop=True)
        found = pairs(some)
        model, accelerator = ((some[k].to_numpy()[found["i"]] == some[k].to_numpy()[found["j"]]) for k in GROUP)
        chosen = {
            "release": np.ones(len(found), dtype=bool),
            "model and accelerator": model & accelerator,
            "accelerator": ~model & accelerator,
        }
        chosen |= {"model": model & ~accelerator, "neither": ~model & ~accelerator}
        for shared, which in chosen.items():
            of = found[which]
            said = {"arch": arch, "shared": shared, "pairs": len(of), "pooled_median": float(of["error"].median())}
            lines.append(said | _relative(some, "error", of))
    return pd.DataFrame(lines)


def _relative(rows: pd.DataFrame, column: str, found: pd.DataFrame) -> dict[str, float]:
    """Return the errors of pairs; a pair counts for the groups of both rows."""
    both = pd.concat([found[["i", column]].set_axis(["row", "error"], axis=1), found[["j", column]].set_axis(["row", "error"], axis=1)])
    if both.empty:
        return {"rows": 0, "groups": 0, "mean": np.nan, "median": np.nan, "bias": np.nan}
    groups = rows[GROUP].iloc[both["row"].to_numpy()].reset_index(drop=True)
    counted = errors(both["error"].reset_index(drop=True), groups)
    return counted | {"rows": both["row"].nunique(), "bias": np.nan}


def floor(rows: pd.DataFrame, keys: list[str]) -> tuple[float, float]:
    """Return the median and the 90th percentile of ``|ln|`` between repeated measurements: rows of equal `keys`."""
    spread = pairs(rows, keys)["measured"]
    return (float(spread.median()), float(spread.quantile(0.9))) if len(spread) else (np.nan, np.nan)


def regimes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the errors in the three regimes, for MoE and dense, for complete rows and for the others.

    Parameters
    ----------
    rows : DataFrame
        As `scored` returns it.

    Returns
    -------
    DataFrame
        One row per regime x completeness x architecture: ``rows``, ``groups`` (family x accelerator), macro averages of
        ``mean``, ``median`` and ``bias``; the same of the baseline; ``floor_median`` and ``floor_p90``: how far apart repeated
        measurements are, for the cold regime over all software, for the others with equal options within a release.
    """
    lines = []
    for complete in ("yes", "partial"):
        for arch in ("moe", "dense"):
            some = rows[(rows["complete"] == complete) & (rows["arch"] == arch)].reset_index(drop=True)
            lines += [{"regime": regime, "complete": complete, "arch": arch} | _one(some, regime) for regime in REGIMES]
    return pd.DataFrame(lines)


def _one(some: pd.DataFrame, regime: str) -> dict[str, float]:
    if regime == "relative":
        found = pairs(some)
        own, base = _relative(some, "error", found), _relative(some, "baseline_error", found)
    else:
        error, baseline = ("relative_error", "baseline_s") if regime == "cold" else ("anchored_error", "baseline_anchored_s")
        own, base = errors(some[error], some), errors(some[baseline] / some["measured_s"] - 1, some)
    spread = floor(some, ["configuration"] if regime == "cold" else ["configuration", "options", "release"])
    named = {f"baseline_{k}": base[k] for k in ("mean", "median", "bias")}
    return own | named | dict(zip(("floor_median", "floor_p90"), spread, strict=True))
