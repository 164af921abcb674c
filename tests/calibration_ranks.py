"""What tests run on each rank: at the top level of a module of its own, so that spawned processes find it."""

from __future__ import annotations

import os
import time

import torch

from simulator.calibration.cases import Case, Row
from simulator.calibration.launch import Tell, run_ranks
from simulator.calibration.measure import dispatch
from simulator.calibration.moe_model import Options
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.steps import peak_memory
from simulator.calibration.weights import Part
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan

CPU = torch.device("cpu")


def sequences(model: Model, job: Job, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab, (job.global_batch, job.sequence_length + 1), generator=generator)


def gradients(step: MoEStep) -> dict[Part, torch.Tensor]:
    """Return the whole reduced gradient of every part of this rank's weights, by name."""
    found = {}
    for bucket in step.buckets:
        flat = step.ranks.all_gather(bucket.axis, bucket.reduced)
        begin = 0
        for weight in bucket.weights:
            whole, begin = flat[begin : begin + weight.numel].view(weight.shape), begin + weight.numel
            found |= dict(zip(weight.parts, whole.split([p.local[0] for p in weight.parts]), strict=True))
    return found


def compare(rank: int, world: int, tell: Tell, model: Model, plans: list[Plan], job: Job, options: Options) -> list[dict]:
    """Return the largest differences of loss and gradients of each plan from one process, for two steps, on this rank."""
    tokens, rows = sequences(model, job), []
    alone = Plan(dp_shard=1, micro_batch=plans[0].micro_batch)
    for plan in plans:
        one, many = alone_step(model, alone, job, options), MoEStep(model, plan, job, rank, options, CPU)
        worst, loss, norm = 0.0, 0.0, 0.0
        for number in range(2):
            expected, measured = (step.backward(tokens) for step in (one, many))
            loss = max(loss, abs(measured - expected) / expected)
            for step in (one, many):
                step.reduce()
            full = {part.name: values for part, values in gradients(one).items()}
            for part, values in gradients(many).items():
                wanted = part.cut(full[part.name])
                worst = max(worst, float((values - wanted).norm() / wanted.norm().clamp(min=1e-12)))
            norm = max(norm, abs(many.norm() / one.norm() - 1))
            for step in (one, many):
                for bucket in step.buckets:
                    bucket.update(number + 1, options.lr, 1.0)
                    bucket.gather()
        rows.append({"plan": str(plan), "loss": loss, "gradient": worst, "norm": norm, "parts": len(gradients_names(many))})
    return rows


def gradients_names(step: MoEStep) -> list[str]:
    return [part.name for bucket in step.buckets for weight in bucket.weights for part in weight.parts]


def alone_step(model: Model, plan: Plan, job: Job, options: Options) -> MoEStep:
    return MoEStep(model, plan, job, 0, options, CPU)


def peaks(rank: int, world: int, tell: Tell, case: Case) -> list[float]:
    """Return the peak memory of the same step, several times."""
    return [peak_memory(case, rank, CPU) for _ in range(4)]


def launched(rank: int, world: int, tell: Tell) -> Row:
    return dispatch(CPU, world, 0)


def linger(rank: int, world: int, tell: Tell) -> None:
    """Tell this process's number and do nothing for a while."""
    tell(os.getpid())
    time.sleep(60)


def start_lingering() -> None:
    """Start a rank that lingers, and print its number."""
    run_ranks(linger, 1, tell=lambda pid: print(pid, flush=True))


def fail(rank: int, world: int, tell: Tell) -> float:
    return 1 / rank
