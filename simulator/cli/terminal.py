"""What the command line prints: lines, tables, JSON, progress bars, and the files of one step."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from simulator.results.ranks import RanksResult
    from simulator.results.step import StepResult

out = Console(width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True)


def say(text: str, console: Console = out) -> None:
    """Print a line of text, left to the terminal to wrap."""
    console.print(text, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell on the error stream what the reader should know about the answer."""
    say(f"[yellow]note:[/] {escape(text)}", err)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the error stream, gone when the work is done; silent when that is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield tell


def print_json(data: Any) -> None:
    """Print JSON for machines; a number that is not finite is a bug and is refused."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")


def records(table: pd.DataFrame) -> list[dict]:
    """Return the rows of `table` in full precision, None where there is no number."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in table.to_dict("records")]


#: column -> (heading, text of a value)
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step_time_s": ("step s", lambda v: f"{v:.3f}"),
    "estimate_s": ("estimate s", lambda v: f"{v:.3f}"),
    "bound_s": ("bound s", lambda v: f"{v:.3f}"),
    "mfu_causal": ("MFU causal", lambda v: f"{v:.1%}"),
    "peak_memory_bytes": ("memory GB", lambda v: f"{v / 1e9:.1f}"),
    "training_days": ("days", lambda v: f"{v:.1f}"),
    "cost_usd": ("cost M$", lambda v: f"{v / 1e6:.2f}"),
    "energy_kwh": ("energy MWh", lambda v: f"{v / 1e3:,.0f}"),
    "efficiency": ("efficiency", lambda v: f"{v:.1%}"),
    "tokens": ("tokens T", lambda v: f"{v / 1e12:.2f}"),
    "costs_s": ("costs s", lambda v: f"{v:.3f}"),
    "seconds": ("seconds", lambda v: f"{v:.3f}"),
    "hidden_s": ("hidden beside compute s", lambda v: f"{v:.3f}" if v else ""),
    "exposed_s": ("exposed s", lambda v: f"{v:.3f}"),
    "slowdown": ("sharing slows", lambda v: f"{v:.2f}"),
    "network_usd": ("network M$", lambda v: f"{v / 1e6:.1f}" if v == v else "no price"),
    "network_w": ("network kW", lambda v: f"{v / 1e3:,.0f}" if v == v else "no figure"),
    "share": ("share", lambda v: f"{v:.1%}"),
    "micro_batch": ("mbs", str),
    "nic_bytes_per_s": ("NIC GB/s", lambda v: f"{v / 1e9:g}"),
    "scale_up_domain": ("domain", str),
    "price_usd_per_accelerator_hour": ("$/h each", lambda v: f"{v:.2f}"),
    "mean_absolute_error": ("mean |error|", lambda v: f"{v:.1%}"),
    "median_absolute_error": ("median |error|", lambda v: f"{v:.1%}"),
    "bias": ("bias", lambda v: f"{v:+.1%}"),
    "worst": ("worst", lambda v: f"{v:+.1%}"),
}


def show(table: pd.DataFrame, title: str | None = None) -> None:
    """Print a table with the headings and units of `COLUMNS`."""
    view = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), header_style="bold")
    for name in table.columns:
        numeric = table[name].dtype.kind in "if"
        whole = name == table.columns[0]  # what a row is about is never broken: people copy it
        view.add_column(COLUMNS.get(name, (name, str))[0], justify="right" if numeric else "left", no_wrap=whole, overflow="fold")
    for row in table.itertuples(index=False):
        view.add_row(*(_cell(name, value) for name, value in zip(table.columns, row, strict=True)))
    out.print(view)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return escape(value)
    if name not in ("network_usd", "network_w") and value != value:  # those say what is missing
        return "–"
    return COLUMNS[name][1](value) if name in COLUMNS else f"{value:g}" if isinstance(value, float) else str(value)


