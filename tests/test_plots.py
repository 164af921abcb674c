"""Pictures hold what the tables hold: counted bars, their lengths, the lines and the words, not pixels."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from small import dense, moe, scenario

import simulator as sim
from simulator import plots
from simulator.plots.timeline import _classes
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan
from simulator.schedules import actions, schedule
from simulator.workload.memory import PARTS

mpl.use("Agg")

MICRO_BATCHES = 6


@pytest.fixture(scope="module")
def result() -> sim.StepResult:
    """Two stages of experts on two hosts: tensor, expert, pipeline and data parallel."""
    return sim.simulate_step(scenario(moe(hidden=1024), 16, Plan(tp=2, pp=2, ep=4), MICRO_BATCHES))


@pytest.fixture(scope="module")
def plain() -> sim.StepResult:
    """Four stages and two replicas without anything that interrupts a forward or a backward."""
    plan = Plan(pp=4, zero=0, overlap=Overlap(grad_reduce=False, param_gather=False))
    return sim.simulate_step(scenario(dense(hidden=2048), 8, plan, MICRO_BATCHES))


@pytest.fixture(scope="module")
def found() -> sim.Search:
    return sim.search(scenario(moe(), 16, Plan(), 8), top=6)


@pytest.fixture
def ax() -> Axes:
    """Axes that pyplot knows nothing about."""
    return Figure(figsize=(10, 5), layout="constrained").subplots()


def words(ax: Axes) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def extents(ax: Axes, kind: str) -> np.ndarray:
    """Return left, right and row of the drawn bars of one kind."""
    paths = [path.vertices for c in ax.collections if c.get_label() == kind for path in c.get_paths()]
    return np.array([[v[:, 0].min(), v[:, 0].max(), round(v[:, 1].mean())] for v in paths]).reshape(-1, 3)


def lengths(ax: Axes, kind: str) -> float:
    drawn = extents(ax, kind)
    return float((drawn[:, 1] - drawn[:, 0]).sum())


@pytest.mark.parametrize("name", ["timeline", "memory", "breakdown", "plans", "comparison"])
def test_draws_on_the_axes_given_and_returns_them(name: str, result: sim.StepResult, found: sim.Search, ax: Axes):
    what = {"plans": found, "comparison": {"one": result, "two": result}}.get(name, result)
    assert getattr(plots, f"plot_{name}")(what, ax=ax) is ax
    assert ax.has_data()
    assert ax.get_title(loc="left")
    assert not plt.get_fignums()
    ax.figure.canvas.draw()


@pytest.mark.parametrize("name", ["timeline", "memory", "breakdown", "plans", "comparison"])
def test_makes_a_figure_without_axes(name: str, result: sim.StepResult, found: sim.Search):
    what = {"plans": found, "comparison": {"one": result}}.get(name, result)
    ax = getattr(plots, f"plot_{name}")(what)
    assert plt.get_fignums() == [ax.figure.number]
    plt.close(ax.figure)


class TestTimeline:
    def test_one_bar_per_micro_batch(self, plain: sim.StepResult, ax: Axes):
        plots.plot_timeline(plain, ax=ax)
        for kind in ("forward", "backward"):
            rows = extents(ax, kind)[:, 2]
            assert [int((rows == row).sum()) for row in range(4)] == [MICRO_BATCHES] * 4
        assert len(extents(ax, "optimizer")) == 4

    def test_bars_name_their_micro_batch(self, plain: sim.StepResult, ax: Axes):
        plots.plot_timeline(plain, ax=ax)
        assert {text for text in words(ax) if text} == {str(i) for i in range(MICRO_BATCHES)}

    def test_chunks_are_named_as_in_the_schedule(self, ax: Axes):
        plan = Plan(pp=2, vpp=2, schedule="interleaved")
        plots.plot_timeline(sim.simulate_step(scenario(dense(hidden=2048), 2, plan, 4, sequence_length=2048)), ax=ax)
        assert {"0F0", "1B3"} <= set(words(ax))

    def test_bars_are_as_long_as_the_table_says(self, result: sim.StepResult):
        """Every kind of bar adds up to what the class computes, and to what it communicates meanwhile."""
        spent = result.timeline.exposed()
        for _, row in spent.iterrows():
            table = plots.bars(result.timeline, int(row["rank_class"]))
            seconds = (table["end_s"] - table["start_s"]).groupby([table["kind"], table["inside"]]).sum()
            passes = sum(seconds.get((kind, False), 0.0) for kind in ("forward", "backward", "optimizer"))
            inside, between = (seconds.get(("exposed communication", where), 0.0) for where in (True, False))
            exposed = sum(row[f"{stream}_exposed_s"] for stream in ("tp", "cp", "ep", "pp", "dp"))
            assert inside > 0
            assert passes - inside == pytest.approx(row["compute_s"])
            assert inside + between == pytest.approx(exposed)

    def test_a_host_that_launches_a_pair_belongs_to_its_bar(self):
        """As outside pairs; it is not drawn as communication."""
        plan = Plan(ep=4, tp=2, schedule="table", table="0F0 0F1+0B0 0B1\n")
        timeline = sim.simulate_step(scenario(moe(4, leading=0), 8, plan, 2, dispatch_s=1e-3)).timeline
        spent, table = timeline.exposed().iloc[0], plots.bars(timeline, 0)
        seconds = (table["end_s"] - table["start_s"]).groupby([table["kind"], table["inside"]]).sum()
        talks, inside = seconds["exposed communication"].sum(), seconds["exposed communication", True]
        assert talks == pytest.approx(spent[[c for c in spent.index if c.endswith("_exposed_s")]].sum())
        assert seconds[["forward", "backward", "optimizer"]].sum() - inside == pytest.approx(spent["compute_s"] + spent["host_s"])
        assert spent["host_s"] > 10 * talks

    def test_draws_the_bars_of_every_stage(self, result: sim.StepResult, ax: Axes):
        plots.plot_timeline(result, ax=ax)
        tables = [plots.bars(result.timeline, number) for number in range(2)]
        for kind in plots.KINDS:
            mine = [table[table["kind"] == kind] for table in tables]
            assert len(extents(ax, kind)) == sum(map(len, mine))
            assert lengths(ax, kind) == pytest.approx(1e3 * sum((t["end_s"] - t["start_s"]).sum() for t in mine))

    def test_title_axes_and_legend(self, result: sim.StepResult, ax: Axes):
        plots.plot_timeline(result, ax=ax)
        idle = result.breakdown().set_index("part")["share"]["idle"]
        assert ax.get_title(loc="left") == f"moe on 16 x h100-sxm5-80: {1e3 * result.step_time_s:.3g} ms per step, {idle:.1%} idle"
        assert ax.get_xlabel() == "time since the step began (ms)"
        assert ax.get_xlim() == pytest.approx((0, 1e3 * result.step_time_s))
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
        assert ax.yaxis_inverted()
        assert legend(ax) == ["forward", "backward", "optimizer", "exposed communication", "idle"]

    def test_window_cuts(self, plain: sim.StepResult, ax: Axes):
        begin, end = 0.3 * plain.step_time_s, 0.5 * plain.step_time_s
        plots.plot_timeline(plain, window_s=(begin, end), ax=ax)
        assert ax.get_xlim() == pytest.approx((1e3 * begin, 1e3 * end))
        drawn = np.concatenate([extents(ax, kind) for kind in plots.KINDS])
        assert 0 < len(drawn) < 8 * MICRO_BATCHES
        assert drawn[:, 0].min() >= 1e3 * begin
        assert drawn[:, 1].max() <= 1e3 * end

    def test_window_in_which_nothing_happens(self, plain: sim.StepResult, ax: Axes):
        """The last stage is idle while the first micro-batch comes to it."""
        first = plots.bars(plain.timeline, 3)["start_s"].min()
        plots.plot_timeline(plain, stages=[3], window_s=(0.0, first), ax=ax)
        assert not any(len(extents(ax, kind)) for kind in plots.KINDS)

    def test_long_windows_are_in_seconds(self, result: sim.StepResult, ax: Axes):
        plots.plot_timeline(result, window_s=(0, 2), ax=ax)
        assert ax.get_xlabel() == "time since the step began (s)"

    def test_stages_in_the_order_asked_for(self, plain: sim.StepResult, ax: Axes):
        plots.plot_timeline(plain, stages=[3, 1], ax=ax)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "1"]
        assert len(extents(ax, "forward")) == 2 * MICRO_BATCHES

    def test_a_stage_shows_its_most_numerous_class(self, ax: Axes):
        s = scenario(moe(), 16, Plan(pp=2, ep=4), MICRO_BATCHES, routing="natural")
        timeline = sim.simulate_step(s).timeline
        assert len(set(timeline.ranks)) == 2
        for stage, number in _classes(timeline, None).items():
            here = [c for c in range(len(timeline.ranks)) if timeline.stage[timeline.rank_class == c][0] == stage]
            assert timeline.ranks[number] == max(timeline.ranks[c] for c in here)

    def test_many_stages_are_not_all_labelled(self, ax: Axes):
        plots.plot_timeline(sim.simulate_step(scenario(dense(layers=64), 64, Plan(pp=64), 2)), ax=ax)
        assert 8 <= len(ax.get_yticks()) <= 32
        assert len(set(extents(ax, "forward")[:, 2])) == 64

    @pytest.mark.parametrize("wrong", [{"window_s": (0.2, 0.1)}, {"stages": [4]}, {"stages": []}])
    def test_refuses(self, wrong: dict, plain: sim.StepResult, ax: Axes):
        with pytest.raises(sim.SimulatorError, match="give|choose"):
            plots.plot_timeline(plain, ax=ax, **wrong)


class TestActivations:
    def test_a_line_for_each_rank_up_to_its_peak(self, ax: Axes):
        table = pd.DataFrame({"time_s": [0.0, 1.0, 3.0], "activations_bytes": [0.0, 2e9, 1e9]})
        plots.plot_activations({"one": table, "two": table.assign(activations_bytes=[0.0, 5e9, 0.0])}, ax=ax)
        assert [list(line.get_ydata()) for line in ax.lines] == [[0.0, 2.0, 1.0], [0.0, 5.0, 0.0]]
        assert [line.get_label() for line in ax.lines] == ["one: 2.0 GB at most", "two: 5.0 GB at most"]
        assert ax.get_ylim()[1] > 5.0

    def test_nothing_to_draw_is_refused(self):
        with pytest.raises(sim.SimulatorError, match="at least one"):
            plots.plot_activations({})


class TestMemory:
    def test_bars_stack_to_the_total(self, result: sim.StepResult, ax: Axes):
        plots.plot_memory(result, ax=ax)
        table = result.memory()
        assert len(ax.containers) == len(PARTS)
        heights = np.array([[bar.get_height() for bar in part] for part in ax.containers])
        assert heights.shape == (len(PARTS), len(table))
        assert heights.sum(axis=0) == pytest.approx(table["total_bytes"] / 1e9)
        tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
        assert tops == pytest.approx(table["total_bytes"] / 1e9)

    def test_capacity_line_and_units(self, result: sim.StepResult, ax: Axes):
        plots.plot_memory(result, ax=ax)
        capacity = result.scenario.cluster.accelerator.hbm_bytes / 1e9
        assert list(ax.lines[0].get_ydata()) == pytest.approx([capacity] * 2)
        assert ax.get_ylim()[1] > capacity
        assert ax.get_ylabel() == "peak memory per accelerator (GB)"
        assert f"{result.peak_memory_bytes / 1e9:.1f} GB" in ax.get_title(loc="left")
        assert legend(ax)[0] == f"capacity: {capacity:.1f} GB"


class TestBreakdown:
    def test_bars_add_up_to_the_step(self, result: sim.StepResult, ax: Axes):
        plots.plot_breakdown(result, ax=ax)
        spent, hidden = ([bar.get_width() for bar in container] for container in ax.containers)
        table = result.breakdown()
        assert sum(spent) == pytest.approx(1e3 * result.step_time_s)
        assert spent == sorted(spent, reverse=True)
        assert sum(hidden) == pytest.approx(1e3 * table["hidden_s"].sum())
        assert len(hidden) == (table["hidden_s"] > 0).sum()
        assert ax.get_xlabel() == "mean time per accelerator (ms)"

    def test_every_bar_says_seconds_and_share(self, result: sim.StepResult, ax: Axes):
        plots.plot_breakdown(result, ax=ax)
        assert len(words(ax)) == len(result.breakdown())
        first = result.breakdown().sort_values("seconds").iloc[-1]
        assert words(ax)[0].startswith(f"{1e3 * first['seconds']:.3g} ms ({first['share']:.1%})")
        assert ax.get_yticklabels()[0].get_text() == plots.WORDS[first["part"]]

    def test_nothing_hidden_no_legend(self, ax: Axes):
        alone = sim.simulate_step(scenario(dense(), 1, Plan(), 2))
        plots.plot_breakdown(alone, ax=ax)
        assert ax.get_legend() is None
        assert len(ax.containers) == 1
        assert words(ax)[-1] == "0.00 s (0.0%)"


class TestPlans:
    def test_a_point_per_plan(self, found: sim.Search, ax: Axes):
        plots.plot_plans(found, ax=ax)
        points = np.array(ax.collections[0].get_offsets())
        assert points[:, 0] == pytest.approx(found.table["peak_memory_bytes"].to_numpy() / 1e9)
        assert points[:, 1] == pytest.approx(1e3 * found.table["step_time_s"].to_numpy())
        assert ax.get_xlabel() == "peak memory per accelerator (GB)"
        assert ax.get_ylabel() == "step time (ms)"
        capacity = found.best.scenario.cluster.accelerator.hbm_bytes / 1e9
        assert list(ax.lines[0].get_xdata()) == pytest.approx([capacity] * 2)
        assert f"capacity: {capacity:.1f} GB" in words(ax)

    def test_every_plan_is_numbered_and_spelled_out(self, found: sim.Search, ax: Axes):
        plots.plot_plans(found, ax=ax)
        numbers = [n for text in words(ax) if "GB" not in text for n in text.split(", ")]
        assert sorted(map(int, numbers)) == list(range(1, len(found.table) + 1))
        assert len(legend(ax)) == len(found.table)
        common = ax.get_legend().get_title().get_text().split()
        for row, text in zip(found.table.itertuples(), legend(ax)):
            assert f"{row.mfu_causal:.1%} MFU" in text
            assert f"pp{row.pp}" in [*common, *text.replace(",", "").split()] or row.pp == 1


class TestComparison:
    def test_bars_end_at_the_step_time(self, result: sim.StepResult, plain: sim.StepResult, ax: Axes):
        results = {"with experts": result, "dense": plain}
        plots.plot_comparison(results, ax=ax)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(results)
        ends = [max(part[row].get_x() + part[row].get_width() for part in ax.containers) for row in range(2)]
        assert ends == pytest.approx([1e3 * r.step_time_s for r in results.values()])
        parts = {plots.WORDS.get(p, p) for r in results.values() for p in r.breakdown()["part"]}
        assert set(legend(ax)) == parts
        assert legend(ax)[-1] == plots.WORDS["idle"]
        assert words(ax)[1] == f"{1e3 * plain.step_time_s:.3g} ms, {plain.mfu_causal:.1%} MFU"
        assert ax.get_xlabel() == "mean time per accelerator and step (ms)"

    def test_refuses_nothing(self, ax: Axes):
        with pytest.raises(sim.SimulatorError, match="nothing to compare"):
            plots.plot_comparison({}, ax=ax)


#: Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009, severity 1
DEFICIENCIES = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
NEIGHBOURS = {
    "timeline": [*plots.KINDS],
    "memory": ["optimizer state" if part == "optimizer" else part for part in PARTS],
    "compute": [part for part in plots.COLOURS if part.startswith("compute")],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return CIE L*a*b* under D65 of linear sRGB."""
    xyz = rgb @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eye", DEFICIENCIES)
