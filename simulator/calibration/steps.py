"""Run the held-out steps on the ranks: repeated, interleaved, with peak memory from the allocator's events."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from simulator.calibration.cases import Case
from simulator.calibration.check import WAITING, Measured, part_of
from simulator.calibration.clock import STILL, batch, timed
from simulator.calibration.launch import Tell, device_of
from simulator.calibration.moe_model import Options
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.together import observed, waited

WARM = 1


def peak_bytes(run: Callable[[], object], device: torch.device) -> float:
    """Return the largest sum of live tensors that `run` reaches, from the allocator's own events.

    Notes
    -----
    On CUDA the allocator keeps it. On a CPU the profiler records every allocation and release; their running sum is the memory of
    tensors, which resident size is not: that keeps freed pages, and what was allocated before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return float(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = most = 0.0
    assert recorded.profiler is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _gathered(value: object) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def peak_memory(case: Case, rank: int, device: torch.device) -> float:
    """Return the peak memory of a rank that makes a step and runs it once; all ranks together."""

    def one() -> None:
        steps.append(MoEStep(case.model, case.plan, case.job, rank, Options(), device))
        steps[0].ranks.settles = device.type == "cpu"
        steps[0].run(tokens)

    tokens, steps = batch(case, device), []
    peak = peak_bytes(one, device)
    steps[0].close()
    return peak


def _turn(case: Case, rank: int, device: torch.device, repeats: int) -> tuple[list[float], dict[str, float], list[list[int]]]:
    """Return the repeats on the slowest rank, mean seconds by part, and the tokens of each expert of this rank's layers."""
    step = MoEStep(case.model, case.plan, case.job, rank, Options(lr=STILL), device)
    tokens, taken, parts = batch(case, device), [], defaultdict(float)
    for _ in range(WARM):
        step.run(tokens)
    step.routed()
    gpu = device.type == "cuda"
    step.recorder.ahead = gpu
    for _ in range(repeats):
        if gpu:  # the step by itself first: its kernels are recorded while the host is ahead
            step.recorder.on = False
            taken.append(max(_gathered(timed(step, tokens, device).wall_s)))
        step.recorder.on = True
        everyone = observed(step, tokens, device)
        if not gpu:
            taken.append(max(whole.wall_s for _, whole, _ in everyone))
        for times, _, _ in everyone:
            for name, spent in times.items():
                parts[part_of(name)] += spent.wall_s / repeats / len(everyone)
        if case.plan.pp == 1:  # stages do not call the same: their waiting stays with their messages
            for axis, seconds in waited([calls for *_, calls in everyone]).items():
                parts[part_of(axis)] -= seconds / repeats
                parts[WAITING] += seconds / repeats
    if gpu:  # what kernels and collectives leave of the step is waiting for the host; less than nothing is noise
        parts["host"] = sum(taken) / repeats - sum(parts.values())
    runs = 2 * repeats if gpu else repeats
    counts = [(layer / runs).long().tolist() for layer in step.routed()]
    step.close()
    return taken, dict(parts), counts


def run(rank: int, world: int, tell: Tell, cases: list[Case], kind: str, turns: int, repeats: int) -> list[Measured]:
    """Return every case as it ran: each once per turn, turn after turn."""
    device = device_of(kind, rank)
    seconds: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, dict[str, float]] = {}
    counts: dict[str, list] = {}
    peaks = {}
    for case in cases:
        peaks[case.name] = tuple(_gathered(peak_memory(case, rank, device)))
        tell("memory", len(peaks), len(cases))
    for turn in range(turns):
        for number, case in enumerate(cases):
            taken, mean, mine = _turn(case, rank, device, repeats)
            seconds[case.name] += taken
            before = parts.get(case.name, {})
            parts[case.name] = {k: before.get(k, 0.0) + mean.get(k, 0.0) / turns for k in before.keys() | mean.keys()}
            stages = _gathered(mine)
            step = world // case.plan.pp  # one rank of each stage tells its layers
            counts[case.name] = [row for first in range(0, world, step) for row in stages[first]]
            tell("steps", turn * len(cases) + number + 1, turns * len(cases))
    return [
        Measured(case, tuple(seconds[case.name]), parts[case.name], peaks[case.name], tuple(map(tuple, counts[case.name])))
        for case in cases
    ]
