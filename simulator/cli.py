"""The command line: one verb per function of the API."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from simulator.errors import PlanError, Problem, ProfileError, SimulatorError

if TYPE_CHECKING:
    import pandas as pd

    from simulator.ranks import RanksResult
    from simulator.result import StepResult
    from simulator.scenario.scenario import Scenario

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan a ten-thousand-GPU training cluster before it exists.",
)
out = Console(width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True)

ScenarioFile = Annotated[Path | None, typer.Argument(help="Scenario in YAML; may be left out when --set gives model, cluster and job.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one entry, e.g. plan.pp=8 or cluster=gb200-nvl72-10368; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def _creatable(folder: Path | None) -> Path | None:
    """Refuse an output folder that cannot be written before the work begins."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder) if folder else None
    if there and not (there.is_dir() and os.access(there, os.W_OK)):
        raise ProfileError(f"--out {folder}: {there} is not a folder that can be written; choose another")
    return folder


OutDir = Annotated[
    Path | None,
    typer.Option("--out", callback=_creatable, help="Folder for tables, pictures, the trace and the scenario."),
]


def _say(text: str, console: Console = out) -> None:
    """Print a line of text, left to the terminal to wrap."""
    console.print(text, highlight=False, soft_wrap=True)


def _load(path: Path | None, sets: list[str] | None, megatron: Path | None = None) -> Scenario:
    from simulator.scenario.profiles import read_text, read_yaml, validated
    from simulator.scenario.scenario import Scenario

    data = read_yaml(path) if path else {}
    processes = None
    if megatron:
        from simulator.scenario.megatron import plan_from_megatron

        run = plan_from_megatron(read_text(megatron))
        for warning in run.warnings:
            _note(warning)
        processes = run.accelerators
        said = run.plan.model_dump(mode="json", exclude_unset=True) | {"dp_shard": None}
        for key, table in {"plan": said, "job": run.job}.items():  # the line has the last word but for --set
            data[key] = (data[key] if isinstance(data.get(key), dict) else {}) | table
    for entry in sets or []:
        _set(data, entry)
    question = validated(Scenario, data, str(path or "scenario"))
    accelerators = question.cluster.accelerators
    if processes not in (None, accelerators):
        _note(f"the line starts {processes:,} processes, the cluster has {accelerators:,} accelerators: dp fills the cluster")
    return question


