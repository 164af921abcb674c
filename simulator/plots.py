"""Pictures of results: each function draws one table onto one Axes and returns it.

Nothing is computed here that a table of the result does not hold. With `ax` a function draws there and touches no global
state; without it, a figure of a fitting size is made with pyplot, so that a notebook shows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from simulator.errors import SimulatorError
from simulator.result import StepResult
from simulator.schedules import Schedule, actions
from simulator.timeline import Timeline

#: colour of everything drawn, kept apart by all common kinds of colour blindness (after Paul Tol's "muted" and "light" schemes)
COLOURS = {
    "forward": "#88CCEE",
    "backward": "#33629B",
    "input gradient": "#44AA99",
    "weight gradient": "#DDCC77",
    "optimizer": "#117733",
    "exposed communication": "#CC6677",
    "compute: gemm": "#332288",
    "compute: grouped_gemm": "#88CCEE",
    "compute: attention": "#44AA99",
    "compute: memory": "#117733",
    "compute: recompute": "#999933",
    "compute: host": "#EE8866",
    "compute: optimizer": "#DDCC77",
    "exposed: tp": "#AA4499",
    "exposed: cp": "#FFAABB",
    "exposed: ep": "#CC6677",
    "exposed: pp": "#EE8866",
    "exposed: dp": "#882255",
    "idle": "#DDDDDD",
    "weights": "#332288",
    "gradients": "#88CCEE",
    "optimizer state": "#117733",
    "activations": "#DDCC77",
    "buffers": "#CC6677",
    "reserved": "#BBBBBB",
    "capacity": "#882255",
    "plan": "#44AA99",
    "best plan": "#882255",
}
#: colour of what has no entry of its own
OTHER = "#777777"
#: what the parts of a breakdown are, for readers who meet the axes' names for the first time
WORDS = {
    "compute: gemm": "compute: matrix products",
    "compute: grouped_gemm": "compute: expert matrix products",
    "compute: memory": "compute: memory-bound kernels",
    "exposed: tp": "exposed: tensor parallel (tp)",
    "exposed: cp": "exposed: context parallel (cp)",
    "exposed: ep": "exposed: expert all-to-all (ep)",
    "exposed: pp": "exposed: pipeline sends (pp)",
    "exposed: dp": "exposed: data parallel (dp)",
    "idle": "idle: bubble and waiting",
}
#: kinds of bars in a timeline, in the order of the legend
KINDS = ("forward", "backward", "optimizer", "exposed communication")
#: streams whose communication happens in the middle of a forward or backward
INSIDE = ("tp", "cp", "ep")


def plot_timeline(
    result: StepResult, stages: Sequence[int] | None = None, window_s: tuple[float, float] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what each pipeline stage does when, one row per stage, and return the Axes.

    Parameters
    ----------
    result : StepResult
    stages : sequence of int, optional
        Stages to draw, from top to bottom; all of them if left out. A stage shows its most numerous class of ranks.
    window_s : tuple of float, optional
        First and last second to draw; the whole step if left out.
    ax : Axes, optional

    Notes
    -----
    A bar is the forward or the backward of one micro-batch (recompute belongs to the backward). Where there is room it
    bears the number of the micro-batch, or with several chunks the whole action of the schedule: ``1F3`` is the forward of
    micro-batch 3 on chunk 1. Communication is drawn only while nothing computes: in a strip under the bar whose
    micro-batch it holds up (paler where it alternates with compute too fast to see), over the full height where it stands
    between bars. Blank is idle.
    """
    chosen = _classes(result.timeline, stages)
    begin, end = window_s or (0.0, result.step_time_s)
    if not end > begin:
        raise SimulatorError(f"window_s = ({begin}, {end}) is empty; give (first, last) with first < last")
    unit, scale = _unit(end - begin)
    ax = _axes(ax, 11, 1.5 + min(max(0.3 * len(chosen), min(0.5 * len(chosen), 3.0)), 9.0))
    tables = (bars(result.timeline, number).assign(row=row) for row, number in enumerate(chosen.values()))
    spans = pd.concat([table[(table["end_s"] > begin) & (table["start_s"] < end)] for table in tables], ignore_index=True)
    spans["left"], spans["right"] = (spans[c].clip(begin, end) * scale for c in ("start_s", "end_s"))
    for kind, mine in spans.groupby(spans["kind"].astype(pd.CategoricalDtype(KINDS)), observed=True):
        high, low = np.where(mine["inside"], 0.22, -0.42), np.where(mine["action"] != "", 0.2, 0.42)
        corners = _corners(mine, mine["row"] + high, mine["row"] + low)
        ax.add_collection(PolyCollection(corners, facecolors=COLOURS[kind], edgecolors="none", label=kind, snap=False), autolim=False)
    _borders_and_names(ax, spans[~spans["inside"] & (spans["action"] != "")], (end - begin) * scale)
    ax.set_xlim(begin * scale, end * scale)
    ax.set_ylim(len(chosen) - 0.45, -0.55)
    ticks = range(0, len(chosen), _every(len(chosen), ax.bbox.height / ax.figure.dpi, 15))
    ax.set_yticks(ticks, [str(list(chosen)[row]) for row in ticks])
    idle = result.breakdown().set_index("part")["share"].get("idle", 0.0)
    _frame(ax, f"{_headline(result)}, {_percent(idle)} idle", f"time since the step began ({unit})", "pipeline stage")
    _legend(ax, [*(Patch(color=COLOURS[k], label=k) for k in KINDS), Patch(facecolor="white", edgecolor="0.6", label="idle")])
    return ax


