"""Whether the predictions choose well: rank correlation and regret within sweeps of layouts."""

from __future__ import annotations

import numpy as np
import pandas as pd

#: fewest distinct layouts that make a sweep
SWEEP = 8


def sweeps(rows: pd.DataFrame, predicted: str = "predicted_s") -> pd.DataFrame:
    """Return how well the predictions rank the layouts of each sweep.

    Parameters
    ----------
    rows : DataFrame
        As `simulator.validation.regimes.scored` returns it.
    predicted : str
        Column of the predictions to rank by.

    Returns
    -------
    DataFrame
        One row per sweep of at least `SWEEP` layouts at equal release, model, accelerators, batch, sequence, precision and
        kernel: ``sweep``, ``layouts``, ``spearman`` and ``regret``, the measured cost of the layout that is predicted best
        over the measured best, less 1. Repeated measurements of a layout count by their geometric mean.
    """
    found = []
    for name, mean in layouts(rows, predicted).groupby("sweep"):
        best = mean["measured"].to_numpy()[mean["predicted"].to_numpy().argmin()]
        found.append(
            {
                "sweep": name,
                "layouts": len(mean),
                "spearman": mean["predicted"].corr(mean["measured"], method="spearman"),
                "regret": float(np.expm1(best - mean["measured"].min())),
            }
        )
    return pd.DataFrame(found, columns=["sweep", "layouts", "spearman", "regret"])


def layouts(rows: pd.DataFrame, predicted: str = "predicted_s") -> pd.DataFrame:
    """Return the layouts of all sweeps: mean ln of ``measured`` and ``predicted``."""
    logs = rows[["sweep", "layout"]].assign(measured=np.log(rows["measured_s"]), predicted=np.log(rows[predicted]))
    mean = logs.groupby(["sweep", "layout"]).mean().reset_index()
    return mean[mean.groupby("sweep")["layout"].transform("size") >= SWEEP].reset_index(drop=True)


def choosing(rows: pd.DataFrame, predicted: str = "predicted_s") -> dict[str, float]:
    """Return the figures over all sweeps.

    Returns
    -------
    dict
        ``sweeps``, ``layouts``; ``spearman_pooled`` of all layouts, each relative to the mean of its sweep, so that sizes of
        models correlate nothing; ``spearman_worst``; ``regret_median`` and ``regret_worst``.
    """
    table, each = sweeps(rows, predicted), layouts(rows, predicted)
    relative = each[["measured", "predicted"]] - each.groupby("sweep")[["measured", "predicted"]].transform("mean")
    relative = relative.round(12)  # equal layouts must tie, whatever the rounding
    return {
        "sweeps": len(table),
        "layouts": int(table["layouts"].sum()),
        "spearman_pooled": relative["measured"].corr(relative["predicted"], method="spearman"),
        "spearman_worst": table["spearman"].min(),
        "regret_median": table["regret"].median(),
        "regret_worst": table["regret"].max(),
    }
