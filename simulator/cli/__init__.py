"""The command line: one verb per function of the API, one module per family of verbs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import NoReturn

import typer
from rich.markup import escape

from simulator.cli.accuracy import validate
from simulator.cli.calibrate import calibrate
from simulator.cli.fabrics import fabrics
from simulator.cli.facts import clusters, models, sources
from simulator.cli.launches import export
from simulator.cli.layouts import layouts
from simulator.cli.planning import advise, budget, cheapest, compare, fewest, scale
from simulator.cli.steps import plan, simulate
from simulator.cli.sweeps import sweep
from simulator.cli.terminal import err, print_json, say
from simulator.errors import PlanError, Problem, SimulatorError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan a ten-thousand-GPU training cluster before it exists.",
)
#: in the order of the help
VERBS = (
    plan, simulate, compare, fewest, cheapest, budget, scale, advise,
    sweep, export, fabrics, layouts, validate, calibrate, models, clusters, sources,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)


def _refuse(problems: list[Problem]) -> NoReturn:
    """End with exit code 2, having told people on the error stream and, with --json, machines on the other."""
    for problem in problems:
        remedy = f"\n  remedy: {escape(problem.remedy)}" if problem.remedy else ""
        say(f"[red]{escape(problem.rule)}:[/] {escape(problem.numbers)}{remedy}", err)
    if "--json" in sys.argv:
        print_json({"problems": [asdict(problem) for problem in problems]})
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
