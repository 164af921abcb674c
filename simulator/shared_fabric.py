"""Several jobs on one fabric: how much each slows the collectives of the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from simulator.errors import PlanError, Problem, ProfileError
from simulator.network.sharing import share, together
from simulator.placing import step_traffic
from simulator.scenario.mesh import accelerator_of
from simulator.scenario.scenario import Scenario


def share_fabric(jobs: Mapping[str, Scenario]) -> pd.DataFrame:
    """Return how much the collectives of each job slow while the other jobs communicate, too.

    Parameters
    ----------
    jobs : mapping of str to Scenario
        Two or more on the same cluster, each on hosts of its own by ``plan.placement.hosts``.

    Returns
    -------
    DataFrame
        One row per job and kind of collective that leaves a scale-up domain: ``job``, ``axis``, ``kind``, ``nic_share`` that all
        groups of the kind leave each other without the other jobs, ``slowdown`` when every other job runs, at the same time,
        its collective of the largest buffers over the step, and ``beside``, those collectives.

    Raises
    ------
    ProfileError
        When there are fewer than two jobs, or their clusters differ.
    PlanError
        When two jobs use one host.

    Notes
    -----
    Rates are max-min fair on the cluster's graph (`simulator.network.sharing.together`). How often jobs meet in time is not
    modelled: the slowdown is that of collectives that do meet.
    """
    _checked(jobs)
    cluster = next(iter(jobs.values())).cluster
    kinds: dict[str, dict[tuple[str, str], float]] = {}
    for name, job in jobs.items():
        traffic = step_traffic(job)
        kinds[name] = {key: size for key, size in traffic.items() if share(job.plan, cluster, *key) is not None}
    main = {name: max(found, key=found.__getitem__) for name, found in kinds.items() if found}
    rows = []
    for name, found in kinds.items():
        others = [(jobs[other].plan, *key) for other, key in main.items() if other != name]
        beside = ", ".join(f"{other}: {' '.join(key)}" for other, key in main.items() if other != name)
        for axis, kind in found:
            alone = share(jobs[name].plan, cluster, axis, kind)
            assert alone is not None
            slowdown = together(cluster, ((jobs[name].plan, axis, kind), *others))[0]
            rows.append({"job": name, "axis": axis, "kind": kind, "nic_share": alone.rate, "slowdown": slowdown, "beside": beside})
    return pd.DataFrame(rows, columns=["job", "axis", "kind", "nic_share", "slowdown", "beside"])


def _checked(jobs: Mapping[str, Scenario]) -> None:
    if len(jobs) < 2:
        raise ProfileError(f"{len(jobs)} job shares a fabric with nobody; give two or more")
    (first, one), *rest = jobs.items()
    for name, job in rest:
        if job.cluster != one.cluster:
            raise ProfileError(f"jobs {first} and {name} are on different clusters, {one.cluster.name} and {job.cluster.name}; give one")
    per_host, owner = one.cluster.host.accelerators, {}
    for name, job in jobs.items():
        for host in np.unique(accelerator_of(job.plan, per_host) // per_host).tolist():
            if host in owner:
                numbers = f"host {host} is used by {owner[host]} and {name}"
                raise PlanError([Problem("jobs have hosts of their own", numbers, "give each its own plan.placement.hosts")])
            owner[host] = name
