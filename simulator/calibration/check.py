"""Prove a profile: run steps that it was not fitted to, predict each with the ordinary `simulate_step`, and compare.

What runs on the ranks is in `simulator.calibration.steps`; here is what is made of it. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from simulator.calibration.cases import Case, held_out
from simulator.calibration.fit import NINETY
from simulator.calibration.machine import FOREIGN, CalibrationError
from simulator.calibration.profile import MachineProfile
from simulator.results.step import StepResult
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

#: what a proof asks for: largest error of a step time, error of peak memory, fewest steps
WORST, MEMORY, STEPS = 0.20, 0.10, 8
#: mean error of step times, and the least length of a step, by device: a scheduler's ticks blur short steps on a CPU
MEAN, LEAST_S = {"cpu": 0.10, "cuda": 0.05}, {"cpu": 0.5, "cuda": 0.0}
#: the part of a step that is messages between stages, and waiting for another rank
WAITING = "pp and waiting"
#: beyond this spread of the same step a machine is too noisy to judge
SPREAD = 0.05


@dataclass(frozen=True)
class Measured:
    """One step as it ran.

    Parameters
    ----------
    case : Case
    seconds : tuple of float
        The repeats, over all turns, on the slowest rank.
    parts_s : dict
        Mean over ranks and repeats by the clock, by kind of operation as the simulator's breakdown names them. What ranks wait in a
        collective for the last one to arrive counts as waiting, in a prediction, too: there for one with more experts' tokens.
        Waiting for one whose kernels happen to be slower is in the kernels of a prediction.
    peak_bytes : tuple of float
        Largest sum of live tensors on every rank.
    counts : tuple of tuple of int
        Tokens of each expert, a row per mixture of experts.
    """

    case: Case
    seconds: tuple[float, ...]
    parts_s: dict[str, float]
    peak_bytes: tuple[float, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def step_s(self) -> float:
        """Median step."""
        return float(np.median(self.seconds))

    @property
    def noise(self) -> float:
        """Half of the interquartile range, over the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low) / 2 / self.step_s

    def routing(self) -> Routing | None:
        """Return the measured tokens per expert, as `simulate_ranks` takes them; None without experts."""
        return Routing(distribution="measured", counts=self.counts) if self.counts else None

    def load(self) -> float:
        """Return the tokens of the heaviest rank of an expert group over the mean, averaged over layers."""
        ep = self.case.plan.ep
        if ep == 1 or not self.counts:
            return 1.0
        table = np.array(self.counts, dtype=float)
        ranks = table.reshape(len(table), ep, -1).sum(axis=2)
        return float((ranks.max(axis=1) / ranks.mean(axis=1)).mean())


def predict(measured: Measured, profile: MachineProfile) -> StepResult:
    """Return the simulated step of a measured one: same model, plan and job, the profile's cluster, the measured imbalance."""
    case, load = measured.case, measured.load()
    job = case.job.model_copy(update={"routing": "natural", "expert_load": load}) if load > 1.0 else case.job
    world = case.plan.world
    if world != profile.cluster.accelerators:
        raise CalibrationError(
            f"{case.name} runs on {world} ranks, the profile {profile.name} was measured on {profile.cluster.accelerators}"
        )
    return simulate_step(Scenario(model=case.model, cluster=profile.cluster, plan=case.plan, job=job))


def agreement(one: MachineProfile, other: MachineProfile) -> pd.DataFrame:
    """Return what two profiles of a machine predict for the held-out steps, tokens spread evenly: ``case one_s other_s difference``.

    Raises
    ------
    CalibrationError
        When they were not measured on the same kind and number of devices.
    """
    if (one.about["device"], one.cluster.accelerators) != (other.about["device"], other.cluster.accelerators):
        raise CalibrationError(
            f"{one.name} is of {one.cluster.accelerators} ranks on {one.about['device']}, {other.name} of {other.cluster.accelerators} on "
            f"{other.about['device']}; compare profiles of the same"
        )
    rows = []
    for case in held_out(one.about["device"]):
        if case.plan.world == one.cluster.accelerators:
            first, second = (
                simulate_step(Scenario(model=case.model, cluster=p.cluster, plan=case.plan, job=case.job)).step_time_s for p in (one, other)
            )
            rows.append({"case": case.name, "one_s": first, "other_s": second, "difference": second / first - 1})
    if not rows:
        raise CalibrationError(f"no held-out step runs on {one.cluster.accelerators} ranks")
    return pd.DataFrame(rows)


