"""What any simulated step means beside its seconds: rates, utilisation, memory, money, and what the numbers rest on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from simulator.feasibility import memory
from simulator.pricing.compute import peak_flop_per_s
from simulator.results.confidence import Interval, interval
from simulator.results.energy import carbon_kg, energy_kwh
from simulator.scenario.cluster import Cluster
from simulator.scenario.plan import RESERVE_SOURCES, Reserve
from simulator.scenario.scenario import Scenario
from simulator.schedules import actions, schedule
from simulator.units import Number
from simulator.workload.flop import count, hardware_flop
from simulator.workload.memory import PARTS
from simulator.workload.stages import stage_blocks


class Outcome(ABC):
    """One optimizer step of `scenario`, however it was simulated."""

    scenario: Scenario
    #: mechanisms that a real step has and this one does not
    not_modelled: ClassVar[Sequence[str]] = ()
    #: which of the three levels the seconds came from
    level: str = "simulate"

    @property
    @abstractmethod
    def step_time_s(self) -> float:
        """Seconds from the first to the last operation of the step."""

    @abstractmethod
    def breakdown(self) -> pd.DataFrame:
        """Return where the step goes, as means over ranks: ``part``, ``seconds``, ``share``, ``hidden_s``."""

    @property
    def tokens_per_s_per_accelerator(self) -> float:
        """Tokens trained on per second and accelerator."""
        return self.scenario.job.tokens_per_step / self.step_time_s / self.scenario.cluster.accelerators

    def _utilisation(self, flop_per_token: float) -> float:
        peak = peak_flop_per_s(self.scenario.cluster.accelerator, "bf16")
        return flop_per_token * self.tokens_per_s_per_accelerator / peak

    @property
    def mfu_6n(self) -> float:
        """Share of the dense bf16 peak by ``6 * active parameters`` FLOP per token, embeddings counted, attention not."""
        return self._utilisation(count(self.scenario.model, self.scenario.job.sequence_length).flop_per_token_6n)

    @property
    def mfu_causal(self) -> float:
        """Share of the dense bf16 peak by model FLOP, attention over the keys that the causal mask leaves."""
        return self._utilisation(count(self.scenario.model, self.scenario.job.sequence_length).flop_per_token_causal)

    @property
    def mfu_noncausal(self) -> float:
        """Share of the dense bf16 peak by model FLOP, attention over all keys (Megatron-LM's formula)."""
        return self._utilisation(count(self.scenario.model, self.scenario.job.sequence_length).flop_per_token_noncausal)

    @property
    def hfu(self) -> float:
        """Share of the dense bf16 peak by FLOP really executed, recompute included."""
        s = self.scenario
        names = [name for stage in stage_blocks(s.model, s.plan, s.job) for name in stage]
        per_micro_batch = hardware_flop(s.model, s.plan, s.job, names) * s.plan.tp * s.plan.cp
        return self._utilisation(per_micro_batch / (s.plan.micro_batch * s.job.sequence_length))

    @property
    def tflop_per_s_per_accelerator(self) -> float:
        """Causal model TFLOP/s per accelerator."""
        return self.mfu_causal * peak_flop_per_s(self.scenario.cluster.accelerator, "bf16") / 1e12

    def memory(self) -> pd.DataFrame:
        """Return peak bytes per pipeline stage: one row per stage, a column per part, ``total_bytes`` and ``capacity_bytes``."""
        parts = self._memory()
        table = pd.DataFrame({f"{name}_bytes": np.asarray(parts[name], dtype=float) for name in (*PARTS, "total")})
        table["capacity_bytes"] = self.scenario.cluster.accelerator.hbm_bytes
        table.insert(0, "stage", range(len(table)))
        return table

    def _memory(self) -> dict[str, Any]:
        return memory(self.scenario)

    @property
    def peak_memory_bytes(self) -> float:
        """Bytes on the fullest stage."""
        return float(self.memory()["total_bytes"].max())

    @property
    def training_days(self) -> float:
        """Days that all tokens of the job take, without interruptions."""
        return self.scenario.job.steps * self.step_time_s / 86400

    @property
    def accelerator_hours(self) -> float:
        """Accelerator-hours of the job."""
        return self.training_days * 24 * self.scenario.cluster.accelerators

    @property
    def cost_usd(self) -> float:
        """Rent of the accelerators for the job, at the cluster's dated price."""
        return self.accelerator_hours * self.scenario.cluster.price_usd_per_accelerator_hour

    @property
    def energy_kwh(self) -> float:
        """Energy of accelerators, hosts and building for the job, kWh: see `simulator.results.energy`."""
        return energy_kwh(self.scenario.cluster, self.accelerator_hours)

    @property
    def carbon_kg(self) -> float:
        """Carbon dioxide equivalent of that energy, kg."""
        return carbon_kg(self.energy_kwh)

    def sources(self) -> pd.DataFrame:
        """Return every fact that the answer rests on: profile, fact, value (SI), grade, source, date."""
        return sources(self.scenario)

    def interval(self) -> Interval:
        """Return the 80 % interval of the step from the errors on published runs, and the runs that it is close to.

        Notes
        -----
        The software release is not known; the errors are those of the closed form, which aims at this simulation.
        """
        return interval(self.scenario, self.step_time_s)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the step, JSON-ready, with stable keys."""
        stages, around = self.memory()["total_bytes"].tolist(), self.interval()
        return {
            "step_time_s": self.step_time_s,
            "step_time_interval_80_s": [around.low_s, around.high_s],
            "inside_validated_range": around.inside,
            "comparable_runs": around.comparable["id"].tolist(),
            "tokens_per_s_per_accelerator": self.tokens_per_s_per_accelerator,
            "mfu_6n": self.mfu_6n,
            "mfu_causal": self.mfu_causal,
            "mfu_noncausal": self.mfu_noncausal,
            "hfu": self.hfu,
            "tflop_per_s_per_accelerator": self.tflop_per_s_per_accelerator,
            "peak_memory_bytes": max(stages),
            "memory_bytes_per_stage": stages,
            "training_days": self.training_days,
            "accelerator_hours": self.accelerator_hours,
            "cost_usd": self.cost_usd,
            "energy_kwh": self.energy_kwh,
            "carbon_kg": self.carbon_kg,
            "level": self.level,
            "not_modelled": list(self.not_modelled),
            "problems": [],
        }


def divided(scenario: Scenario, rank: int, begin: Mapping[str, Number], end: Mapping[str, Number], step_time_s: float) -> dict[str, Number]:
    """Return how long the row of a pipeline rank spends in each phase, and waits; from when its actions begin and end.

    Parameters
    ----------
    begin, end : mapping of str to Number
        By action, seconds; of one rank, or of many that hold the same stages.
    """
    names = {"F": "forward_s", "B": "backward_s", "I": "input_s", "W": "weight_s", "pair": "pair_s"}
    plan = scenario.plan
    found: dict[str, Number] = dict.fromkeys(names.values(), 0.0)
    last: Number = 0.0
    for entry in schedule(plan.schedule, plan.pp, plan.vpp, scenario.micro_batches, plan.table).table[rank]:
        parts = [str(action) for action in actions((entry,))]
        last = reduce(np.maximum, [end[part] for part in parts])
        name = names["pair" if len(parts) > 1 else parts[0].strip("0123456789")]
        found[name] = found[name] + last - reduce(np.minimum, [begin[part] for part in parts])
    found["optimizer_s"] = step_time_s - last
    found["bubble_s"] = np.maximum(step_time_s - sum(found.values()), 0.0)  # rounding can leave -1e-16
    return found


def sources(of: Scenario | Cluster) -> pd.DataFrame:
    """Return every fact that an answer about a scenario or a cluster rests on: profile, fact, value (SI), grade, source, date."""
    if isinstance(of, Cluster):
        return pd.DataFrame(of.provenance())
    scenario, rows = of, of.cluster.provenance()
    model = scenario.model
    dimensions = [(k, v) for k, v in model.model_dump().items() if isinstance(v, int) and not isinstance(v, bool) and v]
    rows += [
        {"profile": model.name, "fact": k, "value": float(v), "grade": "published", "source": model.source, "date": None}
        for k, v in dimensions
    ]
    for name, (grade, source) in RESERVE_SOURCES.items():
        value = float(getattr(scenario.plan.reserve, name))
        own = value != float(getattr(Reserve(), name))
        row = {"profile": "plan", "fact": f"reserve.{name}", "value": value, "grade": "assumed" if own else grade}
        rows.append(row | {"source": "the scenario" if own else source, "date": None})
    if scenario.job.routing == "natural":
        text = "heaviest expert rank over the mean; published forced and natural routing differ by 8 to 20 % of the step"
        rows.append(
            {"profile": "job", "fact": "expert_load", "value": scenario.job.expert_load, "grade": "assumed", "source": text, "date": None}
        )
    return pd.DataFrame(rows)


def facts_by_grade(table: pd.DataFrame) -> str:
    """Return e.g. ``37 facts: 12 datasheet, 17 published, 8 assumed``."""
    counts = table["grade"].value_counts()
    order = [g for g in ("measured", "datasheet", "published", "fitted", "assumed") if g in counts]
    return f"{len(table)} facts: " + ", ".join(f"{counts[g]} {g}" for g in order)
