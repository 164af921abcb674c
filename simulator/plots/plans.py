"""Decisions as pictures: fronts, scaling, maps over two degrees, sensitivities, intervals, differences by term."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from simulator.errors import SimulatorError
from simulator.plots.style import COLOURS, OTHER, WORDS, frame, legend, new_axes, readable_s, unit_of
from simulator.results.step import StepResult

#: figures that can be an axis -> what it says, and how many of its units one of the column's is
FIGURES = {
    "training_days": ("training (days)", 1.0),
    "cost_usd": ("rent of the accelerators (million $)", 1e-6),
    "energy_kwh": ("energy (GWh)", 1e-6),
    "carbon_kg": ("carbon (kt CO2e)", 1e-6),
    "step_time_s": ("step time (s)", 1.0),
    "estimate_s": ("estimated step time (s)", 1.0),
    "peak_memory_bytes": ("peak memory per accelerator (GB)", 1e-9),
    "mfu_causal": ("MFU, causal (%)", 100.0),
    "network_usd": ("network (million $)", 1e-6),
}
#: colours of things that have no meaning of their own, in turn
SERIES = ("#332288", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE", "#882255", "#117733", "#AA4499", "#999933", "#EE8866")


def _figure(name: str) -> tuple[str, float]:
    if name not in FIGURES:
        raise SimulatorError(f"no axis for {name!r}; choose {', '.join(FIGURES)}")
    return FIGURES[name]


def plot_front(
    table: pd.DataFrame,
    x: str = "training_days",
    y: str = "cost_usd",
    group: str = "cluster",
    label: str = "accelerators",
    ax: Axes | None = None,
) -> Axes:
    """Draw two figures of many answers against each other, those on the front filled and joined, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        With ``on_front``, as `simulator.planning.front.mark_front` returns it.
    x, y : str
        Columns, of `FIGURES`.
    group, label : str
        Columns: a colour for each value of the one, the other beside the points.
    ax : Axes, optional
    """
    (x_words, x_scale), (y_words, y_scale) = _figure(x), _figure(y)
    ax = new_axes(ax, 9.5, 5.2)
    rows = table.dropna(subset=[x, y])
    handles = []
    for (name, some), colour in zip(rows.groupby(group, sort=False), SERIES * len(rows)):
        at, on = (some[x] * x_scale, some[y] * y_scale), some["on_front"].to_numpy()
        face = [colour if best else "white" for best in on]
        ax.scatter(*at, s=60, c=face, edgecolors=colour, linewidths=1.4, zorder=3)
        handles.append(Line2D([], [], marker="o", linestyle="", color=colour, label=str(name)))
        for a, b, text, best in zip(*at, some[label], on, strict=True):
            words = f"{text:,}" if isinstance(text, int | np.integer) else str(text)
            ax.annotate(words, (a, b), xytext=(6, 5) if best else (6, -11), textcoords="offset points", fontsize=8)
    front = rows[rows["on_front"]].sort_values([x, y])
    joined = front[front[y] <= front[y].cummin()]  # the others are on the front by a third figure
    ax.plot(joined[x] * x_scale, joined[y] * y_scale, color="0.6", linewidth=1.0, linestyle=":", zorder=1)
    handles.append(Line2D([], [], marker="o", linestyle=":", color="0.4", label="not beaten by another"))
    handles.append(Line2D([], [], marker="o", linestyle="", color="0.4", markerfacecolor="white", label="another is better in all"))
    ax.margins(0.1)
    frame(ax, f"{len(front)} of {len(rows)} answers are worth choosing between (labels: {label})", x_words, y_words)
    legend(ax, handles)
    return ax


def plot_scaling(tables: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw tokens per second over accelerators, with the efficiency at each size and perfect scaling dashed, and return the Axes.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        From `simulator.planning.questions.scaling`, by the name that the legend gives them.
    ax : Axes, optional
    """
    if not tables:
        raise SimulatorError("nothing to draw; give at least one named table of scaling")
    ax = new_axes(ax, 9.0, 5.0)
    ticks: set[int] = set()
    for place, ((name, table), colour) in enumerate(zip(tables.items(), SERIES * len(tables))):
        rows = table.dropna(subset=["tokens_per_s"])
        size, rate = rows["accelerators"].to_numpy(), rows["tokens_per_s"].to_numpy() / 1e6
        ax.plot(size, rate, marker="o", color=colour, label=name)
        ax.plot(size, rate[0] / size[0] * size, color=colour, linestyle="--", linewidth=0.9, alpha=0.6)
        for a, b, share in zip(size, rate, rows["efficiency"], strict=True):
            offset, side = ((-6, 8), "right") if place % 2 == 0 else ((6, -14), "left")
            ax.annotate(f"{share:.0%}", (a, b), xytext=offset, textcoords="offset points", color=colour, fontsize=9, ha=side)
        ticks |= set(size.tolist())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(sorted(ticks), [f"{n:,}" for n in sorted(ticks)])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.margins(0.12)
    frame(ax, "Training rate of each size with its own best plan (dashed: perfect)", "accelerators", "million tokens per second")
    legend(ax, list(ax.get_lines()[::2]))
    return ax


