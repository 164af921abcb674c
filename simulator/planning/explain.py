"""Why a plan won, and what the user's constraints cost."""

from __future__ import annotations

import numpy as np
import pandas as pd

from simulator.errors import ProfileError
from simulator.planning.compare import compare
from simulator.planning.pool import Progress
from simulator.planning.search import Search, search


def why(found: Search) -> pd.DataFrame:
    """Return what the runner-up spends more than the best plan, term by term, largest first: ``part``, ``seconds``.

    Raises
    ------
    ProfileError
        When only one plan was simulated.
    """
    if len(found.results) < 2:
        raise ProfileError("one plan was simulated; search with top=2 or more to explain why it is best")
    best, second = found.results[:2]
    return compare({"best": best, "runner-up": second}).differences()


def constraint_costs(found: Search, progress: Progress | None = None) -> pd.DataFrame:
    """Return what each constraint costs: the fastest step when it alone is lifted.

    Returns
    -------
    DataFrame
        ``constraint``, ``allowed``, ``step_time_s`` without it, ``costs_s`` (how much longer the best plan takes) and ``level``.
        The last row is memory: the lowest bound of a legal plan that does not fit, a step that more memory could at best give.
    """
    best, rows = found.best.step_time_s, []
    for name in found.space.constraints:
        freed = search(found.scenario, top=1, progress=progress, space=found.space.without(name)).best.step_time_s
        allowed = ", ".join(map(str, getattr(found.space, name)))
        rows.append({"constraint": name, "allowed": allowed, "step_time_s": freed, "costs_s": best - freed, "level": "simulate"})
    capacity = found.scenario.cluster.accelerator.hbm_bytes
    beyond = found.pool.bound_s[found.pool.legal & (found.pool.memory_bytes > capacity)]
    least = float(np.min(beyond)) if len(beyond) else best
    limit = {"constraint": "memory", "allowed": f"{capacity / 1e9:.1f} GB", "step_time_s": min(least, best), "level": "bound"}
    rows.append(limit | {"costs_s": max(best - least, 0.0)})
    return pd.DataFrame(rows, columns=["constraint", "allowed", "step_time_s", "costs_s", "level"])
