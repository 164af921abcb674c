"""Fit scales of a model to measurements: bounded, robust, with priors, intervals and sensitivities.

Shapes: R rows, P parameters, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

#: half-width of an 80 % interval of a normal distribution, in standard deviations
Z_80 = 1.2816


@dataclass(frozen=True, slots=True)
class Parameter:
    """A positive number to be fitted.

    Parameters
    ----------
    name, unit : str
    start : float
        Its present value, at which slopes and misses were taken.
    lower, upper : float
        Bounds that physics sets.
    spread : float
        How far it may be from `known`: standard deviation of its logarithm.
    known : float, optional
        What is known without the rows; `start` when left out.
    """

    name: str
    unit: str
    start: float
    lower: float
    upper: float
    spread: float
    known: float | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """What rows say about parameters.

    Parameters
    ----------
    values, low, high : ndarray of shape (P,)
        Most likely values and the ends of their 80 % intervals.
    sensitivity : ndarray of shape (P,)
        Percent by which the rows' predictions move, on average, when the parameter moves by one percent.
    rows : int
        Rows fitted to.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sensitivity: np.ndarray
    rows: int


def fit(parameters: Sequence[Parameter], slopes: np.ndarray, misses: np.ndarray, weights: np.ndarray, tolerance: float = 0.1) -> Fitted:
    """Return the parameters that bring predictions nearest to measurements.

    Parameters
    ----------
    slopes : ndarray of shape (R, P)
        ``d ln(predicted) / d ln(parameter)`` of every row at the starts.
    misses : ndarray of shape (R,)
        ``ln(measured / predicted)`` at the starts.
    weights : ndarray of shape (R,)
        How much each row counts.
    tolerance : float
        Miss beyond which a row counts less and less (soft L1).

    Notes
    -----
    Minimises ``sum w rho((slopes x - misses) / tolerance) + sum ((x - ln(known / start)) / spread)^2`` over
    ``x = ln(value / start)`` within the bounds, ``rho(z) = 2 (sqrt(1 + z^2) - 1)``. The interval is that of the quadratic
    approximation at the minimum. Linear in the logarithms: start again from the result where it is far from the starts.
    """
    low, high = (np.array([np.log(getattr(p, end) / p.start) for p in parameters]) for end in ("lower", "upper"))
    spread = np.array([p.spread for p in parameters])
    known = np.array([np.log((p.known or p.start) / p.start) for p in parameters])
    root = np.sqrt(weights)

    def residuals(x: np.ndarray) -> np.ndarray:
        z = (slopes @ x - misses) / tolerance
        return np.concatenate([root * np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z**2) - 1)), (x - known) / spread])

    found = least_squares(residuals, np.clip(np.zeros(len(parameters)), low, high), bounds=(low, high))
    deviation = np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac)))
    start = np.array([p.start for p in parameters])
    ends = (np.clip(found.x + sign * Z_80 * deviation, low, high) for sign in (-1, 1))
    moves = np.abs(slopes).T @ weights / max(weights.sum(), 1e-300)
    return Fitted(start * np.exp(found.x), *(start * np.exp(end) for end in ends), moves, len(misses))


def leave_out(
    parameters: Sequence[Parameter], slopes: np.ndarray, misses: np.ndarray, weights: np.ndarray, groups: np.ndarray
) -> dict[str, np.ndarray]:
    """Return how far each group's absence moves the parameters, ``ln(value / start)`` of shape (P,), by group.

    Parameters
    ----------
    groups : ndarray of shape (R,)
        Name of the group of each row; the other parameters as in `fit`. Where there is no other group the starts stand.
    """
    start = np.array([p.start for p in parameters])
    moved = {str(group): np.zeros(len(start)) for group in dict.fromkeys(groups)}
    for group in moved if len(moved) > 1 else ():
        kept = groups != group
        moved[group] = np.log(fit(parameters, slopes[kept], misses[kept], weights[kept]).values / start)
    return moved