def plot_heat(table: pd.DataFrame, x: str = "ep", y: str = "pp", ax: Axes | None = None) -> Axes:
    """Draw the best step of every combination of two choices as a map, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        From `simulator.Search.cells`.
    x, y : str
        Its two choices.
    ax : Axes, optional

    Notes
    -----
    The frame is the best. A cell without a number is legal and does not fit in memory, or is not legal at all.
    """
    step, legal = (table.pivot(index=y, columns=x, values=name) for name in ("estimate_s", "legal"))
    ax = new_axes(ax, 2.8 + 0.85 * step.shape[1], 1.9 + 0.55 * step.shape[0])
    values = step.to_numpy(dtype=float)
    unit, scale = unit_of(float(np.nanmin(values)))
    ax.set_facecolor("0.92")  # what a masked cell shows
    image = ax.imshow(np.ma.masked_invalid(values * scale), cmap="viridis_r", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        fits, none = np.isfinite(value), not legal.to_numpy()[row, column] > 0
        text = f"{value * scale:.3g}" if fits else "not legal" if none else "too large"
        colour = "0.45" if not fits else "white" if value > middle else "black"
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=9 if fits else 7)
    row, column = np.unravel_index(int(np.nanargmin(values)), values.shape)
    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS["best plan"], linewidth=2.5))
    ax.set_xticks(range(step.shape[1]), step.columns)
    ax.set_yticks(range(step.shape[0]), step.index)
    ax.figure.colorbar(image, ax=ax, label=f"best step, estimated ({unit})")
    frame(ax, f"Best step of every {y} and {x}", x, y)
    return ax


