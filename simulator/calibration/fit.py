"""Fit costs to measured rows: relative weights, a robust loss, intervals, residuals kept. No torch.

Notes
-----
Times span four decades and disturbances only lengthen them, so an unweighted fit follows the largest and the slowest. Residuals
are differences of logarithms, their loss grows linearly beyond `SCALE` (soft L1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from simulator.calibration.machine import CalibrationError
from simulator.pricing.compute import measured_s
from simulator.pricing.operations import training_part
from simulator.scenario.measured import CollectiveCost, KernelCost
from simulator.units import format_quantity

#: relative difference beyond which a row counts less and less
SCALE = 0.05
#: quantile over probes of the time between kernels: on a GPU what is more is waiting for the host, a figure of its own
BETWEEN = {"cpu": 0.5, "cuda": 0.25}
#: two-sided 90 % of a normal distribution, in standard deviations
NINETY = 1.645


@dataclass(frozen=True)
class Fit:
    """One fitted cost.

    Parameters
    ----------
    name : str
        Kind of kernel, or collective, datatype and ranks.
    values : dict
        Parameters in SI units.
    low, high : dict
        Ends of their 90 % intervals; a parameter that the rows do not tell apart from nothing has none.
    rows : int
        Rows fitted.
    residual : float
        Root mean square of predicted over measured less one.
    """

    name: str
    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    rows: int
    residual: float

    def kernel(self) -> KernelCost:
        """Return the cost of a kernel."""
        return KernelCost.model_validate({k: format_quantity(v, k.removeprefix("launch_")) for k, v in self.values.items()})

    def collective(self) -> CollectiveCost:
        """Return the cost of a collective."""
        dimension = {"latency_s": "s", "knee_bytes": "bytes"}
        return CollectiveCost.model_validate({k: format_quantity(v, dimension.get(k, "bytes_per_s")) for k, v in self.values.items()})


def check_rows(rows: pd.DataFrame, where: str = "measurements") -> None:
    """Refuse a time that is no time.

    Raises
    ------
    CalibrationError
        Names the row: a NaN, an infinite, a zero or a negative time.
    """
    seconds = rows["seconds"].astype(float)
    # between kernels is a difference of two times, on a GPU of two runs
    wrong = rows[~(np.isfinite(seconds) & ((seconds > 0) | (rows["name"] == "between")))]
    if len(wrong):
        first = wrong.iloc[0]
        raise CalibrationError(
            f"{where}: row {wrong.index[0]} ({first['name']}, {first['case']}) took {first['seconds']} s; a time is finite and above zero. "
            "Remove the row or measure again"
        )


def _relative(matrix: np.ndarray, seconds: np.ndarray, calls: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return non-negative coefficients of ``matrix @ c = seconds``, their relative 90 % half-widths, and relative residuals.

    Each row is the mean of so many `calls`, and counts by the root of their number.
    """
    weight = np.sqrt(calls / calls.mean())
    scale = np.where(matrix.any(axis=0), matrix.max(axis=0), 1.0) / seconds.max()
    unit = matrix / scale
    if not np.isfinite(seconds).all() or (seconds <= 0).any():
        raise CalibrationError("a time that is not finite and above zero cannot be fitted")

    def off(logarithms: np.ndarray) -> np.ndarray:
        return weight * np.log(np.maximum(unit @ np.exp(logarithms), 1e-300) / seconds)

    start = np.full(matrix.shape[1], np.log(1.0 / matrix.shape[1]))
    found = least_squares(off, start, loss="soft_l1", f_scale=SCALE, bounds=(-30.0, 10.0))
    c = np.exp(found.x)
    residuals = weight * (unit @ c / seconds - 1)
    freedom = max(len(seconds) - len(c), 1)
    try:
        covariance = np.linalg.inv(found.jac.T @ found.jac) * float(residuals @ residuals) / freedom
        width = NINETY * np.sqrt(np.maximum(np.diag(covariance), 0.0))
    except np.linalg.LinAlgError:
        width = np.full(len(c), np.inf)
    return c / scale, width, residuals


