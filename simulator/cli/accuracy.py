"""The verb validate: predictions against published measurements, or a user's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, OutDir
from simulator.cli.terminal import err, print_json, progress, report_files, save_picture, say, show
from simulator.errors import ProfileError

if TYPE_CHECKING:
    import pandas as pd

    from simulator.errors import Problem
    from simulator.validation.report import Report


def _files(kind: str, what: str) -> object:
    return typer.Option(f"--{kind}", help=f"CSV of your own {what}, as in docs/validation.md; repeatable.", exists=True, dir_okay=False)


def validate(
    data: Annotated[list[Path] | None, _files("data", "training runs")] = None,
    memory: Annotated[list[Path] | None, _files("memory", "memory peaks and failures")] = None,
    collectives: Annotated[list[Path] | None, _files("collectives", "collectives")] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst rows to explain.")] = 15,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the rows.")] = os.cpu_count() or 1,
    docs: Annotated[Path | None, typer.Option(help="Write the report as a Markdown page, too.", dir_okay=False)] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="First write the residuals that the intervals come from.")] = False,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with published measurements, or with your own: cold, anchored, relative, with intervals."""
    from simulator.files import write_atomically
    from simulator.validation.page import CAPTIONS, HEAD, sections
    from simulator.validation.report import confront, refreshed
    from simulator.validation.section import markdown

    own, problems = _own({"data": data, "memory": memory, "collectives": collectives})
    for problem in problems:
        say(f"[red]{escape(problem.rule)}:[/] {escape(problem.numbers)}\n  remedy: {escape(problem.remedy)}", err)
    if own is not None and not any(len(rows) for rows in own.values()):
        raise ProfileError(
            f"none of these files has a row that can be scored ({len(problems)} problems); docs/validation.md lists the columns"
        )
    with progress() as tell:
        report = confront(own, processes=processes, progress=tell)
    if refresh and own is None:
        report = refreshed(report)
    files = _write(report, folder) if folder else []
    parts = [] if as_json and not docs else sections(report, worst, own)
    if docs:
        drawn = _pictures(report, docs.parent)
        shown = "".join(f"\n![{CAPTIONS[picture.stem]}]({picture.name})\n" for picture in drawn)
        write_atomically(docs, lambda f: f.write(markdown(parts, HEAD + shown)))
        files += [docs, *drawn]
    if as_json:
        told = [{"where": p.rule, "what": p.numbers, "remedy": p.remedy} for p in problems]
        print_json(report.json() | {"problems": told, "files": [str(f) for f in files]})
        return
    for part in parts:
        say(f"\n[bold]{escape(part.title)}[/]\n{escape(part.words)}")
        if part.table is not None and len(part.table):
            show(part.table)
    if files:
        report_files(files)


def _own(files: dict[str, list[Path] | None]) -> tuple[dict[str, pd.DataFrame] | None, list[Problem]]:
    """Return a user's rows that can be scored, by kind, None when there is no file, and what is wrong with the others."""
    import pandas as pd

    from simulator.validation.user_rows import read_user_rows

    read = {kind: [read_user_rows(path, kind) for path in paths] for kind, paths in files.items() if paths}
    rows = {kind: pd.concat([found.rows for found in some], ignore_index=True) for kind, some in read.items()}
    return rows or None, [problem for some in read.values() for found in some for problem in found.problems]


def _write(report: Report, folder: Path) -> list[Path]:
    """Write the rows and the pictures below `folder`; return the files."""
    from simulator.files import write_atomically

    write_atomically(folder / "validation.csv", lambda f: report.rows.to_csv(f, index=False))
    return [folder / "validation.csv", *_pictures(report, folder)]


def _pictures(report: Report, folder: Path) -> list[Path]:
    """Draw predicted over measured, and the errors by feature, below `folder`; return the files."""
    from simulator import plots

    if report.rows.empty:
        return []
    drawings = {"accuracy": (plots.plot_accuracy, (7, 6.5)), "residuals": (plots.plot_residuals, (12, 7))}
    return [
        save_picture(folder / f"{name}.png", lambda figure, draw=draw: draw(report.rows, figure), size)
        for name, (draw, size) in drawings.items()
    ]
