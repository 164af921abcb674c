"""Measure the speeds that the documentation quotes: median of five, one core, machine named.

Run with ``make bench``.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import simulator as sim
from simulator.network.flows import flow_times
from simulator.planning.priced import PAIRED, Passes, Priced
from simulator.planning.space import Space, legal_table
from simulator.scenario.profiles import FABRICS

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "kimi-k2-10240-h100.yaml"
RUNS = 5


def machine() -> str:
    """Name the processor, the cores and the Python."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{cpu}, {os.cpu_count()} cores, one used; Python {platform.python_version()}, numpy {np.__version__}"


def median_s(work: Callable[[], object], runs: int = RUNS) -> float:
    """Return the median seconds of `runs` runs, after one to warm up if there are several."""
    if runs > 1:
        work()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def peak_gb() -> float:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def bound_plans(scenario: sim.Scenario, at_most: int) -> int:
    """Bound different legal plans of `scenario`, prices included, as a search does; return how many."""
    table, done = legal_table(scenario, Space()), 0
    passes = None
    for zero in (1, 2, 3, 0):
        part = table.of_kind(zero=zero).take(np.arange(min(len(table), at_most - done)))
        if passes is None or len(part) < len(table):
            passes = Passes.of(scenario, part)
        Priced.of(scenario, part, passes).bounds()
        done += len(part)
        if done == at_most:
            break
    return done


def flow_by_flow() -> None:
    """Print the seconds of concurrent flows of 1 MB +-10 % on non-blocking fat trees of 50 GB/s links."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from fat_tree import THREE_LEVELS, TWO_LEVELS, all_to_all

    random = np.random.default_rng(0)
    everyone = np.arange(THREE_LEVELS.hosts)
    cases = (
        ("all-to-all of 64 hosts", TWO_LEVELS, all_to_all(64), RUNS),
        ("permutation of 8,192 hosts", THREE_LEVELS, (everyone, random.permutation(everyone)), RUNS),
        ("all-to-all of 256 hosts", TWO_LEVELS, all_to_all(256), 1),
    )
    for name, tree, pairs, runs in cases:
        indptr, links, capacity, latency = tree.paths(*pairs)
        size = 1e6 * random.uniform(0.9, 1.1, len(latency))
        seconds = median_s(lambda: flow_times(indptr, links, capacity, size, latency_s=latency), runs)  # noqa: B023
        print(f"{name}, {len(size):,} flows: {seconds:.3f} s")


def networks(scenario: sim.Scenario) -> None:
    """Print the seconds of the graph, of all expert groups at once, and of a step with contention, first time and once known."""
    from simulator.network import sharing

    cluster = scenario.cluster
    graph = median_s(lambda: sim.topology(cluster).graph())
    print(f"networkx graph of 10,240 accelerators: {graph:.3f} s")
    plain = cluster.model_copy(update={"fabric": FABRICS.load("ib-ndr-clos")})
    asked = scenario.with_plan(tp=2, pp=8, ep=64, layout="balanced", recompute="full", dispatcher="alltoall")
    sharing.share(asked.plan, cluster, "edp", "all_gather")  # loads the compiled solver
    for routing in ("sprayed", "hashed"):
        on = plain.model_copy(update={"fabric": plain.fabric.model_copy(update={"routing": routing})})
        first = median_s(lambda on=on: sharing.share(asked.plan, on, "ep", "all_to_all"), runs=1)
        again = median_s(lambda on=on: sharing.share(asked.plan, on, "ep", "all_to_all"))
        print(f"160 all-to-alls of 64 at once, {routing}: {first:.2f} s the first time, {again * 1e3:.3f} ms once known")
    with_it, without = (median_s(lambda c=c: sim.simulate_step(scenario, contention=c)) for c in (True, False))
    print(f"step with contention: {with_it:.3f} s = {with_it / without:.2f} times that without")


def main() -> None:
    """Print every figure with its command."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"machine: {machine()}; median of {RUNS}")
    scenario = sim.Scenario.load(EXAMPLE)
    best = sim.search(scenario, top=1).best.scenario
    step = median_s(lambda: sim.simulate_step(best))
    spans = len(sim.simulate_step(best).timeline)
    print(f"event simulation of the 10,240-accelerator step: {step:.3f} s ({spans:,} spans)")
    jitter = sim.Variation(jitter=0.02)
    seconds = median_s(lambda: sim.simulate_step(best, ranks="all", variation=jitter))
    print(f"every rank of it, each operation with its own duration: {seconds:.3f} s")
    uneven = sim.Variation(jitter=0.02, slow_host_share=0.005, throttled_share=0.1, sequence_spread=0.2)
    routing = sim.Routing(distribution="dirichlet", concentration=5.0, capacity_factor=1.25)
    seconds = median_s(lambda: sim.simulate_step(best, ranks="all", variation=uneven, routing=routing))
    print(f"the same with uneven sequences and experts, capacity 1.25, slow hosts: {seconds:.3f} s; memory so far {peak_gb():.2f} GB")
    for at_most in (100_000, 1_000_000):
        seconds, count = median_s(lambda at_most=at_most: bound_plans(scenario, at_most)), bound_plans(scenario, at_most)
        print(f"bound over {count:,} plans: {seconds:.3f} s = {count / seconds:,.0f} plans/s; memory so far {peak_gb():.2f} GB")
    table = legal_table(scenario, Space()).of_kind(zero=1)
    few = (scenario.job.global_batch // (table.plans.dp * table.plans.micro_batch) <= 64) & ~table.runs(*PAIRED)
    few = np.flatnonzero(few)  # pairs are replayed stream by stream, some hundred times slower: their bound lets few of them through
    priced = Priced.of(scenario, table)
    seconds = median_s(lambda: priced.estimates(few))
    print(
        f"estimate over {len(few):,} plans of at most 64 micro-batches, without pairs: {seconds:.3f} s = {len(few) / seconds:,.0f} plans/s"
    )
    question = median_s(lambda: sim.search(scenario, top=10))
    found = sim.search(scenario, top=10)
    counts = f"{found.legal:,} legal plans, {found.fitting:,} fit, {found.estimated:,} estimated"
    print(f"search, {counts}, ten plans simulated: {question:.3f} s; memory so far {peak_gb():.2f} GB")
    flow_by_flow()
    networks(best)
    print(f"peak memory of this process: {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