def _set(data: dict[str, Any], entry: str) -> None:
    """Change one entry of a scenario's table as ``KEY=VALUE`` says."""
    key, equals, value = entry.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        raise ProfileError(f"--set {entry!r}: write KEY=VALUE, e.g. --set plan.pp=8")
    place = data
    for parent in parents:
        inner = place.get(parent)
        if inner is None or isinstance(inner, str):  # a name: keep it as the base and change one thing
            inner = place[parent] = {"base": inner} if inner else {}
        if not isinstance(inner, dict):
            raise ProfileError(f"--set {entry!r}: {parent} is {inner!r}, not a table")
        place = inner
    try:
        place[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        place[last] = value


def _note(text: str) -> None:
    _say(f"[yellow]note:[/] {escape(text)}", err)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
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


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")


def _records(table: pd.DataFrame) -> list[dict]:
    """Return the rows of `table` in full precision, None where there is no number."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in table.to_dict("records")]


#: column -> (heading, text of a value)
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step_time_s": ("step s", lambda v: f"{v:.3f}"),
    "estimate_s": ("estimate s", lambda v: f"{v:.3f}"),
    "bound_s": ("bound s", lambda v: f"{v:.3f}"),
    "mfu_causal": ("MFU causal", lambda v: f"{v:.1%}"),
    "peak_memory_bytes": ("memory GB", lambda v: f"{v / 1e9:.1f}"),
    "training_days": ("days", lambda v: f"{v:.1f}"),
    "cost_usd": ("cost M$", lambda v: f"{v / 1e6:.2f}"),
    "seconds": ("seconds", lambda v: f"{v:.3f}"),
    "hidden_s": ("hidden beside compute s", lambda v: f"{v:.3f}" if v else ""),
    "share": ("share", lambda v: f"{v:.1%}"),
    "micro_batch": ("mbs", str),
    "nic_bytes_per_s": ("NIC GB/s", lambda v: f"{v / 1e9:g}"),
    "scale_up_domain": ("scale-up domain", str),
    "price_usd_per_accelerator_hour": ("$ per accelerator-h", lambda v: f"{v:.2f}"),
    "mean_absolute_error": ("mean |error|", lambda v: f"{v:.1%}"),
    "median_absolute_error": ("median |error|", lambda v: f"{v:.1%}"),
    "bias": ("bias", lambda v: f"{v:+.1%}"),
    "worst": ("worst", lambda v: f"{v:+.1%}"),
}


def _show(table: pd.DataFrame, title: str | None = None) -> None:
    view = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1), header_style="bold")
    for name in table.columns:
        numeric = table[name].dtype.kind in "if"
        whole = name == table.columns[0]  # what a row is about is never broken: people copy it
        view.add_column(_COLUMNS.get(name, (name, str))[0], justify="right" if numeric else "left", no_wrap=whole, overflow="fold")
    for row in table.itertuples(index=False):
        cells = zip(table.columns, row, strict=True)
        view.add_row(*(_COLUMNS.get(name, ("", lambda v: f"{v:g}" if isinstance(v, float) else str(v)))[1](value) for name, value in cells))
    out.print(view)


def _headline(result: StepResult | RanksResult) -> None:
    from simulator.outcome import facts_by_grade
    from simulator.units import readable

    s = result.scenario
    price = next(r for r in s.cluster.provenance() if r["fact"] == "price_usd_per_accelerator_hour")
    machine = f"{s.cluster.accelerators:,} {s.cluster.accelerator.name} ({s.cluster.name})"
    _say(f"[bold]{escape(s.model.name)}[/] on {escape(machine)}: {s.plan}")
    _say(
        f"step {result.step_time_s:.3f} s, {result.tokens_per_s_per_accelerator:,.0f} tokens/s/accelerator, "
        f"MFU {result.mfu_causal:.1%} causal, {result.mfu_noncausal:.1%} non-causal, {result.mfu_6n:.1%} by 6N (of the dense bf16 peak)"
    )
    _say(
        f"memory {readable(result.peak_memory_bytes, 'bytes')} of {readable(s.cluster.accelerator.hbm_bytes, 'bytes')} "
        "on the fullest stage, "
        f"{result.training_days:.1f} days, {result.accelerator_hours:,.0f} accelerator-hours, "
        f"{result.cost_usd / 1e6:,.2f} M$ at {price['value']:.2f} $/h ({escape(price['source'])}, {price['date']})"
    )
    _show(result.breakdown(), "Where the step goes (mean over ranks)")
    _say(f"Rests on {facts_by_grade(result.sources())} (myriad sources).")
    _say("Not modelled: " + "; ".join(result.summary()["not_modelled"]) + ".")


@contextmanager
def _all_at_once(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder whose files move to `folder` at the end, all of them; after an error none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as hidden:
        yield Path(hidden)
        for file in Path(hidden).iterdir():
            file.replace(folder / file.name)


def _write(result: StepResult | RanksResult, folder: Path, tables: dict[str, pd.DataFrame]) -> list[Path]:
    """Write `tables` and everything about one step below `folder`; return the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    from simulator import plots
    from simulator.result import StepResult

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
            figure = Figure(figsize=(11, 5), layout="constrained")
            draw(result, ax=figure.subplots())
            figure.savefig(place / f"{name}.png", dpi=130)
    names = ["summary.json", "scenario.yaml", *(["trace.json.gz"] if events else [])]
    return [folder / name for name in (*names, *(f"{t}.csv" for t in tables), *(f"{p}.png" for p in pictures))]


def _report_files(files: list[Path]) -> None:
    _say("Files: " + ", ".join(escape(str(f)) for f in files))
    if any(f.name == "trace.json.gz" for f in files):
        _say("Open trace.json.gz at https://ui.perfetto.dev: a process per stage, a thread per stream.")


@app.command()
def plan(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    top: Annotated[int, typer.Option(min=1, help="Plans to simulate and show.")] = 10,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Find the fastest plans: bound every legal one, estimate the promising, simulate the best."""
    from simulator.planning.search import search

    question = _load(scenario, sets)
    with _progress() as tell:
        found = search(question, top=top, progress=tell)
    files = _write(found.best, folder, {"plans": found.table}) if folder else []
    if as_json:
        counts = {"legal": found.legal, "fitting": found.fitting, "estimated": found.estimated, "simulated": len(found.results)}
        _print_json(found.best.summary() | {"plans": _records(found.table), "searched": counts, "files": [str(f) for f in files]})
        return
    degrees = [str(r.scenario.plan) for r in found.results]
    figures = found.table[["step_time_s", "mfu_causal", "peak_memory_bytes", "training_days", "cost_usd"]]
    _show(figures.assign(plan=degrees)[["plan", *figures.columns]], f"The {len(found.table)} fastest plans")
    _say(f"{found.legal:,} legal plans, {found.fitting:,} fit in memory, {found.estimated:,} estimated, {len(found.results)} simulated.\n")
    _headline(found.best)
    if files:
        _report_files(files)


@app.command()
def simulate(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    megatron: Annotated[Path | None, typer.Option(help="File with a Megatron-LM launch line to take the plan and batch from.")] = None,
    ranks: Annotated[Literal["classes", "all"], typer.Option(help="Simulate one rank of each kind, or every rank.")] = "classes",
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With all ranks: jitter=0.02, routing.distribution=zipf, ...; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="With all ranks: how many seeds.")] = 1,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Simulate one optimizer step of a plan: event by event, or every rank with its own durations."""
    from simulator.closed_forms import bound, estimate
    from simulator.scenario.profiles import validated
    from simulator.scenario.routing import Routing
    from simulator.scenario.variation import Variation
    from simulator.simulate import simulate_step

    question = _load(scenario, sets, megatron)
    varied: dict[str, Any] = {}
    for entry in vary or []:
        _set(varied, entry)
    routing = validated(Routing, varied.pop("routing"), "routing") if "routing" in varied else None
    result = simulate_step(question, ranks, validated(Variation, varied, "variation") if varied else None, routing, seeds)
    files = _write(result, folder, {}) if folder else []
    if as_json:
        extra = {"bound_s": bound(question), "estimate_s": estimate(question), "breakdown": _records(result.breakdown())}
        _print_json(result.summary() | extra | {"files": [str(f) for f in files]})
        return
    _headline(result)
    if ranks == "all":
        _show(result.distribution(), "Step time over seeds")
        _show(result.slowest(), "Slowest ranks beside the median of their stage")
    if files:
        _report_files(files)


@app.command()
def validate(
    every: Annotated[bool, typer.Option("--all", help="Also rows whose source leaves something out.")] = False,
    folder: OutDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with published training runs: an error table, nothing fitted."""
    from simulator.files import write_atomically
    from simulator.validation import published

    with _progress() as tell:
        table = published.validate(complete_only=not every, progress=lambda done, total: tell("predict", done, total))
    summary = published.summary(table)
    if folder:
        write_atomically(folder / "validation.csv", lambda f: table.to_csv(f, index=False))
    if as_json:
        _print_json({"summary": _records(summary), "rows": _records(table)})
        return
    _show(summary, "Predicted against measured step time, nothing fitted")
    skipped = table.loc[table["skipped"] != "", "skipped"].value_counts()
    for reason, rows in skipped.items():
        _say(f"skipped {rows}: {reason}")
    if folder:
        _report_files([folder / "validation.csv"])


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A shipped name or the path of a config.json.")] = None, as_json: AsJson = False
) -> None:
    """List the shipped models, or count the parameters and FLOP of one."""
    from simulator.scenario.catalogue import models as shipped
    from simulator.scenario.profiles import MODELS
    from simulator.workload.flop import count

    if name is None:
        table = shipped()
        _print_json(_records(table)) if as_json else _show(table.drop(columns="source"))
        return
    model = MODELS.load(name)
    counted = {f: getattr(count(model, 4096), f) for f in count(model, 4096).__dataclass_fields__}
    if as_json:
        _print_json(model.model_dump(mode="json") | counted)
        return
    _say(f"[bold]{escape(model.name)}[/] ({escape(model.source)})")
    for key, value in (model.model_dump(exclude={"name", "source", "moe_layers", "windows"}) | counted).items():
        text = f"{value / 1e9:.3f} G" if key in counted else str(value)
        _say(f"  {key}: {text}" + (" at 4,096 tokens per sequence" if "causal" in key else ""))


@app.command()
def clusters(as_json: AsJson = False) -> None:
    """List the shipped clusters."""
    from simulator.scenario.catalogue import clusters as shipped

    table = shipped()
    _print_json(_records(table)) if as_json else _show(table)


@app.command()
def sources(
    scenario: Annotated[str, typer.Argument(help="A scenario file or the name of a shipped cluster.")], as_json: AsJson = False
) -> None:
    """Show every fact that an answer rests on, with its grade and source."""
    from simulator.outcome import facts_by_grade
    from simulator.outcome import sources as rests_on
    from simulator.scenario.profiles import CLUSTERS

    shipped = scenario in CLUSTERS.names() or not Path(scenario).exists()  # no such file: the nearest names are told
    table = rests_on(CLUSTERS.load(scenario) if shipped else _load(Path(scenario), None))
    if as_json:
        _print_json(_records(table))
        return
    for (grade, source, date), part in table.fillna({"date": ""}).groupby(["grade", "source", "date"], sort=False):
        _say(f"[bold]{grade}[/] {escape(source)} {date}")
        for row in part.itertuples():
            _say(escape(f"    {row.profile}: {row.fact} = {row.value:g}"))
    _say(facts_by_grade(table))


def _refuse(problems: list[Problem]) -> NoReturn:
    """End with exit code 2, having told people on the error stream and, with --json, machines on the other."""
    for problem in problems:
        remedy = f"\n  remedy: {escape(problem.remedy)}" if problem.remedy else ""
        _say(f"[red]{escape(problem.rule)}:[/] {escape(problem.numbers)}{remedy}", err)
    if "--json" in sys.argv:
        _print_json({"problems": [asdict(problem) for problem in problems]})
    sys.exit(2)


def main() -> None:
    """Run the command line; what the user can mend is told without a traceback and ends with exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except PlanError as error:
        _refuse(error.problems)
    except SimulatorError as error:
        _refuse([Problem("input", str(error), "")])
    except OSError as error:
        _refuse([Problem("file", f"{error.filename or 'output'}: {error.strerror or error}", "")])
    except typer.TyperException as error:  # the command line itself; without words when it was empty and the help was shown
        words = error.format_message().replace("Value error, ", "").replace("Input should be", "must be")
        _refuse([Problem("command", words, "see myriad --help")] if words else [])
