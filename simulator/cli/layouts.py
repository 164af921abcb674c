"""The verb layouts: published layouts beside the best that the search finds with the same memory options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from simulator.cli.question import AsJson, load
from simulator.cli.terminal import err, print_json, progress, records, report_files, say, show

if TYPE_CHECKING:
    import pandas as pd

_HEAD = """
# Would the planner have chosen it?

Written by `{command}`; every figure below is printed by it. Each published layout is simulated, and beside it the best that the search
finds for the same model, cluster, batch and sequence, with the same sharding, recompute, datatypes, dispatcher and overlap.
"""
_WORDS = """
{close} of {count} published layouts are predicted within {limit:.0%} of the predicted best. `excess` is how much longer the published
layout is predicted to take; `rests on` is the part of the step on which most of that rests. An excess says that the prediction and the
people who published disagree, not who is right: they may have had reasons that no step time shows.
"""


def layouts(
    scenarios: Annotated[list[Path] | None, typer.Argument(help="Scenarios in YAML whose plans are to be judged.")] = None,
    record: Annotated[bool, typer.Option(help="Also the fastest published layout of every mixture of experts in the record.")] = True,
    docs: Annotated[Path | None, typer.Option(help="Write the report as a Markdown page, too.", dir_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Hold published layouts against the best that the search finds, and name the term that disagrees."""
    from simulator.errors import ProfileError
    from simulator.files import write_atomically
    from simulator.validation.recipes import recipes
    from simulator.validation.section import Section, markdown

    asked = {path.stem: load(path, None) for path in scenarios or []} | (recipes() if record else {})
    if not asked:
        raise ProfileError("no layout to judge; give scenarios or leave --no-record out")
    table, refused = _judged(asked)
    if as_json:
        print_json({"rows": records(table), "refused": refused})
        return
    words = _words(table)
    shown = _shown(table)
    say(escape(words))
    show(shown, "Published layouts beside the best predicted ones")
    for name, problem in refused.items():
        say(f"[red]{escape(name)}:[/] {escape(problem)}", err)
    if docs:
        command = " ".join(["myriad layouts", *map(str, scenarios or []), *([] if record else ["--no-record"]), "--docs", str(docs)])
        left = "".join(f"\n- `{name}`: {problem}" for name, problem in refused.items())
        parts = [Section("Layouts", words, shown), *([Section("Left out", left.strip())] if left else [])]
        write_atomically(docs, lambda f: f.write(markdown(parts, _HEAD.format(command=command))))
        report_files([docs])


def _judged(asked: dict) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return the verdicts as a table, and why a layout has none."""
    import pandas as pd

    from simulator.errors import SimulatorError
    from simulator.planning.layouts import judge

    rows, refused = [], {}
    with progress() as tell:
        for done, (name, scenario) in enumerate(asked.items()):
            tell("layouts", done, len(asked))
            try:
                rows.append({"layout": name} | judge(scenario).row())
            except SimulatorError as error:
                refused[name] = str(error)
    if not rows:
        raise SimulatorError("; ".join(f"{name}: {problem}" for name, problem in refused.items()))
    return pd.DataFrame(rows).sort_values("excess", ignore_index=True), refused


def _words(table: pd.DataFrame) -> str:
    from simulator.planning.layouts import CLOSE

    return " ".join(_WORDS.format(close=int(table["close"].sum()), count=len(table), limit=CLOSE).split())


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as people read it."""
    from simulator.plots.style import WORDS

    term = [f"{WORDS.get(t, t)}, {s:+.3g} s" if t else "" for t, s in zip(table["term"], table["term_s"], strict=True)]
    return table[["layout", "accelerators"]].assign(
        published=table["published"],
        best=table["best"],
        **{
            "published s": table["published_s"].map("{:.3f}".format),
            "best s": table["best_s"].map("{:.3f}".format),
            "excess": table["excess"].map("{:.1%}".format),
            "rests on": term,
            "fits": ["yes" if not problem else "predicted not to" for problem in table["problems"]],
        },
    )
