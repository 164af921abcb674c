"""Why a scenario cannot run: every rule that it breaks, at once, with the numbers and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from simulator.errors import DeadlockError, PlanError, Problem
from simulator.expert_memory import memory_per_rank
from simulator.scenario.placement import FEWEST_BYTES, ORDER, PIPELINE_INSIDE
from simulator.scenario.plan import INTERLEAVED, Plan
from simulator.scenario.scenario import Scenario
from simulator.schedules import schedule
from simulator.units import readable
from simulator.workload.memory import PARTS
from simulator.workload.stages import stage_blocks


def _divisors(n: int, at_most: int = 4096) -> list[int]:
    return [d for d in range(1, min(n, at_most) + 1) if n % d == 0]


def _any_of(choices: list[int]) -> str:
    return ", ".join(map(str, choices))


def _multiples(n: int, near: int) -> str:
    """Return the multiples of `n` on both sides of `near`."""
    low = near // n * n
    return " or ".join(str(x) for x in (low, low + n) if x > 0)


def _fixed(p: Plan) -> int:
    """Return the ranks that one shard of data parallelism spans."""
    return p.tp * p.cp * p.pp * p.dp_replicate


def _open(s: Scenario) -> bool:
    """Return whether dp is only what is left of a cluster that the other degrees do not divide: then it breaks no rule of its own."""
    ranks = s.ranks(s.plan)
    return s.plan.world != ranks and s.plan.dp_shard == max(1, ranks // _fixed(s.plan))


def _degrees(s: Scenario) -> Iterator[Problem]:
    p, n, fixed = s.plan, s.ranks(s.plan), _fixed(s.plan)
    if p.world == n or n < 1:  # without hosts another rule says so
        return
    if n % fixed == 0:
        remedy = f"use dp_shard: {n // fixed}, or leave it out"
    else:
        divisors, whole = _divisors(n, 2**20), math.lcm(fixed, s.cluster.host.accelerators)
        near = sorted({max(d for d in divisors if d <= fixed), min((d for d in divisors if d > fixed), default=n)})
        remedy = f"make tp * cp * pp * dp_replicate = {fixed} a divisor of {n}, such as {' or '.join(map(str, near))}"
        remedy += f", or use {n // whole * whole} accelerators" if n >= whole else ""
    who = "cluster has" if n == s.cluster.accelerators else "placement uses"
    numbers = f"tp {p.tp} * cp {p.cp} * pp {p.pp} * dp {p.dp} = {p.world}, the {who} {n}"
    yield Problem("degrees multiply to the accelerators", numbers, remedy)


def _expert_degrees(s: Scenario) -> list[int]:
    """Return the ep that divide the experts and, where the plan lets one, the ranks of a pipeline stage."""
    p, own = s.plan, _divisors(s.model.experts.count)
    return [e for e in own if p.dp_shard * p.cp * p.tp % (p.etp * e) == 0] or own


def _expert_mesh(s: Scenario) -> Iterator[Problem]:
    p = s.plan
    inner, mesh = p.dp * p.cp * p.tp, p.etp * p.ep
    if s.model.experts is None or _open(s):
        return
    if inner % mesh:
        remedy = f"use ep of {_any_of(_expert_degrees(s))}" if inner % p.etp == 0 else f"use etp of {_any_of(_divisors(inner, p.tp))}"
        least = math.lcm(minimum_accelerators(p), s.cluster.host.accelerators)
        yield Problem(
            "etp * ep divides dp * cp * tp",
            f"etp {p.etp} * ep {p.ep} = {mesh} does not divide dp * cp * tp = {inner}",
            f"{remedy}, or a multiple of {least} accelerators",
        )
    elif (p.dp_shard * p.cp * p.tp) % mesh:
        replicas = [r for r in _divisors(p.dp) if p.dp // r * p.cp * p.tp % mesh == 0]
        yield Problem(
            "etp * ep divides one replica",
            f"etp * ep = {mesh} does not divide dp_shard * cp * tp = {p.dp_shard * p.cp * p.tp}",
            f"use dp_replicate of {_any_of(replicas)} and leave dp_shard out",
        )


def _tensor_degrees(s: Scenario) -> list[int]:
    """Return the tp that divide the model's widths and, where one does, the accelerators."""
    p, m = s.plan, s.model
    dense = not all(k.moe for k in m.kinds)
    own = [t for t in _divisors(m.heads) if (m.kv_heads % t == 0 or t % m.kv_heads == 0) and not (dense and m.ffn % t)]
    return [t for t in own if s.ranks(p) % (t * p.cp * p.pp * p.dp_replicate) == 0] or own