def linear(name: str, columns: dict[str, np.ndarray], seconds: np.ndarray, calls: np.ndarray | None = None) -> Fit:
    """Return the fit of seconds to a sum of terms, each a column times a coefficient of at least zero.

    Parameters
    ----------
    columns : dict
        ``launch_s`` or ``latency_s``: the coefficient itself; a key that ends in ``_per_s``: its reciprocal. Terms that explain
        less than a thousandth of every row are left out.
    calls : ndarray, optional
        How many calls each row is the mean of; all alike by default.
    """
    calls = np.ones_like(seconds) if calls is None else calls
    columns = {key: values for key, values in columns.items() if np.any(values)}
    while True:
        matrix = np.column_stack(list(columns.values())).astype(float)
        c, width, residuals = _relative(matrix, seconds, calls)
        share = (matrix * c / seconds[:, None]).max(axis=0)
        if share.min() >= 1e-3 or len(columns) == 1:
            break
        columns.pop(list(columns)[int(share.argmin())])
    values, low, high = {}, {}, {}
    for key, coefficient, w in zip(columns, c, width, strict=True):
        inverse = key.endswith("_per_s")
        values[key] = float(1 / coefficient if inverse else coefficient)
        if w < 5:
            low[key], high[key] = (float(values[key] * np.exp(sign * w)) for sign in (-1, 1))
    return Fit(name, values, low, high, len(seconds), float(np.sqrt(np.mean(residuals**2))))


def _typical(rows: pd.DataFrame, time: str) -> pd.DataFrame:
    """Return one row per case and name: the lower quartile over turns of the medians over repeats.

    Short disturbances do not move a median; what spoils a whole turn only lengthens it.
    """
    grouped = rows.groupby(["name", "case", "ranks"], sort=False)
    table = grouped.agg(calls=("calls", "first"), flop=("flop", "first"), bytes=("bytes", "first"))
    return table.assign(seconds=grouped[time].quantile(0.25, interpolation="lower")).reset_index()


def clock(rows: pd.DataFrame, device: str) -> str:
    """Return the column that times kernels: on a CPU the thread's processor time, which other processes do not lengthen."""
    return "cpu_s" if device == "cpu" and (rows.loc[rows["part"] == "kernel", "cpu_s"] > 0).all() else "seconds"


def fit_kernels(rows: pd.DataFrame, device: str) -> dict[str, Fit]:
    """Return the cost of every kind of kernel, from the probes; the time between kernels is shared out over their calls."""
    check_rows(rows)
    time = clock(rows, device)
    probes = _typical(rows[rows["part"] == "kernel"], time)
    step, between = (probes[probes["name"] == name] for name in ("step", "between"))
    probes = probes[~probes["name"].isin(["step", "between"])]
    calls = between["case"].map(probes.groupby("case")["calls"].sum())
    gap = float(np.quantile(np.maximum(between["seconds"], 0.0) / calls, BETWEEN[device])) if len(step) else 0.0
    fits = {}
    for name, table in probes.groupby("name", sort=False):
        columns = {"launch_s": table["calls"], "flop_per_s": table["flop"], "bytes_per_s": table["bytes"]}
        fit = linear(str(name), {k: v.to_numpy(float) for k, v in columns.items()}, table["seconds"].to_numpy(float))
        fits[str(name)] = _later(fit, gap)
    return fits


def _later(fit: Fit, gap: float) -> Fit:
    return Fit(
        fit.name,
        {"launch_s": 0.0} | fit.values | {"launch_s": fit.values.get("launch_s", 0.0) + gap},
        fit.low,
        fit.high,
        fit.rows,
        fit.residual,
    )


def attention_curve(rows: pd.DataFrame, device: str) -> dict[str, KernelCost]:
    """Return the measured curve of attention over the keys per query, forward and backward."""
    found = {}
    table = _typical(rows[rows["part"] == "attention"], clock(rows, device))
    for name, part in table.groupby("name", sort=False):
        part = part.assign(keys=part["case"].astype(float)).sort_values("keys")
        rates = [format_quantity(rate, "flop_per_s") for rate in part["flop"] / part["seconds"]]
        found[str(name)] = KernelCost.model_validate({"launch_s": "0 s", "keys": tuple(part["keys"]), "flop_per_s_at_keys": tuple(rates)})
    return found


