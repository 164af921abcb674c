"""Go through every legal plan: bound all, drop what does not fit, estimate the promising, simulate the best few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from simulator.beside import Beside
from simulator.closed_forms import bound_s, estimate_s
from simulator.errors import PlanError, Problem, ProfileError
from simulator.result import StepResult
from simulator.scenario.plan import COLUMNS, INTERLEAVED, Plan, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, repeating, schedule
from simulator.simulate import simulate_step
from simulator.stage_times import BlockPrice, StageTimes, price_blocks, stage_times
from simulator.workload.memory import memory_per_stage
from simulator.workload.ops import Block
from simulator.workload.stages import blocks, stages_of

#: every module whose activations selective recompute may drop cheaply
SELECTIVE = ("core_attn", "layernorm", "moe_act", "mla_up_proj")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Search:
    """What a search found.

    Parameters
    ----------
    table : DataFrame
        The best plans, fastest first: plan, ``step_time_s``, ``estimate_s``, ``bound_s``, ``mfu_causal``,
        ``peak_memory_bytes``, ``training_days``, ``cost_usd``.
    results : list of StepResult
        The simulated steps, in the same order.
    legal, fitting, estimated : int
        How many plans were legal, fitted in memory, were estimated.
    """

    table: pd.DataFrame
    results: list[StepResult]
    legal: int
    fitting: int
    estimated: int

    @property
    def best(self) -> StepResult:
        """The fastest simulated step."""
        return self.results[0]


def _divisors(n: int) -> np.ndarray:
    candidates = np.arange(1, n + 1)
    return candidates[n % candidates == 0]


def legal_plans(scenario: Scenario) -> Iterator[PlanColumns]:
    """Yield the legal plans of `scenario`, as columns per category (ZeRO stage, recompute).

    Degrees and micro-batch are free; datatypes, dispatcher, overlap and reserve are those of ``scenario.plan``. Stages
    are balanced. Tensor parallelism stays inside the scale-up domain; context parallelism is tried above 8,192 tokens;
    interleaved schedules have at least pp micro-batches.
    """
    model, job, n, like = scenario.model, scenario.job, scenario.ranks(scenario.plan), scenario.plan
    layers = model.layers + model.mtp_layers
    domain, sparse = scenario.cluster.host.scale_up_domain, all(kind.moe for kind in model.kinds)
    tp = [
        t
        for t in _divisors(n)
        if t <= domain and model.heads % t == 0 and (model.kv_heads % t == 0 or t % model.kv_heads == 0) and (sparse or model.ffn % t == 0)
    ]
    cp = [c for c in (1, 2, 4, 8, 16, 32) if c == 1 or job.sequence_length > 8192]
    pp = [p for p in _divisors(n) if p <= layers]
    ep = _divisors(model.experts.count) if model.experts else np.array([1])
    grid = np.array(list(product(tp, cp, pp, (1, 2, 3, 4, 6, 8), ep, (1, 2, 4, 8), (1, 2, 4, 8))), dtype=np.int64)
    columns = dict(zip(("tp", "cp", "pp", "vpp", "ep", "etp", "micro_batch"), grid.T, strict=True))
    columns["dp_replicate"] = np.full(len(grid), like.dp_replicate)
    inner = columns["tp"] * columns["cp"] * columns["pp"] * like.dp_replicate
    keep = n % inner == 0
    columns = {k: v[keep] for k, v in columns.items()}
    columns["dp_shard"] = n // inner[keep]
    table = PlanColumns(**{name: columns[name] for name in COLUMNS}, like=like)
    table = table.take(np.flatnonzero(_divides(table, scenario)))
    for zero, recompute in product((1, 3), ("none", "selective", "full")):
        kind = like.model_copy(update={"zero": zero, "recompute": recompute, "recompute_modules": SELECTIVE, "layout": "balanced"})
        yield replace(table, like=kind)


def _divides(p: PlanColumns, scenario: Scenario) -> np.ndarray:
    """Return which plans keep every rule of `simulator.feasibility.structure`."""
    model, job = scenario.model, scenario.job
    experts = model.experts
    legal = (p.dp * p.cp * p.tp) % (p.etp * p.ep) == 0
    legal &= (p.dp_shard * p.cp * p.tp) % (p.etp * p.ep) == 0
    legal &= p.etp <= p.tp
    if experts:
        legal &= experts.ffn % p.etp == 0
        legal &= (p.tp == 1) | p.sequence_parallel
        legal &= (p.ep == 1) | (job.routing == "balanced") | (job.expert_load <= p.ep)
    else:
        legal &= p.etp == 1
    legal &= job.global_batch % (p.dp * p.micro_batch) == 0
    parts = p.cp * np.where(p.cp > 1, 2, 1) * (p.tp if p.sequence_parallel else 1)
    legal &= job.sequence_length % parts == 0
    legal &= p.pp * p.vpp <= model.layers + model.mtp_layers
    micro_batches = job.global_batch // (p.dp * p.micro_batch)
    interleaved = p.vpp > 1
    return legal & (~interleaved | ((p.pp > 1) & (micro_batches >= p.pp) & (micro_batches % np.maximum(micro_batches // p.pp, 1) == 0)))


def _take(item: Any, index: np.ndarray, length: int) -> Any:
    """Return a block or a price with every column cut down to `index`; constants stay."""

    def cut(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.shape == (length,):
            return value[index]
        if isinstance(value, dict):
            return {key: cut(one) for key, one in value.items()}
        if isinstance(value, Beside):
            return replace(value, **{f.name: cut(getattr(value, f.name)) for f in fields(value)})
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    return replace(item, **{f.name: cut(getattr(item, f.name)) for f in fields(item) if f.name not in ("forward", "backward")})


@dataclass(frozen=True)
class Priced:
    """Plans of one category with the prices of their blocks, computed once for all of them."""

    scenario: Scenario
    plans: PlanColumns
    blocks: dict[str, Block]
    prices: dict[str, BlockPrice]

    @classmethod
    def of(cls, scenario: Scenario, plans: PlanColumns, sharing: bool = False) -> Priced:
        """Price `plans`: blocks do not depend on pp, vpp or the number of micro-batches; only estimates need `sharing`."""
        all_blocks = blocks(scenario.model, plans, scenario.job)
        return cls(scenario, plans, all_blocks, price_blocks(all_blocks, scenario.model, plans, scenario.cluster, sharing))

    @property
    def micro_batches(self) -> np.ndarray:
        """Micro-batches per step, per plan."""
        return self.scenario.job.global_batch // (self.plans.dp * self.plans.micro_batch)

    def groups(self, *keys: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the indices of plans that agree in pp, vpp and `keys`."""
        rows = np.column_stack([self.plans.pp, self.plans.vpp, *keys])
        _, inverse = np.unique(rows, axis=0, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)

    def part(self, index: np.ndarray) -> Priced:
        """Return some of the plans."""
        n = len(self.plans)
        cut = {k: {name: _take(x, index, n) for name, x in getattr(self, k).items()} for k in ("blocks", "prices")}
        return Priced(self.scenario, self.plans.take(index), **cut)

    def uniform(self, index: np.ndarray) -> Priced:
        """Return some of the plans, which agree in schedule, pp and vpp."""
        part = self.part(index)
        return replace(part, plans=replace(part.plans, like=part.plans.row(0)))

    def order(self, micro_batches: int) -> Schedule:
        """Return the schedule of plans that agree in it."""
        p = self.plans.like
        return schedule(p.schedule, p.pp, p.vpp, micro_batches, p.table)

    def stages(self) -> tuple:
        """Return the blocks of each stage of plans that agree in the layout."""
        return stages_of(self.scenario.model, self.plans.like.layout, self.plans.like.stages, self.scenario.job.sequence_length)

    def times(self, order: Schedule) -> StageTimes:
        """Return the parts of the step of plans that agree in schedule, pp and vpp."""
        s = self.scenario
        return stage_times(s.model, self.plans, s.job, s.cluster, self.stages(), self.blocks, self.prices, order)

    def bounds(self) -> np.ndarray:
        """Return the lower bound of every plan's step, seconds."""
        found = np.empty(len(self.plans))
        for index in self.groups():
            part = self.uniform(index)
            order = part.order(_fewest(part.plans.like, part.micro_batches))
            found[index] = bound_s(part.plans, part.times(order), part.micro_batches, order)
        return found

    def estimates(self) -> np.ndarray:
        """Return the estimate of every plan's step, seconds."""
        found, shared = np.empty(len(self.plans)), Priced.of(self.scenario, self.plans, sharing=True)
        for index in self.groups(self.micro_batches):
            part = shared.uniform(index)
            micro_batches = int(part.micro_batches[0])
            found[index] = estimate_s(part.plans, part.times(part.order(micro_batches)), micro_batches, part.order)
        return found

    def peak_memory(self) -> np.ndarray:
        """Return the bytes of every plan's fullest stage."""
        found, p, m = np.empty(len(self.plans)), self.plans, self.micro_batches
        like = p.like.schedule
        several = repeating(like if like in INTERLEAVED else "interleaved", p.pp, m)
        kept = np.where(p.vpp > 1, several, m if like == "gpipe" else repeating("1f1b" if like in INTERLEAVED else like, p.pp, m))
        for index in self.groups(kept):
            part, s = self.uniform(index), self.scenario
            total = memory_per_stage(s.model, part.plans, s.job, part.stages(), part.blocks, int(part.micro_batches[0]))["total"]
            found[index] = total.max(axis=-1)
        return found


