"""Pictures of results: each function draws one table onto one Axes and returns it.

Nothing is computed here that a table of the result does not hold. With `ax` a function draws there and touches no global
state; without it, a figure of a fitting size is made with pyplot, so that a notebook shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch, Rectangle

from simulator.result import StepResult
from simulator.timeline import Timeline

#: colour of everything drawn, kept apart by all common kinds of colour blindness (after Paul Tol's "muted" and "light" schemes)
COLOURS = {
    "forward": "#88CCEE",
    "backward": "#332288",
    "optimizer": "#117733",
    "exposed communication": "#CC6677",
    "compute: gemm": "#332288",
    "compute: grouped_gemm": "#88CCEE",
    "compute: attention": "#44AA99",
    "compute: memory": "#117733",
    "compute: recompute": "#999933",
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
#: above this many bars white gaps between them would hide them
FEW_BARS = 1500


def plot_timeline(
    result: StepResult, stages: Sequence[int] | None = None, window_s: tuple[float, float] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what the compute stream of each pipeline stage does when, and return the Axes.

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
    Forward and backward are bars per micro-batch, recompute inside the backward. Communication is drawn where nothing
    computes; what runs beside compute is not visible. Blank is idle.
    """
    timeline, chosen = result.timeline, _classes(result.timeline, stages)
    begin, end = window_s or (0.0, result.step_time_s)
    if not end > begin:
        raise ValueError(f"window_s = ({begin}, {end}) is empty; give (first, last) with first < last")
    unit, scale = ("ms", 1e3) if end - begin < 1 else ("s", 1.0)
    ax = _axes(ax, 11, 1.6 + 0.27 * max(len(chosen), 4))
    drawn: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for row, number in enumerate(chosen.values()):
        for kind, (starts, ends) in bars(timeline, number).items():
            seen = (ends > begin) & (starts < end)
            left, right = (np.clip(x[seen], begin, end) * scale for x in (starts, ends))
            drawn[kind].append(_rectangles(left, right, row))
    few = sum(len(r) for rectangles in drawn.values() for r in rectangles) <= FEW_BARS
    for kind, rectangles in drawn.items():
        edge = {"edgecolors": "white", "linewidths": 0.4} if few else {"edgecolors": "none"}
        ax.add_collection(PolyCollection(np.concatenate(rectangles), facecolors=COLOURS[kind], label=kind, **edge), autolim=False)
    ax.set_xlim(begin * scale, end * scale)
    ax.set_ylim(len(chosen) - 0.5, -0.5)
    ax.set_yticks(range(len(chosen)), [str(stage) for stage in chosen])
    ax.set_xlabel(f"time since the step began ({unit})")
    ax.set_ylabel("pipeline stage")
    ax.set_title(f"{_headline(result)}, {_idle(result):.1%} idle", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, [*(Patch(color=COLOURS[k], label=k) for k in KINDS), Patch(facecolor="white", edgecolor="0.6", label="idle")])
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
    ax = _axes(ax, max(7.0, 4.5 + 0.4 * len(stage)), 4.2)
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
    ax.set_xticks(stage)
    ax.set_xlabel("pipeline stage")
    ax.set_ylabel("peak memory per accelerator (GB)")
    worst = int(table["total_bytes"].idxmax())
    ax.set_title(f"Peak memory {result.peak_memory_bytes / 1e9:.1f} GB (stage {stage[worst]}) of {capacity / 1e9:.1f} GB", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
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
    Full bars add up to the step. A pale bar behind one is communication that runs beside compute and costs no time.
    """
    table = result.breakdown().sort_values("seconds", ascending=False, kind="stable").reset_index(drop=True)
    ax = _axes(ax, 9.5, 1.4 + 0.36 * len(table))
    rows, seconds, hidden = np.arange(len(table)), table["seconds"].to_numpy(), table["hidden_s"].to_numpy()
    ax.barh(rows, seconds, height=0.75, color=[COLOURS.get(p, OTHER) for p in table["part"]], label="part of the step")
    if hidden.any():
        pale = ax.barh(rows, hidden, left=seconds, height=0.75, color="white", edgecolor="0.55", hatch="////", linewidth=0.6)
        pale.set_label("hidden beside compute: costs no time")
        _legend(ax, [pale], beside=False)
    for row, part in table.iterrows():
        text = f" {_readable_s(part['seconds'])}  ({part['share']:.1%})"
        ax.annotate(text, (part["seconds"] + part["hidden_s"], row), va="center", ha="left")
    ax.set_yticks(rows, [WORDS.get(p, p) for p in table["part"]])
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.set_xlim(0, 1.22 * (seconds + hidden).max())
    ax.set_xlabel("mean time per accelerator (s)")
    ax.set_title(_headline(result), loc="left")
    ax.spines[["top", "right"]].set_visible(False)
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
    memory, seconds = table["peak_memory_bytes"].to_numpy() / 1e9, table["step_time_s"].to_numpy()
    ax = _axes(ax, 11, max(4.2, 1.8 + 0.27 * len(table)))
    colours = [COLOURS["best plan"], *[COLOURS["plan"]] * (len(table) - 1)]
    ax.scatter(memory, seconds, s=46, c=colours, zorder=3)
    line = ax.axvline(capacity, color=COLOURS["capacity"], linestyle="--", linewidth=1.8, label=f"capacity: {capacity:.1f} GB")
    low, high = memory.min(), max(memory.max(), capacity)
    ax.set_xlim(low - 0.12 * (high - low), high + 0.08 * (high - low))
    ax.margins(y=0.12)
    ax.set_xlabel("peak memory per accelerator (GB)")
    ax.set_ylabel("step time (s)")
    _number(ax, memory, seconds)
    s = result.scenario
    text = f"{s.model.name} on {s.cluster.accelerators:,} x {s.cluster.accelerator.name}: {search.fitting:,} of {search.legal:,} plans fit"
    ax.set_title(text, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    names = [Patch(alpha=0, label=f"{i + 1}: {_plan(row)}, {row['mfu_causal']:.1%} MFU") for i, row in table.iterrows()]
    _legend(ax, [*names, line], handlelength=1.2)
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
        raise ValueError("nothing to compare; give at least one named result")
    table = pd.DataFrame({name: r.breakdown().set_index("part")["seconds"] for name, r in results.items()}, dtype=float).fillna(0.0)
    known = {part: place for place, part in enumerate(COLOURS)}
    table = table.loc[sorted(table.index, key=lambda part: (part == "idle", known.get(part, len(known)), part))]
    ax = _axes(ax, 11, max(4.0, 1.4 + 0.42 * len(results)))
    rows, left = np.arange(len(results)), np.zeros(len(results))
    for part, values in table.iterrows():
        seconds = values.to_numpy()
        hatch = "////" if str(part).startswith("exposed") else None
        ax.barh(
            rows, seconds, left=left, height=0.72, color=COLOURS.get(part, OTHER), hatch=hatch,
            edgecolor="white", linewidth=0.5, label=WORDS.get(part, part),
        )  # fmt: skip
        left += seconds
    for row, r in enumerate(results.values()):
        ax.annotate(f" {r.step_time_s:.3g} s, {r.mfu_causal:.1%} MFU", (r.step_time_s, row), va="center", ha="left")
    ax.set_yticks(rows, list(results))
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.set_xlim(0, 1.25 * left.max())
    ax.set_xlabel("mean time per accelerator and step (s)")
    ax.set_title("Where the step goes", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, list(ax.containers))
    return ax


def bars(timeline: Timeline, rank_class: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the bars of one class of ranks: starts and ends in seconds, by kind.

    Parameters
    ----------
    timeline : Timeline
    rank_class : int

    Notes
    -----
    Touching spans of one micro-batch's forward or backward become one bar. Communication is cut to where nothing computes.
    """
    mine = (timeline.rank_class == rank_class) & (timeline.end_s > timeline.start_s)
    starts, ends, action = timeline.start_s[mine], timeline.end_s[mine], timeline.action[mine].astype(str)
    computes = timeline.stream[mine] == "compute"
    borders = np.unique(np.concatenate([starts, ends]))
    code = np.full(max(len(borders) - 1, 0), -1)
    change = np.zeros(len(borders))
    np.add.at(change, np.searchsorted(borders, starts[~computes]), 1)
    np.add.at(change, np.searchsorted(borders, ends[~computes]), -1)
    names, number = np.unique(action, return_inverse=True)
    exposed = len(names)
    code[np.cumsum(change)[:-1] > 0] = exposed
    first, last = (np.searchsorted(borders, x[computes]) for x in (starts, ends))
    for a, b, n in zip(first, last, number[computes], strict=True):
        code[a:b] = n
    cuts = np.flatnonzero(np.diff(code)) + 1
    begin, stop = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(code)]])
    kinds = np.array([*(_kind(name) for name in names), "exposed communication", "idle"])
    kind = kinds[code[begin]] if len(code) else np.array([], dtype=str)
    return {k: (borders[begin[kind == k]], borders[stop[kind == k]]) for k in KINDS}


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
        raise ValueError(f"stages = {list(wanted)}: the plan has stages {min(of_stage)} to {max(of_stage)}; choose from these")
    return {stage: of_stage[stage] for stage in wanted}


