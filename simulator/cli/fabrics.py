"""The verb fabrics: the same step on several networks, and what they cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, OutDir, ScenarioFile, Sets, load
from simulator.cli.terminal import print_json, progress, records, report_files, say, show


def fabrics(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    fabric: Annotated[list[str] | None, typer.Option(help="A shipped fabric or a file; repeatable. All that fit when left out.")] = None,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare networks: the same step on each fabric, with switches, cables, price and power."""
    from simulator.files import write_atomically
    from simulator.planning.fabrics import fabrics as compared

    question = load(scenario, sets)
    with progress() as tell:
        table = compared(question, fabric, tell)
    if folder:
        write_atomically(folder / "fabrics.csv", lambda f: table.to_csv(f, index=False))
    if as_json:
        print_json({"fabrics": records(table)})
        return
    plan = table["plan"].iloc[0]
    columns = ["fabric", "step_time_s", "exposed_s", "slowdown", "hottest", "switches", "cables", "network_usd", "network_w"]
    show(table[columns], f"{question.model.name} on {question.cluster.accelerators:,} {question.cluster.accelerator.name}: {plan}")
    say(escape("Prices are estimates of 2026 (myriad fabrics --json names all columns); NICs belong to the hosts."))
    if folder:
        report_files([folder / "fabrics.csv"])
