"""The wiring: a scenario in, a simulated step out."""

from __future__ import annotations

from functools import cache
from typing import Literal, overload

import numpy as np

from simulator.engine.events import run
from simulator.engine.order import prepare
from simulator.engine.ranks import replay_ranks
from simulator.engine.timeline import Timeline
from simulator.errors import PlanError, Problem, ProfileError
from simulator.feasibility import check
from simulator.network.collectives import crossings
from simulator.placing import settled
from simulator.pricing.beside import Beside
from simulator.pricing.contention import shares, stretched
from simulator.pricing.durations import Prices, RankDurations, spans, uneven
from simulator.pricing.operations import Known
from simulator.pricing.stage_times import pass_beside
from simulator.results.ranks import RanksResult
from simulator.results.step import StepResult, StepsResult
from simulator.scenario.cluster import Cluster
from simulator.scenario.mesh import accelerator_of, placed
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.schedules import schedule
from simulator.workload.build import build_step
from simulator.workload.classes import RankClasses, rank_classes, rank_loads
from simulator.workload.memory import kept_bytes
from simulator.workload.ops import HOST
from simulator.workload.stages import blocks, stage_blocks
from simulator.workload.step import StepProgram


@overload
def simulate_step(scenario: Scenario, ranks: Literal["classes"] = "classes", *, contention: bool = False) -> StepResult: ...


@overload
def simulate_step(
    scenario: Scenario, ranks: Literal["all"], variation: Variation | None = None, routing: Routing | None = None, seeds: int = 1
) -> RanksResult: ...


def simulate_step(
    scenario: Scenario,
    ranks: Literal["classes", "all"] = "classes",
    variation: Variation | None = None,
    routing: Routing | None = None,
    seeds: int = 1,
    contention: bool = False,
) -> StepResult | RanksResult:
    """Return the simulated optimizer step of `scenario`.

    Parameters
    ----------
    scenario : Scenario
    ranks : str
        ``classes`` simulates one rank of each class that behaves alike, event by event, which is exact; ``all`` replays every
        operation of every rank (`simulate_ranks`).
    variation, routing, seeds
        For ``all``: as for `simulate_ranks`.
    contention : bool
        For ``classes``: let collectives of different kinds that overlap in time slow each other where they share links
        (`simulator.pricing.contention`); that all groups of one kind share them is always in.

    Raises
    ------
    PlanError
        When the scenario cannot run; carries every problem.
    ProfileError
        When `variation`, `routing` or `seeds` meet classes: ranks of a class are alike; when `contention` meets all ranks.
    """
    scenario = settled(scenario)
    if ranks == "all":
        if contention:
            raise ProfileError("contention between kinds of collectives is found for classes of ranks; write ranks='classes'")
        return simulate_ranks(scenario, variation, routing, seeds)
    if ranks != "classes":
        raise ProfileError(f"ranks = {ranks!r}; choose 'classes' or 'all'")
    if variation is not None or routing is not None or seeds != 1:
        raise ProfileError("variation, routing and seeds set every rank apart, classes are of ranks alike; write ranks='all'")
    return simulate_events(scenario, contention=contention)


def simulate_events(scenario: Scenario, every_rank: bool = False, contention: bool = False) -> StepResult:
    """Return the step of `scenario` simulated event by event.

    Parameters
    ----------
    every_rank : bool
        Run a SimPy process for each stream of each rank, not of each class: the slow truth that classes and replay are held to.
    contention : bool
        As in `simulate_step`.
    """
    problems = check(scenario)
    if problems:
        raise PlanError(problems)
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    classes = classify(plan, cluster, job.expert_load if job.routing == "natural" else 1.0, every_rank)
    program = build_step(model, plan, job, classes)
    prices = Prices.of(program, scenario, slowdowns(program, scenario))
    seconds = prices.node_s(program)
    found, queues = shares(program, scenario), program.streams()
    start, end = run(queues, program.needs, program.meet, seconds, lambda n: describe(program, n))
    if contention:
        seconds = stretched(program, scenario, seconds, start, end, found)
        start, end = run(queues, program.needs, program.meet, seconds, lambda n: describe(program, n))
    return StepResult(scenario, _timeline(program, scenario, start, end), prices.parts_s(program), found)


