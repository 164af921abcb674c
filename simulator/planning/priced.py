"""A table of plans with its prices: every price computed once for each combination of degrees that it depends on, then looked up.

Shapes: n plans, U distinct combinations, K kinds of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np

from simulator.closed_forms import bound_s, estimate_s
from simulator.planning.space import Table, grouped
from simulator.pricing import op_s
from simulator.scenario.plan import COLUMNS, INTERLEAVED, Plan, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, repeating, schedule
from simulator.stage_times import PASSES, SHARDING, Runs, StageTimes, hop_s, optimizer_of, parameters, price_passes, price_sharding, stacked
from simulator.workload.memory import memory_per_stage
from simulator.workload.ops import Block
from simulator.workload.stages import StageBlocks, blocks, stages_of
from simulator.workload.step import NORM_OP

#: what the passes of a block, its sharding and a message between stages depend on
_TOKENS = ("tp", "cp", "ep", "etp", "micro_batch")
_GROUPS = ("tp", "cp", "ep", "etp", "dp_replicate", "dp_shard")
_MESSAGE = ("tp", "cp", "micro_batch", "pp")
#: sizes of a block that memory is made of
_SIZES = ("saved_bytes", "recompute_bytes", "weight_bytes")
#: schedules that run forwards and backwards in pairs
PAIRED = ("interleaved-overlapped", "dualpipe", "dualpipev")
#: plans priced together: their arrays stay in the processor's cache
CHUNK = 8192


def distinct(plans: PlanColumns, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each combination of `names`, and for every row the number of its combination."""
    code = np.zeros(len(plans), dtype=np.int64)
    for name in names:
        values, inverse = np.unique(getattr(plans, name), return_inverse=True)
        code = code * len(values) + inverse
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    return first, inverse