def _model(s: Scenario) -> Iterator[Problem]:
    p, m = s.plan, s.model
    use_tp = f"use tp of {_any_of(_tensor_degrees(s))}"
    if m.heads % p.tp:
        yield Problem("heads divide by tp", f"{m.heads} heads do not divide by tp = {p.tp}", use_tp)
    elif m.kv_heads % p.tp and p.tp % m.kv_heads:
        yield Problem("key-value heads divide by tp, or tp by them", f"{m.kv_heads} key-value heads and tp = {p.tp}", use_tp)
    if not all(k.moe for k in m.kinds) and m.ffn % p.tp:
        yield Problem("MLP width divides by tp", f"ffn = {m.ffn} does not divide by tp = {p.tp}", use_tp)
    if m.experts is None:
        if p.ep > 1 or p.etp > 1:
            yield Problem("expert axes need experts", f"{m.name} is dense, the plan has ep = {p.ep}, etp = {p.etp}", "use ep: 1 and etp: 1")
        return
    e = m.experts
    if e.count % p.ep:
        yield Problem("experts divide by ep", f"ep = {p.ep} does not divide {e.count} experts", f"use ep of {_any_of(_expert_degrees(s))}")
    if e.ffn % p.etp:
        yield Problem(
            "expert width divides by etp",
            f"etp = {p.etp} does not divide the expert width {e.ffn}",
            f"use etp of {_any_of(_divisors(e.ffn, p.tp))}",
        )
    if p.tp > 1 and not p.sequence_parallel:
        yield Problem(
            "experts with tp need sequence parallelism",
            f"tp = {p.tp} with sequence_parallel: false would send every token {p.tp} times",
            "use sequence_parallel: true",
        )
    extra = s.routing.redundant_experts if s.routing else 0
    if extra and (e.count + extra) % p.ep:
        numbers = f"{e.count} experts + {extra} redundant ones = {e.count + extra} slots do not divide over ep = {p.ep}"
        yield Problem("expert slots divide by ep", numbers, f"use redundant_experts: {p.ep * -(-(e.count + extra) // p.ep) - e.count}")
    if s.job.routing == "natural" and s.job.expert_load > p.ep > 1:
        yield Problem("expert load is at most ep", f"expert_load = {s.job.expert_load}, ep = {p.ep}", f"use expert_load of at most {p.ep}")


def _batch(s: Scenario) -> Iterator[Problem]:
    p, j = s.plan, s.job
    per_round = p.dp * p.micro_batch
    if j.global_batch % per_round and not _open(s):
        step = per_round * (p.pp if p.schedule in INTERLEAVED else 1)
        yield Problem(
            "batch divides by dp * micro-batch",
            f"global_batch = {j.global_batch} does not divide by dp {p.dp} * micro_batch {p.micro_batch} = {per_round}",
            f"use a global_batch of {_multiples(step, j.global_batch)}, or another dp",
        )
    parts = p.cp * (2 if p.cp > 1 else 1) * (p.tp if p.sequence_parallel else 1)
    if j.sequence_length % parts:
        yield Problem(
            "sequence divides by cp and tp",
            f"sequence_length = {j.sequence_length} does not divide into {parts} parts "
            "(2 cp * tp: balanced ring attention and sequence parallelism)",
            f"use a sequence_length of {_multiples(parts, j.sequence_length)}",
        )