def plot_tornado(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw how far each input moves the step of the chosen plan between the ends of its interval, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        From `simulator.planning.sensitivity.tornado`.
    ax : Axes, optional

    Notes
    -----
    Bars begin at the step with every input as it is. A hatched input changes which plan is best at one of its ends.
    """
    ax = new_axes(ax, 10.0, 1.6 + 0.5 * len(table))
    base = float(table["base_s"].iloc[0])
    unit, scale = unit_of(base)
    place = np.arange(len(table))
    reach = 0.0
    for side, colour in (("low", COLOURS["exposed communication"]), ("high", COLOURS["plan"])):
        moved = (table[f"{side}_s"] - base).to_numpy() * scale
        hatch = ["////" if changes else "" for changes in table["changes"]]
        ax.barh(place, moved, left=base * scale, height=0.65, color=colour, hatch=hatch, edgecolor="white", label=f"{side} end")
        for y, by, factor in zip(place, moved, table[side], strict=True):
            right = by > 0 or (by == 0 and side == "high")
            ax.annotate(
                f"x {factor:g}", (base * scale + by, y), xytext=(4 if right else -4, 0), textcoords="offset points",
                ha="left" if right else "right", va="center", fontsize=8,
            )  # fmt: skip
        reach = max(reach, float(np.abs(moved).max()))
    ax.axvline(base * scale, color="0.2", linewidth=1.2)
    ax.set_xlim(base * scale - 1.25 * reach, base * scale + 1.25 * reach)
    ax.set_yticks(place, [f"{name}{' *' if changes else ''}" for name, changes in zip(table["input"], table["changes"], strict=True)])
    ax.invert_yaxis()
    note = "* another plan is best at one end" if table["changes"].any() else "no input changes which plan is best"
    frame(ax, f"What the step of {readable_s(base)} rests on ({note})", f"estimated step time of the chosen plan ({unit})")
    legend(ax, list(ax.containers))
    return ax


def plot_intervals(results: Mapping[str, StepResult], ax: Axes | None = None) -> Axes:
    """Draw the days that training takes on each of several machines, with 80 % intervals, and return the Axes.

    Parameters
    ----------
    results : mapping of str to StepResult
    ax : Axes, optional

    Notes
    -----
    Intervals come from the errors on comparable published runs, see `StepResult.interval`. A hollow dot lies outside the
    range in which the simulator has been held against measurements.
    """
    if not results:
        raise SimulatorError("nothing to compare; give at least one named result")
    ax = new_axes(ax, 9.5, 1.4 + 0.5 * len(results))
    colour = COLOURS["compute: gemm"]
    for place, result in enumerate(results.values()):
        around, steps = result.interval(), result.scenario.job.steps / 86400
        low, high = around.low_s * steps, around.high_s * steps
        ax.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        known = around.inside and around.accelerator_known
        ax.plot(result.training_days, place, marker="o", markersize=8, color=colour, markerfacecolor=colour if known else "white")
        ax.annotate(f"  {result.training_days:.0f} ({low:.0f} to {high:.0f})", (max(high, result.training_days), place), va="center")
    ax.set_yticks(range(len(results)), list(results))
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.set_xlim(0, 1.25 * ax.get_xlim()[1])
    frame(ax, "Days of training, with 80 % intervals (hollow: outside the validated range)", "training (days)")
    return ax


def plot_differences(table: pd.DataFrame, title: str, ax: Axes | None = None) -> Axes:
    """Draw what one step spends more or less than another, term by term, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        From `Comparison.differences`: ``part`` and ``seconds``.
    title : str
    ax : Axes, optional
    """
    rows = table[table["seconds"].abs() > 1e-3 * table["seconds"].abs().max()]
    if rows.empty:
        raise SimulatorError("the steps do not differ; compare others")
    ax = new_axes(ax, 9.5, 1.4 + 0.36 * len(rows))
    total = float(table["seconds"].sum())
    unit, scale = unit_of(max(float(rows["seconds"].abs().max()), abs(total)))
    place, seconds = np.arange(len(rows)), rows["seconds"].to_numpy() * scale
    ax.barh(place, seconds, height=0.72, color=[COLOURS.get(part, OTHER) for part in rows["part"]])
    for y, value in zip(place, seconds, strict=True):
        side = {"xytext": (4 if value > 0 else -4, 0), "ha": "left" if value > 0 else "right"}
        ax.annotate(f"{value:+.3g}", (value, y), textcoords="offset points", va="center", fontsize=9, **side)
    ax.axvline(0, color="0.2", linewidth=1.0)
    ax.margins(x=0.18)
    ax.set_yticks(place, [WORDS.get(part, part) for part in rows["part"]])
    ax.invert_yaxis()
    frame(ax, f"{title}: {total * scale:+.3g} {unit} per step", f"difference ({unit})")
    return ax
