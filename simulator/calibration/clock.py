"""Run a step on all ranks at once and time it: what measurements and proofs share."""

from __future__ import annotations

import statistics

import torch
import torch.distributed as dist

from simulator.calibration.cases import Case
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.recorder import Spent, now

#: learning rate of measured steps: so small that the router's choices stay, because a CPU library prepares itself anew for every
#: new number of rows, which no cost over FLOP and bytes can tell
STILL = 1e-7


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the median, and the interquartile range over it."""
    if len(values) < 2:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / middle if middle else 0.0


def wait(device: torch.device) -> None:
    """Return when the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: MoEStep, tokens: torch.Tensor, device: torch.device) -> Spent:
    """Run one step that all ranks begin together, and return what it took on this one."""
    wait(device)
    dist.barrier()
    begin = now()
    step.run(tokens)
    wait(device)
    return now().less(begin)


def batch(case: Case, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return the tokens of a global batch, all ranks the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(case.model.vocab, (case.job.global_batch, case.job.sequence_length + 1), generator=generator).to(device)
