"""The verb validate: predictions against published measurements."""

from __future__ import annotations

from typing import Annotated

import typer

from simulator.cli.question import AsJson, OutDir
from simulator.cli.terminal import print_json, progress, records, report_files, say, show


def validate(
    every: Annotated[bool, typer.Option("--all", help="Also rows whose source leaves something out.")] = False,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with published training runs: an error table, nothing fitted."""
    from simulator.files import write_atomically
    from simulator.validation import published

    with progress() as tell:
        table = published.validate(complete_only=not every, progress=lambda done, total: tell("predict", done, total))
    summary = published.summary(table)
    if folder:
        write_atomically(folder / "validation.csv", lambda f: table.to_csv(f, index=False))
    if as_json:
        print_json({"summary": records(summary), "rows": records(table)})
        return
    show(summary, "Predicted against measured step time, nothing fitted")
    skipped = table.loc[table["skipped"] != "", "skipped"].value_counts()
    for reason, rows in skipped.items():
        say(f"skipped {rows}: {reason}")
    if folder:
        report_files([folder / "validation.csv"])
