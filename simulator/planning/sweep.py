"""Many scenarios, answered on any executor, kept as they finish, continued after an interruption."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from simulator.closed_forms import estimate
from simulator.errors import PlanError, ProfileError, SimulatorError
from simulator.executors import finished
from simulator.feasibility import check
from simulator.lower_bound import bound
from simulator.planning.results import Answers, canonical, key_of, stored_answers
from simulator.results.outcome import Outcome
from simulator.scenario.scenario import Scenario, change
from simulator.simulate import simulate_step

Level = Literal["simulate", "estimate", "bound"]
#: what a row can be: answered; refused by `check`; no scenario at all; stopped by an error of Myriad's own
STATUS = ("answered", "infeasible", "invalid", "failed")


@dataclass(frozen=True)
class ClosedForm(Outcome):
    """A step whose seconds come from a formula: `estimate` or `bound`.

    Parameters
    ----------
    scenario : Scenario
    seconds : float
    level : str
    """

    scenario: Scenario
    seconds: float
    level: str

    @classmethod
    def of(cls, scenario: Scenario, level: str) -> ClosedForm:
        """Return the step by the formula that `level` names.

        Raises
        ------
        PlanError
            When the scenario cannot run.
        """
        problems = check(scenario)
        if problems:
            raise PlanError(problems)
        return cls(scenario, float(estimate(scenario) if level == "estimate" else bound(scenario)), level)

    @property
    def step_time_s(self) -> float:
        """Seconds by the formula."""
        return self.seconds

    def breakdown(self) -> pd.DataFrame:
        """Return the step as one part: a formula does not say which part of it hides another."""
        return pd.DataFrame([{"part": "step", "seconds": self.seconds, "share": 1.0, "hidden_s": 0.0}])


def grid(base: Scenario | Mapping[str, Any], vary: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return a table of a scenario for every combination of the values of `vary`.

    Parameters
    ----------
    base : Scenario or mapping
        A scenario, or the table of one as in a YAML file.
    vary : mapping
        Dotted keys and their values, ``{"plan.pp": [4, 8], "cluster": ["h100-rail-10240", "gb200-nvl72-10368"]}``.

    Returns
    -------
    list of dict
        The last key varies fastest. Where degrees or the cluster vary, `plan.dp_shard` fills the cluster again unless it is
        varied itself.
    """
    if isinstance(base, Scenario):
        base = base.described()
    empty = [key for key, values in vary.items() if isinstance(values, str) or not len(values)]
    if empty:
        raise ProfileError(f"vary {empty[0]}: give a list of one value or more; found {vary[empty[0]]!r}")
    tables = []
    for values in itertools.product(*vary.values()):
        table = copy.deepcopy(dict(base))
        if isinstance(table.get("plan"), dict) and "plan.dp_shard" not in vary:
            table["plan"]["dp_shard"] = None
        for key, value in zip(vary, values, strict=True):
            change(table, key, value)
        tables.append(table)
    return tables