#: parts that are kernels; what has no name of its own is bandwidth-bound
KERNELS = ("gemm", "grouped_gemm", "attention", "optimizer", "memory")


def part_of(name: str) -> str:
    """Return the part of the simulator's breakdown that a recorded name belongs to."""
    head = name.split(".")[0]
    if head in ("tp", "ep", "pp", "dp", "edp", "world"):
        return {"edp": "dp", "world": "dp", "pp": WAITING}.get(head, head)
    return head if head in KERNELS else "memory"


def predicted_parts(result: StepResult) -> dict[str, float]:
    """Return the simulator's breakdown by the same parts; waiting of a pipeline counts with its messages."""
    found: dict[str, float] = {}
    for row in result.breakdown().itertuples():
        name = str(row.part).split(": ")[-1]
        name = WAITING if name in ("pp", "idle") else name
        found[name] = found.get(name, 0.0) + float(row.seconds)
    return found


def half_width(result: StepResult, profile: MachineProfile, noise: float) -> float:
    """Return half of the 90 % interval of a predicted step, relative: residuals of the fits, weighted by their parts, and noise."""
    sigma: dict[str, list[float]] = {}
    for name, residual in profile.residuals().items():
        kind = name.split(".")[0]
        part = part_of(name) if kind not in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send") else "communication"
        sigma.setdefault(part, []).append(residual)
    parts, variance = predicted_parts(result), noise**2
    for part, seconds in parts.items():
        key = "communication" if part in ("tp", "ep", "dp", WAITING) else part
        if key in sigma:
            variance += (float(np.mean(sigma[key])) * seconds / result.step_time_s) ** 2
    return NINETY * float(np.sqrt(variance))


