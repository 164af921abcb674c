"""Why a scenario cannot run: every rule that it breaks, at once, with the numbers and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from simulator.errors import PlanError, Problem
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.units import readable
from simulator.workload.memory import PARTS, memory_per_stage
from simulator.workload.schedules import schedule
from simulator.workload.stages import blocks, stage_blocks


def _divisors(n: int, at_most: int = 4096) -> str:
    return ", ".join(str(d) for d in range(1, min(n, at_most) + 1) if n % d == 0)


def _multiples(n: int, near: int) -> str:
    low = near // n * n
    return " or ".join(str(x) for x in (low, low + n) if x > 0)


def _degrees(s: Scenario) -> Iterator[Problem]:
    p, n = s.plan, s.cluster.accelerators
    if p.world != n:
        yield Problem(
            "degrees multiply to the accelerators",
            f"tp {p.tp} * cp {p.cp} * pp {p.pp} * dp {p.dp} = {p.world}, the cluster has {n}",
            f"leave dp out, or make tp * cp * pp * dp_replicate divide {n}",
        )
    inner = p.dp * p.cp * p.tp
    if inner % (p.etp * p.ep):
        yield Problem(
            "etp * ep divides dp * cp * tp",
            f"etp {p.etp} * ep {p.ep} = {p.etp * p.ep} does not divide dp * cp * tp = {inner}",
            f"use etp * ep of {_divisors(inner)}; "
            f"this one needs at least pp * lcm(tp * cp, etp * ep) = {minimum_accelerators(p)} accelerators",
        )
    elif p.dp_replicate > 1 and (p.dp_shard * p.cp * p.tp) % (p.etp * p.ep):
        yield Problem(
            "etp * ep divides one replica",
            f"etp * ep = {p.etp * p.ep} does not divide dp_shard * cp * tp = {p.dp_shard * p.cp * p.tp}",
            "use a larger dp_shard and a smaller dp_replicate",
        )


def _model(s: Scenario) -> Iterator[Problem]:
    p, m = s.plan, s.model
    if m.heads % p.tp:
        yield Problem("heads divide by tp", f"{m.heads} heads do not divide by tp = {p.tp}", f"use tp of {_divisors(m.heads)}")
    elif m.kv_heads % p.tp and p.tp % m.kv_heads:
        yield Problem(
            "key-value heads divide by tp, or tp by them",
            f"{m.kv_heads} key-value heads and tp = {p.tp}",
            f"use tp of {_divisors(m.kv_heads)} or a multiple of {m.kv_heads}",
        )
    if not all(k.moe for k in m.kinds) and m.ffn % p.tp:
        yield Problem("MLP width divides by tp", f"ffn = {m.ffn} does not divide by tp = {p.tp}", f"use tp of {_divisors(m.ffn, 64)}")
    if m.experts is None:
        if p.ep > 1 or p.etp > 1:
            yield Problem("expert axes need experts", f"{m.name} is dense, the plan has ep = {p.ep}, etp = {p.etp}", "use ep: 1 and etp: 1")
        return
    e = m.experts
    if e.count % p.ep:
        yield Problem("experts divide by ep", f"ep = {p.ep} does not divide {e.count} experts", f"use {_divisors(e.count)}")
    if e.ffn % p.etp:
        yield Problem(
            "expert width divides by etp", f"etp = {p.etp} does not divide the expert width {e.ffn}", f"use {_divisors(e.ffn, 64)}"
        )
    if p.tp > 1 and not p.sequence_parallel:
        yield Problem(
            "experts with tp need sequence parallelism",
            f"tp = {p.tp} with sequence_parallel: false would send every token {p.tp} times",
            "use sequence_parallel: true",
        )
    if s.job.routing == "natural" and s.job.expert_load > p.ep > 1:
        yield Problem("expert load is at most ep", f"expert_load = {s.job.expert_load}, ep = {p.ep}", f"use at most {p.ep}")


def _batch(s: Scenario) -> Iterator[Problem]:
    p, j = s.plan, s.job
    per_round = p.dp * p.micro_batch
    if j.global_batch % per_round:
        yield Problem(
            "batch divides by dp * micro-batch",
            f"global_batch = {j.global_batch} does not divide by dp {p.dp} * micro_batch {p.micro_batch} = {per_round}",
            f"use a global_batch of {_multiples(per_round, j.global_batch)}, or another dp",
        )
    parts = p.cp * (2 if p.cp > 1 else 1) * (p.tp if p.sequence_parallel else 1)
    if j.sequence_length % parts:
        yield Problem(
            "sequence divides by cp and tp",
            f"sequence_length = {j.sequence_length} does not divide into {parts} parts "
            "(2 cp * tp: balanced ring attention and sequence parallelism)",
            f"use {_multiples(parts, j.sequence_length)}",
        )


def _pipeline(s: Scenario) -> Iterator[Problem]:
    p = s.plan
    try:
        stage_blocks(s.model, p, s.job)
    except PlanError as error:
        yield from error.problems
    micro_batches = s.job.global_batch // (p.dp * p.micro_batch)
    if micro_batches:
        try:
            schedule(p.schedule, p.pp, p.vpp, micro_batches)
        except PlanError as error:
            yield from error.problems


def _precision(s: Scenario) -> Iterator[Problem]:
    dtype, peaks = s.plan.precision.gemm, s.cluster.accelerator.peak_flop_per_s
    if dtype not in peaks:
        yield Problem(
            "the accelerator computes in the datatype",
            f"precision.gemm = {dtype}, {s.cluster.accelerator.name} has {', '.join(peaks)}",
            f"use {' or '.join(peaks)}",
        )


def structure(scenario: Scenario) -> list[Problem]:
    """Return every broken rule about degrees, shapes, batch, layout and datatype; memory is not looked at."""
    rules = (_degrees, _model, _batch, _pipeline, _precision)
    return [problem for rule in rules for problem in rule(scenario)]


def memory(scenario: Scenario) -> dict[str, Any]:
    """Return bytes per pipeline rank, part by part; see `simulator.workload.memory.memory_per_stage`."""
    model, plan, job = scenario.model, scenario.plan, scenario.job
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    return memory_per_stage(model, plan, job, stage_blocks(model, plan, job), blocks(model, plan, job), micro_batches)


def _remedies(s: Scenario) -> str:
    """Try the usual remedies one at a time and tell which of them fit."""
    p = s.plan
    tries: dict[str, dict[str, Any]] = {
        "recompute: selective of every module": {
            "recompute": "selective", "recompute_modules": ("core_attn", "layernorm", "moe_act", "mla_up_proj"),
        },
        "recompute: full": {"recompute": "full"},
        "micro_batch: 1": {"micro_batch": 1},
        f"pp: {2 * p.pp}": {"pp": 2 * p.pp, "layout": "balanced"},
        f"tp: {2 * p.tp}": {"tp": 2 * p.tp},
        f"ep: {2 * p.ep}": {"ep": 2 * p.ep},
        **{f"zero: {z}": {"zero": z} for z in range(p.zero + 1, 4)},
        f"pp: {2 * p.pp} with recompute: full": {"pp": 2 * p.pp, "layout": "balanced", "recompute": "full"},
        "zero: 3 with recompute: full": {"zero": 3, "recompute": "full"},
    }  # fmt: skip
    capacity, fits, nearest = s.cluster.accelerator.hbm_bytes, [], (math.inf, "")
    for words, changes in tries.items():
        other = s.with_plan(**changes)
        if other.plan == p or structure(other):
            continue
        need = float(memory(other)["total"].max())
        if need <= capacity:
            fits.append(f"{words} ({readable(need, 'bytes')})")
        nearest = min(nearest, (need, words))
    if fits:
        return "fits with " + ", ".join(fits[:4])
    if nearest[1]:
        return f"no single change fits; {nearest[1]} comes nearest with {readable(nearest[0], 'bytes')}: use more accelerators per replica"
    return "use more accelerators per replica"


def _fits(s: Scenario) -> Iterator[Problem]:
    parts = memory(s)
    capacity, worst = s.cluster.accelerator.hbm_bytes, int(parts["total"].argmax())
    need = float(parts["total"][worst])
    if need > capacity:
        detail = ", ".join(f"{name} {readable(float(parts[name][worst]), 'bytes')}" for name in PARTS)
        yield Problem(
            "the model fits in memory",
            f"stage {worst} needs {readable(need, 'bytes')}, {s.cluster.accelerator.name} has {readable(capacity, 'bytes')}: "
            f"{readable(need - capacity, 'bytes')} too much ({detail})",
            _remedies(s),
        )


def check(scenario: Scenario) -> list[Problem]:
    """Return every reason why `scenario` cannot run; an empty list when it can.

    Memory is looked at when everything else is right, because a plan that does not divide has no stages to measure.
    """
    return structure(scenario) or list(_fits(scenario))


def minimum_accelerators(plan: Plan) -> int:
    """Return the fewest accelerators that hold one replica of `plan`: ``pp * max(tp * cp, etp * ep)`` when one divides the other."""
    return int(plan.minimum_world)