#: kinds of actions of a schedule -> what they are called in pictures
ACTIONS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def plot_schedule(schedule: Schedule, times: tuple[float, float, float] = (1.0, 1.0, 1.0), ax: Axes | None = None) -> Axes:
    """Draw the table of a pipeline schedule as a grid, one row per rank, and return the Axes.

    Parameters
    ----------
    schedule : Schedule
    times : tuple of float
        Durations of a forward, an input gradient and a weight gradient; a whole backward takes the last two together.
    ax : Axes, optional

    Notes
    -----
    All stages are alike and messages take no time. The numbers are micro-batches; chunks after the first are paler. A pair
    is drawn as two halves, the forward above the backward. Blank is idle.
    """
    spans = schedule.spans(times)
    length = max(end for *_, end in spans)
    ax = _axes(ax, 11, 0.9 + 0.34 * schedule.pp)
    cells: dict[tuple[str, float], list[list[tuple[float, float]]]] = {}
    narrowest = min(end - start for _, _, start, end in spans) / length * ax.bbox.width / ax.figure.dpi * 72  # points
    for rank, entry, start, end in spans:
        parts = tuple(actions((entry,)))
        for i, action in enumerate(parts):
            high, low = (rank - 0.45 + 0.9 * i / len(parts), rank - 0.45 + 0.9 * (i + 1) / len(parts))
            pale = 0.55 * action.chunk / (schedule.vpp - 1) if schedule.vpp > 1 else 0.0
            cells.setdefault((action.kind, pale), []).append([(start, high), (end, high), (end, low), (start, low)])
            if narrowest > 8:
                light = pale < 0.3 and action.kind in "BI"
                name, size = str(action.micro_batch), 7 if len(parts) == 1 else 6
                ax.text(
                    (start + end) / 2, (high + low) / 2, name, ha="center", va="center", fontsize=size, color="white" if light else "black"
                )
    for (kind, pale), corners in cells.items():
        colour = pale + (1 - pale) * np.array(to_rgb(COLOURS[ACTIONS[kind]]))
        ax.add_collection(
            PolyCollection(corners, facecolors=colour, edgecolors="white", linewidths=0.5, label=ACTIONS[kind]), autolim=False
        )
    ax.set_xlim(0, length)
    ax.set_ylim(schedule.pp - 0.45, -0.55)
    ax.set_yticks(range(schedule.pp))
    waits = 1 - sum(end - start for _, _, start, end in spans) / (length * schedule.pp)
    title = f"{schedule.name}: {schedule.pp} ranks, {schedule.micro_batches} micro-batches, {_percent(waits)} idle"
    _frame(ax, title, "time", "pipeline rank")
    _legend(ax, [Patch(color=COLOURS[ACTIONS[k]], label=ACTIONS[k]) for k in ACTIONS if any(k == kind for kind, _ in cells)])
    return ax


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
    ax = _axes(ax, min(max(7.0, 4.5 + 0.4 * len(stage)), 13.0), 4.2)
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
    ax.set_xticks(stage[:: _every(len(stage), ax.bbox.width / ax.figure.dpi, 22)])
    worst = int(table["total_bytes"].idxmax())
    title = f"Peak memory {result.peak_memory_bytes / 1e9:.1f} GB (stage {stage[worst]}) of {capacity / 1e9:.1f} GB"
    _frame(ax, title, "pipeline stage", "peak memory per accelerator (GB)")
    _legend(ax, [line, *reversed(ax.containers)])
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
    ax = _axes(ax, 9.5, 1.4 + 0.36 * len(table))
    unit, scale = _unit(result.step_time_s)
    rows, seconds, hidden = np.arange(len(table)), table["seconds"].to_numpy() * scale, table["hidden_s"].to_numpy() * scale
    ax.barh(rows, seconds, height=0.75, color=[COLOURS.get(p, OTHER) for p in table["part"]], label="part of the step")
    if (some := hidden > 0).any():
        look = {"color": "white", "edgecolor": "0.55", "hatch": "////", "linewidth": 0.6, "label": "hidden beside compute: costs no time"}
        _legend(ax, [ax.barh(rows[some], hidden[some], left=seconds[some], height=0.75, **look)], beside=False)
    for row, part in table.iterrows():
        beside = f", {_readable_s(part['hidden_s'])} hidden" if part["hidden_s"] else ""
        text = f" {_readable_s(part['seconds'])} ({_percent(part['share'])}){beside}"
        ax.annotate(text, (seconds[row] + hidden[row], row), va="center", ha="left")
    ax.set_yticks(rows, [WORDS.get(p, p) for p in table["part"]])
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(0, 1.4 * (seconds + hidden).max())
    _frame(ax, _headline(result), f"mean time per accelerator ({unit})")
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
    unit, scale = _unit(result.step_time_s)
    memory, seconds = table["peak_memory_bytes"].to_numpy() / 1e9, table["step_time_s"].to_numpy() * scale
    ax = _axes(ax, 11, max(4.2, 2.0 + 0.27 * len(table)))
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
    _frame(ax, title, "peak memory per accelerator (GB)", f"step time ({unit})")
    common, names = _plan_names(table)
    names = [f"{i}: {name}, {mfu:.1%} MFU" for i, name, mfu in zip(range(1, len(table) + 1), names, table["mfu_causal"])]
    _legend(ax, [Patch(alpha=0, label=name) for name in names], title=common, handlelength=0, handletextpad=0, alignment="left")
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
    ax = _axes(ax, 11, max(4.0, 1.4 + 0.42 * len(results)))
    unit, scale = _unit(max(r.step_time_s for r in results.values()))
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
        ax.annotate(f" {_readable_s(r.step_time_s)}, {r.mfu_causal:.1%} MFU", (r.step_time_s * scale, row), va="center", ha="left")
    ax.set_yticks(rows, list(results))
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.set_xlim(0, 1.25 * left.max())
    _frame(ax, "Where the step goes", f"mean time per accelerator and step ({unit})")
    _legend(ax, list(ax.containers))
    return ax


