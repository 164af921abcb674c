"""The architect's table: the same step on several fabrics, with what each network costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from simulator.errors import PlanError, ProfileError
from simulator.feasibility import check
from simulator.network.bill import bill_of_materials
from simulator.network.sharing import known
from simulator.placing import settled
from simulator.planning.search import search
from simulator.scenario.cluster import Cluster, Fabric
from simulator.scenario.profiles import FABRICS, PARTS
from simulator.scenario.scenario import Scenario
from simulator.scenario.wiring import Clos
from simulator.simulate import simulate_step


def candidates(cluster: Cluster) -> list[str]:
    """Return the shipped Clos fabrics that take the ports of this cluster's NICs and reach all of its accelerators.

    Dragonflies and Slim Fly are compared by name only: on minimal routes, all that is modelled, they lose to any Clos.
    """
    found = []
    for name in FABRICS.names():
        fabric = FABRICS.load(name)
        shape = fabric.shape
        port = cluster.host.nic_bytes_per_s / (shape.planes * shape.cables if isinstance(shape, Clos) else 1)
        plug = PARTS.load(fabric.host_optic).port_bytes_per_s if fabric.host_optic else None
        if isinstance(shape, Clos) and plug == port and fabric.tiers[-1].accelerators >= cluster.accelerators:
            found.append(name)
    return found


def fabrics(
    scenario: Scenario, names: Iterable[str | Fabric] | None = None, progress: Callable[[str, int, int], None] | None = None
) -> pd.DataFrame:
    """Return the step of `scenario` on several fabrics, contention included, with switches, cables, price and power of each.

    Parameters
    ----------
    scenario : Scenario
        A plan that cannot run is replaced by the fastest that `search` finds on the scenario's own fabric; it is the same on
        all fabrics.
    names : iterable of str or Fabric, optional
        Shipped names, paths or fabrics; by default `candidates`.
    progress : callable, optional
        Called with ``("fabrics", done, total)``.

    Returns
    -------
    DataFrame
        One row per fabric, fastest first: ``fabric``, ``family``, ``routing``, ``step_time_s``, ``exposed_s`` (communication that
        compute waits for), ``nic_share`` and ``slowdown`` of the collective that sharing slows most, the ``hottest`` kind of
        link it meets, ``bisection_share`` of half of all NICs, ``diameter``, ``switches``, ``cables``, ``network_usd`` and
        ``network_w`` (NaN when a part has no figure), ``plan``.

    Raises
    ------
    ProfileError
        When a fabric is unknown or does not reach all accelerators.
    """
    chosen = [n if isinstance(n, Fabric) else FABRICS.resolve(n) for n in (candidates(scenario.cluster) if names is None else names)]
    if not chosen:
        raise ProfileError(f"no shipped fabric has {scenario.cluster.accelerators:,} ports for the NICs of {scenario.cluster.host.name}")
    scenario = settled(scenario)
    if check(scenario):
        scenario = search(scenario, top=1).best.scenario
    rows = []
    for done, fabric in enumerate(chosen):
        if progress:
            progress("fabrics", done, len(chosen))
        rows.append(_row(scenario, fabric))
    return pd.DataFrame(rows).sort_values("step_time_s", kind="stable", ignore_index=True)


def _row(scenario: Scenario, fabric: Fabric) -> dict:
    reach = max(fabric.tiers[-1].accelerators, scenario.cluster.host.scale_up_domain)
    if scenario.cluster.accelerators > reach:
        raise ProfileError(f"fabric {fabric.name} reaches {reach:,} of {scenario.cluster.accelerators:,} accelerators")
    cluster = scenario.cluster.model_copy(update={"fabric": fabric})
    question = scenario.model_copy(update={"cluster": cluster})
    problems = check(question)
    if problems:
        raise PlanError(problems)
    result = simulate_step(question, contention=True)
    built, _ = known(cluster)
    bill = bill_of_materials(built, cluster)
    parts, network = result.breakdown(), result.network()
    worst = network.sort_values("nic_share", kind="stable").iloc[0] if len(network) else None
    full = cluster.accelerators / 2 * cluster.host.nic_bytes_per_s
    return {
        "fabric": fabric.name,
        "family": fabric.family,
        "routing": fabric.routing,
        "step_time_s": result.step_time_s,
        "exposed_s": float(parts.loc[parts["part"].str.startswith("exposed"), "seconds"].sum()),
        "nic_share": 1.0 if worst is None else worst["nic_share"],
        "slowdown": 1.0 if worst is None else worst["slowdown"],
        "hottest": "" if worst is None else kind_of_link(worst["hottest"]),
        "bisection_share": built.bisection_bytes_per_s() / full,
        "diameter": built.diameter(),
        "switches": built.switches,
        "cables": int(sum(built.cables(tier) for tier in built.tiers if tier != "scale-up")),
        "network_usd": float(bill["price_usd"].sum(skipna=False)),
        "network_w": float(bill["power_w"].sum(skipna=False)),
        "plan": str(question.plan),
    }


def kind_of_link(name: str) -> str:
    """Return the kind of a link from its name: ``leaf 4 -> spine 7`` is ``leaf -> spine``, ``leaf up 3`` is ``leaf up``."""
    return " ".join(word for word in name.split() if not word.isdigit())
