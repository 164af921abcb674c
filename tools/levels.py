"""Hold bound and estimate against the simulation on a large random grid: ``python tools/levels.py 300 --seed 7``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr

import simulator as sim

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from grid import grid, uneven


def main() -> None:
    """Print the worst bound and estimate, for uniform and for uneven or overlapped stages."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("count", type=int)
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    rows = []
    for s in grid(given.count, given.seed):
        step = sim.simulate_step(s).step_time_s
        rows.append((uneven(s), s.plan.schedule, step, sim.estimate(s), sim.bound(s)))
    table = pd.DataFrame(rows, columns=["uneven", "schedule", "step", "estimate", "bound"])
    table["off"], table["under"] = (table["estimate"] / table["step"] - 1).abs(), table["bound"] / table["step"]
    for kind, part in table.groupby("uneven"):
        rank = spearmanr(part["step"], part["estimate"]).statistic
        words = "uneven or overlapped" if kind else "uniform"
        print(f"{words}: {len(part)} steps, estimate off by {part['off'].max():.2%} at most, Spearman {rank:.4f}", end=", ")
        print(f"bound {part['under'].min():.0%} to {part['under'].max():.4%} of the step")
    print(table.groupby("schedule")[["off", "under"]].max().to_string())


if __name__ == "__main__":
    main()
