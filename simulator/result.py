"""What a simulated step means: times, rates, utilisation, memory, money, and what the numbers rest on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from simulator.compute import peak_flop_per_s
from simulator.feasibility import memory
from simulator.network.sharing import Share
from simulator.scenario.cluster import Cluster
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, actions, schedule
from simulator.timeline import Timeline
from simulator.workload.flop import count, hardware_flop
from simulator.workload.memory import PARTS
from simulator.workload.stages import blocks, stage_blocks

#: mechanisms that a real step has and this one does not
NOT_MODELLED = (
    "failures, restarts and checkpoints (training days are of uninterrupted steps)",
    "overlap of expert all-to-all with compute outside pairs of forward and backward",
    "overlap of tensor-parallel collectives with anything but gradients",
    "contention between different collectives on one link",
    "jitter and clock or power limits",
    "input pipeline and logging",
)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of `scenario`, simulated event by event.

    Parameters
    ----------
    scenario : Scenario
    timeline : Timeline
        Every span of every class of ranks.
    compute_parts_s : dict
        Mean seconds per rank on the compute stream, by kind of kernel.
    shares : dict
        What sharing leaves each (axis, kind) of collective that crosses the network.
    """

    scenario: Scenario
    timeline: Timeline
    compute_parts_s: dict[str, float] = field(repr=False)
    shares: dict[tuple[str, str], Share] = field(default_factory=dict, repr=False)

    @cached_property
    def step_time_s(self) -> float:
        """Seconds from the first to the last operation of the step."""
        return self.timeline.makespan_s

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

    def breakdown(self) -> pd.DataFrame:
        """Return where the step goes, as means over ranks.

        Returns
        -------
        DataFrame
            Columns ``part``, ``seconds``, ``share``, ``hidden_s``: kernels by kind, communication that nothing hides by
            stream, idle time (pipeline bubble and waiting). Seconds add up to the step; ``hidden_s`` runs beside compute.
        """
        spent = self.timeline.exposed()
        weight = spent["ranks"] / spent["ranks"].sum()
        kernels = sum(self.compute_parts_s.values())
        rows = [(f"compute: {part}", seconds, 0.0) for part, seconds in self.compute_parts_s.items()]
        for stream in ("tp", "cp", "ep", "pp", "dp"):
            exposed, hidden = (float((spent[f"{stream}_{how}_s"] * weight).sum()) for how in ("exposed", "hidden"))
            if exposed or hidden:
                rows.append((f"exposed: {stream}", exposed, hidden))
        idle = self.step_time_s - kernels - sum(r[1] for r in rows[len(self.compute_parts_s) :])
        rows.append(("idle", max(idle, 0.0), 0.0))  # rounding can leave -1e-16
        table = pd.DataFrame(rows, columns=["part", "seconds", "hidden_s"])
        table.insert(2, "share", table["seconds"] / self.step_time_s)
        return table

    def network(self) -> pd.DataFrame:
        """Return what each kind of collective keeps of its NICs while all of its groups communicate.

        Returns
        -------
        DataFrame
            One row per axis and kind that leaves a scale-up domain: ``flows`` between domains, the highest ``tier`` that they
            reach, ``nic_share`` of the rate that the slowest member keeps, ``slowdown`` by sharing with other groups, and the
            ``hottest`` link with the share of it in use (``load``).
        """
        tiers = self.scenario.cluster.fabric.tiers
        rows = [
            (axis, kind, s.flows, tiers[min(s.level, len(tiers) - 1)].name, s.rate, s.slowdown, *(s.hottest[0] if s.hottest else ("", 0.0)))
            for (axis, kind), s in self.shares.items()
        ]
        return pd.DataFrame(rows, columns=["axis", "kind", "flows", "tier", "nic_share", "slowdown", "hottest", "load"])

    def _order(self) -> Schedule:
        plan, job = self.scenario.plan, self.scenario.job
        return schedule(plan.schedule, plan.pp, plan.vpp, job.global_batch // (plan.dp * plan.micro_batch), plan.table)

    def _action_times(self) -> tuple[dict, dict]:
        """Return when each (class, action) begins and ends, messages and data-parallel collectives aside."""
        spans = self.timeline.table()
        spans = spans[(spans["action"] != "") & ~spans["stream"].isin(("pp", "dp"))].groupby(["rank_class", "action"])
        return spans["start_s"].min().to_dict(), spans["end_s"].max().to_dict()

    def activations_over_time(self) -> pd.DataFrame:
        """Return the activations that each class of ranks holds, from one change to the next.

        Returns
        -------
        DataFrame
            ``rank_class``, ``stage``, ``time_s``, ``activations_bytes`` from that time on. A forward takes what its blocks
            save, a backward gives it back; an input gradient gives back what the weight gradient does not need. What is
            computed again lives within one block and is not drawn; `memory` adds it.
        """
        s, order = self.scenario, self._order()
        all_blocks, stages = blocks(s.model, s.plan, s.job), stage_blocks(s.model, s.plan, s.job)
        saved, rest = ([sum(float(getattr(all_blocks[n], f)) for n in names) for names in stages] for f in ("saved_bytes", "weight_bytes"))
        rest = [min(both) for both in zip(saved, rest, strict=True)]
        begin, end = self._action_times()
        stage, tables = dict(zip(self.timeline.rank_class.tolist(), self.timeline.stage.tolist(), strict=True)), []
        for c in range(len(self.timeline.ranks)):
            changes = [(0.0, 0.0)]
            for action in actions(order.table[stage[c]]):
                part, key = order.held[stage[c]][action.chunk], (c, str(action))
                given = {"F": saved[part], "B": -saved[part], "I": rest[part] - saved[part], "W": -rest[part]}[action.kind]
                changes.append(((begin if action.kind == "F" else end)[key], given))
            time, given = np.array(sorted(changes)).T  # given back before taken at the same moment
            table = pd.DataFrame({"rank_class": c, "stage": stage[c], "time_s": time, "activations_bytes": np.cumsum(given)})
            tables.append(table.groupby("time_s", sort=True).last().reset_index()[table.columns])
        return pd.concat(tables, ignore_index=True)

    def phases(self) -> pd.DataFrame:
        """Return how each class of ranks spends the step, as profilers of pipelines divide it.

        Returns
        -------
        DataFrame
            One row per class: ``stage``, ``ranks``, seconds of forwards, whole backwards, input gradients and weight gradients
            on their own (``forward_s``, ``backward_s``, ``input_s``, ``weight_s``), of pairs (``pair_s``), of what follows the
            last of them until all ranks are done (``optimizer_s``: reduction, norm, optimizer, gather and their waiting) and
            of waiting before and between them (``bubble_s``). They add up to the step; communication of a forward or
            backward is part of it.
        """
        order, stage = self._order(), dict(zip(self.timeline.rank_class.tolist(), self.timeline.stage.tolist(), strict=True))
        begin, end = self._action_times()
        names = {"F": "forward_s", "B": "backward_s", "I": "input_s", "W": "weight_s", "pair": "pair_s"}
        rows = []
        for c, ranks in enumerate(self.timeline.ranks.tolist()):
            row, last = dict.fromkeys(names.values(), 0.0), 0.0
            for entry in order.table[stage[c]]:
                parts = [(c, str(action)) for action in actions((entry,))]
                last = max(end[part] for part in parts)
                row[names["pair" if len(parts) > 1 else parts[0][1].strip("0123456789")]] += last - min(begin[part] for part in parts)
            row["optimizer_s"] = self.step_time_s - last
            row["bubble_s"] = max(self.step_time_s - sum(row.values()), 0.0)  # rounding can leave -1e-16
            rows.append({"rank_class": c, "stage": stage[c], "ranks": ranks} | row)
        return pd.DataFrame(rows)

    def memory(self) -> pd.DataFrame:
        """Return peak bytes per pipeline stage: one row per stage, a column per part, ``total_bytes`` and ``capacity_bytes``."""
        parts = memory(self.scenario)
        table = pd.DataFrame({f"{name}_bytes": np.asarray(parts[name], dtype=float) for name in (*PARTS, "total")})
        table["capacity_bytes"] = self.scenario.cluster.accelerator.hbm_bytes
        table.insert(0, "stage", range(len(table)))
        return table

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

    def sources(self) -> pd.DataFrame:
        """Return every fact that the answer rests on: profile, fact, value (SI), grade, source, date."""
        return sources(self.scenario)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the step, JSON-ready, with stable keys."""
        stages = self.memory()["total_bytes"].tolist()
        return {
            "step_time_s": self.step_time_s,
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
            "level": "simulate",
            "not_modelled": list(NOT_MODELLED),
            "problems": [],
        }


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
    reserve = scenario.plan.reserve
    rows += [
        {
            "profile": "plan", "fact": f"reserve.{name}", "value": float(getattr(reserve, name)), "grade": "assumed",
            "source": "memory that no tensor explains; measure it on your software stack", "date": None,
        }
        for name in ("context", "communication", "fragmentation")
    ]  # fmt: skip
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
