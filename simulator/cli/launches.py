"""Launch configurations of training frameworks: options that read one, and the verb export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from simulator.cli.question import Reader, ScenarioFile, Sets, load
from simulator.cli.terminal import report_files, say
from simulator.errors import PlanError, ProfileError

if TYPE_CHECKING:
    from simulator.formats.launch import Launch

Megatron = Annotated[Path | None, typer.Option(help="File with a Megatron-LM launch line to take the plan and batch from.")]
Torchtitan = Annotated[Path | None, typer.Option(help="torchtitan TOML to take the plan and batch from.")]
Deepspeed = Annotated[Path | None, typer.Option(help="DeepSpeed JSON to take the plan and batch from.")]


def launch(megatron: Path | None, torchtitan: Path | None, deepspeed: Path | None) -> Reader | None:
    """Return what reads the one configuration that is given, None when none is.

    Raises
    ------
    ProfileError
        When several are given.
    """
    given = {"--megatron": megatron, "--torchtitan": torchtitan, "--deepspeed": deepspeed}
    named = [name for name, path in given.items() if path is not None]
    if len(named) > 1:
        raise ProfileError(f"{' and '.join(named)} are given together; a plan comes from one of them")
    if not named:
        return None
    return lambda data: _read(named[0], given[named[0]], data)


def _read(kind: str, path: Path, data: dict[str, Any]) -> Launch:
    from simulator.formats.deepspeed import plan_from_deepspeed
    from simulator.formats.megatron import plan_from_megatron
    from simulator.formats.torchtitan import plan_from_torchtitan
    from simulator.scenario.profiles import MODELS, read_text

    if kind == "--megatron":
        return plan_from_megatron(read_text(path))
    if kind == "--deepspeed":
        return plan_from_deepspeed(path)
    return plan_from_torchtitan(path, MODELS.resolve(data["model"]).layers if "model" in data else None)


def export(
    scenario: ScenarioFile = None,
    sets: Sets = None,
    to: Annotated[Literal["megatron", "torchtitan", "deepspeed", "chakra"], typer.Option(help="What to write.")] = "megatron",
    out: Annotated[Path | None, typer.Option("--out", help="File, or folder of Chakra traces; left out, the text is printed.")] = None,
) -> None:
    """Write the plan as a launch line or configuration that starts it, or the step as Chakra traces for ASTRA-sim."""
    from simulator.feasibility import check
    from simulator.files import write_atomically
    from simulator.formats.chakra import save_chakra
    from simulator.formats.deepspeed import deepspeed_text
    from simulator.formats.megatron_write import megatron_command
    from simulator.formats.torchtitan import torchtitan_text

    question = load(scenario, sets)
    problems = check(question)
    if problems:
        raise PlanError(problems)
    if to == "chakra":
        if out is None:
            raise ProfileError("--to chakra writes a file per rank; name the folder with --out")
        files = save_chakra(question, out)
        say(f"{len(files) - 1} traces and {files[-1].name} in {out}")
        return
    text = {"megatron": megatron_command, "torchtitan": torchtitan_text, "deepspeed": deepspeed_text}[to](question)
    if out is None:
        typer.echo(text, nl=False)
        return
    write_atomically(out, lambda file: file.write(text))
    report_files([out])
