"""How far a prediction may be off: 80 % intervals from the residuals of comparable published runs.

Shapes: N published rows, Q questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simulator.scenario.scenario import Scenario
from simulator.workload.flop import count

#: predicted and measured steps of published runs, written by ``myriad validate --write``
RESIDUALS = Path(__file__).parents[1] / "validation" / "data" / "residuals.csv"
#: share of true values that an interval is meant to hold
COVERAGE = 0.8
#: numbers that make runs comparable, as log2, and by how many doublings runs may differ to count as one unit apart; tensor
#: parallelism decides what is exposed: of 0.5, 0.7, 1 and 2 doublings, 0.7 has the best interval scores, every group left out
SCALES = {
    "accelerators": 3.0, "parameters": 3.0, "hidden": 1.5, "sequence": 2.0, "tokens": 2.0,
    "tp": 0.7, "cp": 2.0, "pp": 2.0, "ep": 2.0, "micro_batches": 3.0,
}  # fmt: skip
#: words that make runs comparable, and how many units a difference counts
WORDS = {"accelerator": 1.5, "arch": 1.5, "precision": 1.0, "recompute": 0.5, "sharding": 1.0}
#: units over which the weight of a row falls to 1/e, shortest first, and how many groups of rows must count
REACHES, GROUPS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0), 4.0
#: a question is inside the validated range when a row is as near as this, units
NEAR = 2.0


def features(scenario: Scenario) -> dict[str, Any]:
    """Return what makes a scenario comparable with published runs: the columns of `SCALES` and `WORDS`."""
    model, plan, job = scenario.model, scenario.plan, scenario.job
    return {
        "accelerators": scenario.cluster.accelerators,
        "parameters": count(model, job.sequence_length).active_parameters,
        "hidden": model.hidden,
        "sequence": job.sequence_length,
        "tokens": plan.micro_batch * job.sequence_length / plan.cp,
        "tp": plan.tp,
        "cp": plan.cp,
        "pp": plan.pp,
        "ep": plan.ep * plan.etp,
        "micro_batches": job.global_batch / (plan.dp * plan.micro_batch),
        "accelerator": scenario.cluster.accelerator.name,
        "arch": model.arch,
        "precision": plan.precision.gemm,
        "recompute": plan.recompute,
        "sharding": "parameters" if plan.zero == 3 else "state",
    }


def distances(questions: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Return how far questions are from rows, in units of `SCALES` and `WORDS`, shape (Q, N).

    Notes
    -----
    Euclidean over the numbers' log2; differing words add in the same square.
    """
    total = np.zeros((len(questions), len(rows)))
    for name, scale in SCALES.items():
        a, b = (np.log2(t[name].to_numpy(dtype=float)) / scale for t in (questions, rows))
        total += (a[:, None] - b[None, :]) ** 2
    for name, units in WORDS.items():
        a, b = questions[name].to_numpy(dtype=str), rows[name].to_numpy(dtype=str)
        total += units**2 * (a[:, None] != b[None, :])
    return np.sqrt(total)


@dataclass(frozen=True)
class Interval:
    """An 80 % interval around a predicted step, and the published runs that it comes from.

    Parameters
    ----------
    low_s, high_s : float
        Its ends, seconds. They need not lie around the prediction evenly: where comparable runs took longer than
        predicted, so may this one.
    inside : bool
        Whether a published run is as near as `NEAR`; outside, the interval is an extrapolation.
    accelerator_known : bool
        Whether any published run was on the accelerator.
    comparable : DataFrame
        The runs that weigh most, nearest first: ``id``, ``source``, ``model``, ``accelerator``, ``accelerators`` (their number),
        ``distance``, ``weight`` (share of all), ``measured_over_predicted``.
    """

    low_s: float
    high_s: float
    inside: bool
    accelerator_known: bool
    comparable: pd.DataFrame


@lru_cache(maxsize=1)
def residuals() -> tuple[pd.DataFrame, dict[str, float]]:
    """Return the shipped residual table and the levels of its quantiles, by regime.

    Returns
    -------
    table : DataFrame
        One row per published run: ``id``, ``source``, ``model``, ``group``, the features, and ln(measured / predicted): ``cold``
        without a factor of its software release, ``anchored`` with one (blank without another model of the release).
    levels : dict
        By regime, the central share of weighted residuals that holds 80 % of the left-out runs.
    """
    text = RESIDUALS.read_text(encoding="utf-8").splitlines(keepends=True)
    levels = dict(pair.split("=") for pair in text[0].removeprefix("#").split())
    return pd.read_csv(StringIO("".join(text[1:]))), {regime: float(level) for regime, level in levels.items()}


