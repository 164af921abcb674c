"""What people ask of a planner: how many accelerators, which cluster, how far the money goes, how it scales, how to share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd

from simulator.errors import PlanError, Problem, ProfileError
from simulator.planning.search import degrees, search
from simulator.planning.space import Space
from simulator.scenario.cluster import Cluster
from simulator.scenario.scenario import Scenario

#: the plans that questions about many clusters look at unless told otherwise: what every trainer can do, in few seconds each
COMMON = Space(
    zero=(1,), schedule=("1f1b", "interleaved"), recompute=("none", "layernorm+mlp_act+moe_act+mla_up_proj", "full"),
    layout=("balanced",), micro_batch=(1, 2), vpp=(1, 2, 4),
)  # fmt: skip
#: steps from the last size that is too slow to the doubled one
STEPS = 8
#: what they pass over, for people
SEARCHED = (
    "Each row is the fastest of the plans that every trainer can do: 1F1B and interleaved schedules, ZeRO-1, micro-batches of 1 and 2; "
    "degrees in the scenario are not used. `myriad plan` looks at every schedule."
)
Tell = Callable[[str, int, int], None]


def on_cluster(scenario: Scenario, cluster: Cluster, accelerators: int | None = None, batch: int | None = None) -> Scenario:
    """Return the question on another cluster, of `accelerators` and with a global batch of `batch`; the plan fills it.

    Raises
    ------
    ProfileError
        When the cluster cannot have so many.
    """
    size = cluster if accelerators is None else Cluster.model_validate(cluster.model_dump(mode="json") | {"accelerators": accelerators})
    job = scenario.job if batch is None else scenario.job.model_copy(update={"global_batch": batch})
    plan = scenario.plan.model_copy(update={"dp_shard": None, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1, "vpp": 1})
    plan = plan.model_copy(update={"schedule": "1f1b", "layout": None, "table": None})
    return scenario.model_copy(update={"cluster": size, "job": job, "plan": plan.on(size.accelerators)})


def answer(scenario: Scenario, space: Space = COMMON) -> dict[str, Any]:
    """Return the fastest plan of a question as a row; with its ``problem`` and no figures when there is none."""
    cluster = scenario.cluster
    row: dict[str, Any] = {"cluster": cluster.name, "accelerators": cluster.accelerators, "problem": ""}
    try:
        best = search(scenario, top=1, space=space).best
    except PlanError as error:
        return row | {"problem": str(error.problems[0])}
    figures = {
        "step_time_s": best.step_time_s,
        "mfu_causal": best.mfu_causal,
        "training_days": best.training_days,
        "cost_usd": best.cost_usd,
        "energy_kwh": best.energy_kwh,
        "carbon_kg": best.carbon_kg,
        "tokens_per_s": scenario.job.tokens_per_step / best.step_time_s,
    }
    return row | figures | {"plan": str(best.scenario.plan)} | degrees(best.scenario.plan)


def _rows(questions: Sequence[Scenario], space: Space, progress: Tell | None) -> pd.DataFrame:
    rows = []
    for done, question in enumerate(questions):
        if progress:
            progress("plan", done, len(questions))
        rows.append(answer(question, space))
    if progress:
        progress("plan", len(questions), len(questions))
    table = pd.DataFrame(rows)
    if not (table["problem"] == "").any():
        raise PlanError([Problem("some cluster has a plan", f"none of {len(table)}: {table['problem'].iloc[-1]}", "ask for larger ones")])
    return table


def sizes(cluster: Cluster, at_most: int | None = None) -> list[int]:
    """Return accelerator counts worth asking about: one scale-up domain, doubled up to `at_most` or what the fabric reaches."""
    least = max(cluster.host.scale_up_domain, cluster.host.accelerators)
    most = min(at_most or cluster.accelerators, max(cluster.fabric.tiers[-1].accelerators, least))
    return [least * 2**n for n in range(int(np.log2(max(most // least, 1))) + 1)]


def between(cluster: Cluster, less: int, more: int) -> list[int]:
    """Return accelerator counts between two sizes: whole hosts, by `STEPS` to the larger one."""
    hosts = {round(less + (more - less) * step / STEPS) // cluster.host.accelerators for step in range(1, STEPS)}
    return sorted(n * cluster.host.accelerators for n in hosts if less < n * cluster.host.accelerators < more)


def fewest_accelerators(
    scenario: Scenario, days: float, counts: Iterable[int] | None = None, space: Space = COMMON, progress: Tell | None = None
) -> pd.DataFrame:
    """Return the smallest cluster that finishes the job in `days`, after those that do not.

    Parameters
    ----------
    scenario : Scenario
        Model, job, and the cluster whose size is asked.
    days : float
    counts : iterable of int, optional
        Sizes to try, ascending. When left out: `sizes`, then those `between` the last that is too slow and the first that is not.

    Returns
    -------
    DataFrame
        A row per size tried up to the first that meets the deadline, ascending: see `answer`.

    Raises
    ------
    PlanError
        When none does; names the nearest miss.
    """
    rows: list[dict[str, Any]] = []

    def met(tried: Sequence[int]) -> bool:
        for done, count in enumerate(tried):
            if progress:
                progress("plan", done, len(tried))
            rows.append(answer(on_cluster(scenario, scenario.cluster, count), space))
            if rows[-1].get("training_days", np.inf) <= days:
                return True
        return False

    if met(sorted(counts or sizes(scenario.cluster))):
        if counts is None and len(rows) > 1:
            doubled = rows.pop()
            if not met(between(scenario.cluster, rows[-1]["accelerators"], doubled["accelerators"])):
                rows.append(doubled)
        return pd.DataFrame(rows)
    raise PlanError([_miss(pd.DataFrame(rows), f"training_days <= {days:g}", "training_days", days)])


def cheapest(
    scenario: Scenario,
    clusters: Mapping[str, Cluster],
    counts: Iterable[int] | None = None,
    days: float | None = None,
    budget_usd: float | None = None,
    space: Space = COMMON,
    progress: Tell | None = None,
) -> pd.DataFrame:
    """Return clusters by size that meet a deadline and a budget: cheapest first, or fastest first when only money is limited.

    Parameters
    ----------
    clusters : mapping of str to Cluster
        Accelerator, host, fabric and price of each.
    counts : iterable of int, optional
        Sizes of each; `sizes` when left out. Those that a cluster cannot have are left out.
    days, budget_usd : float, optional

    Returns
    -------
    DataFrame
        See `answer`.

    Raises
    ------
    PlanError
        When none meets them; names the nearest miss.
    """
    questions = []
    for cluster in clusters.values():
        for count in counts or sizes(cluster):
            try:
                questions.append(on_cluster(scenario, cluster, count))
            except ProfileError:
                continue  # not a multiple of its hosts, or beyond its fabric
    if not questions:
        raise ProfileError("no cluster can have these numbers of accelerators; choose multiples of its hosts, within its fabric")
    table = _rows(questions, space, progress)
    limits = {name: value for name, value in (("training_days", days), ("cost_usd", budget_usd)) if value is not None}
    met = table[table["problem"] == ""]
    for name, value in limits.items():
        met = met[met[name] <= value]
    if met.empty:
        wanted = " and ".join(f"{name} <= {value:g}" for name, value in limits.items())
        tightest = min(limits, key=lambda name: limits[name] / table[name].min())
        raise PlanError([_miss(table, wanted, tightest, limits[tightest])])
    by = "training_days" if days is None and budget_usd is not None else "cost_usd"
    return met.sort_values(by, ignore_index=True)


def _miss(table: pd.DataFrame, wanted: str, column: str, limit: float) -> Problem:
    """Return that nothing meets a limit, and what comes nearest."""
    if column not in table or table[column].isna().all():
        return Problem("some cluster meets the limits", f"none has a plan: {table['problem'].iloc[-1]}", "ask for larger clusters")
    near = table.loc[table[column].idxmin()]
    numbers = f"{wanted}: {near['accelerators']:,} accelerators of {near['cluster']} come nearest with {near['training_days']:.1f} days"
    numbers += f" for {near['cost_usd'] / 1e6:.2f} M$ ({near['plan']})"
    return Problem(
        "some cluster meets the limits", numbers, f"allow {column} of {near[column]:.4g} instead of {limit:.4g}, or other clusters"
    )


def tokens_for(scenario: Scenario, budget_usd: float, space: Space = COMMON) -> dict[str, Any]:
    """Return how far a budget goes on the cluster of `scenario`: the row of its fastest plan, with ``tokens`` and their days."""
    row = answer(scenario, space)
    if row["problem"]:
        raise PlanError([Problem("the cluster has a plan", row["problem"], "choose a larger cluster")])
    tokens = scenario.job.tokens * budget_usd / row["cost_usd"]
    share = tokens / scenario.job.tokens
    changed = {name: row[name] * share for name in ("training_days", "cost_usd", "energy_kwh", "carbon_kg")}
    return row | changed | {"tokens": tokens}


def scaling(
    scenario: Scenario,
    counts: Iterable[int],
    kind: Literal["strong", "weak"] = "strong",
    space: Space = COMMON,
    progress: Tell | None = None,
) -> pd.DataFrame:
    """Return the step on growing clusters: of the job's batch (strong), or of as many sequences per accelerator (weak).

    Parameters
    ----------
    scenario : Scenario
        Its batch is that of its own cluster; weak scaling keeps the share of each accelerator.
    counts : iterable of int
        Sizes; those on which the share is no whole batch are left out.

    Returns
    -------
    DataFrame
        See `answer`; ``global_batch`` and ``efficiency``: tokens per second and accelerator over those of the smallest size
        that has a plan.

    Raises
    ------
    PlanError
        When no size has a plan, or none has a whole batch.
    """
    job, own = scenario.job, scenario.cluster.accelerators
    asked = [(n, job.global_batch if kind == "strong" else job.global_batch * n // own) for n in sorted(counts)]
    if kind == "weak":
        asked = [(n, batch) for n, batch in asked if batch and batch * own == job.global_batch * n]
    if not asked:
        numbers = f"{job.global_batch:,} sequences on {own:,} accelerators are no whole number on any of these sizes"
        raise PlanError([Problem("each accelerator keeps its share of the batch", numbers, "choose sizes that divide or multiply it")])
    questions = [on_cluster(scenario, scenario.cluster, n, batch) for n, batch in asked]
    table = _rows(questions, space, progress).assign(global_batch=[batch for _, batch in asked])
    rate = table["tokens_per_s"] / table["accelerators"]
    return table.assign(efficiency=rate / rate.dropna().iloc[0])


def split(jobs: Mapping[str, Scenario], shares: Sequence[int], space: Space = COMMON, progress: Tell | None = None) -> pd.DataFrame:
    """Return the best split of one cluster among several jobs: that whose last job ends first.

    Parameters
    ----------
    jobs : mapping of str to Scenario
        Each on the whole cluster.
    shares : sequence of int
        Numbers of accelerators that a job may get.

    Returns
    -------
    DataFrame
        A row per job with its ``accelerators``; see `answer`.

    Raises
    ------
    PlanError
        When no split gives every job a plan.
    """
    names, whole = list(jobs), next(iter(jobs.values())).cluster.accelerators
    questions = {(name, n): on_cluster(jobs[name], jobs[name].cluster, n) for name in names for n in shares}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for done, (key, question) in enumerate(questions.items()):
        if progress:
            progress("plan", done, len(questions))
        rows[key] = answer(question, space)

    def ends(given: tuple[int, ...]) -> float:
        return max(rows[name, n].get("training_days", np.inf) for name, n in zip(names, given, strict=True))

    possible = [given for given in product(shares, repeat=len(names)) if sum(given) <= whole]
    best = min(possible, key=lambda given: (ends(given), sum(given)), default=None)
    if best is None or not np.isfinite(ends(best)):
        numbers = f"no split of {whole:,} accelerators into {', '.join(map(str, shares))} gives each of {', '.join(names)} a plan"
        raise PlanError([Problem("every job has a plan", numbers, "allow other shares or fewer jobs")])
    return pd.DataFrame([{"job": name} | rows[name, n] for name, n in zip(names, best, strict=True)])