def _rectangles(left: np.ndarray, right: np.ndarray, row: int, half: float = 0.4) -> np.ndarray:
    """Return the corners (n, 4, 2) of bars on one row."""
    low, high = np.full(len(left), row - half), np.full(len(left), row + half)
    return np.stack([np.stack(pair, axis=-1) for pair in ((left, low), (right, low), (right, high), (left, high))], axis=1)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the Axes of a new figure of that many inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _legend(ax: Axes, handles: list, beside: bool = True, **kwargs: Any) -> None:
    """Put the legend where no data is: right of the axes, or below the last bar when the corner is free."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0} if beside else {"loc": "lower right"}
    ax.legend(handles=handles, frameon=False, **place, **kwargs)


def _number(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Write 1, 2, 3 ... beside the points; points on top of each other share one list of numbers."""
    spots: dict[tuple[float, float], list[str]] = {}
    wide, tall = np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())
    for number, point in enumerate(zip(x.tolist(), y.tolist(), strict=True), start=1):
        near = [s for s in spots if abs(s[0] - point[0]) < 0.03 * wide and abs(s[1] - point[1]) < 0.045 * tall]
        spots.setdefault(near[0] if near else point, []).append(str(number))
    for point, numbers in spots.items():
        ax.annotate(", ".join(numbers), point, xytext=(-6, 4), textcoords="offset points", ha="right", fontweight="bold")


def _plan(row: pd.Series) -> str:
    """Return the degrees of one row of a search table that are not 1, and what is recomputed."""
    degrees = " ".join(f"{axis}{row[axis]}" for axis in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp") if row[axis] > 1)
    return f"{degrees} zero{row['zero']} mbs{row['micro_batch']} recompute-{row['recompute']}"


def _headline(result: StepResult) -> str:
    s = result.scenario
    return f"{s.model.name} on {s.cluster.accelerators:,} x {s.cluster.accelerator.name}: {result.step_time_s:.3g} s per step"


def _idle(result: StepResult) -> float:
    table = result.breakdown().set_index("part")
    return float(table["share"].get("idle", 0.0))


def _readable_s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
