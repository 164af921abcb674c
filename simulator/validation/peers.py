"""Rows that other simulators published their own error on, and those errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from simulator.scenario.scenario import Scenario
from simulator.validation.published import step_s, validate


@dataclass(frozen=True)
class Peer:
    """What a peer reports on a set of rows.

    Parameters
    ----------
    rows : str
        What the rows are.
    pattern : str
        Of their ids.
    error : str
        The column scored: ``anchored_error`` where a factor exists, else ``relative_error``.
    said : str
        The peer's own figures, and where they are printed.
    target : str
        What this project wants to reach.
    """

    rows: str
    pattern: str
    error: str
    said: str
    target: str


PEERS = (
    Peer(
        "Korthikanti et al. 2022, table 5, on A100",
        r"^korth-(?!530-2240)",
        "anchored_error",
        "Calculon: mean 3.65 %, worst 8.87 % (Isaev et al., SC 2023)",
        "mean 3 %",
    ),
    Peer(
        "SimuMax B200, dense",
        r"^simumax-llama",
        "anchored_error",
        "SimuMax: mean 5.2 %, worst 11.4 % by the predictions that it prints for these rows",
        "mean 5 %, worst 10 %",
    ),
    Peer(
        "SimuMax B200, MoE",
        r"^simumax-(?!llama)",
        "anchored_error",
        "SimuMax: mean 6.6 %, worst 13.5 %; by the predictions that it prints for these rows 10.0 % and 13.5 %",
        "mean 5 %, worst 10 %",
    ),
    Peer("vTrain, several hosts", r"^vtrain-m-", "anchored_error", "vTrain: mean 14.73 % (Bang et al., MICRO 2024)", "mean 8 %"),
    Peer("vTrain, one host", r"^vtrain-s-", "anchored_error", "vTrain: mean 8.37 % (the same)", "mean 8 %"),
    Peer("Llama 3 405B on 8,192 and 16,384 H100", r"^llama3-t4", "relative_error", "none found", "10 %"),
    Peer("DeepSeek-V3 on 2,048 H800", r"^dsv3-isca", "relative_error", "one peer is 61 % too slow", "10 %"),
)


def peers(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the errors on the peers' rows beside the peers' own.

    Parameters
    ----------
    rows : DataFrame
        As `simulator.validation.regimes.scored` returns it.

    Returns
    -------
    DataFrame
        ``rows``, ``count``, ``scored`` (rows with a factor, for anchored ones), ``mean``, ``worst`` (signed), ``said``,
        ``target``. Rows count once each here, as peers count.
    """
    lines = []
    for peer in PEERS:
        some = rows[rows["id"].str.contains(peer.pattern)]
        error = some[peer.error].dropna()
        worst = error.loc[error.abs().idxmax()] if len(error) else float("nan")
        regime = "anchored" if peer.error == "anchored_error" else "cold"
        counted = {"rows": peer.rows, "count": len(some), "scored": len(error), "regime": regime}
        lines.append(counted | {"mean": error.abs().mean(), "worst": worst, "said": peer.said, "target": peer.target})
    return pd.DataFrame(lines)


#: rows whose source leaves something out that matters: pattern of id -> columns and the values that are plausible
_LEFT_OUT: dict[str, dict[str, tuple[str, ...]]] = {
    # the first chunk has only the embedding and the last only the output (section 3.3.2), so that 126 others of 16 stages have a layer
    # each; 16 sequences a replica fill 16 stages at one each alone
    r"^llama3-t4": {"vpp": ("8",)},
    # one sequence: with two, the phases of its table 4 would make a pair of forward and backward 1.9 times as long as the two alone
    # (tests/against/test_dualpipe.py); four are 30 micro-batches, fewer than DualPipe needs on 16 ranks
    r"^dsv3-isca": {"mbs": ("1",), "notes": ("natural routing", "force-balanced")},
}


def plausible(runs: pd.DataFrame, predict: Callable[[Scenario], float] = step_s) -> pd.DataFrame:
    """Return the errors of rows for every plausible value of what their sources leave out.

    Parameters
    ----------
    runs : DataFrame
        As `simulator.validation.published.published_runs` returns it.
    predict : callable
        As in `simulator.validation.published.validate`.

    Returns
    -------
    DataFrame
        ``id``, ``taken`` (the values), ``relative_error``.
    """
    lines = []
    for pattern, columns in _LEFT_OUT.items():
        rows = runs[runs["id"].str.contains(pattern)]
        for values in itertools.product(*columns.values()):
            taken = dict(zip(columns, values, strict=True))
            table = validate(predict, rows.assign(**taken), complete_only=False)
            words = ", ".join(value if name == "notes" else f"{name} {value}" for name, value in taken.items())
            lines += [{"id": i, "taken": words, "relative_error": e} for i, e in zip(table["id"], table["relative_error"], strict=True)]
    return pd.DataFrame(lines, columns=["id", "taken", "relative_error"])
