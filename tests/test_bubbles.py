"""The pipeline bubble against its published formula, on three levels: actions, a real program, the whole simulator.

Without communication a step takes ``(m + p - 1)(F + B)`` under GPipe and 1F1B and ``(m + (p - 1)/v)(F + B)`` interleaved:
idle over ideal time ``(p - 1)/m`` and ``(p - 1)/(m v)``.

References
----------
Huang et al., "GPipe", 2019, section 2.3; Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters
Using Megatron-LM", SC 2021, sections 2.2.1 and 2.2.2 (t_pb / t_id).
"""

from __future__ import annotations

import numpy as np
import pytest
from small import H100, dense, job

from simulator.closed_forms import bound, estimate
from simulator.engine.events import run
from simulator.engine.replay import Lap, replay, replay_streams
from simulator.scenario.cluster import Accelerator, Cluster, Fabric, Host
from simulator.scenario.plan import Plan, Precision
from simulator.scenario.scenario import Scenario
from simulator.schedules import schedule
from simulator.simulate import classify, simulate_step
from simulator.workload.build import build_step
from simulator.workload.step import StepProgram

EXACT = 1e-9
SHAPES = [
    ("gpipe", 1, 1, 5), ("gpipe", 2, 1, 2), ("gpipe", 4, 1, 8), ("gpipe", 8, 1, 3),
    ("1f1b", 1, 1, 5), ("1f1b", 2, 1, 2), ("1f1b", 4, 1, 8), ("1f1b", 8, 1, 3), ("1f1b", 4, 1, 100),
    ("interleaved", 2, 2, 2), ("interleaved", 4, 2, 8), ("interleaved", 4, 4, 4), ("interleaved", 8, 3, 16), ("interleaved", 4, 2, 64),
]  # fmt: skip
shapes = pytest.mark.parametrize(("name", "pp", "vpp", "m"), SHAPES)


def bubble(pp: int, vpp: int, m: int) -> float:
    """Return idle over ideal time."""
    return (pp - 1) / (m * vpp)


# --- actions: the order of the table alone, no program ---


@shapes
@pytest.mark.parametrize(("forward", "backward"), [(1.0, 2.0), (3.0, 1.0), (0.7, 0.7)])
def test_replayed_actions(name, pp, vpp, m, forward, backward):
    """`replay` of the schedule's actions, F and B per rank split evenly over its chunks."""
    order = schedule(name, pp, vpp, m)
    f, b = (np.full(pp * vpp, seconds / vpp) for seconds in (forward, backward))
    ideal = m * (forward + backward)
    assert replay(order, {"F": f, "B": b}, np.zeros(())).max() == pytest.approx(ideal * (1 + bubble(pp, vpp, m)), rel=EXACT)
    _, done = replay_streams(order, lambda what: [[Lap(((("compute", {"F": f, "B": b}[k][s]),),))] for k, s in what], (), 0.0)
    assert done.max() == pytest.approx(ideal * (1 + bubble(pp, vpp, m)), rel=EXACT)


# --- a real program: what `build_step` makes of a model, run in SimPy with made-up seconds ---


def handmade_seconds(program: StepProgram, forward: float, backward: float) -> np.ndarray:
    """Return seconds that give every forward and backward of a chunk its time, spread over its kernels, and all else none."""
    of_action: dict[tuple, list[int]] = {}
    for node, (task, rank, action) in enumerate(zip(program.task, program.rank_class, program.label, strict=True)):
        if action is not None and program.tasks[task].stream == "compute":
            of_action.setdefault((rank, action), []).append(node)
    seconds = np.zeros(len(program))
    for (_, action), nodes in of_action.items():
        seconds[nodes] = (forward if action.kind == "F" else backward) / len(nodes)
    return seconds


@shapes
def test_simulated_program(name, pp, vpp, m):
    """The program of a real model, tensor-parallel collectives and messages in it, all of zero seconds."""
    model, plan = dense(pp * vpp), Plan(tp=2, pp=pp, vpp=vpp, schedule=name, dp_shard=1)
    cluster = H100.model_copy(update={"accelerators": 2 * pp})
    program = build_step(model, plan, job(m), classify(plan, cluster, 1.0, every_rank=True))
    assert {task.stream for task in program.tasks} >= ({"compute", "tp", "pp"} if pp > 1 else {"compute", "tp"})
    seconds = handmade_seconds(program, 1.0 / vpp, 2.0 / vpp)
    _, end = run(program.streams(), program.needs, program.meet, seconds)
    assert end.max() == pytest.approx(3.0 * m * (1 + bubble(pp, vpp, m)), rel=EXACT)


# --- the whole simulator: on a machine where only the layers' GEMMs take time ---


def ideal_cluster(accelerators: int) -> Cluster:
    """Return a machine without latency whose memory and links are endlessly fast, and whose fp32 alone is slow."""
    nothing, fast = {"ll": "0 s", "ll128": "0 s", "simple": "0 s"}, "1e30 B/s"
    accelerator, host, fabric = (part.model_dump(mode="json") for part in (H100.accelerator, H100.host, H100.fabric))
    accelerator |= {"hbm_bytes_per_s": fast, "launch_s": "0 s"}
    accelerator["peak_flop_per_s"] |= {"fp32": "1 TFLOP/s", "bf16": "1e30 FLOP/s", "fp16": "1e30 FLOP/s", "fp8": "1e30 FLOP/s"}
    host |= {"scale_up_bytes_per_s": fast, "base_latency_s": nothing, "hop_latency_s": nothing}
    host["dispatch_s"] = None
    host["sources"] = [s | {"facts": [f for f in s["facts"] if f != "dispatch_s"]} for s in host["sources"]]
    host["bus_bytes_per_s"] = dict.fromkeys(host["bus_bytes_per_s"], fast)
    fabric["hop_latency_s"] = nothing
    fabric["tiers"] = [tier | {"latency_s": "0 s"} for tier in fabric["tiers"]]
    parts = {
        "accelerator": Accelerator.model_validate(accelerator),
        "host": Host.model_validate(host),
        "fabric": Fabric.model_validate(fabric),
    }
    return H100.model_copy(update=parts | {"accelerators": accelerators})


@shapes
def test_whole_simulator(name, pp, vpp, m):
    """`simulate_step`, `estimate` and `bound` on `pp` accelerators against one accelerator that has no pipeline.

    Layers compute in fp32, embedding, head, attention and the optimizer in what costs nothing: stages are even to 1e-15.
    """
    model = dense(24 if 24 % (pp * vpp) == 0 else pp * vpp)

    def scenario(**plan) -> Scenario:
        return Scenario(model=model, cluster=ideal_cluster(plan["pp"]), plan=Plan(precision=Precision(gemm="fp32"), **plan), job=job(m))

    alone = simulate_step(scenario(pp=1)).step_time_s
    assert alone > 0.01
    piped = scenario(pp=pp, vpp=vpp, schedule=name)
    expected = alone / pp * (1 + bubble(pp, vpp, m))
    result = simulate_step(piped)
    assert result.step_time_s == pytest.approx(expected, rel=EXACT)
    assert estimate(piped) == pytest.approx(expected, rel=EXACT)
    assert bound(piped) == pytest.approx(expected, rel=EXACT)
    idle = result.breakdown().set_index("part")["seconds"]["idle"]
    assert idle == pytest.approx(alone / pp * bubble(pp, vpp, m), rel=EXACT, abs=EXACT * expected)