def sweep(
    scenarios: Iterable[Scenario | Mapping[str, Any]],
    into: str | Path | None = None,
    level: Level = "simulate",
    executor: str | Executor = "process",
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Return the figures of many scenarios, one row each, in their order.

    Parameters
    ----------
    scenarios : iterable of Scenario or mapping
        Scenarios, or tables of them such as `grid` makes. Equal ones are answered once.
    into : path, optional
        SQLite file that keeps every answer as soon as it is there. What it already holds is not computed again: run an
        interrupted sweep again and it goes on.
    level : str
        ``simulate`` (events), ``estimate`` or ``bound`` (closed forms).
    executor : str or concurrent.futures.Executor
        As for `simulator.executors.opened`: ``process``, ``process:8``, ``serial``, ``dask://HOST:PORT``; or an executor of
        Dask, Ray, MPI or any other.
    progress : callable, optional
        Called with the number of rows done, stored ones included, and of all.

    Returns
    -------
    DataFrame
        ``key``, what the scenario is, ``level``, ``status`` (`STATUS`), ``problem``, and the figures with their units; no
        number where there is no answer. `stored_scenario` returns the scenario of a key.

    Raises
    ------
    ProfileError
        When `into` belongs to something else or to another version, or the executor cannot be reached.
    SimulatorError
        When workers died over some scenarios even alone; everything else is then stored.
    """
    if level not in get_args(Level):
        raise ProfileError(f"level = {level!r}; choose {', '.join(get_args(Level))}")
    questions = [canonical({"level": level, "scenario": _table(scenario)}) for scenario in scenarios]
    keys = [key_of(question) for question in questions]
    asked = dict(zip(keys, questions, strict=True))
    lost: dict[str, BaseException] = {}
    with Answers(into) if into is not None else nullcontext() as store:
        known = {key: found for key, found in (store.known() if store else {}).items() if key in asked}
        missing = {key: question for key, question in asked.items() if key not in known}
        if progress:
            progress(len(known), len(asked))
        for key, answer in finished(_answer, missing, executor) if missing else ():
            if isinstance(answer, BaseException):
                lost[key] = answer
                continue
            known[key] = json.loads(answer)
            if store:
                store.add(key, asked[key], known[key])
            if progress:
                progress(len(known), len(asked))
    if lost:
        error = next(iter(lost.values()))
        kept = f"; the other {len(known)} are kept in {into}, run again to try these" if into else ""
        raise SimulatorError(f"{len(lost)} of {len(asked)} scenarios took their worker along ({type(error).__name__}: {error}){kept}")
    return pd.DataFrame([_row(key, asked[key], known[key]) for key in keys])


def stored_sweep(path: str | Path) -> pd.DataFrame:
    """Return every row of a file of answers, as `sweep` does; in the order of their keys. Also while a sweep writes it."""
    return pd.DataFrame([_row(key, canonical(question), answer) for key, question, answer in stored_answers(path)])


def stored_scenario(path: str | Path, key: str) -> Scenario:
    """Return the scenario whose answer has `key` in a file of answers.

    Raises
    ------
    ProfileError
        When the file holds no such key, or its table was no scenario to begin with.
    """
    for found, question, _ in stored_answers(path):
        if found == key:
            return Scenario.model_validate(question["scenario"])
    raise ProfileError(f"{path} holds no answer with the key {key}")


def _table(scenario: Scenario | Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole of a scenario with every fact; a table that is none as it stands, for its row to say why."""
    if isinstance(scenario, Scenario):
        return scenario.model_dump(mode="json")
    try:
        return Scenario.model_validate(dict(scenario)).model_dump(mode="json")
    except SimulatorError:
        return json.loads(json.dumps(dict(scenario), default=str))


def _answer(question: str) -> str:
    """Answer one question in canonical JSON, in canonical JSON; whatever happens is an answer."""
    asked = json.loads(question)
    try:
        figures = _figures(Scenario.model_validate(asked["scenario"]), asked["level"])
        found = {"status": "answered", "problem": "", "figures": figures}
    except PlanError as error:
        found = {"status": "infeasible", "problem": str(error), "figures": {}}
    except ProfileError as error:
        found = {"status": "invalid", "problem": str(error), "figures": {}}
    except Exception as error:  # noqa: BLE001 - one scenario that trips over a bug must not end a sweep of thousands
        found = {"status": "failed", "problem": f"{type(error).__name__}: {error}", "figures": {}}
    return canonical(found)


def _figures(scenario: Scenario, level: str) -> dict[str, float]:
    found = simulate_step(scenario) if level == "simulate" else ClosedForm.of(scenario, level)
    return {name: float(v) for name, v in found.summary().items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _row(key: str, question: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row: what the scenario is, without the facts of its model and cluster, and what came of it."""
    asked = json.loads(question)
    table = asked["scenario"]
    row: dict[str, Any] = {"key": key}
    for part in ("model", "cluster"):
        found = table.get(part)
        row[part] = found.get("name", "") if isinstance(found, dict) else found
    if isinstance(table.get("cluster"), dict):
        row["accelerators"] = table["cluster"].get("accelerators")
    for part in ("plan", "job"):
        for name, value in table[part].items() if isinstance(table.get(part), dict) else ():
            row[f"{part}.{name}"] = canonical(value) if isinstance(value, dict | list) else value
    return row | {"level": asked["level"], "status": answer["status"], "problem": answer["problem"]} | answer["figures"]
