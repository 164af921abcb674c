"""Which of many answers are worth choosing between: those that no other beats in everything that counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from simulator.errors import ProfileError


def mark_front(table: pd.DataFrame, by: Sequence[str] = ("training_days", "cost_usd", "energy_kwh")) -> pd.DataFrame:
    """Return `table` with a column ``on_front``: whether no other row is at least as small in all of `by` and smaller in one.

    Parameters
    ----------
    table : DataFrame
        Answers, e.g. of `simulator.planning.questions.cheapest`.
    by : sequence of str
        Columns of which less is better. A row without one of the figures is never on the front.

    Raises
    ------
    ProfileError
        When the table lacks a column.
    """
    missing = [name for name in by if name not in table]
    if missing or not by:
        raise ProfileError(f"no front over {', '.join(missing) or 'nothing'}; choose columns of {', '.join(map(str, table.columns))}")
    values = table[list(by)].to_numpy(dtype=float)
    no_worse = (values[:, None, :] <= values[None, :, :]).all(axis=-1)
    better = (values[:, None, :] < values[None, :, :]).any(axis=-1)
    return table.assign(on_front=~(no_worse & better).any(axis=0) & ~np.isnan(values).any(axis=-1))