def _fewest(plan: Plan, micro_batches: np.ndarray) -> int:
    """Return a small number of micro-batches whose schedule has the places and kinds of actions of all."""
    return int(min(micro_batches.min(), 2 * plan.pp)) if plan.schedule not in INTERLEAVED else plan.pp


def search(scenario: Scenario, top: int = 10, progress: Progress | None = None) -> Search:
    """Return the fastest plans for the model, cluster and job of `scenario`.

    Parameters
    ----------
    scenario : Scenario
        Its plan gives what is not searched: datatypes, dispatcher, overlap, reserve.
    top : int
        Plans to simulate.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    PlanError
        When no plan is legal, or none fits in memory; says which comes nearest.

    Notes
    -----
    A plan is passed over without an estimate only when its lower bound exceeds the estimate of `top` others.
    """
    if top < 1:
        raise ProfileError(f"top = {top}; simulate at least 1 plan")
    tell = progress or (lambda stage, done, total: None)
    kinds = list(legal_plans(scenario))
    legal = sum(map(len, kinds))
    if not legal:
        raise PlanError([_nothing_legal(scenario)])
    capacity, pools, least = scenario.cluster.accelerator.hbm_bytes, [], (np.inf, None)
    for done, plans in enumerate(kinds):
        tell("bound", done, len(kinds))
        priced = Priced.of(scenario, plans)
        need = priced.peak_memory()
        tightest = int(need.argmin())
        if need[tightest] < least[0]:
            least = (float(need[tightest]), plans.row(tightest))
        fits = np.flatnonzero(need <= capacity)
        if len(fits):
            fitting = priced.part(fits)
            pools.append((fitting, fitting.bounds()))
    tell("bound", len(kinds), len(kinds))
    if not pools:
        raise PlanError([_nothing_fits(scenario, *least)])
    candidates, estimated = _estimate_promising(pools, top, tell)
    results = []
    for done, candidate in enumerate(candidates):
        tell("simulate", done, len(candidates))
        results.append(simulate_step(scenario.model_copy(update={"plan": candidate.plan})))
    tell("simulate", len(candidates), len(candidates))
    order = sorted(range(len(results)), key=lambda i: results[i].step_time_s)
    table = pd.DataFrame([_row(results[i], candidates[i]) for i in order])
    return Search(table, [results[i] for i in order], legal, sum(len(bounds) for _, bounds in pools), estimated)


