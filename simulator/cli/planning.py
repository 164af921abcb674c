"""Verbs that decide: compare, fewest, cheapest, budget, scale, advise."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, ScenarioFile, Sets, load
from simulator.cli.terminal import note, print_json, progress, records, say, show

if TYPE_CHECKING:
    import pandas as pd

Counts = Annotated[list[int] | None, typer.Option("--accelerators", help="A number of accelerators to look at; repeatable.")]
#: how people write large amounts
_THOUSANDS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
#: what of an answer is shown to people
_SHOWN = ("cluster", "accelerators", "step_time_s", "mfu_causal", "training_days", "cost_usd", "energy_kwh", "efficiency", "tokens", "plan")


def _above_0(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def _money(text: str) -> float:
    """Return dollars from ``20e6``, ``20M`` or ``"20 M$"``."""
    match = re.fullmatch(r"\s*\$?\s*(-?[0-9][0-9._]*(?:[eE][+-]?[0-9]+)?)\s*([kKMBG]?)\s*(?:\$|USD)?\s*", text)
    try:
        return float(match[1]) * _THOUSANDS[match[2]]
    except (TypeError, ValueError):
        raise typer.BadParameter(f"{text!r} is not an amount of money; write 20e6, 20M or 1.5B") from None


def _tell(table: pd.DataFrame, title: str, as_json: bool) -> None:
    from simulator.planning.questions import SEARCHED
    from simulator.results.energy import BASIS

    if as_json:
        print_json({"rows": records(table)})
        return
    shown = table[[name for name in _SHOWN if name in table]].fillna("no plan")
    if "cluster" in shown:  # the name of a changed cluster lists what was changed: too long for a column
        shown = shown.assign(cluster=shown["cluster"].str.replace(" with .*", "*", regex=True))
    show(shown, title)
    changed = [name for name in table.get("cluster", []) if " with " in name]
    say("\n".join([escape("* " + name) for name in dict.fromkeys(changed)] + [SEARCHED, f"Energy: {BASIS}."]))


def compare(
    scenarios: Annotated[list[Path], typer.Argument(help="Scenarios in YAML; the first is what the others are held against.")],
    as_json: AsJson = False,
) -> None:
    """Simulate several scenarios and explain their differences term by term."""
    from simulator.planning.compare import compare as beside

    found = beside({str(path): load(path, None) for path in scenarios})
    names = list(found.results)
    differences = {name: found.differences(name) for name in names[1:]}
    if as_json:
        why = {name: records(table) for name, table in differences.items()}
        print_json({"rows": records(found.table), "terms": records(found.terms()), "differences": why})
        return
    for row in found.table.itertuples():
        say(escape(f"{row.name}: {row.model} on {row.accelerators:,} of {row.cluster}, {row.plan}"))
    figures = found.table.drop(columns=["model", "cluster", "accelerators", "plan"])
    show(figures.assign(name=[Path(name).stem for name in names]), "Beside each other")
    for name, table in differences.items():
        some = table[table["seconds"].abs() >= 0.0005].head(8)  # what is more than nothing as it is printed
        show(some, f"What {Path(name).stem} takes longer than {Path(names[0]).stem}")


def fewest(
    scenario: ScenarioFile = None,
    days: Annotated[float, typer.Option(callback=_above_0, help="Deadline for the whole job.")] = 30.0,
    counts: Counts = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Find the fewest accelerators that finish the job in time."""
    from simulator.planning.questions import fewest_accelerators

    with progress() as tell:
        table = fewest_accelerators(load(scenario, sets), days, counts, progress=tell)
    _tell(table, f"The last size finishes in {days:g} days", as_json)


def cheapest(
    scenario: ScenarioFile = None,
    clusters: Annotated[
        list[str] | None, typer.Option("--cluster", help="Name or file of a cluster; repeatable. All shipped ones.")
    ] = None,
    days: Annotated[float | None, typer.Option(callback=_above_0, help="Deadline for the whole job.")] = None,
    usd: Annotated[
        float | None,
        typer.Option("--budget", parser=_money, metavar="USD", callback=_above_0, help="Money for the whole job, e.g. 20e6 or 20M."),
    ] = None,
    counts: Counts = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Find the cheapest cluster, by kind and size, that meets a deadline or a budget."""
    from simulator.planning.questions import cheapest as best
    from simulator.scenario.profiles import CLUSTERS

    loaded = {name: CLUSTERS.load(name) for name in clusters or CLUSTERS.names()}
    with progress() as tell:
        table = best(load(scenario, sets), loaded, counts, days, usd, progress=tell)
    _tell(table, "Clusters that meet the limits, best first", as_json)


def budget(
    usd: Annotated[
        float, typer.Option("--usd", parser=_money, metavar="USD", callback=_above_0, help="Money for the whole job, e.g. 20e6 or 20M.")
    ],
    scenario: ScenarioFile = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Tell how many tokens a budget trains on."""
    import pandas as pd

    from simulator.planning.questions import tokens_for

    _tell(pd.DataFrame([tokens_for(load(scenario, sets), usd)]), f"What {usd / 1e6:g} M$ train", as_json)


def scale(
    scenario: ScenarioFile = None,
    counts: Counts = None,
    kind: Annotated[Literal["strong", "weak"], typer.Option(help="The same batch on all sizes, or one that grows with them.")] = "strong",
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Tell how the step scales with the number of accelerators, each size with its own best plan."""
    from simulator.planning.questions import scaling, sizes

    question = load(scenario, sets)
    with progress() as tell:
        table = scaling(question, counts or sizes(question.cluster), kind, progress=tell)
    _tell(table, f"{kind.capitalize()} scaling", as_json)


def advise(
    flop: Annotated[float, typer.Option(min=0, help="Model FLOP of the whole training.")],
    activation: Annotated[float, typer.Option(help="Share of the parameters that a token uses; 1 is a dense model.")] = 1.0,
    granularity: Annotated[float, typer.Option(help="Experts that make up one MLP of the usual width.")] = 12.0,
    as_json: AsJson = False,
) -> None:
    """Advise on parameters and tokens for a compute budget, by published scaling laws."""
    from simulator.planning.advice import advise as of_laws

    found = of_laws(flop, activation, granularity)
    if as_json:
        print_json(asdict(found))
        return
    active, total = found.parameters / 1e9, found.total_parameters / 1e9
    tokens, batch = found.tokens / 1e12, found.batch_tokens / 1e6
    say(f"{active:,.1f} B active of {total:,.1f} B parameters on {tokens:,.2f} T tokens, {batch:.1f} M tokens a step")
    say(f"loss {found.loss:.3f} nats per token, that of a dense model with {found.leverage:.1f} times the compute")
    for warning in found.extrapolated:
        note(warning)
    say("Sources: " + "; ".join(found.sources))