@dataclass(frozen=True)
class Proof:
    """Measured against predicted.

    Parameters
    ----------
    steps : DataFrame
        One row per step: ``case``, ``measured_s``, ``noise``, ``predicted_s``, ``error``, ``low_s``, ``high_s``,
        ``measured_memory_bytes``, ``predicted_memory_bytes``, ``memory_error``, ``expert_load``.
    parts : DataFrame
        One row per step and kind of operation: ``case``, ``part``, ``measured_s``, ``predicted_s``, ``error``.
    pairs : int
        Pairs of steps that differ by more than twice their noise.
    wrong_order : tuple of tuple of str
        Those of them that the predictions put the other way round.
    foreign_share : float or None
    problems : tuple of str
        What is missing to a proof, in words; empty when it is one.
    noisy : tuple of str
        Why the machine cannot be judged on; empty when it was quiet.
    counts : dict
        Tokens per expert of every step.
    """

    steps: pd.DataFrame
    parts: pd.DataFrame
    pairs: int
    wrong_order: tuple[tuple[str, str], ...]
    foreign_share: float | None
    problems: tuple[str, ...]
    noisy: tuple[str, ...]
    counts: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def verdict(self) -> str:
        """``proved``, ``not proved``, or ``too noisy to judge``."""
        return "too noisy to judge" if self.noisy else "not proved" if self.problems else "proved"

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error of the step times."""
        return float(self.steps["error"].abs().mean())

    @property
    def worst_error(self) -> float:
        """Largest absolute relative error of a step time."""
        return float(self.steps["error"].abs().max())

    def summary(self) -> dict[str, Any]:
        """Return the figures, JSON-ready."""
        return {
            "verdict": self.verdict,
            "steps": len(self.steps),
            "mean_absolute_error": self.mean_error,
            "worst_absolute_error": self.worst_error,
            "worst_memory_error": float(self.steps["memory_error"].abs().max()),
            "pairs": self.pairs,
            "wrong_order": [list(pair) for pair in self.wrong_order],
            "foreign_share": self.foreign_share,
            "noise": float(self.steps["noise"].median()),
            "problems": list(self.problems),
            "noisy": list(self.noisy),
        }


def _order(steps: pd.DataFrame) -> tuple[int, tuple[tuple[str, str], ...]]:
    pairs, wrong = 0, []
    for one, other in combinations(steps.to_dict("records"), 2):
        noise = 2 * (one["noise"] * one["measured_s"] + other["noise"] * other["measured_s"]) / 2
        if abs(one["measured_s"] - other["measured_s"]) > 2 * noise:
            pairs += 1
            if (one["measured_s"] < other["measured_s"]) != (one["predicted_s"] < other["predicted_s"]):
                wrong.append((one["case"], other["case"]))
    return pairs, tuple(wrong)


def compare(measured: Sequence[Measured], profile: MachineProfile, foreign: float | None) -> Proof:
    """Return what `measured` steps say about `profile`."""
    rows, parts = [], []
    for m in measured:
        result = predict(m, profile)
        predicted, width = result.step_time_s, half_width(result, profile, m.noise)
        memory, peak = result.peak_memory_bytes, max(m.peak_bytes)
        rows.append(
            {
                "case": m.case.name, "model": m.case.model.name, "plan": str(m.case.plan), "measured_s": m.step_s, "noise": m.noise,
                "predicted_s": predicted, "error": predicted / m.step_s - 1, "low_s": predicted * (1 - width),
                "high_s": predicted * (1 + width), "measured_memory_bytes": peak, "predicted_memory_bytes": memory,
                "memory_error": memory / peak - 1, "expert_load": m.load(),
            }
        )  # fmt: skip
        ours = predicted_parts(result)
        for part in sorted(m.parts_s.keys() | ours.keys()):
            seen, said = m.parts_s.get(part, 0.0), ours.get(part, 0.0)
            parts.append(
                {"case": m.case.name, "part": part, "measured_s": seen, "predicted_s": said, "error": said / seen - 1 if seen else None}
            )
    steps = pd.DataFrame(rows)
    pairs, wrong = _order(steps)
    noisy = _noise(steps, foreign)
    problems, counts = _problems(steps, wrong, profile.about["device"]), {m.case.name: m.counts for m in measured}
    return Proof(steps, pd.DataFrame(parts), pairs, wrong, foreign, problems, noisy, counts)


def _noise(steps: pd.DataFrame, foreign: float | None) -> tuple[str, ...]:
    found = []
    if foreign is not None and foreign > FOREIGN:
        found.append(f"other processes took {foreign:.0%} of the cores during the check; at most {FOREIGN:.0%} can be judged: stop them")
    if (middle := float(steps["noise"].median())) > SPREAD:
        found.append(f"the same step varies by +-{middle:.0%}; at most {SPREAD:.0%} can be judged")
    return tuple(found)


def _problems(steps: pd.DataFrame, wrong: tuple[tuple[str, str], ...], device: str) -> tuple[str, ...]:
    found = []
    mean, worst, memory = steps["error"].abs().mean(), steps["error"].abs().max(), steps["memory_error"].abs().max()
    long = int((steps["measured_s"] >= LEAST_S[device]).sum())
    if long < STEPS:
        found.append(f"{long} steps of {LEAST_S[device]} s or more; a proof takes {STEPS}")
    if mean > MEAN[device]:
        found.append(f"mean error {mean:.1%} is above {MEAN[device]:.0%}")
    if worst > WORST:
        found.append(f"largest error {worst:.1%} is above {WORST:.0%}")
    if memory > MEMORY:
        found.append(f"largest error of peak memory {memory:.1%} is above {MEMORY:.0%}")
    if wrong:
        found.append(f"order of {len(wrong)} pairs is wrong: " + ", ".join(f"{a} and {b}" for a, b in wrong))
    return tuple(found)


Progress = Callable[[str, int, int], None]
