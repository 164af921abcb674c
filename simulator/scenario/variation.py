"""What sets ranks and micro-batches apart from one another: jitter, slow hosts, throttling, uneven sequences. Seeded."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, field_validator

from simulator.errors import PlanError, Problem
from simulator.scenario.facts import Frozen

#: default -> value, grade and source
_SOURCES = {
    "jitter": (
        0.02,
        "assumed",
        "spread of one kernel's time at steady clocks; no fleet has published it per kernel. ByteDance's steps vary by 6 % "
        "between median and p90 of a job (Lin et al., OSDI 2025), which holds everything else too",
    ),
    "slow_host_slowdown": (
        1.10,
        "published",
        "Jiang et al., MegaScale, NSDI 2024: 0.5 % of the machines took about 10 % longer; slow_host_share = 0.005 asks for them",
    ),
    "throttled_slowdown": (
        1.08,
        "published",
        "Sinha et al., Not All GPUs Are Created Equal, SC 2022: equal GPUs differ by 8 % on average and 22 % at most under power "
        "and thermal management, outliers by 1.5 times",
    ),
}


class Variation(Frozen):
    """How ranks and micro-batches differ. Everything but jitter is off until its share or spread is given.

    Parameters
    ----------
    seed : int
        The same seed draws the same numbers, to the byte; seeds are independent of each other.
    jitter : float
        Sigma of the log-normal factor, mean 1, on every kernel of every rank. Default 0.02, assumed: no fleet has published
        it per kernel.
    slow_host_share : float
        Probability that a host is slow. Default 0; MegaScale found 0.005 (Jiang et al., NSDI 2024, published).
    slow_host_slowdown : float
        How many times as long its kernels take. Default 1.10 (the same, published).
    throttled_share : float
        Probability that an accelerator is throttled by heat or power. Default 0.
    throttled_slowdown : float
        How many times as long its kernels take. Default 1.08, the mean spread of equal GPUs (Sinha et al., "Not All GPUs
        Are Created Equal", SC 2022, published: 22 % at most, outliers 1.5 times). Llama 3 lost 1 to 2 % of its throughput to
        the midday heat (Grattafiori et al., 2024).
    sequence_spread : float
        Sigma of the log-normal spread of tokens over micro-batches. Default 0: packed to equal length. Uneven sequences were
        behind 21.4 % of ByteDance's straggling jobs, slower by 1.34 on average (Lin et al., "Understanding Stragglers in Large
        Model Training Using What-if Analysis", OSDI 2025).

    last_stage_slowdown : float
        How many times as long the kernels of the last pipeline rank take. Default 1: the head and the loss are priced where they
        stand; what a stack adds there (loss reporting, evaluation of metrics, a poor split of the layers) is for the user to say.

    Notes
    -----
    A log-normal factor with mean 1 is ``exp(sigma z - sigma^2 / 2)``, z standard normal.
    """

    seed: int = Field(default=0, ge=0)
    jitter: float = _SOURCES["jitter"][0]
    slow_host_share: float = 0.0
    slow_host_slowdown: float = _SOURCES["slow_host_slowdown"][0]
    throttled_share: float = 0.0
    throttled_slowdown: float = _SOURCES["throttled_slowdown"][0]
    sequence_spread: float = 0.0
    last_stage_slowdown: float = 1.0

    @field_validator("slow_host_slowdown", "throttled_slowdown", "last_stage_slowdown")
    @classmethod
    def _slower_not_faster(cls, value: float) -> float:
        if value < 1:
            raise ValueError(f"{value:g}: what is slow takes 1 or more times as long; write 1.1 for 10 % slower")
        return value

    @field_validator("slow_host_share", "throttled_share")
    @classmethod
    def _shares(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"{value:g} is not a share between 0 and 1; write 0.005 for 0.5 %")
        return value

    @field_validator("jitter", "sequence_spread")
    @classmethod
    def _spreads(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"{value:g} is not a sigma between 0 and 1; write 0.02 for 2 %")
        return value

    def random(self, what: str) -> np.random.Generator:
        """Return the random numbers of one purpose, independent of those of any other."""
        return np.random.default_rng([self.seed, *what.encode()])

    def slowdown(self, accelerators: int, per_host: int) -> np.ndarray:
        """Return how many times as long the kernels of each accelerator take: slow host times throttled.

        Parameters
        ----------
        accelerators, per_host : int
            Accelerators in use, filling one host after the other.
        """
        hosts = -(-accelerators // per_host)
        slow = np.where(self.random("slow hosts").random(hosts) < self.slow_host_share, self.slow_host_slowdown, 1.0)
        hot = np.where(self.random("throttled").random(accelerators) < self.throttled_share, self.throttled_slowdown, 1.0)
        return np.repeat(slow, per_host)[:accelerators] * hot

    def tokens(self, micro_batches: int, replicas: int, mean: int, unit: int) -> np.ndarray:
        """Return the tokens of each micro-batch of each data-parallel replica.

        Parameters
        ----------
        micro_batches, replicas : int
        mean : int
            Tokens per micro-batch when all are even.
        unit : int
            Ranks that a micro-batch is divided over; every count is a positive multiple of it.

        Returns
        -------
        ndarray of int, shape (micro_batches, replicas)
            Adds up to ``micro_batches * replicas * mean``: whole units by largest remainder.

        Raises
        ------
        PlanError
            When `mean` is not a multiple of `unit`.
        """
        if mean % unit:
            numbers = f"{mean} tokens of a micro-batch do not divide over its {unit} ranks"
            raise PlanError([Problem("tokens divide over the ranks of a micro-batch", numbers, f"use a multiple of {unit}")])
        count = micro_batches * replicas
        weight = np.exp(self.sequence_spread * self.random("sequences").standard_normal(count))
        spare = count * (mean // unit - 1)  # everyone has one unit
        quota = weight / weight.sum() * spare
        whole = np.floor(quota).astype(np.int64)
        missing = spare - int(whole.sum())
        whole[np.argsort(whole - quota, kind="stable")[:missing]] += 1
        return ((whole + 1) * unit).reshape(micro_batches, replicas)

    def provenance(self) -> list[dict[str, Any]]:
        """Return one row per number of what is switched on: profile, fact, value, grade, source, date."""
        on = {
            "jitter": self.jitter > 0,
            "slow_host_slowdown": self.slow_host_share > 0,
            "throttled_slowdown": self.throttled_share > 0,
        }
        rows = []
        for fact, (default, grade, source) in _SOURCES.items():
            value = getattr(self, fact)
            if on[fact]:
                given = (grade, source) if value == default else ("assumed", "given by the user in place of the shipped default")
                rows.append({"profile": "variation", "fact": fact, "value": value, "grade": given[0], "source": given[1], "date": None})
        return rows
