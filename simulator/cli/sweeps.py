"""The verb sweep: many scenarios on any executor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, Sets, question_table, read_values
from simulator.cli.terminal import print_json, progress, records, report_files, say, show
from simulator.errors import ProfileError

Over = Annotated[
    list[str] | None,
    typer.Option("--over", metavar="KEY=V1,V2,...", help="Values of one entry, e.g. plan.pp=4,8,16; repeat it for every combination."),
]


def sweep(
    scenarios: Annotated[list[Path], typer.Argument(help="One scenario in YAML or several.")],
    over: Over = None,
    sets: Sets = None,
    into: Annotated[Path | None, typer.Option("--into", help="SQLite file that keeps every answer; run again to go on.")] = None,
    level: Annotated[str, typer.Option(help="simulate, estimate or bound.")] = "simulate",
    engine: Annotated[str, typer.Option(help="serial, process, process:N or dask://HOST:PORT.")] = "process",
    table: Annotated[Path | None, typer.Option("--table", help="Also write the table, .parquet or .csv.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer every combination of values for one scenario or several; an interrupted sweep goes on where it stopped."""
    from simulator.files import save_table
    from simulator.planning.sweep import grid
    from simulator.planning.sweep import sweep as run

    if table is not None and table.suffix not in (".parquet", ".csv"):
        raise ProfileError(f"--table {table}: write .parquet or .csv")
    varied = dict(read_values(entry, "--over") for entry in over or [])
    asked = [one for path in scenarios for one in grid(question_table(path, sets), varied)]
    with progress() as tell:
        found = run(asked, into, level, engine, lambda done, total: tell(level, done, total))
    if table is not None:
        save_table(found, table)
    if as_json:
        print_json({"rows": records(found)})
        return
    several = [
        name for name in found.columns if name.partition(".")[0] in ("model", "cluster", "plan", "job") and found[name].nunique() > 1
    ]
    figures = [name for name in ("step_time_s", "mfu_causal", "peak_memory_bytes", "training_days", "cost_usd") if name in found]
    view = found[[*several, *figures, "status"]] if several or figures else found[["model", "cluster", "status"]]
    show(view, f"{len(found)} scenarios")
    for (status, problem), rows in found[found["status"] != "answered"].groupby(["status", "problem"], sort=False):
        say(escape(f"{status}, {len(rows)} rows: {problem}"))
    if table is not None:
        report_files([table])