def _talk(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per collective and size: in a step where it was measured there, by itself only beyond twice the largest such size.

    Between kernels a call of gloo takes a moment or a tick of the scheduler: a row tells as much as it has calls.
    """
    alone = _typical(rows[rows["part"] == "collective"], "seconds")
    inside = rows[(rows["part"] == "together") & rows["name"].isin(alone["name"])]
    if inside.empty:
        return alone.assign(calls=1.0)
    inside = inside.groupby(["name", "ranks", "case", "bytes"], sort=False)[["calls", "seconds"]].median().reset_index()
    largest = inside.groupby(["name", "ranks"])["bytes"].max().rename("largest")
    alone = alone.merge(largest, on=["name", "ranks"], how="left")
    return pd.concat([inside, alone[~(alone["bytes"] <= 2 * alone["largest"])]], ignore_index=True)


def fit_together(
    rows: pd.DataFrame, costs: Mapping[str, KernelCost], keys: Mapping[str, float], alike: Collection[str]
) -> tuple[dict[str, Fit], Fit | None]:
    """Return what several ranks together change: the speed that kernels keep, by part, and the skew of the ranks.

    Parameters
    ----------
    costs : mapping
        Fitted cost of every kind of kernel in a rank's own probe.
    keys : mapping
        Mean number of keys that a query of each probe sees.
    alike : collection of str
        Probes whose ranks do the same, and meet only when all of it is done: what they wait for is neither tokens of experts, which a
        step knows by itself, nor a tensor-parallel collective, which has its waiting in its cost.

    Returns
    -------
    kept : dict of str to Fit
        ``share``: seconds in the own probe over those beside communication, whose buffers have emptied the caches and whose threads share
        the core.
    skew : Fit or None
        ``share``: in `alike` probes, the waiting for the slower rank at collectives, mean over ranks, over the time of the kernels
        before them. For two ranks that is the expected maximum of their kernels over the mean less one.
    """
    table = rows[rows["part"] == "together"]
    if table.empty:
        return {}, None
    inside = table[table["name"].isin(costs.keys())].copy()
    inside["alone"] = [float(measured_s(r.flop, r.bytes, r.calls, costs[r.name], keys[r.case])) for r in inside.itertuples(index=False)]
    inside["in"] = inside["name"].map(training_part)
    sums = inside.groupby(["in", "case", "turn"])[["alone", "seconds"]].sum()
    shares = (sums["alone"] / sums["seconds"]).groupby(["in", "case"]).max()  # of the turns: what disturbs one only lengthens it
    kept = {part: _share(f"in_training.{part}", group) for part, group in shares.groupby("in")}
    kernels = inside.groupby(["case", "turn"])["seconds"].sum()
    waits = table[(table["name"] == "wait") & table["case"].isin(alike)].set_index(["case", "turn"])["seconds"]
    return kept, _share("skew", (waits / kernels).dropna()) if len(waits) else None


def _share(name: str, shares: pd.Series) -> Fit:
    """Return the median of `shares`, with quantiles as its interval."""
    middle, low, high = (float(shares.quantile(q)) for q in (0.5, 0.05, 0.95))
    return Fit(name, {"share": middle}, {"share": low}, {"share": high}, len(shares), float(shares.std(ddof=0) / middle))


def fit_collectives(rows: pd.DataFrame) -> dict[str, Fit]:
    """Return the cost of every collective, datatype and number of ranks; with a knee where that halves the squared residual."""
    check_rows(rows)
    fits = {}
    table = _talk(rows)
    for (name, ranks), part in table.groupby(["name", "ranks"], sort=False):
        key = f"{name}.{ranks}"
        size, seconds, calls = (part[column].to_numpy(float) for column in ("bytes", "seconds", "calls"))
        best = linear(key, {"latency_s": np.ones_like(size), "bytes_per_s": size}, seconds, calls)
        for knee in sorted(set(size))[2:-1]:
            columns = {
                "latency_s": np.ones_like(size),
                "bytes_per_s": np.minimum(size, knee),
                "beyond_bytes_per_s": np.maximum(size - knee, 0),
            }
            bent = linear(key, columns, seconds, calls)
            if set(bent.values) == set(columns) and bent.residual**2 < 0.5 * best.residual**2:
                best = Fit(key, bent.values | {"knee_bytes": knee}, bent.low, bent.high, bent.rows, bent.residual)
        # in noise a time may not grow with its buffer: nothing is then known to move faster than the fastest seen
        known = {"latency_s": 0.0, "bytes_per_s": float(np.max(size / seconds))}
        fits[key] = Fit(key, known | best.values, best.low, best.high, best.rows, best.residual)
    return fits


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at `x` of a line through `points`, logarithmic in both."""
    xs, ys = np.log(np.array(sorted(points)).T)
    return float(np.exp(np.interp(np.log(x), xs, ys)))
