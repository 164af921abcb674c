"""The executable step: parallel equals one process, it learns, it counts what it drops, and it does the FLOP that are priced."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from calibration_ranks import CPU, compare, fail, launched, peaks, sequences  # noqa: E402
from small import dense  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from simulator.calibration import kernels  # noqa: E402
from simulator.calibration.cases import Case, held_out, plan  # noqa: E402
from simulator.calibration.launch import RankError, run_ranks  # noqa: E402
from simulator.calibration.moe_model import Options  # noqa: E402
from simulator.calibration.moe_step import MoEStep  # noqa: E402
from simulator.calibration.profile import load  # noqa: E402
from simulator.errors import PlanError  # noqa: E402
from simulator.scenario.job import Job  # noqa: E402
from simulator.scenario.model import Experts, LatentAttention, Model  # noqa: E402
from simulator.scenario.plan import Plan  # noqa: E402
from simulator.scenario.scenario import Scenario  # noqa: E402
from simulator.simulate import simulate_step  # noqa: E402
from simulator.workload.attention import ATTENTION_BACKWARD_FLOP, attended  # noqa: E402
from simulator.workload.ops import total  # noqa: E402
from simulator.workload.stages import blocks, sequence  # noqa: E402

torch.set_num_threads(1)

SIZES = {"vocab": 64, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 48}
EXPERTS = Experts(count=4, top_k=2, ffn=24, shared_ffn=16)
GQA = dense(2, 32, name="gqa", experts=EXPERTS, moe_layers=(False, True), **SIZES)
MLA = dense(
    2, 32, name="mla", experts=EXPERTS, moe_layers=(True, True),
    latent=LatentAttention(q_rank=16, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=8), **(SIZES | {"kv_heads": 4}),
)  # fmt: skip
JOB = Job(tokens=10**6, global_batch=8, sequence_length=16)
FP32 = Options(dtype=torch.float32, lr=1e-3)
ONE = Plan(dp_shard=1)

TWO = [Plan(dp_shard=2), Plan(dp_shard=2, ep=2), Plan(tp=2, dp_shard=1), Plan(tp=2, ep=2, dp_shard=1), Plan(pp=2, dp_shard=1)]
FOUR = [Plan(dp_shard=4, ep=2), Plan(dp_shard=2, tp=2, ep=4), Plan(dp_shard=2, pp=2, ep=2), Plan(tp=2, pp=2, dp_shard=1)]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "plans"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_parallel_equals_one_process(world: int, plans: list[Plan]):
    """Loss, gradients and their norm over two optimizer steps, every layout in one job of `world` processes."""
    rows = list(itertools.chain(*run_ranks(compare, world, GQA, plans, JOB, FP32)))
    assert len(rows) == world * len(plans)
    assert {row["plan"] for row in rows} == {str(plan) for plan in plans}
    for row in rows:
        assert row["parts"] >= 8
        assert max(row["loss"], row["gradient"], row["norm"]) < 1e-5, row


@pytest.mark.slow
def test_latent_attention_and_sigmoid_router_in_parallel():
    options = Options(dtype=torch.float32, lr=1e-3, scoring="sigmoid", explicit_attention=True)
    for row in itertools.chain(*run_ranks(compare, 2, MLA, [Plan(tp=2, dp_shard=1), Plan(dp_shard=2, ep=2)], JOB, options)):
        assert max(row["loss"], row["gradient"], row["norm"]) < 1e-5, row


def fresh(model: Model = GQA, job: Job = JOB, plan: Plan = ONE, **options) -> MoEStep:
    return MoEStep(model, plan, job, 0, Options(**({"dtype": torch.float32, "lr": 1e-3} | options)), CPU)


def periodic(job: Job, vocab: int) -> torch.Tensor:
    """Sequences in which every token tells the next one."""
    start = torch.arange(job.global_batch)[:, None]
    return (start + 3 * torch.arange(job.sequence_length + 1)) % vocab


@pytest.mark.parametrize("model", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_loss_falls(model: Model, scoring: str):
    step = fresh(model, scoring=scoring, lr=1e-2, auxiliary_loss=0.01, bias_rate=1e-3)
    losses = [step.run(periodic(JOB, model.vocab)).loss for _ in range(40)]
    assert losses[0] == pytest.approx(np.log(model.vocab), rel=0.25)
    assert losses[-1] < 0.25 * losses[0]


def test_training_in_bf16_follows_fp32():
    losses = {dtype: [step.run(periodic(JOB, GQA.vocab)).loss for _ in range(10)] for dtype in (torch.float32, torch.bfloat16)
              for step in [fresh(dtype=dtype, lr=3e-3)]}  # fmt: skip
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)


@pytest.mark.parametrize("model", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradient_is_that_of_finite_differences(model: Model, scoring: str):
    """Along the gradient itself, by central differences; with every expert chosen, so that no choice jumps."""
    every = model.model_copy(update={"experts": EXPERTS.model_copy(update={"top_k": EXPERTS.count})})
    step, tokens = fresh(every, scoring=scoring), sequences(every, JOB)
    step.backward(tokens)
    step.reduce()
    norm, small = step.norm(), 1e-2
    direction = [bucket.reduced / norm for bucket in step.buckets]
    losses = []
    for away in (small, -2 * small):
        for bucket, g in zip(step.buckets, direction, strict=True):
            bucket.values.sub_(away * g)
        losses.append(step.backward(tokens))
    assert losses[1] - losses[0] == pytest.approx(2 * small * norm, rel=5e-3)


def test_micro_batches_add_up():
    """Two micro-batches of four sequences give the gradient of eight of one."""
    steps = [fresh(), fresh(plan=ONE.model_copy(update={"micro_batch": 4}))]
    for step in steps:
        step.backward(sequences(GQA, JOB))
        step.reduce()
    for one, other in zip(*(step.buckets for step in steps), strict=True):
        torch.testing.assert_close(other.reduced, one.reduced, rtol=1e-4, atol=1e-7)


def test_fused_attention_equals_products():
    for model in (GQA, MLA):
        fused, plain = (fresh(model, explicit_attention=explicit) for explicit in (False, True))
        tokens = sequences(model, JOB)
        assert fused.run(tokens).loss == pytest.approx(plain.run(tokens).loss, rel=1e-6)
        assert fused.run(tokens).gradient_norm == pytest.approx(plain.run(tokens).gradient_norm, rel=1e-4)


def test_tokens_per_expert_add_up_and_balance():
    step = fresh(bias_rate=0.05)
    tokens = sequences(GQA, JOB)
    spread = []
    for _ in range(20):
        step.recorder.on = True
        loss = step.backward(tokens)
        (counts,) = step.routed()
        assert counts.sum() == JOB.tokens_per_step * EXPERTS.top_k
        step.layers[0].balance(counts)
        spread.append(float(counts.max() / counts.float().mean()))
    assert loss > 0
    assert spread[-1] < spread[0]


def test_capacity_drops_are_counted():
    """With a capacity of half the mean at least half of the copies are dropped, and each expert computes no more than it may."""
    step = fresh(capacity_factor=0.5)
    step.backward(sequences(GQA, JOB))
    (counts,), layer = step.routed(), step.layers[0]
    per_micro_batch = JOB.sequence_length * EXPERTS.top_k
    most = -(-per_micro_batch // (2 * EXPERTS.count))
    assert counts.sum() == JOB.global_batch * per_micro_batch
    assert JOB.global_batch * (per_micro_batch - EXPERTS.count * most) <= layer.dropped < JOB.global_batch * per_micro_batch
    whole = fresh(capacity_factor=float(EXPERTS.count))
    whole.backward(sequences(GQA, JOB))
    assert whole.layers[0].dropped == 0


def test_order_of_copies_by_hand():
    """Three tokens, two copies each, experts 0 to 2; then with room for one copy."""
    experts = torch.tensor([[2, 0], [0, 1], [0, 2]])
    places, order, counts, dropped = kernels.order(experts, 3)
    assert order.tolist() == [1, 2, 4, 3, 0, 5]
    assert places.tolist() == [[4, 0], [1, 3], [2, 5]]
    assert (counts.tolist(), dropped) == ([3, 1, 2], 0)
    places, order, counts, dropped = kernels.order(experts, 3, most=1)
    assert order.tolist() == [1, 3, 0]
    assert places.tolist() == [[2, 0], [3, 1], [3, 3]]
    assert (counts.tolist(), dropped) == ([3, 1, 2], 3)
    rows = kernels.gather_rows(torch.eye(3), order // 2)
    assert kernels.sum_copies(rows, places).tolist() == [[2, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("model", [GQA, MLA], ids=["gqa", "mla"])
def test_flop_equal_the_simulators_formula(model: Model):
    """Products of the real step, attention over all keys, as torch counts them: exactly the FLOP that `simulate_step` prices."""
    job = JOB.model_copy(update={"global_batch": 1})
    step = fresh(model, job, explicit_attention=True)
    with FlopCounterMode(display=False) as counter:
        step.backward(sequences(model, job))
    keys = attended(job.sequence_length, None, causal=False) / attended(job.sequence_length, None)
    made = blocks(model, ONE, job)
    expected = 0.0
    for name in sequence(model):
        for segments, scale in ((made[name].forward, keys), (made[name].backward, keys * 2 / ATTENTION_BACKWARD_FLOP)):
            expected += float(total(segments, lambda op, s=scale: op.flop * (s if op.kind == "attention" else 1.0)))
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


def test_what_the_step_does_not_have_is_refused():
    with pytest.raises(PlanError, match=r"(?s)cp = 2.*recompute = full"):
        fresh(plan=Plan(dp_shard=1, cp=2, recompute="full"))
    with pytest.raises(PlanError, match="mtp_layers = 1"):
        fresh(GQA.model_copy(update={"mtp_layers": 1}))


def test_a_failing_rank_is_told():
    with pytest.raises(RankError, match="rank 0 failed(.|\n)*zero_division|ZeroDivisionError"):
        run_ranks(fail, 1)


def test_peak_memory_does_not_hang_on_who_frees_a_tensor():
    """gloo's threads let go of tensors when they like: a step of many tensor-parallel collectives peaks at the same place, and where
    the simulator says."""
    case = next(case for case in held_out(small=True) if case.name == "DP2")
    tensor = Case("TP2", case.model.model_copy(update={"heads": 8, "kv_heads": 8, "head_dim": 56}), plan(tp=2), case.job)
    for each in (case, tensor):
        found = np.array(run_ranks(peaks, 2, each))
        assert np.ptp(found) < 0.01 * found.mean()
        scenario = Scenario(model=each.model, cluster=load("epyc").cluster, plan=each.plan, job=each.job)
        assert simulate_step(scenario).peak_memory_bytes == pytest.approx(found.max(), rel=0.1)


def test_ranks_end_with_the_process_that_started_them():
    """Killed outright, it cannot end them; they must not go on measuring beside the run that resumes."""
    code = "from calibration_ranks import start_lingering\nif __name__ == '__main__': start_lingering()"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})
    assert starter.stdout is not None
    rank = int(starter.stdout.readline())
    assert alive(rank)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    ends = time.monotonic() + 20
    while alive(rank) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(rank)


def alive(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_a_launch_costs_the_host_is_measured_on_a_step():
    (row,) = run_ranks(launched, 1)
    assert row.calls > 50
    assert 1e-6 < row.seconds / row.calls < 1e-2