def _weights(distance: np.ndarray, group: np.ndarray, may: np.ndarray) -> np.ndarray:
    """Return the weight of every row for every question, shape (Q, N).

    Parameters
    ----------
    distance : ndarray of shape (Q, N)
    group : ndarray of shape (N,)
        Number of each row's group, from 0.
    may : ndarray of shape (Q, N)
        Whether a row may be used for a question.

    Notes
    -----
    ``exp(-distance / reach) / sqrt(rows of the group)``, with the shortest reach of `REACHES` at which `GROUPS` groups count:
    ``(sum of w)^2 / sum of w^2`` over the groups' weights. One measurement that is near says where, not how far it may be off.
    """
    size = np.sqrt(np.bincount(group))[group]
    member = (group[:, None] == np.arange(group.max() + 1)[None, :]).astype(float)
    usable = np.where(may, distance, np.inf)
    nearest = usable.min(axis=1, keepdims=True)
    ahead = usable - np.where(np.isfinite(nearest), nearest, 0.0)
    found, done = np.zeros(distance.shape), np.zeros(len(distance), dtype=bool)
    for reach in REACHES:
        some = ~done
        weights = np.exp(-ahead[some] / reach) / size
        of_groups = weights @ member
        enough = of_groups.sum(axis=1) ** 2 >= GROUPS * (of_groups**2).sum(axis=1)
        found[some] = weights
        done[np.flatnonzero(some)[enough]] = True
    return found


def _quantiles(values: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return weighted quantiles by the midpoint rule."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) - weights[order] / 2
    return np.interp(levels, share / weights.sum(), values[order])


def quantiles(asked: pd.DataFrame, rows: pd.DataFrame, regime: str, level: float | np.ndarray, leave_out: bool = False) -> np.ndarray:
    """Return the interval of ln(measured / predicted) for every question, shape (Q, 2); NaN where no row is comparable.

    Parameters
    ----------
    asked : DataFrame
        Questions, by the columns of `SCALES` and `WORDS`.
    rows : DataFrame
        As the table of `residuals`.
    regime : str
        ``cold`` or ``anchored``: the column to take residuals from.
    level : float or ndarray of shape (L,)
        Central share of the weighted residuals; for many, the shape is (Q, 2, L).
    leave_out : bool
        Leave out the rows of a question's own ``group``, for published runs that ask about themselves.
    """
    rows = rows[rows[regime].notna()].reset_index(drop=True)
    at = np.array([0.5 - np.asarray(level) / 2, 0.5 + np.asarray(level) / 2])
    ends = np.full((len(asked), *at.shape), np.nan)
    residual, (group, names) = rows[regime].to_numpy(dtype=float), pd.factorize(rows["group"])
    own = names.get_indexer(asked["group"]) if leave_out else np.full(len(asked), -1)
    for block in np.array_split(np.arange(len(asked)), len(asked) // 256 + 1):
        weights = _weights(distances(asked.iloc[block], rows), group, group[None, :] != own[block][:, None])
        for place, weight in zip(block, weights, strict=True):
            if weight.any():
                ends[place] = _quantiles(residual[weight > 0], weight[weight > 0], at)
    return ends


def interval(scenario: Scenario, seconds: float, regime: str = "cold") -> Interval:
    """Return the 80 % interval of a predicted step.

    Parameters
    ----------
    scenario : Scenario
    seconds : float
        The prediction.
    regime : str
        ``cold``; ``anchored`` when a factor measured on the same software release is already in `seconds`.

    Notes
    -----
    The ends are the prediction times weighted quantiles of measured over predicted among published runs. A run weighs
    the less the farther it is and the more runs its group (model and accelerator) has. The central share taken is the one
    that holds 80 % of published runs when their own group is left out.
    """
    table, levels = residuals()
    asked = pd.DataFrame([features(scenario)])
    low, high = quantiles(asked, table, regime, levels[regime])[0]
    rows = table[table[regime].notna()].reset_index(drop=True)
    distance = distances(asked, rows)
    weight = _weights(distance, pd.factorize(rows["group"])[0], np.ones(distance.shape, dtype=bool))[0]
    near = rows[["id", "source", "model", "accelerator", "accelerators"]].assign(
        distance=distance[0], weight=weight / weight.sum(), measured_over_predicted=np.exp(rows[regime])
    )
    return Interval(
        low_s=seconds * float(np.exp(low)),
        high_s=seconds * float(np.exp(high)),
        inside=bool(distance.min() <= NEAR),
        accelerator_known=scenario.cluster.accelerator.name in set(rows["accelerator"]),
        comparable=near.sort_values(["distance", "id"], ignore_index=True).head(10),
    )
