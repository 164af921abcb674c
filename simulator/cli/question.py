"""What the verbs have in common: the scenario, changes to it, and where answers go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from simulator.cli.terminal import note
from simulator.errors import ProfileError

if TYPE_CHECKING:
    from simulator.scenario.scenario import Scenario

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


def load(path: Path | None, sets: list[str] | None, megatron: Path | None = None) -> Scenario:
    """Return the scenario of a file, changed by a Megatron-LM launch line and then by ``--set``."""
    from simulator.scenario.profiles import read_text, read_yaml, validated
    from simulator.scenario.scenario import Scenario

    data = read_yaml(path) if path else {}
    processes = None
    if megatron:
        from simulator.scenario.megatron import plan_from_megatron

        run = plan_from_megatron(read_text(megatron))
        for warning in run.warnings:
            note(warning)
        processes = run.accelerators
        said = run.plan.model_dump(mode="json", exclude_unset=True) | {"dp_shard": None}
        for key, table in {"plan": said, "job": run.job}.items():  # the line has the last word but for --set
            data[key] = (data[key] if isinstance(data.get(key), dict) else {}) | table
    for entry in sets or []:
        _set(data, entry)
    question = validated(Scenario, data, str(path or "scenario"))
    accelerators = question.cluster.accelerators
    if processes not in (None, accelerators):
        note(f"the line starts {processes:,} processes, the cluster has {accelerators:,} accelerators: dp fills the cluster")
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