def simulate_steps(scenario: Scenario, steps: int = 3, post_validation: bool = True) -> StepsResult:
    """Return several optimizer steps of `scenario` in a row, event by event, one rank of each class.

    Parameters
    ----------
    steps : int
        At least 2; a steady pace takes a few.
    post_validation : bool
        Let each stage update its parameters and begin the next step at once, and validate the gradient norm later, so that the
        slopes of consecutive steps overlap; False waits for all ranks between steps.

    Raises
    ------
    PlanError
        When the scenario cannot run; carries every problem.
    """
    problems = check(scenario)
    if steps < 2:
        problems.append(Problem("at least two steps", f"steps = {steps}", "use 2 or more, or simulate_step"))
    if problems:
        raise PlanError(problems)
    plan, job = scenario.plan, scenario.job
    classes = classify(plan, scenario.cluster, job.expert_load if job.routing == "natural" else 1.0, every_rank=False)
    program = build_step(scenario.model, plan, job, classes, steps, post_validation)
    seconds = node_seconds(program, scenario)
    start, end = run(program.streams(), program.needs, program.meet, seconds, lambda n: describe(program, n))
    return StepsResult(scenario, post_validation, steps, _timeline(program, scenario, start, end))


def simulate_ranks(scenario: Scenario, variation: Variation | None = None, routing: Routing | None = None, seeds: int = 1) -> RanksResult:
    """Return the optimizer step of `scenario` with every operation of every rank at its own duration.

    Parameters
    ----------
    scenario : Scenario
    variation : Variation, optional
        Jitter, slow hosts, throttling, uneven sequences, and the first seed; nothing varies by default.
    routing : Routing, optional
        How tokens spread over experts; what the scenario or else its job says by default.
    seeds : int
        How many seeds to simulate, counted up from that of `variation`.

    Raises
    ------
    PlanError
        When the scenario cannot run; carries every problem.

    Notes
    -----
    `simulator.engine.ranks` replays the order of the program; overlap and sharing are in the durations beforehand, and rates
    do not change while an operation runs. The same seed gives the same bytes.
    """
    problems = check(scenario)
    if seeds < 1:
        problems.append(Problem("at least one seed", f"seeds = {seeds}", "use 1 or more"))
    if problems:
        raise PlanError(problems)
    plan, variation, routing, asked = scenario.plan, variation or Variation(jitter=0), routing or scenario.routing, scenario
    scenario = node_limited(scenario, routing)
    same = np.ones(plan.world)
    program = build_step(scenario.model, plan, scenario.job, rank_classes(plan, same, same))
    order = prepare(
        program.streams(), program.needs, program.meet, spans(program, scenario), plan.world // plan.pp, lambda n: describe(program, n)
    )
    slow = slowdowns(program, scenario)
    times, first = np.empty(seeds), None
    for i in range(seeds):
        now = variation.model_copy(update={"seed": variation.seed + i})
        what, dropped = uneven(scenario, now, routing)
        durations = RankDurations(program, scenario, slow, what, now)
        replay = replay_ranks(order, durations)
        times[i] = replay.end_s.max()
        first = first or (dropped, program, order, durations, replay)
    assert first is not None
    return RanksResult(asked, variation, routing, times, *first)


