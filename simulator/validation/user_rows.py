"""A user's own measured runs: read, checked cell by cell, and scored where they can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from simulator.errors import Problem, ProfileError, nearest
from simulator.validation.row import Row
from simulator.validation.row_machines import MACHINES, known_machine
from simulator.validation.row_model import usual
from simulator.validation.row_scripts import with_scripts
from simulator.validation.schema import SCHEMAS, Schema, wrong

#: degrees whose product is the number of accelerators
_MESH = ("tp", "pp", "cp", "dp")


@dataclass(frozen=True)
class UserRows:
    """A user's file.

    Parameters
    ----------
    rows : DataFrame
        The rows without problems, in the columns of `simulator.validation.published.published_runs`.
    problems : list of Problem
        What is wrong with the others: row and column, what it says, the remedy.
    """

    rows: pd.DataFrame
    problems: list[Problem]


def read_user_rows(path: str | Path, kind: str = "data") -> UserRows:
    """Return the rows of a CSV file that can be scored, and why the others cannot.

    Parameters
    ----------
    path : str or Path
        A table in the columns of `simulator.validation.schema`, comma-separated, UTF-8, with a header.
    kind : str
        Key of `SCHEMAS`: ``data`` (training runs), ``memory`` or ``collectives``.

    Raises
    ------
    ProfileError
        When the file is no table at all.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, on_bad_lines="error")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} is not a table: {error}; write CSV in UTF-8 with a header, as docs/validation.md says") from None
    schema = SCHEMAS[kind]
    table.columns = [str(name).strip() for name in table.columns]
    problems = _column_problems(path, table, schema)
    missing = any(column.needed == "always" and column.name not in table for column in schema.columns)
    for name in schema.by_name:
        if name not in table:
            table[name] = ""
    table = table.apply(lambda cells: cells.str.strip()).assign(file=path.name)
    table["source"] = table["source"].where(table["source"] != "", path.stem)
    if "complete" in table:
        table["complete"] = table["complete"].where(table["complete"] != "", "yes")
    if missing:
        return UserRows(table.iloc[:0], problems)
    found = [_row_problems(path, number, row, schema) for number, row in enumerate(table.to_dict("records"), start=2)]
    good = np.array([not some for some in found], dtype=bool)
    return UserRows(table[good].reset_index(drop=True), problems + [problem for some in found for problem in some])


def _column_problems(path: Path, table: pd.DataFrame, schema: Schema) -> list[Problem]:
    problems = [
        Problem(f"{path.name}, column {column.name}", "is not in the header", f"add the column: {column.meaning}")
        for column in schema.columns
        if column.needed == "always" and column.name not in table
    ]
    problems += [
        Problem(f"{path.name}, heading {name}", "is not understood and left out", nearest(name, schema.by_name))
        for name in table.columns
        if name not in schema.by_name and not name.startswith("Unnamed")
    ]
    if not set(schema.measured) & set(table.columns):
        problems.append(Problem(f"{path.name}, column {schema.measured[0]}", "no measurement in the header", schema.remedy))
    return problems


def _row_problems(path: Path, number: int, row: dict[str, str], schema: Schema) -> list[Problem]:
    """Return what is wrong with one row; `number` is its line in the file."""

    def problem(column: str, what: str, remedy: str) -> Problem:
        name = f" ({row['id'] or 'no id'})" if "id" in row else ""
        return Problem(f"{path.name}, line {number}{name}, column {column}", what, remedy)

    problems = [problem(c.name, *found) for c in schema.columns if (found := wrong(c, row[c.name]))]
    for column in schema.columns:
        needed = column.needed == "always" or (column.needed == "moe" and row["arch"] == "moe")
        if needed and not row[column.name] and not usual(row.get("model", ""), column.name):
            problems.append(problem(column.name, "is blank", f"write {column.meaning}"))
    if row.get("arch", "") not in ("", "dense", "moe"):
        problems.append(problem("arch", f"{row['arch']!r}", "write dense or moe"))
    if row["gpu"] and not known_machine(row["gpu"]):
        problems.append(problem("gpu", f"{row['gpu']!r} has no profile", nearest(row["gpu"], MACHINES)))
    if not any(row[name] for name in schema.measured):
        problems.append(problem(schema.measured[0], "is blank", schema.remedy))
    if problems or "tp" not in row:
        return problems
    scripted = with_scripts(Row(row))  # which may say another degree than a table prints
    return _layout_problems(problem, row | {name: scripted.text(name) for name in (*_MESH, "gpus", "arch", "ep", "etp", "mbs", "gbs")})


def _layout_problems(problem, row: dict[str, str]) -> list[Problem]:
    """Return why degrees and batch cannot be, for a row whose cells are numbers."""
    degree = {name: int(float(row[name])) if row[name] else 1 for name in (*_MESH, "gpus", "ep", "etp", "mbs", "gbs")}
    rest = degree["tp"] * degree["pp"] * degree["cp"]
    if degree["gpus"] % rest:
        return [problem("gpus", f"tp x pp x cp = {rest} does not divide {degree['gpus']}", f"use a multiple of {rest}")]
    dp = degree["gpus"] // rest
    if row["dp"] and degree["dp"] != dp:
        return [problem("dp", f"tp x pp x cp x dp = {rest * degree['dp']}, gpus = {degree['gpus']}", f"write {dp}")]
    if row["arch"] == "moe" and (dp * degree["cp"] * degree["tp"]) % (degree["ep"] * degree["etp"]):
        world = dp * degree["cp"] * degree["tp"]
        numbers = f"ep x etp = {degree['ep'] * degree['etp']} does not divide dp x cp x tp = {world}"
        return [problem("ep", numbers, f"use a divisor of {world // degree['etp']}")]
    if row["gbs"] and degree["gbs"] % (dp * degree["mbs"]):
        unit = dp * degree["mbs"]
        return [
            problem("gbs", f"{degree['gbs']} is not a multiple of dp x mbs = {unit}", f"use {max(1, round(degree['gbs'] / unit)) * unit}")
        ]
    return []