def bars(timeline: Timeline, rank_class: int) -> pd.DataFrame:
    """Return the bars of one class of ranks.

    Parameters
    ----------
    timeline : Timeline
    rank_class : int

    Returns
    -------
    DataFrame
        One row per bar: ``kind``, ``action`` (empty for communication), ``inside`` (communication that holds up a micro-batch
        whose bar goes on around it), ``start_s``, ``end_s``.

    Notes
    -----
    Touching spans of one micro-batch's forward or backward become one bar. Communication is cut to where nothing computes.
    """
    mine = (timeline.rank_class == rank_class) & (timeline.end_s > timeline.start_s)
    starts, ends, stream, action = (x[mine] for x in (timeline.start_s, timeline.end_s, timeline.stream, timeline.action))
    borders = np.unique(np.concatenate([starts, ends]))
    first, last = np.searchsorted(borders, starts), np.searchsorted(borders, ends)
    actions, number = np.unique(action.astype(str), return_inverse=True)
    computes, inside = stream == "compute", np.isin(stream, INSIDE) & (action != "")
    owner = np.full(max(len(borders) - 1, 0), -1)  # whose forward or backward each interval between two borders belongs to
    for these in (inside, computes):
        for a, b, n in zip(first[these], last[these], number[these]):
            owner[a:b] = n
    busy, computing = _covered(len(borders), first, last), _covered(len(borders), first[computes], last[computes])
    exposed = busy & ~computing
    passes = _runs(borders, owner)
    passes["action"] = actions[passes.pop("value")]
    passes.insert(0, "kind", [_kind(a) for a in passes["action"]])
    held = _runs(borders, np.where(exposed, (owner >= 0).astype(int), -1))
    held["inside"] = held.pop("value").astype(bool)
    return pd.concat([passes.assign(inside=False), held.assign(kind="exposed communication", action="")], ignore_index=True)