def node_limited(scenario: Scenario, routing: Routing | None) -> Scenario:
    """Return `scenario` with the router's groups that limit each token to `routing.hosts_per_token` scale-up domains.

    Raises
    ------
    PlanError
        When that many domains do not hold a token's experts, or experts do not divide over the domains.
    """
    experts, most = scenario.model.experts, routing and routing.hosts_per_token
    if experts is None or not most:
        return scenario
    groups = int(crossings(placed(scenario.plan, "ep", scenario.cluster.host.accelerators), scenario.cluster)[1])
    if most >= groups:
        return scenario
    if experts.count % groups or most * (experts.count // groups) < experts.top_k:
        numbers = f"hosts_per_token = {most}: {groups} domains of {experts.count / groups:g} experts, top_k = {experts.top_k}"
        fewest = -(-experts.top_k * groups // experts.count)
        remedy = f"use hosts_per_token of at least {fewest}, and an ep whose domains divide the experts"
        raise PlanError([Problem("a token's experts fit on its hosts", numbers, remedy)])
    limited = experts.model_copy(update={"groups": groups, "top_groups": most})
    return scenario.model_copy(update={"model": scenario.model.model_copy(update={"experts": limited})})


def classify(plan: Plan, cluster: Cluster, heaviest: float, every_rank: bool) -> RankClasses:
    """Return the classes of ranks, set apart by slow hosts and by the tokens that the router sends them."""
    host = accelerator_of(plan, cluster.host.accelerators) // cluster.host.accelerators
    slowdown = np.ones(cluster.hosts)
    for number, factor in cluster.slow_hosts.items():
        slowdown[number] = factor
    load = rank_loads(plan, heaviest) if heaviest > 1 else np.ones(plan.world)
    return rank_classes(plan, slowdown[host], load, every_rank)


def node_seconds(program: StepProgram, scenario: Scenario) -> np.ndarray:
    """Return the seconds of every node of `program`, as communication beside it, its load and its rank's speed make them."""
    return Prices.of(program, scenario, slowdowns(program, scenario)).node_s(program)


def slowdowns(program: StepProgram, scenario: Scenario) -> np.ndarray:
    """Return the factor by which communication slows each node beside it: one for each pass of a block and each pair of stages.

    Found beforehand from even load and full speed (`simulator.pricing.beside`); 1 for what belongs to no pass. The wait for the host is
    that of the kernels as slow as they are there.
    """
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    all_blocks, stages = blocks(model, plan, job), stage_blocks(model, plan, job)
    known = Known(model, plan, cluster)

    @cache
    def of_block(name: str, kind: str, paired: bool) -> Beside:
        return pass_beside(all_blocks[name], kind, model, plan, cluster, paired, known)

    @cache
    def factor(task: int, pair: tuple[int, int] | None) -> float:
        name, kind = program.tasks[task].of
        if program.tasks[task].stream not in ("compute", HOST) or not name:
            return 1.0
        if pair is None:
            return float(of_block(name, kind, False).slowdown(cluster.accelerator))
        parts = (of_block(name, kind, True) for kind, stage in zip("FB", pair, strict=True) for name in stages[stage])
        return float(sum(parts, Beside()).slowdown(cluster.accelerator))

    return np.array([factor(task, pair) for task, pair in zip(program.task, program.pair, strict=True)])


def describe(program: StepProgram, node: int) -> str:
    """Return a node in words."""
    rank = program.rank_class[node]
    action = program.label[node]
    where = f"stage {program.classes.stage[rank]} (class {rank})"
    return f"{where}: {program.tasks[program.task[node]].name} {action or ''}".strip()


def _timeline(program: StepProgram, scenario: Scenario, start: np.ndarray, end: np.ndarray) -> Timeline:
    rank = np.asarray(program.rank_class)
    task = np.asarray(program.task)
    names = np.array([t.name for t in program.tasks], dtype=object)
    streams = np.array([t.stream for t in program.tasks], dtype=object)
    actions = {None: ""} | {a: str(a) for a in set(program.label) if a is not None}
    action = np.array([actions[a] for a in program.label], dtype=object)
    takes = taken_bytes(program, scenario)
    return Timeline(rank, program.classes.stage[rank], streams[task], names[task], action, start, end, program.classes.count, takes)


def taken_bytes(program: StepProgram, scenario: Scenario) -> dict[tuple[int, str], float]:
    """Return the activations that each (class, action) takes, or gives back (negative).

    One heavy rank of each expert group, as a job's `expert_load` has it, is another one for each layer: in sum they are even.
    """
    model, plan, job = scenario.model, scenario.plan, scenario.job
    order = schedule(plan.schedule, plan.pp, plan.vpp, job.global_batch // (plan.dp * plan.micro_batch), plan.table)
    kept = kept_bytes(model, plan, job, stage_blocks(model, plan, job), blocks(model, plan, job))
    takes = {}
    for c, action in dict.fromkeys(zip(program.rank_class, program.label, strict=True)):
        if action is not None:
            part = order.held[program.classes.stage[c]][action.chunk]
            saved, rest = (float(of_stages[part]) for of_stages in kept)
            takes[c, str(action)] = {"F": saved, "B": -saved, "I": rest - saved, "W": -rest}[action.kind]
    return takes