class _Rows(Mapping):
    """Fields of priced combinations, each looked up for the plans at hand when it is asked for."""

    def __init__(self, tables: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        self._tables, self._known = tables, {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._known:
            table, rows = self._tables[name]
            self._known[name] = table[rows]
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


@dataclass(frozen=True)
class Passes:
    """Prices and sizes of the blocks for every distinct combination of degrees and kind of recompute.

    Parameters
    ----------
    row : ndarray (n,)
        The combination of every plan.
    tables : dict of str to ndarray (U, K)
        `PASSES`, parameters and sizes.
    runs : dict of str to list
        Of each block, the runs forward and backward for each kind of recompute, (U per kind,) each.
    each : int
        Combinations per kind of recompute.
    """

    row: np.ndarray
    tables: dict[str, np.ndarray]
    runs: dict[str, list[tuple[Runs, Runs]]]
    each: int

    @classmethod
    def of(cls, scenario: Scenario, table: Table) -> Passes:
        """Price the blocks of `table`."""
        first, inverse = distinct(table.plans, _TOKENS)
        plans = table.plans.take(first)
        parts, runs = [], {}
        for recompute, modules in table.recomputes:
            like = plans.like.model_copy(update={"recompute": recompute, "recompute_modules": modules})
            columns = PlanColumns(**{name: getattr(plans, name) for name in COLUMNS}, like=like)
            priced = {}
            for name, block in blocks(scenario.model, columns, scenario.job).items():
                found = price_passes(block, scenario.model, columns, scenario.cluster)
                runs.setdefault(name, []).append((found.pop("forward_runs"), found.pop("backward_runs")))
                priced[name] = found | parameters(block) | {size: getattr(block, size) + np.zeros(len(first)) for size in _SIZES}
            parts.append(stacked(priced, priced.__getitem__, next(iter(priced.values()))))
        tables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return cls(table.recompute * len(first) + inverse, tables, runs, len(first))


@dataclass(frozen=True)
class Priced:
    """A table of plans of one sharding, precision, dispatcher and overlap, with its prices."""

    scenario: Scenario
    table: Table
    passes: Passes
    row: np.ndarray = field(repr=False)
    sharding: dict[str, np.ndarray] = field(repr=False)
    group_row: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, scenario: Scenario, table: Table, passes: Passes | None = None) -> Priced:
        """Price `table`; `passes` of a table that differs only in its sharding may be given."""
        passes = passes or Passes.of(scenario, table)
        first, inverse = distinct(table.plans, _GROUPS)
        plans = table.plans.take(first)
        priced = {
            name: price_sharding(block, scenario.model, plans, scenario.cluster)
            for name, block in blocks(scenario.model, plans, scenario.job).items()
        }
        return cls(scenario, table, passes, passes.row, stacked(priced, priced.__getitem__, SHARDING), inverse)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of blocks."""
        return tuple(self.passes.runs)

    @cached_property
    def micro_batches(self) -> np.ndarray:
        """Micro-batches per step, per plan."""
        return self.scenario.job.global_batch // (self.table.plans.dp * self.table.plans.micro_batch)

    @cached_property
    def norm_s(self) -> float:
        """The all-reduce of the gradient norm over all ranks, the same for every plan."""
        return float(op_s(NORM_OP, self.scenario.model, self.table.row(0), self.scenario.cluster))

    @cached_property
    def hop_s(self) -> np.ndarray:
        """A message between stages, per plan."""
        s = self.scenario
        first, inverse = distinct(self.table.plans, _MESSAGE)
        return hop_s(s.model, self.table.plans.take(first), s.job, s.cluster)[inverse]

    def plan_of(self, index: np.ndarray) -> Plan:
        """Return the plan whose schedule, layout, pp and vpp are those of the rows at `index`."""
        return self.table.row(int(index[0]))

    def columns(self, index: np.ndarray) -> PlanColumns:
        """Return rows that agree in schedule, layout, pp and vpp."""
        plans = self.table.plans
        return PlanColumns(**{name: getattr(plans, name)[index] for name in COLUMNS}, like=self.plan_of(index))

    def stages(self, plan: Plan) -> tuple[StageBlocks, ...]:
        """Return the blocks of each stage of a plan."""
        return stages_of(self.scenario.model, plan.layout, plan.stages, self.scenario.job.sequence_length)

    def times(self, index: np.ndarray, columns: PlanColumns) -> StageTimes:
        """Return the parts of the step of rows that agree in schedule, layout, pp and vpp."""
        s, passes, row, group_row = self.scenario, self.passes.tables, self.row[index], self.group_row[index]
        tables = {name: (passes[name], row) for name in (*PASSES, "dense_parameters", "expert_parameters")}
        tables |= {name: (self.sharding[name], group_row) for name in SHARDING}
        return StageTimes(
            prices=_Rows(tables),
            runs=_RunsOf(self, index),
            kinds=self.kinds,
            stages=self.stages(columns.like),
            hop_s=self.hop_s[index],
            norm_s=self.norm_s,
            optimize=optimizer_of(s.model, columns, s.job, s.cluster),
        )

    def chunks(self, groups: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the rows of `groups` in pieces of at most `CHUNK`."""
        for group in groups:
            yield from np.split(group, range(CHUNK, len(group), CHUNK))

    def bounds(self) -> np.ndarray:
        """Return the lower bound of every plan's step, seconds."""
        found, plans = np.empty(len(self.table)), self.table.plans
        kept = np.zeros(len(self.table), dtype=np.int64)
        for code, (name, _) in enumerate(self.table.shapes):
            mine = np.flatnonzero(self.table.shape == code) if name in PAIRED else []
            kept[mine] = repeating(name, plans.pp[mine], self.micro_batches[mine])
        for index in self.chunks(grouped(self.table.shape, plans.pp, plans.vpp, kept)):
            columns = self.columns(index)
            order = _fewest(columns.like, self.micro_batches[index])
            found[index] = bound_s(columns, self.times(index, columns), self.micro_batches[index], order)
        return found

    def estimates(self, index: np.ndarray | None = None) -> np.ndarray:
        """Return the estimate of the step of the plans at `index`, or of all, seconds."""
        index = np.arange(len(self.table)) if index is None else index
        found, plans, m = np.empty(len(index)), self.table.plans, self.micro_batches[index]
        paired = np.isin(self.table.shape[index], [i for i, (name, _) in enumerate(self.table.shapes) if name in PAIRED])
        kind = np.where(paired, self.table.recompute[index], 0)  # the segments of a pair are those of its recompute
        for part in self.chunks(grouped(self.table.shape[index], plans.pp[index], plans.vpp[index], m, kind)):
            columns, micro_batches = self.columns(index[part]), int(m[part[0]])
            like = columns.like
            found[part] = estimate_s(
                columns,
                self.times(index[part], columns),
                micro_batches,
                lambda n, p=like: schedule(p.schedule, p.pp, p.vpp, n, p.table),
            )
        return found

    def peak_memory(self) -> np.ndarray:
        """Return the bytes of every plan's fullest stage."""
        found, s, plans = np.empty(len(self.table)), self.scenario, self.table.plans
        names = [name for name, _ in self.table.shapes]
        kept = np.zeros(len(self.table), dtype=np.int64)
        for code, name in enumerate(names):
            mine = np.flatnonzero(self.table.shape == code)
            m = self.micro_batches[mine]
            kept[mine] = m if name == "gpipe" else repeating(name, plans.pp[mine], m)
        for index in self.chunks(grouped(self.table.shape, plans.pp, plans.vpp, kept)):
            columns, m = self.columns(index), int(self.micro_batches[index[0]])
            stages = self.stages(columns.like)
            parts = memory_per_stage(s.model, columns, s.job, stages, self.sizes(index), m, decisive=True)
            found[index] = parts["total"].max(axis=-1)
        return found

    def sizes(self, index: np.ndarray) -> dict[str, Block]:
        """Return the blocks of the rows at `index`, their sizes and no operations."""
        tables, row = self.passes.tables, self.row[index]
        names = [f.name for f in fields(Block) if f.name in tables]
        looked_up = {name: tables[name][row] for name in names}
        return {kind: Block((), (), **{n: looked_up[n][..., i] for n in names}) for i, kind in enumerate(self.kinds)}


class _RunsOf(Mapping):
    """The runs of every block for some rows, looked up when a pair asks for them."""

    def __init__(self, priced: Priced, index: np.ndarray):
        self._priced, self._known = priced, {}
        self._recompute, self._row = np.divmod(priced.row[index], priced.passes.each)

    def __getitem__(self, name: str) -> tuple[Runs, Runs]:
        if name not in self._known:
            self._known[name] = self._of(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._priced.kinds)

    def __len__(self) -> int:
        return len(self._priced.kinds)

    def _of(self, name: str) -> tuple[Runs, Runs]:
        of_kind = self._priced.passes.runs[name]
        (kind,) = set(self._recompute.tolist())
        take = lambda seconds: seconds[self._row] if np.ndim(seconds) else seconds  # noqa: E731
        forward, backward = (
            tuple(tuple((stream, take(seconds)) for stream, seconds in run) for run in runs) for runs in of_kind[kind]
        )
        return forward, backward


def _fewest(plan: Plan, micro_batches: np.ndarray) -> Schedule:
    """Return the schedule of `plan` for a small number of micro-batches that has the places and kinds of actions of all."""
    m = int(min(micro_batches.min(), 2 * plan.pp))
    if plan.schedule in PAIRED:  # here it matters how many run alone
        m = int(repeating(plan.schedule, plan.pp, int(micro_batches[0])))
    elif plan.schedule in INTERLEAVED:
        m = plan.pp
    return schedule(plan.schedule, plan.pp, plan.vpp, m)
