"""Pictures of decisions hold what their tables hold, and the tables hold what arithmetic says."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from small import moe, scenario

import simulator as sim
from simulator import plots
from simulator.errors import ProfileError, SimulatorError
from simulator.planning.compare import compare
from simulator.planning.front import mark_front
from simulator.planning.sensitivity import tornado
from simulator.planning.space import Space
from simulator.scenario.plan import Plan

mpl.use("Agg")

ANSWERS = pd.DataFrame(
    {
        "cluster": ["a", "a", "b", "b", "c"],
        "accelerators": [8, 16, 8, 16, 8],
        "training_days": [10.0, 6.0, 12.0, 7.0, np.nan],
        "cost_usd": [1e6, 1.2e6, 2e6, 1.1e6, np.nan],
        "energy_kwh": [5e6, 5e6, 4e6, 9e6, np.nan],
    }
)


@pytest.fixture
def ax() -> Axes:
    return Figure(figsize=(10, 5), layout="constrained").subplots()


@pytest.fixture(scope="module")
def found() -> sim.Search:
    space = Space(zero=(1,), schedule=("1f1b", "interleaved"), recompute=("none", "full"), micro_batch=(1,))
    return sim.search(scenario(moe(), 16, Plan(), 8), top=4, space=space)


def words(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_the_front_is_what_no_other_beats():
    assert mark_front(ANSWERS, ["training_days", "cost_usd"])["on_front"].tolist() == [True, True, False, True, False]
    assert mark_front(ANSWERS)["on_front"].tolist() == [True, True, True, True, False]
    assert mark_front(ANSWERS, ["cost_usd"])["on_front"].tolist() == [True, False, False, False, False]
    twins = pd.concat([ANSWERS.iloc[:1]] * 2, ignore_index=True)
    assert mark_front(twins)["on_front"].all()  # equal answers do not beat each other
    with pytest.raises(ProfileError, match="no front over joy"):
        mark_front(ANSWERS, ["joy"])


def test_front_draws_every_answer_and_joins_the_best(ax: Axes):
    plots.plot_front(mark_front(ANSWERS, ["training_days", "cost_usd"]), ax=ax)
    drawn = np.concatenate([c.get_offsets() for c in ax.collections])
    np.testing.assert_allclose(sorted(drawn.tolist()), [[6, 1.2], [7, 1.1], [10, 1], [12, 2]])
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[6, 1.2], [7, 1.1], [10, 1]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("training (days)", "rent of the accelerators (million $)")
    assert ax.get_title(loc="left").startswith("3 of 4 answers")
    with pytest.raises(SimulatorError, match="no axis for 'joy'"):
        plots.plot_front(ANSWERS, "joy")


def test_scaling_draws_rates_and_efficiencies(ax: Axes):
    table = pd.DataFrame({"accelerators": [8, 16], "tokens_per_s": [4e6, 6e6], "efficiency": [1.0, 0.75]})
    plots.plot_scaling({"strong": table}, ax=ax)
    curve, perfect = ax.get_lines()
    assert curve.get_xydata().tolist() == [[8, 4], [16, 6]]
    assert perfect.get_xydata().tolist() == [[8, 4], [16, 8]]
    assert words(ax) == ["100%", "75%"]
    with pytest.raises(SimulatorError, match="nothing to draw"):
        plots.plot_scaling({})


def test_cells_are_the_best_of_their_plans(found: sim.Search):
    cells = found.cells("pp", "ep")
    assert cells["legal"].sum() == found.legal
    assert cells["fits"].sum() == found.fitting
    assert cells["estimate_s"].min() == pytest.approx(found.pool.estimate_s[found.pool.estimated].min())
    pool = found.pool
    for row in cells[cells["fits"] > 0].itertuples():
        every = [i for i in range(len(pool)) if (pool.plan(i).pp, pool.plan(i).ep) == (row.pp, row.ep)]
        assert row.legal == len(every)
        exact = min(sim.estimate(found.scenario.model_copy(update={"plan": pool.plan(i)})) for i in every)
        assert row.estimate_s == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ProfileError, match="no cells over speed"):
        found.cells("speed")


def test_heat_writes_every_cell(found: sim.Search, ax: Axes):
    cells = found.cells("pp", "ep")
    cells.loc[cells.index[-1], ["estimate_s", "fits"]] = np.nan, 0
    plots.plot_heat(cells, ax=ax)
    fits = cells["estimate_s"].notna()
    assert len(words(ax)) == len(cells)
    assert sum(word.replace(".", "").isdigit() for word in words(ax)) == fits.sum()
    assert words(ax).count("too large") == (~fits & (cells["legal"] > 0)).sum()
    assert words(ax).count("not legal") == (cells["legal"] == 0).sum()
    (frame,) = ax.patches
    best = cells.loc[cells["estimate_s"].idxmin()]
    assert [label.get_text() for label in ax.get_xticklabels()][round(frame.get_x() + 0.5)] == f"{best['ep']:.0f}"
    assert [label.get_text() for label in ax.get_yticklabels()][round(frame.get_y() + 0.5)] == f"{best['pp']:.0f}"


def test_tornado_bars_reach_the_ends(found: sim.Search, ax: Axes):
    table = tornado(found)
    assert table["base_s"].nunique() == 1
    assert table["base_s"].iloc[0] == pytest.approx(sim.estimate(found.scenarios[0]))
    plots.plot_tornado(table, ax=ax)
    for bars, side in zip(ax.containers, ("low_s", "high_s"), strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert ends == pytest.approx((1e3 * table[side]).tolist())
    assert ax.get_xlabel() == "estimated step time of the chosen plan (ms)"


def test_intervals_are_those_of_the_results(found: sim.Search, ax: Axes):
    result = found.best
    plots.plot_intervals({"one": result}, ax=ax)
    span, dot = ax.get_lines()
    around, days = result.interval(), result.scenario.job.steps / 86400
    assert span.get_xdata().tolist() == pytest.approx([around.low_s * days, around.high_s * days])
    assert dot.get_xdata()[0] == pytest.approx(result.training_days)
    with pytest.raises(SimulatorError, match="nothing to compare"):
        plots.plot_intervals({})


def test_differences_are_drawn_with_their_sign(found: sim.Search, ax: Axes):
    beside = compare({"best": found.results[0], "last": found.results[-1]})
    table = beside.differences()
    plots.plot_differences(table, "last against best", ax=ax)
    drawn = [bar.get_width() for bar in ax.patches]
    assert drawn == pytest.approx([1e3 * s for s in table["seconds"] if abs(s) > 1e-3 * table["seconds"].abs().max()])
    total = 1e3 * (found.results[-1].step_time_s - found.results[0].step_time_s)
    assert ax.get_title(loc="left") == f"last against best: {total:+.3g} ms per step"
    with pytest.raises(SimulatorError, match="do not differ"):
        plots.plot_differences(table.assign(seconds=0.0), "same")
