"""Whether errors grow with the machine: slopes of the error over the number of accelerators."""

from __future__ import annotations

import numpy as np
import pandas as pd

#: series of runs of one model that grow with the machine: name -> pattern of `id`
_PAPERS = {
    "Narayanan 2021 table 1, 1.7 B to 1 T, weak scaling": r"sc21-t1-",
    "MegaScale 2024 table 2, Megatron-LM, batch 768": r"megascale-megatron-lm-768-",
    "MegaScale 2024 table 2, Megatron-LM, batch 6,144": r"megascale-megatron-lm-6144-",
}
#: fewest machine sizes that make a series
_SIZES = 3


def series(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the scaling series of a `scored` table by name.

    Notes
    -----
    The papers' series are named; those of dgxc-benchmarking are every release, model and precision whose rows differ only in
    data-parallel degree and batch, with three machine sizes or more.
    """
    found = {name: rows[rows["id"].str.contains(pattern)] for name, pattern in _PAPERS.items()}
    some = rows[rows["source"] == "NVIDIA dgxc-benchmarking"]
    per_replica = some["layout"].str.replace(r" dp\d+", "", regex=True)
    for (release, model, precision, accelerator, layout), group in some.groupby(
        [some["release"], some["model"], some["precision"], some["accelerator"], per_replica]
    ):
        found[f"{release}: {model}, {precision}, {accelerator}, {layout}"] = group
    return {name: group for name, group in found.items() if group["accelerators"].nunique() >= _SIZES}


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the slope of ln(predicted / measured) over log2(accelerators), per series.

    Returns
    -------
    DataFrame
        ``series``, ``rows``, ``from``, ``to`` (accelerators), ``slope`` per doubling and ``standard_error`` of it (NaN for two
        rows); the last line pools the dgxc series with one level each.
    """
    lines, pooled = [], []
    for name, group in series(rows).items():
        x, y = np.log2(group["accelerators"].to_numpy(dtype=float)), group["residual"].to_numpy()
        lines.append({"series": name, "rows": len(group), "from": int(2 ** x.min() + 0.5), "to": int(2 ** x.max() + 0.5)} | _line(x, y, 2))
        if name not in _PAPERS:
            pooled.append((x - x.mean(), y - y.mean()))
    if pooled:
        x, y = (np.concatenate(parts) for parts in zip(*pooled, strict=True))
        some = [line for line in lines if line["series"] not in _PAPERS]
        size = {"from": min(line["from"] for line in some), "to": max(line["to"] for line in some)}
        lines.append({"series": f"dgxc, {len(pooled)} series pooled", "rows": len(x)} | size | _line(x, y, 1 + len(pooled)))
    return pd.DataFrame(lines, columns=["series", "rows", "from", "to", "slope", "standard_error"])


def _line(x: np.ndarray, y: np.ndarray, parameters: int) -> dict[str, float]:
    """Return the least-squares slope and its standard error."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / (x**2).sum())
    rest, free = y - slope * x, len(x) - parameters
    error = float(np.sqrt((rest**2).sum() / free / (x**2).sum())) if free > 0 else float("nan")
    return {"slope": slope, "standard_error": error}