def _covered(borders: int, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return which intervals between `borders` borders some span covers."""
    change = np.zeros(borders)
    np.add.at(change, first, 1)
    np.add.at(change, last, -1)
    return np.cumsum(change)[:-1] > 0


def _runs(borders: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """Return the longest runs of intervals with the same value; -1 is left out."""
    begin = np.flatnonzero(np.diff(values, prepend=-2) != 0)
    stop = np.append(begin[1:], len(values)) if len(begin) else begin
    keep = values[begin] >= 0
    begin, stop = begin[keep], stop[keep]
    return pd.DataFrame({"value": values[begin], "start_s": borders[begin], "end_s": borders[stop]})


def _kind(action: str) -> str:
    """Return what an action like ``0F3`` is; what belongs to no micro-batch follows the last backward."""
    letter = action.lstrip("0123456789")[:1]
    return {"F": "forward", "": "optimizer"}.get(letter, "backward")


def _classes(timeline: Timeline, stages: Sequence[int] | None) -> dict[int, int]:
    """Return the most numerous class of ranks of every stage asked for."""
    classes, first = np.unique(timeline.rank_class, return_index=True)
    of_stage: dict[int, int] = {}
    for number, stage in zip(classes.tolist(), timeline.stage[first].tolist(), strict=True):
        if stage not in of_stage or timeline.ranks[number] > timeline.ranks[of_stage[stage]]:
            of_stage[stage] = number
    wanted = sorted(of_stage) if stages is None else list(dict.fromkeys(stages))
    unknown = [stage for stage in wanted if stage not in of_stage]
    if unknown or not wanted:
        raise SimulatorError(f"stages = {list(wanted)}: the plan has stages {min(of_stage)} to {max(of_stage)}; choose from these")
    return {stage: of_stage[stage] for stage in wanted}


def _corners(spans: pd.DataFrame, high: pd.Series, low: pd.Series) -> np.ndarray:
    """Return the corners (n, 4, 2) of bars between `left` and `right`, `high` and `low`; rows count downwards."""
    left, right, high, low = (x.to_numpy(dtype=float) for x in (spans["left"], spans["right"], high, low))
    return np.stack([np.stack(pair, axis=-1) for pair in ((left, low), (right, low), (right, high), (left, high))], axis=1)


def _borders_and_names(ax: Axes, passes: pd.DataFrame, width: float) -> None:
    """Set wide forward and backward bars apart by white lines, and name those that have room for it."""
    if passes["action"].str.startswith("0").all():
        passes = passes.assign(action=passes["action"].str[2:])
    wide = passes[passes["right"] - passes["left"] > 0.006 * width]
    ax.vlines(wide["right"], wide["row"] - 0.42, wide["row"] + 0.42, colors="white", linewidths=0.8)
    room = 0.0088 * width * passes["action"].str.len().max()  # for the longest name, so that a row does not stop naming at 9
    for bar in wide[wide["right"] - wide["left"] > room].itertuples():
        place = ((bar.left + bar.right) / 2, bar.row - 0.1)
        colour = "white" if bar.kind == "backward" else "black"
        ax.annotate(bar.action, place, ha="center", va="center", fontsize=7.5, color=colour, annotation_clip=True)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the Axes of a new figure of that many inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _frame(ax: Axes, title: str, x: str, y: str = "") -> None:
    """Write title and axis labels, and take away the lines that bound nothing."""
    ax.set_title(title, loc="left")
    ax.set_xlabel(x, loc="center" if y else "left")
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)


def _every(count: int, inches: float, points: float) -> int:
    """Return every how many of `count` labels to write so that each has `points` of room along `inches`."""
    return max(1, math.ceil(count * points / 72 / inches))


def _legend(ax: Axes, handles: list, beside: bool = True, **kwargs: Any) -> None:
    """Put the legend where no data is: right of the axes, or under their right corner."""
    right = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    place = right if beside else {"loc": "upper right", "bbox_to_anchor": (1.0, 0.0), "borderaxespad": 1.9}
    ax.legend(handles=handles, frameon=False, **place, **kwargs)


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


def _headline(result: StepResult) -> str:
    s = result.scenario
    return f"{s.model.name} on {s.cluster.accelerators:,} x {s.cluster.accelerator.name}: {_readable_s(result.step_time_s)} per step"


def _unit(seconds: float) -> tuple[str, float]:
    """Return the unit of an axis as long as `seconds`, and how many of it are a second."""
    return ("ms", 1e3) if seconds < 1 else ("s", 1.0)


def _readable_s(seconds: float) -> str:
    """Return seconds as text; differences that are rounding errors as zero."""
    if seconds >= 1 or seconds < 1e-9:
        return f"{max(seconds, 0.0):.2f} s"
    return f"{1e3 * seconds:.3g} ms"


def _percent(share: float) -> str:
    """Return a share as text that tells little from nothing."""
    return "< 0.1%" if 1e-9 < share < 0.0005 else f"{max(share, 0.0):.1%}"