def _pipeline(s: Scenario) -> Iterator[Problem]:
    p = s.plan
    try:
        stage_blocks(s.model, p, s.job)
    except PlanError as error:
        yield from error.problems
        return
    per_round = p.dp * p.micro_batch
    micro_batches = s.job.global_batch // per_round
    rounds = max(1, micro_batches // p.pp)
    if _open(s) or not micro_batches:
        return
    if p.schedule in INTERLEAVED and micro_batches % rounds:
        yield Problem(
            "micro-batches divide into rounds",
            f"{p.schedule} schedule: {micro_batches} micro-batches do not divide into {rounds} rounds of pp = {p.pp}",
            f"use a global_batch of {_multiples(p.pp * per_round, s.job.global_batch)}, or schedule: 1f1b with vpp: 1",
        )
        return
    # a few rounds have the rules of all, and a huge batch no huge table
    few = micro_batches if p.table or micro_batches <= 4 * p.pp else 4 * p.pp + micro_batches % 2 * (p.schedule not in INTERLEAVED)
    try:
        schedule(p.schedule, p.pp, p.vpp, few, p.table)
    except PlanError as error:
        yield from error.problems
    except DeadlockError as error:
        yield Problem("the schedule ends", str(error), "move what each rank waits for to an earlier place")


def _precision(s: Scenario) -> Iterator[Problem]:
    precision, peaks = s.plan.precision, s.cluster.accelerator.peak_flop_per_s
    for field, dtype in (("gemm", precision.gemm), ("head", precision.head)):
        either = field == "head" and dtype in ("bf16", "fp16")  # 16 bits of the kind that the accelerator has
        if dtype not in peaks and not either:
            yield Problem(
                "the accelerator computes in the datatype",
                f"precision.{field} = {dtype}, {s.cluster.accelerator.name} has {', '.join(peaks)}",
                f"use {' or '.join(peaks)}",
            )


def _placement(s: Scenario) -> Iterator[Problem]:
    p, place = s.plan, s.plan.placement
    if place.order == FEWEST_BYTES:
        yield Problem(
            "the placement is decided", f"order {FEWEST_BYTES} asks for the best one", "call simulator.fewest_bytes(scenario) first"
        )
        return
    at = place.order.split("-").index
    for name, places, there in (("hosts", place.hosts, s.cluster.hosts), ("accelerators", place.accelerators, s.cluster.accelerators)):
        beyond = [x for x in places or () if x >= there]
        if beyond:
            numbers = f"placement names {name[:-1]} {beyond[0]}, the cluster has 0 to {there - 1}"
            yield Problem("what a placement names is there", numbers, "name one of those")
    if s.ranks(p) < 1:
        yield Problem(
            "hosts are left",
            f"spare_hosts = {place.spare_hosts}, the cluster has {s.cluster.hosts} hosts",
            f"use spare_hosts of at most {s.cluster.hosts - 1}",
        )
    if p.cp > 1 and p.dp > 1 and (at("cp") > at("dp") or at("cp") < at("tp") < at("dp")):
        yield Problem("dp follows cp", f"order {place.order} with cp = {p.cp} and dp = {p.dp}", f"use {ORDER} or {PIPELINE_INSIDE}")
    if p.dp_replicate > 1 and at("dp") < max(at("tp"), at("ep")):
        yield Problem("replicas are outermost", f"order {place.order} with dp_replicate = {p.dp_replicate}", "put dp behind tp, cp and ep")
    before = [x for x in place.order.split("-") if at(x) < at("pp")]
    dense = math.prod({"tp": p.tp, "cp": p.cp, "dp": p.dp}.get(x, 1) for x in before)
    expert = math.prod({"tp": p.etp, "ep": p.ep, "dp": p.edp}.get(x, 1) for x in before)
    if p.pp > 1 and dense != expert and p.dp * p.cp * p.tp % (p.etp * p.ep) == 0:  # else another rule says so
        yield Problem(
            "attention and expert mesh have the same stages",
            f"order {place.order} puts {dense} attention and {expert} expert ranks inside pp",
            f"use {ORDER}, or degrees whose products before pp agree",
        )


def structure(scenario: Scenario) -> list[Problem]:
    """Return every broken rule about degrees, shapes, batch, layout and datatype; memory is not looked at."""
    rules = (_degrees, _expert_mesh, _model, _batch, _pipeline, _precision, _placement)
    return [problem for rule in rules for problem in rule(scenario)]


def memory(scenario: Scenario) -> dict[str, Any]:
    """Return bytes per pipeline rank, part by part; see `simulator.expert_memory.memory_per_rank`."""
    return memory_per_rank(scenario)


def _usual_remedies(p: Plan) -> list[dict[str, Any]]:
    """Return the changes of `p` that may save memory, gentle ones first."""
    selective = {"recompute": "selective", "recompute_modules": ("core_attn", "layernorm", "mlp_act", "moe_act", "mla_up_proj")}
    deeper = {"pp": 2 * p.pp, "layout": "balanced"}
    single = [selective, {"recompute": "full"}, {"micro_batch": 1}, deeper, {"tp": 2 * p.tp}, {"ep": 2 * p.ep}]
    single += [{"zero": stage} for stage in range(p.zero + 1, 4)]
    return [*single, deeper | {"recompute": "full"}, {"zero": 3, "recompute": "full"}]


def _words(p: Plan, changes: dict[str, Any]) -> str:
    """Return what of `changes` is new to `p`, as one writes it in a scenario file."""
    new = {key: value for key, value in changes.items() if getattr(p, key) != value}
    return ", ".join(f"{key}: [{', '.join(value)}]" if isinstance(value, tuple) else f"{key}: {value}" for key, value in new.items())


def _remedies(s: Scenario) -> str:
    """Try the usual remedies one at a time and tell which of them fit."""
    capacity, fits, nearest = s.cluster.accelerator.hbm_bytes, [], (math.inf, "")
    for changes in _usual_remedies(s.plan):
        other, words = s.with_plan(**changes), _words(s.plan, changes)
        if not words or structure(other):
            continue
        need = float(memory(other)["total"].max())
        if need <= capacity:
            fits.append(f"{words} ({readable(need, 'bytes')})")
        nearest = min(nearest, (need, words))
    if fits:
        return "fits with " + "; or ".join(fits[:4])
    if s.plan.tp == s.plan.pp == s.plan.cp == s.plan.ep == 1:
        return "the plan splits nothing (tp, pp, cp and ep are 1); `myriad plan --out FOLDER` writes one that fits to FOLDER/scenario.yaml"
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
    return plan.pp * math.lcm(plan.tp * plan.cp, plan.etp * plan.ep)
