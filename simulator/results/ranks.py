"""What a replay of every rank means: who is slow, who waits, what decides the step, and how it varies over seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from simulator.engine.order import RankProgram
from simulator.engine.ranks import Replay, critical_path, replay_ranks
from simulator.engine.timeline import ASIDE
from simulator.expert_memory import RankActivations, memory_per_rank
from simulator.pricing.durations import RankDurations
from simulator.results.outcome import Outcome, divided
from simulator.scenario.mesh import accelerator_of
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.workload.step import StepProgram

#: mechanisms that a real step has and a replay of every rank has not
NOT_MODELLED = (
    "failures, restarts and checkpoints (training days are of uninterrupted steps)",
    "rates that change while an operation runs: overlap and sharing are factors found beforehand",
    "overlap of expert all-to-all with compute outside pairs of forward and backward",
    "contention between different kinds of collectives on one link",
    "input pipeline and logging",
)


@dataclass(frozen=True)
class RanksResult(Outcome):
    """One optimizer step of `scenario` on every rank, each with its own durations.

    Parameters
    ----------
    scenario : Scenario
    variation : Variation
        Its seed is that of the tables; further seeds count up from it.
    routing : Routing or None
    step_times_s : ndarray of shape (seeds,)
        Seconds of the step for each seed, the one of the tables first.
    dropped_share : float
        Share of the tokens that experts over their capacity dropped.
    """

    scenario: Scenario
    variation: Variation
    routing: Routing | None
    step_times_s: np.ndarray
    dropped_share: float
    program: StepProgram = field(repr=False)
    order: RankProgram = field(repr=False)
    durations: RankDurations = field(repr=False)
    replay: Replay = field(repr=False)
    not_modelled = NOT_MODELLED

    @property
    def step_time_s(self) -> float:
        """Seconds until the last rank is done."""
        return float(self.step_times_s[0])

    def breakdown(self) -> pd.DataFrame:
        """Return where the step goes, as means over ranks.

        Returns
        -------
        DataFrame
            ``part``, ``seconds``, ``share``, ``hidden_s``: kernels and their wait for the host that launches them, collectives
            that kernels waited for while they were under way, waiting (for slower members of a group, for other stages, for
            messages, for the end). Seconds add up to the step; what is hidden ran beside compute or waiting.
        """
        mean = self._table[["compute_s", "host_s", "exposed_s", "wait_s"]].mean()
        hidden = max(float(self.replay.collective_s.mean() - mean["exposed_s"]), 0.0)  # of two at once only the longer is exposed
        compute = mean["compute_s"] + mean["host_s"]
        rows = [("compute", compute, 0.0), ("exposed: collectives", mean["exposed_s"], hidden), ("idle", mean["wait_s"], 0.0)]
        table = pd.DataFrame(rows, columns=["part", "seconds", "hidden_s"])
        table.insert(2, "share", table["seconds"] / self.step_time_s)
        return table

    def sources(self) -> pd.DataFrame:
        """Return every fact that the answer rests on, those of the variation included."""
        return pd.concat([super().sources(), pd.DataFrame(self.variation.provenance())], ignore_index=True)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the step with its spread over seeds and its slowest ranks, JSON-ready, with stable keys."""
        return super().summary() | {
            "distribution": self.distribution().to_dict("records")[0],
            "slowest": self.slowest().to_dict("records"),
            "dropped_share": self.dropped_share,
        }

    @cached_property
    def _host(self) -> np.ndarray:
        per_host = self.scenario.cluster.host.accelerators
        return accelerator_of(self.scenario.plan, per_host) // per_host

    @cached_property
    def _table(self) -> pd.DataFrame:
        replay, stages = self.replay, self.order.stages
        rank = np.arange(replay.end_s.size)
        table = pd.DataFrame(
            {
                "rank": rank,
                "stage": np.repeat(np.arange(stages), self.order.ranks),
                "host": self._host[rank],
                "slowdown": self.durations.uneven.slowdown.ravel(),
                "compute_s": replay.compute_s.ravel(),
                "host_s": replay.host_s.ravel(),
                "exposed_s": replay.exposed_s.ravel(),
                "end_s": replay.end_s.ravel(),
            }
        )
        table.insert(7, "wait_s", self.step_time_s - table["compute_s"] - table["host_s"] - table["exposed_s"])
        table["over_stage"] = (replay.compute_s / np.median(replay.compute_s, axis=1, keepdims=True)).ravel()
        return table

    def table(self) -> pd.DataFrame:
        """Return how each rank spends the step.

        Returns
        -------
        DataFrame
            One row per rank: ``stage``, ``host``, ``slowdown`` (factor on its kernels, jitter apart), ``compute_s``,
            ``host_s`` (what kernels of pairs waited for the host that launches them; outside pairs it is in ``compute_s``),
            ``exposed_s`` (communication under way that compute waited for), ``wait_s`` (for slower members of its groups, for
            other stages, for the end), ``end_s`` of its last operation, ``over_stage`` (compute over the median of its stage).
            Compute, host, exposed and wait add up to the step.
        """
        return self._table.copy()

    def phases(self) -> pd.DataFrame:
        """Return how each rank spends the step, as profilers of pipelines divide it; replays the step to find it.

        Returns
        -------
        DataFrame
            One row per rank: ``rank``, ``stage``, and the seconds of `StepResult.phases`. What a rank waits for inside an action,
            as for slower members of its groups, is part of the action.
        """
        (begin, end), tables = self._action_times, []
        for stage in range(self.order.stages):
            row = divided(self.scenario, stage, begin[stage], end[stage], self.step_time_s)
            ranks = np.arange(self.order.ranks) + stage * self.order.ranks
            tables.append(pd.DataFrame({"rank": ranks, "stage": stage} | row))
        return pd.concat(tables, ignore_index=True)

    @cached_property
    def _action_times(self) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
        """When the actions of each stage begin and end, one time per rank; replays the step to find it."""
        kept = replay_ranks(self.order, self.durations, keep=True)
        assert kept.ends is not None
        begin, end = ([{} for _ in range(self.order.stages)] for _ in range(2))
        for node, action in enumerate(self.program.label):
            if action is None or self.program.tasks[self.program.task[node]].stream in ASIDE:
                continue
            stage, name, done = self.program.rank_class[node], str(action), kept.ends[node]
            if name not in begin[stage]:  # kernels come first
                begin[stage][name] = done - self.durations(node)
            end[stage][name] = np.maximum(end[stage].get(name, done), done)
        return begin, end

    def _memory(self) -> dict[str, Any]:
        return memory_per_rank(self.scenario, self.durations.uneven)

    @cached_property
    def _activations(self) -> RankActivations:
        return RankActivations(self.scenario, self.durations.uneven.load)

    def activations(self) -> pd.DataFrame:
        """Return the most activations that each rank holds at once: ``rank``, ``stage``, ``peak_bytes``.

        They are of the tokens that its experts receive from each micro-batch in flight; of uneven sequences only those.
        """
        peaks = self._activations.peaks()
        rank = np.arange(peaks.size)
        return pd.DataFrame({"rank": rank, "stage": rank // self.order.ranks, "peak_bytes": peaks.ravel()})

    def activations_over_time(self, rank: int) -> pd.DataFrame:
        """Return the activations that one rank holds, from one change to the next; replays the step to find it.

        Returns
        -------
        DataFrame
            ``time_s``, ``activations_bytes`` from that time on: a forward takes them when it begins, a backward gives them back
            when it ends.
        """
        stage, index = divmod(rank, self.order.ranks)
        begin, end = ((times[stage]) for times in self._action_times)
        moments = [(0.0, 0.0)]
        for action, taken in self._activations.changes(stage):
            taken = float(np.broadcast_to(taken, self.order.ranks)[index])
            when = np.broadcast_to((begin if taken > 0 else end)[str(action)], self.order.ranks)[index]
            moments.append((float(when), taken))
        time, taken = np.array(moments).T  # in the order of the schedule, whatever rounding says
        table = pd.DataFrame({"time_s": np.maximum.accumulate(time), "activations_bytes": np.cumsum(taken)})
        return table.groupby("time_s", sort=True).last().reset_index()

    def slowest(self, count: int = 10) -> pd.DataFrame:
        """Return the `count` ranks that compute longest beside the median of their stage, slowest first."""
        return self._table.sort_values(["over_stage", "rank"], ascending=[False, True]).head(count).reset_index(drop=True)

    def critical_path(self) -> pd.DataFrame:
        """Return the chain of operations that decides the step time, first to last; replays the step to find it.

        Returns
        -------
        DataFrame
            ``rank``, ``stage``, ``host``, ``stream``, ``name``, ``action``, ``start_s``, ``end_s``, ``seconds``: each starts
            when the one before it ends, so `seconds` add up to the step. Of a collective, the member that came last.
        """
        kept = replay_ranks(self.order, self.durations, keep=True)
        program, rows = self.program, []
        for node, index, start, end in critical_path(self.order, kept):
            task, stage, action = program.tasks[program.task[node]], program.rank_class[node], program.label[node]
            rank = stage * self.order.ranks + index
            host = int(self._host[rank])
            rows.append((rank, stage, host, task.stream, task.name, str(action or ""), start, end, end - start))
        columns = ["rank", "stage", "host", "stream", "name", "action", "start_s", "end_s", "seconds"]
        return pd.DataFrame(rows, columns=columns)

    def distribution(self) -> pd.DataFrame:
        """Return the step time over the seeds: one row, columns ``seeds``, ``mean_s``, ``min_s``, ``p05_s`` to ``p95_s``, ``max_s``."""
        times = self.step_times_s
        quantiles = {f"p{q:02d}_s": float(np.quantile(times, q / 100)) for q in (5, 25, 50, 75, 95)}
        ends = {"min_s": float(times.min()), **quantiles, "max_s": float(times.max())}
        return pd.DataFrame([{"seeds": len(times), "mean_s": float(times.mean()), **ends}])
