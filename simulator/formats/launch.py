"""What a launch configuration of a training framework says, and what it cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from simulator.errors import PlanError, Problem, ProfileError
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import read_text

#: fields of a plan that describe the software that runs it: no launch configuration says them
SOFTWARE = ("reserve", "kernels", "framework")


@dataclass(frozen=True, slots=True)
class Launch:
    """What a launch configuration says.

    Parameters
    ----------
    plan : Plan
        With `dp_shard` left open where the configuration leaves it to the size of the cluster.
    job : dict
        Those of ``global_batch``, ``sequence_length``, ``tokens``, ``optimizer`` and ``routing`` that it gives.
    accelerators : int or None
        Processes that it starts.
    warnings : tuple of str
        What was not read or is not modelled.
    """

    plan: Plan
    job: dict[str, Any]
    accelerators: int | None
    warnings: tuple[str, ...]


def loaded(source: str | Path | Mapping[str, Any], language: str, parse: Callable[[str], Any]) -> Mapping[str, Any]:
    """Return a configuration as a table: a mapping as it is, a file as `parse` reads its `language`.

    Raises
    ------
    ProfileError
        When the file cannot be read, is not in the language, or holds no table.
    """
    if isinstance(source, Mapping):
        return source
    try:
        data = parse(read_text(source))
    except (ValueError, RecursionError) as error:  # what json and tomllib raise
        raise ProfileError(f"{source} is not {language}: {error}") from None
    if not isinstance(data, Mapping):
        raise ProfileError(f"{source} must hold a {language} object; found {type(data).__name__}")
    return data


def refuse(framework: str, terms: dict[str, str]) -> None:
    """Raise a PlanError when `terms` names parts of a plan that `framework` has no words for; values are remedies."""
    if terms:
        raise PlanError(
            Problem(f"{framework} can say the plan", f"{framework} cannot say {term}", remedy) for term, remedy in terms.items()
        )


def refuse_unsaid(framework: str, plan: Plan, understood: Plan, fills: bool = True) -> None:
    """Raise a PlanError that names every term in which `understood`, read back from what was written, differs from `plan`.

    Parameters
    ----------
    fills : bool
        Whether the configuration leaves `dp_shard` to the size of the cluster.
    """
    wanted, found = _terms(plan), _terms(understood)
    leave = {"dp_shard"} if fills else set()
    differing = [name for name in wanted if wanted[name] != found.get(name) and name not in leave]
    refuse(framework, {f"{name}: {_text(wanted[name])}": f"it means {name}: {_text(found.get(name))}" for name in differing})


def _terms(plan: Plan) -> dict[str, Any]:
    """Return the leaves of a plan by dotted name, without what describes the software."""
    found: dict[str, Any] = {}
    for name in type(plan).model_fields:
        value = getattr(plan, name)
        if name in SOFTWARE:
            continue
        if isinstance(value, BaseModel):
            found |= {f"{name}.{key}": getattr(value, key) for key in type(value).model_fields}
        else:
            found[name] = value
    return found


def _text(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "[" + ", ".join(map(str, value)) + "]"
    return "null" if value is None else str(value)
