"""The verb fabrics: the same step on several networks, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, OutDir, ScenarioFile, Sets, load
from simulator.cli.terminal import print_json, progress, records, report_files, save_picture, say, show

if TYPE_CHECKING:
    import pandas as pd


def fabrics(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    fabric: Annotated[list[str] | None, typer.Option(help="A shipped fabric or a file; repeatable. All that fit when left out.")] = None,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare networks: the same step on each fabric, with switches, cables, price and power."""
    from simulator.planning.fabrics import fabrics as compared

    question = load(scenario, sets)
    with progress() as tell:
        table = compared(question, fabric, tell)
    files = _write(table, folder) if folder else []
    if as_json:
        print_json({"fabrics": records(table)})
        return
    plan = table["plan"].iloc[0]
    columns = ["fabric", "step_time_s", "exposed_s", "slowdown", "hottest", "switches", "cables", "network_usd", "network_w"]
    show(table[columns], f"{question.model.name} on {question.cluster.accelerators:,} {question.cluster.accelerator.name}: {plan}")
    say("exposed: communication that compute waits for; sharing slows: how much longer the collective that shares most takes.")
    say(escape("Prices are estimates of 2026 (myriad fabrics --json names all columns); NICs belong to the hosts."))
    if files:
        report_files(files)


def _write(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the table and its pictures below `folder`; return the files."""
    from simulator import plots
    from simulator.files import write_atomically

    write_atomically(folder / "fabrics.csv", lambda f: table.to_csv(f, index=False))
    steps = save_picture(folder / "fabrics.png", lambda f: plots.plot_fabrics(table, f.subplots()), (9.0, 1.2 + 0.38 * len(table)))
    costs = save_picture(folder / "fabric_costs.png", lambda f: plots.plot_fabric_costs(table, f.subplots()), (10.0, 5.0))
    return [folder / "fabrics.csv", steps, costs]
