"""What happens when: the timeline of a step, and the table of a pipeline schedule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from simulator.engine.timeline import Timeline
from simulator.errors import SimulatorError
from simulator.plots.style import COLOURS, every, frame, headline, legend, new_axes, percent, unit_of
from simulator.results.step import StepResult
from simulator.schedules import Schedule, actions

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
    unit, scale = unit_of(end - begin)
    ax = new_axes(ax, 11, 1.5 + min(max(0.3 * len(chosen), min(0.5 * len(chosen), 3.0)), 9.0))
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
    ticks = range(0, len(chosen), every(len(chosen), ax.bbox.height / ax.figure.dpi, 15))
    ax.set_yticks(ticks, [str(list(chosen)[row]) for row in ticks])
    idle = result.breakdown().set_index("part")["share"].get("idle", 0.0)
    frame(ax, f"{headline(result)}, {percent(idle)} idle", f"time since the step began ({unit})", "pipeline stage")
    legend(ax, [*(Patch(color=COLOURS[k], label=k) for k in KINDS), Patch(facecolor="white", edgecolor="0.6", label="idle")])
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
    ax = new_axes(ax, 11, 0.9 + 0.34 * schedule.pp)
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
    title = f"{schedule.name}: {schedule.pp} ranks, {schedule.micro_batches} micro-batches, {percent(waits)} idle"
    frame(ax, title, "time", "pipeline rank")
    legend(ax, [Patch(color=COLOURS[ACTIONS[k]], label=ACTIONS[k]) for k in ACTIONS if any(k == kind for kind, _ in cells)])
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
    Touching spans of one micro-batch's forward or backward become one bar, what waits for the host that launches it included.
    Communication is cut to where nothing computes.
    """
    mine = (timeline.rank_class == rank_class) & (timeline.end_s > timeline.start_s)
    starts, ends, stream, action = (x[mine] for x in (timeline.start_s, timeline.end_s, timeline.stream, timeline.action))
    borders = np.unique(np.concatenate([starts, ends]))
    first, last = np.searchsorted(borders, starts), np.searchsorted(borders, ends)
    actions, number = np.unique(action.astype(str), return_inverse=True)
    computes, hosts, inside = stream == "compute", stream == "host", np.isin(stream, INSIDE) & (action != "")
    owner = np.full(max(len(borders) - 1, 0), -1)  # whose forward or backward each interval between two borders belongs to
    for these in (hosts, inside, computes):
        for a, b, n in zip(first[these], last[these], number[these]):
            owner[a:b] = n
    talking, computing = (_covered(len(borders), first[these], last[these]) for these in (~computes & ~hosts, computes))
    exposed = talking & ~computing
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
