"""Verbs about one step: plan, simulate."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from simulator.cli.launches import Deepspeed, Megatron, Torchtitan, launch
from simulator.cli.question import Allowed, AsJson, OutDir, ScenarioFile, Sets, Varied, load, space, variation
from simulator.cli.terminal import headline, print_json, progress, records, report_files, say, show, write


def plan(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    top: Annotated[int, typer.Option(min=1, help="Plans to simulate and show.")] = 10,
    allow: Allowed = None,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest plans: bound every legal one, estimate the promising, simulate the best."""
    from simulator.planning.search import search

    question = load(scenario, sets)
    with progress() as tell:
        found = search(question, top=top, progress=tell, space=space(allow))
    files = write(found.best, folder, {"plans": found.table}) if folder else []
    if as_json:
        counts = {"legal": found.legal, "fitting": found.fitting, "estimated": found.estimated, "simulated": len(found.results)}
        print_json(found.best.summary() | {"plans": records(found.table), "searched": counts, "files": [str(f) for f in files]})
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
    headline(found.best)
    if files:
        report_files(files)


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
