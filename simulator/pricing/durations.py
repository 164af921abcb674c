"""How long every rank takes for each node of a program: the common price, times what sets ranks and micro-batches apart.

Shapes: N nodes, L MoE layers, M micro-batches, W ranks of one pipeline stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from simulator.errors import PlanError, Problem
from simulator.pricing.operations import Known, loaded
from simulator.scenario.mesh import accelerator_of, group
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.schedules import schedule
from simulator.workload.classes import rank_loads
from simulator.workload.ops import HOST, LAUNCH
from simulator.workload.routing import RoutedTokens, moe_layer_count, route
from simulator.workload.stages import blocks, stage_blocks
from simulator.workload.step import StepProgram, Task

#: collectives that carry state, not tokens
_STATE = ("dp", "edp", "dp_replicate", "world")


@dataclass(frozen=True, slots=True)
class Uneven:
    """What sets the ranks of a stage and the micro-batches apart.

    Parameters
    ----------
    slowdown : ndarray of shape (stages, W)
        How many times as long a rank's kernels take.
    tokens : ndarray of shape (M, W), or None
        Tokens of the micro-batch that a rank works on, over the mean.
    load : ndarray of shape (L, M, W), or None
        Tokens that its experts receive, over the mean.
    """

    slowdown: np.ndarray
    tokens: np.ndarray | None = None
    load: np.ndarray | None = None


def rank_load(routed: RoutedTokens, plan: Plan) -> np.ndarray:
    """Return the load of every rank of a stage, shape (L, M, W); those of a group that share an expert's width share its load."""
    load, ranks = routed.load, np.arange(plan.world // plan.pp)
    index = {axis: ranks // group(plan, axis).stride for axis in ("ep", "edp")}
    return load.reshape(*load.shape[:2], -1)[..., index["edp"] % plan.edp * plan.ep + index["ep"] % plan.ep]


def uneven(scenario: Scenario, variation: Variation, routing: Routing | None) -> tuple[Uneven, float]:
    """Return what sets ranks and micro-batches apart, drawn by the seed of `variation`, and the share of dropped tokens.

    Parameters
    ----------
    routing : Routing or None
        None follows the job: balanced, or one heavy rank in each expert group.

    Raises
    ------
    PlanError
        When `routing` does not fit the model or the plan.
    """
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    ranks, per_host = plan.world // plan.pp, cluster.host.accelerators
    slow = variation.slowdown(cluster.accelerators, per_host)
    for host, factor in cluster.slow_hosts.items():
        slow[host * per_host : (host + 1) * per_host] *= factor
    slow = slow[accelerator_of(plan, per_host)].reshape(plan.pp, ranks)
    slow[-1] *= variation.last_stage_slowdown
    mean, unit = plan.micro_batch * job.sequence_length, plan.cp * (plan.tp if plan.sequence_parallel else 1)
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    tokens = np.full((micro_batches, plan.dp), mean)
    if variation.sequence_spread:
        tokens = variation.tokens(micro_batches, plan.dp, mean, unit)
    tokens = np.repeat(tokens, ranks // plan.dp, axis=1)  # shape (M, W)
    over_mean = tokens / mean if variation.sequence_spread else None
    if model.experts is None and routing is not None:
        numbers = f"routing is {routing.distribution}, {model.name} is dense"
        raise PlanError([Problem("routing needs experts", numbers, "leave routing out")])
    natural = job.expert_load if job.routing == "natural" and routing is None else 1.0
    if model.experts is None or (routing is None and natural == 1 and over_mean is None):
        return Uneven(slow, over_mean), 0.0
    together = (tokens // unit).reshape(micro_batches, -1, plan.ep * plan.etp).sum(axis=-1)
    routed = route(routing or Routing(), model.experts, moe_layer_count(model), together, plan.ep, variation.random("routing"))
    load = rank_load(routed, plan)
    if natural > 1:
        load = load * rank_loads(plan, natural)[:ranks]
    return Uneven(slow, over_mean, load), routed.dropped_share


def moe_layers(program: StepProgram, scenario: Scenario) -> np.ndarray:
    """Return the MoE layer, counted over the model, that each node's routed work belongs to; -1 for none.

    Notes
    -----
    A forward passes the MoE layers of its chunk in order, every other action in reverse, and does the same number of routed
    tasks for each.
    """
    model, plan, job = scenario.model, scenario.plan, scenario.job
    pipeline = schedule(plan.schedule, plan.pp, plan.vpp, job.global_batch // (plan.dp * plan.micro_batch), plan.table)
    sparse = {name: any(op.routed for segment in b.forward for op in segment) for name, b in blocks(model, plan, job).items()}
    held = [sum(sparse[name] for name in names) for names in stage_blocks(model, plan, job)]
    first = np.concatenate([[0], np.cumsum(held)])
    routed = [any(op.routed for op in task.ops) for task in program.tasks]
    queues: dict[tuple, list[int]] = {}
    for node, task in enumerate(program.task):
        action = program.label[node]
        if action is not None and routed[task]:
            queues.setdefault((program.rank_class[node], action), []).append(node)
    layer = np.full(len(program), -1)
    for (stage, action), nodes in queues.items():
        part = pipeline.held[stage][action.chunk]
        order = np.arange(len(nodes)) * held[part] // len(nodes)
        layer[nodes] = first[part] + (order if action.kind == "F" else held[part] - 1 - order)
    return layer


def variants(program: StepProgram, slow: np.ndarray) -> tuple[list[tuple[int, float]], np.ndarray]:
    """Return the distinct pairs of a task and how much slower its kernels are, and the pair of each node."""
    place, known = np.empty(len(program), dtype=np.int64), {}
    for node, pair in enumerate(zip(program.task, slow.tolist(), strict=True)):
        place[node] = known.setdefault(pair, len(known))
    return list(known), place


@dataclass(frozen=True, slots=True)
class Prices:
    """What the operations of a program cost.

    Parameters
    ----------
    tasks : list of Task
        One for each variant: a task, as slow as communication beside it makes it.
    ops_s : list of ndarray (ops, loads)
        Seconds of each variant's operations, for every load that occurs.
    variant, load : ndarray (nodes,)
        Of every node.
    """

    tasks: list[Task]
    ops_s: list[np.ndarray]
    variant: np.ndarray
    load: np.ndarray

    @classmethod
    def of(cls, program: StepProgram, scenario: Scenario, slow: np.ndarray) -> Prices:
        """Return the prices of `program`, whose nodes are as `slow` as `slowdowns` says."""
        known = Known(scenario.model, scenario.plan, scenario.cluster, graph=True)
        loads, place = np.unique(program.classes.load, return_inverse=True)
        kinds, variant = variants(program, slow)
        tasks = [program.tasks[task] for task, _ in kinds]
        ops_s = [
            np.array([[float(known.op_s(op, load, factor)) for load in loads] for op in task.ops]).reshape(-1, len(loads))
            for task, (_, factor) in zip(tasks, kinds, strict=True)
        ]
        return cls(tasks, ops_s, variant, place[np.asarray(program.rank_class)])

    def node_s(self, program: StepProgram) -> np.ndarray:
        """Return the seconds of every node: the price of its task, times the slowdown of its class when it computes."""
        price = np.array([sum(rows, np.zeros(rows.shape[1])) for rows in self.ops_s])
        return price[self.variant, self.load] * self._slowdown(program)

    def parts_s(self, program: StepProgram) -> dict[str, float]:
        """Return the mean seconds per rank that the compute stream spends on each kind of kernel."""
        parts: dict[str, float] = {}
        share, rank = program.classes.count / program.classes.count.sum(), np.asarray(program.rank_class)
        runs = np.zeros((len(self.tasks), self.ops_s[0].shape[1]))
        np.add.at(runs, (self.variant, self.load), share[rank] * self._slowdown(program))
        for task, times, ops_s in zip(self.tasks, runs, self.ops_s, strict=True):
            for op, seconds in zip(task.ops if task.stream == "compute" else (), ops_s, strict=False):
                part = "optimizer" if op.name.startswith("optimizer") else "recompute" if op.grad == "again" else op.kind
                parts[part] = parts.get(part, 0.0) + float(sum(times * seconds))
        return parts

    def _slowdown(self, program: StepProgram) -> np.ndarray:
        computes = np.array([task.computes for task in self.tasks])[self.variant]
        return np.where(computes, program.classes.slowdown[np.asarray(program.rank_class)], 1.0)


class RankDurations:
    """Seconds of each node on every rank of its stage; call it with a node.

    Parameters
    ----------
    program : StepProgram
        With one class of ranks per pipeline stage.
    scenario : Scenario
    slow : ndarray of shape (nodes,)
        How many times as long the kernels of a node take beside communication (`simulator.simulate.slowdowns`).
    uneven : Uneven
    variation : Variation
        For its jitter and seed.

    Notes
    -----
    ``d(n, r) = slow(r) jitter(n, r) (s(n) + change(n, r))`` with s at even load and full speed, overlap and sharing included;
    ``slow`` of hosts and ``jitter`` for kernels only. The change is priced:

    - routed operations at the load of their rank, exactly (`simulator.pricing.operations.op_s`);
    - the rest at ``t`` times the tokens: attention grows with t^2, everything else linearly as between t = 1 and t = 2;
      collectives that carry gradients or parameters do not.

    The kernels of a node vary independently. Their sum is taken as one log-normal of the same mean and variance:
    ``sigma_n^2 = ln(1 + (exp(sigma^2) - 1) sum p_i^2 / (sum p_i)^2)`` for kernels of p_i seconds. The draws of a node come
    from a counter-based generator at a position of its own, so they do not depend on the order of the calls.

    References
    ----------
    Fenton, "The Sum of Log-Normal Probability Distributions in Scatter Transmission Systems", 1960.
    Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
    """

    def __init__(self, program: StepProgram, scenario: Scenario, slow: np.ndarray, uneven: Uneven, variation: Variation):
        self.ranks = scenario.plan.world // scenario.plan.pp
        self.uneven = uneven
        kinds, place = variants(program, slow)
        self.stage, self.kind = program.rank_class, place.tolist()
        tasks = [program.tasks[task] for task, _ in kinds]
        self.computes = [task.computes for task in tasks]
        self.slow = [row if (row != 1.0).any() else None for row in uneven.slowdown]
        known = Known(scenario.model, scenario.plan, scenario.cluster, graph=True)
        self.prices = [
            np.array([float(known.op_s(op, slow=factor)) for op in task.ops]) for task, (_, factor) in zip(tasks, kinds, strict=True)
        ]
        self.seconds = [float(prices.sum()) for prices in self.prices]
        self._set_jitter(variation)
        self._set_changes(program, scenario, known, [(task, factor) for task, (_, factor) in zip(tasks, kinds, strict=True)])

    def _set_jitter(self, variation: Variation) -> None:
        spread = np.expm1(variation.jitter**2)
        self.sigma = [
            float(np.sqrt(np.log1p(spread * (p**2).sum() / p.sum() ** 2))) if on and p.sum() > 0 else 0.0
            for p, on in zip(self.prices, self.computes, strict=True)
        ]
        self._bits = np.random.Philox(key=variation.random("jitter").integers(0, 2**63, size=2, dtype=np.uint64))
        self._random, self._at = np.random.Generator(self._bits), self._bits.state
        self._draw = np.empty(self.ranks, dtype=np.float32)

    def _set_changes(self, program: StepProgram, scenario: Scenario, known: Known, kinds: Sequence[tuple[Task, float]]) -> None:
        """Price what the load and the tokens of a rank change, per kind of task and how slow it is."""
        self.micro_batch = [-1 if a is None else a.micro_batch for a in program.label]
        self.layer = [-1] * len(program)
        loads = np.ones(1)
        if self.uneven.load is not None:
            self.layer = moe_layers(program, scenario).tolist()
            index, loads = pd.factorize(self.uneven.load.reshape(-1))  # by hashing: five times as fast as sorting
            self.load_index = index.reshape(self.uneven.load.shape).astype(np.int32)
        if self.uneven.tokens is not None:
            self.more, self.more_squared = self.uneven.tokens - 1.0, self.uneven.tokens**2 - 1.0
        self.routed, self.linear, self.square = [], [], []
        self._known: dict[tuple[int, int, int], float | np.ndarray] = {}
        for (task, slow), prices in zip(kinds, self.prices, strict=True):
            linear = square = 0.0
            routed = np.zeros(len(loads))
            for op, price in zip(task.ops, prices, strict=True):
                if op.routed:
                    routed += known.op_s(op, loads, slow) - price
                elif op.name.startswith("attn.core"):
                    square += price
                elif op.kind in (HOST, LAUNCH):  # what it waits for is left as it is at the mean
                    continue
                elif op.axis not in _STATE:
                    linear += float(known.op_s(loaded(op, 2.0), slow=slow)) - price
            self.routed.append(routed if routed.any() else None)
            self.linear.append(linear)
            self.square.append(square)

    def __call__(self, node: int) -> float | np.ndarray:
        """Return the seconds of `node`: one number, or one per rank of its stage, shape (W,); not to be written to."""
        kind, stage, batch = self.kind[node], self.stage[node], self.micro_batch[node]
        length = self._steady(kind, stage, batch)
        if self.layer[node] >= 0 and self.routed[kind] is not None:
            change = self.routed[kind].take(self.load_index[self.layer[node], batch])
            length = change + length if self.slow[stage] is None or not self.computes[kind] else change * self.slow[stage] + length
        return length * self._jitter(node, self.sigma[kind]) if self.sigma[kind] > 0.0 else length

    def _steady(self, kind: int, stage: int, batch: int) -> float | np.ndarray:
        """Return what every node of this kind, stage and micro-batch takes, routed load and jitter apart."""
        known = self._known.get((kind, stage, batch))
        if known is None:
            known = self.seconds[kind]
            if self.uneven.tokens is not None and batch >= 0 and (self.linear[kind] or self.square[kind]):
                known = known + self.linear[kind] * self.more[batch] + self.square[kind] * self.more_squared[batch]
            if self.computes[kind] and self.slow[stage] is not None:
                known = known * self.slow[stage]
            self._known[kind, stage, batch] = known
        return known

    def _jitter(self, node: int, sigma: float) -> np.ndarray:
        """Return a factor for every rank, log-normal with mean 1; drawn in float32, whose 6e-8 is nothing beside sigma."""
        at, draw = self._at, self._draw
        at["state"]["counter"][:] = (0, node, 0, 0)
        at["buffer_pos"], at["has_uint32"] = 4, 0
        self._bits.state = at
        self._random.standard_normal(dtype=np.float32, out=draw)
        draw *= np.float32(sigma)
        draw -= np.float32(sigma * sigma / 2)
        return np.exp(draw, dtype=np.float64)


def spans(program: StepProgram, scenario: Scenario) -> list[tuple[int, int]]:
    """Return the groups of every node inside its stage as (size, stride); (1, 1) for kernels and messages."""
    ranks = scenario.plan.world // scenario.plan.pp

    def span(axis: str) -> tuple[int, int]:
        if axis in ("", "pp", "copies"):  # the two copies of a stage meet across stages
            return 1, 1
        if axis == "world":
            return ranks, 1
        g = group(scenario.plan, axis)
        return int(g.size), int(g.stride)

    of = [span(task.axis) for task in program.tasks]
    return [of[t] for t in program.task]
