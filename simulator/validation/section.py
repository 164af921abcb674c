"""A section of a report, as words and a table, and how sections become a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Parameters
    ----------
    title, words : str
        Heading, and what the reader must know of the table.
    table : DataFrame or None
        Cells as text, the headings as people read them.
    """

    title: str
    words: str
    table: pd.DataFrame | None = None


def percent(value: float, sign: bool = False) -> str:
    """Return a share as text, a dash when there is none."""
    if value != value:
        return "–"
    return f"{100 * value:+.1f} %" if sign else f"{100 * value:.1f} %"


def markdown(parts: Iterable[Section], head: str) -> str:
    """Return sections as a Markdown page."""
    blocks = [head.strip()]
    for part in parts:
        blocks += [f"## {part.title}", part.words]
        if part.table is not None and len(part.table):
            blocks.append(markdown_table(part.table))
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    """Return a table as Markdown."""
    rows = ([str(value).replace("|", "\\|") for value in row] for row in table.itertuples(index=False))
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
