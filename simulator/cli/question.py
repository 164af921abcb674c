"""What the verbs have in common: the scenario, changes to it, and where answers go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
import yaml

from simulator.cli.terminal import note
from simulator.errors import ProfileError

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.formats.launch import Launch
    from simulator.planning.space import Space
    from simulator.scenario.routing import Routing
    from simulator.scenario.scenario import Scenario
    from simulator.scenario.variation import Variation

ScenarioFile = Annotated[Path | None, typer.Argument(help="Scenario in YAML; may be left out when --set gives model, cluster and job.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one entry, e.g. plan.pp=8 or cluster=gb200-nvl72-10368; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


#: reads a configuration, knowing the table of the scenario that it belongs to
Reader: TypeAlias = "Callable[[dict[str, Any]], Launch]"


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


def load(path: Path | None, sets: list[str] | None, launch: Reader | None = None) -> Scenario:
    """Return the scenario of a file, changed by what `launch` reads of a framework's configuration and then by ``--set``."""
    from simulator.placing import settled
    from simulator.scenario.profiles import read_yaml, validated
    from simulator.scenario.scenario import Scenario

    data = read_yaml(path) if path else {}
    processes = None
    if launch:
        run = launch(data)
        for warning in run.warnings:
            note(warning)
        processes = run.accelerators
        said = run.plan.model_dump(mode="json", exclude_unset=True) | {"dp_shard": run.plan.dp_shard}
        for key, table in {"plan": said, "job": run.job}.items():  # the configuration has the last word but for --set
            data[key] = (data[key] if isinstance(data.get(key), dict) else {}) | table
    _apply(data, sets)
    question = settled(validated(Scenario, data, str(path or "scenario")))
    accelerators = question.cluster.accelerators
    if processes not in (None, accelerators):
        note(f"the line starts {processes:,} processes, the cluster has {accelerators:,} accelerators: dp fills the cluster")
    return question


def question_table(path: Path, sets: list[str] | None) -> dict[str, Any]:
    """Return the table of a scenario's file, changed by ``--set``; whether it is a scenario is not asked yet."""
    from simulator.scenario.profiles import read_yaml

    data = read_yaml(path)
    _apply(data, sets)
    return data


def _apply(data: dict[str, Any], entries: list[str] | None, option: str = "--set") -> None:
    """Change a table as each ``KEY=VALUE`` of an option says."""
    from simulator.scenario.scenario import change

    for entry in entries or []:
        key, equals, value = entry.partition("=")
        if not equals or not all(key.split(".")):
            raise ProfileError(f"{option} {entry!r}: write KEY=VALUE, e.g. --set plan.pp=8")
        try:
            change(data, key, read_value(value))
        except ProfileError as error:
            raise ProfileError(f"{option} {entry!r}: {error}") from None


def read_value(text: str) -> Any:
    """Return a value as YAML reads it; a text that is no YAML stays text."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def read_values(entry: str, option: str) -> tuple[str, list[Any]]:
    """Return key and values of ``KEY=V1,V2,...``."""
    key, equals, text = entry.partition("=")
    values = read_value(f"[{text}]")
    if not equals or not key or not isinstance(values, list) or not values:
        raise ProfileError(f"{option} {entry!r}: write KEY=VALUE,VALUE, e.g. {option} {EXAMPLES[option]}")
    return key, values


#: how the values of each option that takes several are written
EXAMPLES = {"--over": "plan.pp=4,8,16", "--allow": "pp=4,8,16"}

Allowed = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="KEY=V1,V2,...",
        help="Values that a choice of the search may take: tp, cp, pp, vpp, ep, etp, micro_batch, zero, schedule, recompute, "
        "layout, dispatcher, dp_replicate, order; repeatable.",
    ),
]


def space(entries: list[str] | None) -> Space:
    """Return what the search may choose, narrowed or widened by each ``KEY=V1,V2,...``."""
    from simulator.planning.space import Space
    from simulator.scenario.profiles import validated

    said = dict(read_values(entry, "--allow") for entry in entries or [])
    return validated(Space, {key: tuple(values) for key, values in said.items()}, "--allow")


Varied = Annotated[
    list[str] | None,
    typer.Option("--vary", metavar="KEY=VALUE", help="With all ranks: jitter=0.02, routing.distribution=zipf, ...; repeatable."),
]


def variation(entries: list[str] | None) -> tuple[Variation | None, Routing | None]:
    """Return what ``--vary`` says of ranks and of routing; None for what it does not mention."""
    from simulator.scenario.profiles import validated
    from simulator.scenario.routing import Routing
    from simulator.scenario.variation import Variation

    said: dict[str, Any] = {}
    _apply(said, entries, "--vary")
    routing = validated(Routing, said.pop("routing"), "routing") if "routing" in said else None
    return validated(Variation, {"jitter": 0} | said, "variation") if said else None, routing
