"""Tables as pictures: memory, where the step goes, plans, results beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from simulator.errors import SimulatorError
from simulator.plots.style import COLOURS, OTHER, WORDS, every, frame, headline, legend, new_axes, percent, readable_s, unit_of
from simulator.results.step import StepResult


def plot_memory(result: StepResult, ax: Axes | None = None) -> Axes:
    """Draw the peak memory of each pipeline stage, part by part, under the accelerator's capacity, and return the Axes.

    Parameters
    ----------
    result : StepResult
    ax : Axes, optional
    """
    table = result.memory()
    stage, capacity = table["stage"].to_numpy(), float(table["capacity_bytes"].iloc[0])
    parts = [c for c in table.columns if c.endswith("_bytes") and c not in ("total_bytes", "capacity_bytes")]
    ax = new_axes(ax, min(max(7.0, 4.5 + 0.4 * len(stage)), 13.0), 4.2)
    under = np.zeros(len(stage))
    for column in parts:
        part = column.removesuffix("_bytes")
        label = "optimizer state" if part == "optimizer" else part
        height = table[column].to_numpy() / 1e9
        ax.bar(stage, height, bottom=under, width=0.8, color=COLOURS.get(label, OTHER), edgecolor="white", linewidth=0.5, label=label)
        under += height
    line = ax.axhline(capacity / 1e9, color=COLOURS["capacity"], linestyle="--", linewidth=1.8, label=f"capacity: {capacity / 1e9:.1f} GB")
    ax.set_ylim(0, 1.08 * max(capacity / 1e9, under.max()))
    ax.set_xlim(stage[0] - 0.6, stage[-1] + 0.6)
    ax.set_xticks(stage[:: every(len(stage), ax.bbox.width / ax.figure.dpi, 22)])
    worst = int(table["total_bytes"].idxmax())
    title = f"Peak memory {result.peak_memory_bytes / 1e9:.1f} GB (stage {stage[worst]}) of {capacity / 1e9:.1f} GB"
    frame(ax, title, "pipeline stage", "peak memory per accelerator (GB)")
    legend(ax, [line, *reversed(ax.containers)])
    return ax


def plot_activations(held: Mapping[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """Draw the activations that ranks hold over the step, one line each, and return the Axes.

    Parameters
    ----------
    held : mapping of str to DataFrame
        Tables of ``time_s`` and ``activations_bytes`` by the name of their line (`RanksResult.activations_over_time`).
    ax : Axes, optional
    """
    if not held:
        raise SimulatorError("no table of activations to draw; give at least one by name")
    ax = new_axes(ax, 10.0, 3.6)
    lines, colours = [], [COLOURS["activations"], COLOURS["gradients"], COLOURS["weights"], OTHER]
    for n, (name, table) in enumerate(held.items()):
        size, colour = table["activations_bytes"].to_numpy() / 1e9, colours[n % len(colours)]
        lines += ax.step(table["time_s"], size, where="post", color=colour, linewidth=1.6, label=f"{name}: {size.max():.1f} GB at most")
    ax.set_xlim(0, max(table["time_s"].max() for table in held.values()))
    ax.set_ylim(0, 1.08 * max(table["activations_bytes"].max() for table in held.values()) / 1e9)
    frame(ax, f"Activations of {len(held)} rank{'s' if len(held) > 1 else ''} over the step", "seconds", "activations (GB)")
    legend(ax, lines)
    return ax


def plot_breakdown(result: StepResult, ax: Axes | None = None) -> Axes:
    """Draw where the step goes, longest part first, in seconds and shares, and return the Axes.

    Parameters
    ----------
    result : StepResult
    ax : Axes, optional

    Notes
    -----
    Full bars add up to the step. A hatched bar behind one is communication that runs beside compute and costs no time.
    """
    table = result.breakdown().sort_values("seconds", ascending=False, kind="stable").reset_index(drop=True)
    ax = new_axes(ax, 9.5, 1.4 + 0.36 * len(table))
    unit, scale = unit_of(result.step_time_s)
    rows, seconds, hidden = np.arange(len(table)), table["seconds"].to_numpy() * scale, table["hidden_s"].to_numpy() * scale
    ax.barh(rows, seconds, height=0.75, color=[COLOURS.get(p, OTHER) for p in table["part"]], label="part of the step")
    if (some := hidden > 0).any():
        look = {"color": "white", "edgecolor": "0.55", "hatch": "////", "linewidth": 0.6, "label": "hidden beside compute: costs no time"}
        legend(ax, [ax.barh(rows[some], hidden[some], left=seconds[some], height=0.75, **look)], beside=False)
    for row, part in table.iterrows():
        beside = f", {readable_s(part['hidden_s'])} hidden" if part["hidden_s"] else ""
        text = f" {readable_s(part['seconds'])} ({percent(part['share'])}){beside}"
        ax.annotate(text, (seconds[row] + hidden[row], row), va="center", ha="left")
    ax.set_yticks(rows, [WORDS.get(p, p) for p in table["part"]])
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(0, 1.4 * (seconds + hidden).max())
    frame(ax, headline(result), f"mean time per accelerator ({unit})")
    return ax


def plot_plans(search: Any, ax: Axes | None = None) -> Axes:
    """Draw the best plans of a search, step time against peak memory, and return the Axes.

    Parameters
    ----------
    search : Search
        What `simulator.search` returned. Numbers are ranks in its table, 1 the fastest; the legend spells the plans out.
    ax : Axes, optional
    """
    table, result = search.table, search.best
    capacity = float(result.memory()["capacity_bytes"].iloc[0]) / 1e9
    unit, scale = unit_of(result.step_time_s)
    memory, seconds = table["peak_memory_bytes"].to_numpy() / 1e9, table["step_time_s"].to_numpy() * scale
    ax = new_axes(ax, 11, max(4.2, 2.0 + 0.27 * len(table)))
    colours = [COLOURS["best plan"], *[COLOURS["plan"]] * (len(table) - 1)]
    ax.scatter(memory, seconds, s=46, c=colours, zorder=3)
    ax.axvline(capacity, color=COLOURS["capacity"], linestyle="--", linewidth=1.8)
    low, high = min(memory.min(), 0.9 * capacity), max(memory.max(), capacity)
    ax.set_xlim(low - 0.12 * (high - low), high + 0.12 * (high - low))
    ax.margins(y=0.12)
    side = {"xytext": (5, 0), "textcoords": "offset points", "rotation": 90, "va": "center", "color": COLOURS["capacity"]}
    ax.annotate(f"capacity: {capacity:.1f} GB", (capacity, 0.5), xycoords=("data", "axes fraction"), **side)
    _number(ax, memory, seconds)
    s = result.scenario
    title = f"{s.model.name} on {s.cluster.accelerators:,} x {s.cluster.accelerator.name}: the {len(table)} fastest plans"
    frame(ax, title, "peak memory per accelerator (GB)", f"step time ({unit})")
    common, names = _plan_names(table)
    names = [f"{i}: {name}, {mfu:.1%} MFU" for i, name, mfu in zip(range(1, len(table) + 1), names, table["mfu_causal"])]
    legend(ax, [Patch(alpha=0, label=name) for name in names], title=common, handlelength=0, handletextpad=0, alignment="left")
    return ax


def plot_comparison(results: Mapping[str, StepResult], ax: Axes | None = None) -> Axes:
    """Draw where the step of each of several results goes, one stacked bar per name, and return the Axes.

    Parameters
    ----------
    results : mapping of str to StepResult
        Drawn from top to bottom; step time and causal model FLOP utilisation stand at the end of each bar.
    ax : Axes, optional
    """
    if not results:
        raise SimulatorError("nothing to compare; give at least one named result")
    table = pd.DataFrame({name: r.breakdown().set_index("part")["seconds"] for name, r in results.items()}, dtype=float).fillna(0.0)
    known = {part: place for place, part in enumerate(COLOURS)}
    table = table.loc[sorted(table.index, key=lambda part: (part == "idle", known.get(part, len(known)), part))]
    ax = new_axes(ax, 11, max(4.0, 1.4 + 0.42 * len(results)))
    unit, scale = unit_of(max(r.step_time_s for r in results.values()))
    rows, left = np.arange(len(results)), np.zeros(len(results))
    for part, values in table.iterrows():
        seconds = values.to_numpy() * scale
        hatch = "////" if str(part).startswith("exposed") else None
        ax.barh(
            rows, seconds, left=left, height=0.72, color=COLOURS.get(part, OTHER), hatch=hatch,
            edgecolor="white", linewidth=0.5, label=WORDS.get(part, part),
        )  # fmt: skip
        left += seconds
    for row, r in enumerate(results.values()):
        ax.annotate(f" {readable_s(r.step_time_s)}, {r.mfu_causal:.1%} MFU", (r.step_time_s * scale, row), va="center", ha="left")
    ax.set_yticks(rows, list(results))
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.set_xlim(0, 1.25 * left.max())
    frame(ax, "Where the step goes", f"mean time per accelerator and step ({unit})")
    legend(ax, list(ax.containers))
    return ax


def _number(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Write 1, 2, 3 ... beside the points; points on top of each other share one list of numbers."""
    spots: dict[tuple[float, float], list[str]] = {}
    wide, tall = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    for number, point in enumerate(zip(x.tolist(), y.tolist(), strict=True), start=1):
        near = [s for s in spots if abs(s[0] - point[0]) < 0.03 * wide and abs(s[1] - point[1]) < 0.037 * tall]
        spots.setdefault(near[0] if near else point, []).append(str(number))
    for point, numbers in spots.items():
        ax.annotate(", ".join(numbers), point, xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontweight="bold")


def _plan_names(table: pd.DataFrame) -> tuple[str, list[str]]:
    """Return what all plans of a search table have in common, and what is left of each."""
    axes = {a: a for a in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "zero")} | {"micro_batch": "mbs", "recompute": "recompute-"}
    same = [a for a in axes if len(table) > 1 and table[a].nunique() == 1]

    def words(row: pd.Series, which: list[str]) -> str:
        return " ".join(f"{axes[a]}{row[a]}" for a in which)

    common = words(table.iloc[0], [a for a in same if table[a].iloc[0] != 1 or a == "zero"])
    return f"all with {common}" if common else "", [words(row, [a for a in axes if a not in same]) for _, row in table.iterrows()]