def headline(result: StepResult | RanksResult) -> None:
    """Print the figures of one step, where it goes, and what it rests on."""
    from simulator.results.energy import BASIS
    from simulator.results.outcome import facts_by_grade
    from simulator.units import readable

    s = result.scenario
    price = next(r for r in s.cluster.provenance() if r["fact"] == "price_usd_per_accelerator_hour")
    machine = f"{s.cluster.accelerators:,} {s.cluster.accelerator.name} ({s.cluster.name})"
    say(f"[bold]{escape(s.model.name)}[/] on {escape(machine)}: {s.plan}")
    say(
        f"step {result.step_time_s:.3f} s, {result.tokens_per_s_per_accelerator:,.0f} tokens/s/accelerator, "
        f"MFU {result.mfu_causal:.1%} causal, {result.mfu_noncausal:.1%} non-causal, {result.mfu_6n:.1%} by 6N (of the dense bf16 peak)"
    )
    say(
        f"memory {readable(result.peak_memory_bytes, 'bytes')} of {readable(s.cluster.accelerator.hbm_bytes, 'bytes')} "
        "on the fullest stage, "
        f"{result.training_days:.1f} days, {result.accelerator_hours:,.0f} accelerator-hours, "
        f"{result.cost_usd / 1e6:,.2f} M$ at {price['value']:.2f} $/h ({escape(price['source'])}, {price['date']})"
    )
    around = result.interval()
    near = around.comparable.iloc[0]
    say(f"energy {result.energy_kwh / 1e3:,.0f} MWh, {result.carbon_kg / 1e3:,.0f} t CO2e ({BASIS})")
    where = "inside" if around.inside else "OUTSIDE"
    low, high = around.low_s / result.step_time_s, around.high_s / result.step_time_s
    say(
        f"80 % interval {around.low_s:.3g} to {around.high_s:.3g} s, {low * result.training_days:.1f} to {high * result.training_days:.1f} "
        f"days, {low * result.cost_usd / 1e6:,.2f} to {high * result.cost_usd / 1e6:,.2f} M$, from the errors on published runs, {where} "
        f"the validated range; nearest: {escape(near['model'])} on {near['accelerators']:,.0f} {near['accelerator']} "
        f"({escape(near['source'])}), which took {near['measured_over_predicted']:.2f} times as long as predicted"
    )
    show(result.breakdown(), "Where the step goes (mean over ranks)")
    say(f"Rests on {facts_by_grade(result.sources())} (myriad sources).")
    say("Not modelled: " + "; ".join(result.summary()["not_modelled"]) + ".")


@contextmanager
def _all_at_once(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder whose files move to `folder` at the end, all of them; after an error none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as hidden:
        yield Path(hidden)
        for file in Path(hidden).iterdir():
            file.replace(folder / file.name)


def write(result: StepResult | RanksResult, folder: Path, tables: dict[str, pd.DataFrame]) -> list[Path]:
    """Write `tables` and everything about one step below `folder`; return the files."""
    from simulator import plots
    from simulator.results.step import StepResult

    events = isinstance(result, StepResult)  # a replay of every rank has no spans to draw, but ranks to list
    tables = tables | {"breakdown": result.breakdown(), "memory": result.memory(), "sources": result.sources()}
    tables |= {} if events else {"ranks": result.table(), "critical_path": result.critical_path()}
    pictures = {"timeline": plots.plot_timeline} if events else {}
    pictures |= {"memory": plots.plot_memory, "breakdown": plots.plot_breakdown}
    with _all_at_once(folder) as place:
        (place / "summary.json").write_text(json.dumps(result.summary(), indent=2) + "\n", encoding="utf-8")
        result.scenario.save(place / "scenario.yaml")
        if events:
            result.timeline.save_trace(place / "trace.json.gz")
        for name, table in tables.items():
            table.to_csv(place / f"{name}.csv", index=False)
        for name, draw in pictures.items():
            save_picture(place / f"{name}.png", lambda figure, draw=draw: draw(result, ax=figure.subplots()), (11, 5))
    names = ["summary.json", "scenario.yaml", *(["trace.json.gz"] if events else [])]
    return [folder / name for name in (*names, *(f"{t}.csv" for t in tables), *(f"{p}.png" for p in pictures))]


def save_picture(path: Path, draw: Callable[[Figure], Any], size: tuple[float, float]) -> Path:
    """Write the picture that `draw` makes on an empty figure of `size` inches; return its file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    from simulator.files import write_atomically

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=130), "wb")
    return path


def report_files(files: list[Path]) -> None:
    """Say which files were written, and how to open the trace."""
    say("Files: " + ", ".join(escape(str(f)) for f in files))
    if any(f.name == "trace.json.gz" for f in files):
        say("Open trace.json.gz at https://ui.perfetto.dev: a process per stage, a thread per stream.")
