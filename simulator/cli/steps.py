"""Verbs about one step: plan, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from simulator.cli.launches import Deepspeed, Megatron, Torchtitan, launch
from simulator.cli.question import Allowed, AsJson, OutDir, ScenarioFile, Sets, Varied, load, space, variation
from simulator.cli.terminal import headline, print_json, progress, records, report_files, save_picture, say, show, write

if TYPE_CHECKING:
    import pandas as pd

    from simulator.planning.search import Search


def plan(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    top: Annotated[int, typer.Option(min=1, help="Plans to simulate and show.")] = 10,
    allow: Allowed = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also what each --allow costs; with --out, step against memory.")] = False,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest plans: bound every legal one, estimate the promising, simulate the best."""
    from simulator.planning.explain import constraint_costs, why
    from simulator.planning.search import search

    question = load(scenario, sets)
    with progress() as tell:
        found = search(question, top=top, progress=tell, space=space(allow))
        costs = constraint_costs(found, tell) if explain else None
    reasons = why(found) if len(found.results) > 1 else None
    files = write(found.best, folder, {"plans": found.table}) if folder else []
    files += [_draw_front(found, folder)] if folder and explain else []
    if as_json:
        counts = {"legal": found.legal, "fitting": found.fitting, "estimated": found.estimated, "simulated": len(found.results)}
        reason = {name: records(table) for name, table in (("why", reasons), ("constraint_costs", costs)) if table is not None}
        print_json(found.best.summary() | {"plans": records(found.table), "searched": counts} | reason | {"files": [str(f) for f in files]})
        return
    degrees = [str(r.scenario.plan) for r in found.results]
    figures = found.table[["step_time_s", "mfu_causal", "peak_memory_bytes", "training_days", "cost_usd"]]
    kinds = list(dict.fromkeys(found.table["recompute"]))  # plans may differ in the modules alone, whose names are too long for a column
    marks = {kind: kind if kind in ("none", "full") else f"({number})" for number, kind in enumerate(kinds, start=1)}
    view = figures.assign(plan=degrees, recompute=found.table["recompute"].map(marks))
    show(view[["plan", *figures.columns, "recompute"]], f"The {len(found.table)} fastest plans")
    for kind, mark in marks.items():
        if mark != kind:
            say(f"{mark} recompute of {kind.replace('+', ', ')}")
    say(f"{found.legal:,} legal plans, {found.fitting:,} fit in memory, {found.estimated:,} estimated, {len(found.results)} simulated.\n")
    if reasons is not None:
        say(escape(_because(reasons, found)))
    if costs is not None:
        show(costs, "What each constraint costs: the step without it")
    headline(found.best)
    if files:
        report_files(files)


def _because(reasons: pd.DataFrame, found: Search) -> str:
    """Return in a sentence what the runner-up spends more and less than the best plan, by the largest terms."""
    from simulator.plots.style import WORDS

    best, second = found.results[:2]
    terms = [f"{WORDS.get(row.part, row.part)} {row.seconds:+.3f} s" for row in reasons.itertuples() if abs(row.seconds) >= 0.0005][:4]
    longer = f"The second takes {second.step_time_s - best.step_time_s:.3f} s longer"
    return f"{longer}: {', '.join(terms)}.\n" if terms else f"{longer}: no term differs by 0.5 ms.\n"


def _draw_front(found: Search, folder: Path) -> Path:
    """Draw the fastest plan within each amount of memory, by estimate; return the file."""
    from simulator import plots

    table = found.front()
    table = table.assign(
        on_front=True, degrees=[f"tp{t} pp{p} ep{e}" for t, p, e in zip(table["tp"], table["pp"], table["ep"], strict=True)]
    )
    axes = {"group": "schedule", "label": "degrees"}
    return save_picture(
        folder / "front.png",
        lambda figure: plots.plot_front(table, "estimate_s", "peak_memory_bytes", ax=figure.subplots(), **axes),
        (10, 5),
    )


def simulate(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    megatron: Megatron = None,
    torchtitan: Torchtitan = None,
    deepspeed: Deepspeed = None,
    ranks: Annotated[Literal["classes", "all"], typer.Option(help="Simulate one rank of each kind, or every rank.")] = "classes",
    vary: Varied = None,
    seeds: Annotated[int, typer.Option(min=1, help="With all ranks: how many seeds.")] = 1,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Simulate one optimizer step of a plan: event by event, or every rank with its own durations."""
    from simulator.closed_forms import estimate
    from simulator.lower_bound import bound
    from simulator.results.ranks import RanksResult
    from simulator.simulate import simulate_step

    question = load(scenario, sets, launch(megatron, torchtitan, deepspeed))
    result = simulate_step(question, ranks, *variation(vary), seeds)
    files = write(result, folder, {}) if folder else []
    if as_json:
        extra = {"bound_s": bound(question), "estimate_s": estimate(question), "breakdown": records(result.breakdown())}
        print_json(result.summary() | extra | {"files": [str(f) for f in files]})
        return
    headline(result)
    if isinstance(result, RanksResult):
        show(result.distribution(), "Step time over seeds")
        show(result.slowest(), "Slowest ranks beside the median of their stage")
    if files:
        report_files(files)