@pytest.mark.parametrize("group", NEIGHBOURS)
def test_colours_differ_to_every_eye(group: str, eye: str):
    """Twelve units of L*a*b* are well above the two or three that are just noticeable; communication also has a hatch."""
    linear = [((np.array(to_rgb(plots.COLOURS[name])) + 0.055) / 1.055) ** 2.4 for name in NEIGHBOURS[group]]
    seen = [lab(np.clip(DEFICIENCIES[eye] @ rgb, 0, 1)) for rgb in linear]
    for i, one in enumerate(seen):
        for j, other in enumerate(seen[:i]):
            assert np.linalg.norm(one - other) > 12, (NEIGHBOURS[group][i], NEIGHBOURS[group][j])


def test_every_part_has_a_colour(result: sim.StepResult):
    assert set(result.breakdown()["part"]) <= set(plots.COLOURS)


def test_drawing_leaves_the_tables_alone(result: sim.StepResult, ax: Axes):
    before = result.breakdown(), result.memory()
    plots.plot_breakdown(result, ax=ax)
    plots.plot_memory(result, ax=ax)
    assert result.breakdown().equals(before[0])
    assert result.memory().equals(before[1])


class TestSchedule:
    @pytest.mark.parametrize(("name", "vpp"), [("1f1b", 1), ("zb-h2", 1), ("interleaved", 3), ("zb-v", 2), ("dualpipe", 2)])
    def test_draws_every_action_once(self, name: str, vpp: int, ax: Axes):
        order = schedule(name, 4, vpp, 12)
        assert plots.plot_schedule(order, ax=ax) is ax
        everything = [action for row in order.table for action in actions(row)]
        for kind, label in plots.ACTIONS.items():
            assert len(extents(ax, label)) == sum(action.kind == kind for action in everything)
        kinds = {action.kind for action in everything}
        assert legend(ax) == [label for kind, label in plots.ACTIONS.items() if kind in kinds]

    def test_cells_are_as_long_as_their_times_and_numbered(self, ax: Axes):
        plots.plot_schedule(schedule("zb-h1", 3, 1, 5), times=(1.0, 1.5, 0.5), ax=ax)
        for label, seconds in (("forward", 1.0), ("input gradient", 1.5), ("weight gradient", 0.5)):
            left, right, _ = extents(ax, label).T
            assert right - left == pytest.approx(seconds)
        assert sorted(words(ax)) == sorted(3 * 3 * [str(n) for n in range(5)])
        assert "zb-h1: 3 ranks, 5 micro-batches" in ax.get_title("left")

    def test_crowded_cells_bear_no_numbers(self, ax: Axes):
        plots.plot_schedule(schedule("1f1b", 8, 1, 256), ax=ax)
        assert not ax.texts
