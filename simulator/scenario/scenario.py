"""One question: this model, on this cluster, by this plan, for this job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from simulator.errors import ProfileError
from simulator.scenario.cluster import Cluster
from simulator.scenario.facts import Frozen
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import CLUSTERS, MODELS, described, read_yaml, save_yaml, validated
from simulator.scenario.routing import Routing


class Scenario(Frozen):
    """Model, cluster, plan and job.

    Parameters
    ----------
    model : Model or str
        Or a shipped name, the path of a ``config.json``, or a table with ``base`` and what differs.
    cluster : Cluster or str
        Or a shipped name, a path, or a table with ``base`` and what differs.
    plan : Plan
        `dp_shard` may be left out: it then fills the cluster.
    job : Job
    routing : Routing, optional
        How unevenly tokens fall on experts, and the remedies in force; for a simulation of every rank.
    """

    model: Model
    cluster: Cluster
    plan: Plan = Plan()
    job: Job
    routing: Routing | None = None

    @model_validator(mode="before")
    @classmethod
    def _resolve_names(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if "model" in data and not isinstance(data["model"], Model):
                data["model"] = MODELS.resolve(data["model"])
            if "cluster" in data and not isinstance(data["cluster"], Cluster):
                data["cluster"] = CLUSTERS.resolve(data["cluster"])
        return data

    @model_validator(mode="after")
    def _fill_data_parallel(self) -> Scenario:
        object.__setattr__(self, "plan", self.plan.on(self.ranks(self.plan)))
        return self

    def ranks(self, plan: Plan) -> int:
        """Return the accelerators that `plan` may use: all but spare hosts, or those that its placement names."""
        place, per_host = plan.placement, self.cluster.host.accelerators
        if place.accelerators is not None:
            return len(place.accelerators)
        hosts = place.hosts if place.hosts is not None else ()
        return len(hosts) * per_host if hosts else self.cluster.accelerators - place.spare_hosts * per_host

    @classmethod
    def load(cls, path: str | Path) -> Scenario:
        """Return the scenario in a YAML file.

        Raises
        ------
        ProfileError
            When the file cannot be read, or names the keys and values that do not fit.
        """
        return validated(cls, read_yaml(path), str(path))

    def described(self) -> dict[str, Any]:
        """Return the scenario as a table, by name where model and cluster are the shipped ones."""
        data = self.model_dump(mode="json")
        data["model"] = described(MODELS, self.model)
        data["cluster"] = described(CLUSTERS, self.cluster)
        if self.routing is None:
            del data["routing"]
        return data

    def save(self, path: str | Path) -> None:
        """Write the scenario to a YAML file, by name where model and cluster are the shipped ones."""
        save_yaml(self.described(), path)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step."""
        return self.job.global_batch // (self.plan.dp * self.plan.micro_batch)

    def with_plan(self, **changes: Any) -> Scenario:
        """Return the same question for a plan with `changes`; degrees that fill the cluster are filled again."""
        data = self.plan.model_dump() | {"dp_shard": None} | changes
        return self.model_copy(update={"plan": (plan := Plan.model_validate(data)).on(self.ranks(plan))})


def change(table: dict[str, Any], key: str, value: Any) -> None:
    """Set one entry of a scenario's table, in place.

    Parameters
    ----------
    table : dict
        As in a YAML file.
    key : str
        Dotted, ``plan.pp``. A part that is a name becomes a table on that base: ``cluster.accelerators`` of a named cluster.

    Raises
    ------
    ProfileError
        When the key is empty, or leads through something that is no table.
    """
    *parents, last = key.split(".")
    if not all([*parents, last]):
        raise ProfileError(f"{key!r} is no key of a scenario; write, for example, plan.pp")
    place = table
    for parent in parents:
        inner = place.get(parent)
        if inner is None or isinstance(inner, str):  # a name: keep it as the base and change one thing
            inner = place[parent] = {"base": inner} if inner else {}
        if not isinstance(inner, dict):
            raise ProfileError(f"{parent} is {inner!r}, not a table: {key} leads nowhere")
        place = inner
    place[last] = value