@dataclass(frozen=True, slots=True)
class _Candidate:
    plan: Plan
    bound_s: float
    estimate_s: float


def _estimate_promising(pools: list[tuple[Priced, np.ndarray]], top: int, tell: Progress) -> tuple[list[_Candidate], int]:
    """Estimate plans in order of their bound until no bound can beat the `top` best estimates; return those and how many."""
    owner = np.concatenate([np.full(len(bounds), i) for i, (_, bounds) in enumerate(pools)])
    place = np.concatenate([np.arange(len(bounds)) for _, bounds in pools])
    bounds = np.concatenate([bounds for _, bounds in pools])
    order = np.argsort(bounds, kind="stable")
    estimates = np.full(len(bounds), np.inf)
    done, batch = 0, max(64, 8 * top)
    while done < len(order):
        threshold = np.partition(estimates, min(top, len(estimates)) - 1)[min(top, len(estimates)) - 1]
        if bounds[order[done]] > threshold:
            break
        tell("estimate", done, int((bounds <= threshold).sum()))
        chunk = order[done : done + batch]
        for i, (priced, _) in enumerate(pools):
            mine = chunk[owner[chunk] == i]
            if len(mine):
                estimates[mine] = priced.part(place[mine]).estimates()
        done += len(chunk)
    tell("estimate", done, done)
    best = np.argsort(estimates, kind="stable")[: min(top, done)]
    found = [_Candidate(pools[owner[i]][0].plans.row(int(place[i])), float(bounds[i]), float(estimates[i])) for i in best]
    return found, done


def _row(result: StepResult, candidate: _Candidate) -> dict[str, Any]:
    p = result.scenario.plan
    degrees = {name: getattr(p, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "zero", "micro_batch", "recompute")}
    return degrees | {
        "step_time_s": result.step_time_s,
        "estimate_s": candidate.estimate_s,
        "bound_s": candidate.bound_s,
        "mfu_causal": result.mfu_causal,
        "peak_memory_bytes": result.peak_memory_bytes,
        "training_days": result.training_days,
        "cost_usd": result.cost_usd,
    }


def _nothing_legal(s: Scenario) -> Problem:
    return Problem(
        "some plan is legal",
        f"no degrees divide {s.cluster.accelerators} accelerators, {s.model.heads} heads, {s.model.layers} layers and "
        f"global_batch {s.job.global_batch}",
        "choose a global_batch with more divisors in common with the accelerators",
    )


def _nothing_fits(s: Scenario, need: float, plan: Plan | None) -> Problem:
    return Problem(
        "some plan fits in memory",
        f"the smallest plan needs {need / 1e9:.1f} GB of {s.cluster.accelerator.hbm_bytes / 1e9:.1f} GB ({plan})",
        "use more accelerators, larger ones, or smaller datatypes",
    )
