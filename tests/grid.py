"""A random grid of large pipelines, for confronting closed forms with the simulation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from small import H100, SCHEDULES, Small, dense, moe

from simulator.feasibility import structure
from simulator.scenario.job import Job
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import INTERLEAVED, TWO_CHUNKS, Plan
from simulator.scenario.scenario import Scenario

PAIRED = ("dualpipe", "dualpipev", "interleaved-overlapped")


def grid(count: int, seed: int, most: int = 256) -> Iterator[Scenario]:
    """Yield `count` legal scenarios: every schedule in turn, up to 16 ranks, 4 chunks and `most` micro-batches, any ZeRO stage."""
    random = np.random.default_rng(seed)

    def one(*choices):
        return choices[random.integers(len(choices))]

    made = 0
    while made < count:
        name = SCHEDULES[made % len(SCHEDULES)]
        pp = one(2, 4, 8, 16)
        vpp = 2 if name in TWO_CHUNKS else one(2, 3, 4) if name in INTERLEAVED else 1
        stages = pp * (1 if name == "dualpipe" else vpp)
        m = int(min(most, pp * one(1, 2, 3, 6, 8, 11, 16, 32, 64)))
        spare = one(0, 0, 1, stages // 2)
        layers, hidden = stages * (1 if stages > 16 else one(1, 2)) + spare, one(512, 2048, 4096)
        sparse = one(False, True)
        model = moe(layers, hidden, leading=one(0, 1)) if sparse else dense(layers, hidden)
        tp, zero = one(1, 2), one(0, 1, 2, 3)
        plan = Plan(
            tp=tp, pp=pp, vpp=vpp, ep=one(1, 8) if sparse else 1, schedule=name, dp_shard=8 // tp, zero=zero,
            dispatcher=one("alltoall", "deepep", "hybridep"), layout="balanced" if spare else None, recompute=one("none", "selective"),
            overlap=Overlap(
                grad_reduce=one(True, False), param_gather=one(True, False), pp=one(True, False), tp="pieces" if made % 3 == 2 else True,
                prefetch=made % 4, queued=made % 4 > 1,
            ),
        )  # fmt: skip
        job = Job(tokens=4096 * m * plan.dp, global_batch=m * plan.dp, sequence_length=one(512, 2048))
        scenario = Small(model=model, cluster=H100.model_copy(update={"accelerators": 8 * pp}), plan=plan, job=job)
        if structure(scenario) == []:
            made += 1
            yield scenario


def uneven(s: Scenario) -> bool:
    """Whether stages differ by more than the embedding and the head, or forwards and backwards overlap."""
    return s.plan.layout is not None or s.plan.schedule in PAIRED
