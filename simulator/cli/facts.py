"""Verbs about facts: models, clusters, sources."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, load
from simulator.cli.terminal import print_json, records, say, show


def models(
    name: Annotated[str | None, typer.Argument(help="A shipped name or the path of a config.json.")] = None, as_json: AsJson = False
) -> None:
    """List the shipped models, or count the parameters and FLOP of one."""
    from simulator.scenario.catalogue import models as shipped
    from simulator.scenario.profiles import MODELS
    from simulator.workload.flop import count

    if name is None:
        table = shipped()
        print_json(records(table)) if as_json else show(table.drop(columns="source"))
        return
    model = MODELS.load(name)
    counted = {f: getattr(count(model, 4096), f) for f in count(model, 4096).__dataclass_fields__}
    if as_json:
        print_json(model.model_dump(mode="json") | counted)
        return
    say(f"[bold]{escape(model.name)}[/] ({escape(model.source)})")
    for key, value in (model.model_dump(exclude={"name", "source", "moe_layers", "windows"}) | counted).items():
        text = f"{value / 1e9:.3f} G" if key in counted else str(value)
        say(f"  {key}: {text}" + (" at 4,096 tokens per sequence" if "causal" in key else ""))


def clusters(as_json: AsJson = False) -> None:
    """List the shipped clusters."""
    from simulator.scenario.catalogue import clusters as shipped

    table = shipped()
    print_json(records(table)) if as_json else show(table)


def sources(
    scenario: Annotated[str, typer.Argument(help="A scenario file or the name of a shipped cluster.")], as_json: AsJson = False
) -> None:
    """Show every fact that an answer rests on, with its grade and source."""
    from simulator.results.outcome import facts_by_grade
    from simulator.results.outcome import sources as rests_on
    from simulator.scenario.profiles import CLUSTERS

    shipped = scenario in CLUSTERS.names() or not Path(scenario).exists()  # no such file: the nearest names are told
    table = rests_on(CLUSTERS.load(scenario) if shipped else load(Path(scenario), None))
    if as_json:
        print_json(records(table))
        return
    for (grade, source, date), part in table.fillna({"date": ""}).groupby(["grade", "source", "date"], sort=False):
        say(f"[bold]{grade}[/] {escape(source)} {date}")
        for row in part.itertuples():
            say(escape(f"    {row.profile}: {row.fact} = {row.value:g}"))
    say(facts_by_grade(table))
