"""A table of plans with its prices: every price computed once for each combination of degrees that it depends on, then looked up.

Shapes: n plans, U distinct combinations, K kinds of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from simulator.closed_forms import estimate_s
from simulator.lower_bound import (
    PARAMETERS,
    PASSES,
    SHARDING,
    Sums,
    bound_s,
    hop_s,
    optimizer_of,
    passes_table,
    sharding_table,
    sizes_table,
)
from simulator.planning.space import Table, grouped, numbered
from simulator.pricing.operations import Known, op_s
from simulator.pricing.stage_times import BlockPrice, least_pair_s, price_blocks, stage_times
from simulator.scenario.plan import COLUMNS, INTERLEAVED, Plan, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, repeating, schedule
from simulator.units import Number
from simulator.workload.blocks import Block
from simulator.workload.memory import memory_per_stage
from simulator.workload.stages import StageBlocks, blocks, stages_of
from simulator.workload.step import NORM_OP

#: what the passes of a block, its sharding and a message between stages depend on
_TOKENS = ("tp", "cp", "ep", "etp", "micro_batch")
_GROUPS = ("tp", "cp", "ep", "etp", "dp_replicate", "dp_shard")
_MESSAGE = ("tp", "cp", "micro_batch", "pp")
#: schedules that run forwards and backwards in pairs
PAIRED = ("interleaved-overlapped", "dualpipe", "dualpipev")
#: plans bounded together: their arrays stay in the processor's cache
CHUNK = 8192


def distinct(plans: PlanColumns, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each combination of `names`, and for every row the number of its combination."""
    number, count = numbered(*(getattr(plans, name) for name in names))
    first = np.empty(count, dtype=np.int64)
    first[number[::-1]] = np.arange(len(plans))[::-1]  # the last to be written is the first row
    return first, number


def _like(plans: PlanColumns, like: Plan) -> PlanColumns:
    return PlanColumns(**{name: getattr(plans, name) for name in COLUMNS}, like=like)


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
        `PASSES` and parameters.
    blocks : dict of str to Block
        Sizes of the K kinds of blocks, (U,) each, without their operations.
    """

    row: np.ndarray
    tables: dict[str, np.ndarray]
    blocks: dict[str, Block]

    @classmethod
    def of(cls, scenario: Scenario, table: Table) -> Passes:
        """Price the blocks of `table`."""
        first, inverse = distinct(table.plans, _TOKENS)
        plans, parts, sizes = table.plans.take(first), [], []
        known = Known(scenario.model, plans, scenario.cluster)
        for recompute, modules in table.recomputes:
            columns = _like(plans, plans.like.model_copy(update={"recompute": recompute, "recompute_modules": modules}))
            own = blocks(scenario.model, columns, scenario.job)
            found = passes_table(own, scenario.model, columns, scenario.cluster, known) | sizes_table(own)
            parts.append({name: np.broadcast_to(values, (len(first), len(own))) for name, values in found.items()})
            sizes.append({name: replace(block, forward=(), backward=()) for name, block in own.items()})
        tables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return cls(table.recompute * len(first) + inverse, tables, _joined(sizes, [len(first)] * len(sizes)))


@dataclass(frozen=True)
class Priced:
    """A table of plans of one sharding, precision, dispatcher and overlap, with its prices."""

    scenario: Scenario
    table: Table
    passes: Passes
    sharding: dict[str, np.ndarray] = field(repr=False)
    group_row: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, scenario: Scenario, table: Table, passes: Passes | None = None) -> Priced:
        """Price `table`; `passes` of a table that differs only in its sharding may be given."""
        passes = passes or Passes.of(scenario, table)
        first, inverse = distinct(table.plans, _GROUPS)
        plans, parts = table.plans.take(first), []
        for name in ("1f1b", "dualpipe"):  # whose pipeline holds two copies of the model, which share state
            columns = _like(plans, plans.like.model_copy(update={"schedule": name}))
            parts.append(sharding_table(blocks(scenario.model, columns, scenario.job), scenario.model, columns, scenario.cluster))
        found = {name: np.concatenate([part[name] for part in parts]) for name in SHARDING}
        return cls(scenario, table, passes, found, inverse + table.runs("dualpipe") * len(first))

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

    def columns(self, index: np.ndarray) -> PlanColumns:
        """Return rows that agree in schedule, layout, pp and vpp."""
        return _like(self.table.plans.take(index), self.table.row(int(index[0])))

    def stages(self, plan: Plan) -> tuple[StageBlocks, ...]:
        """Return the blocks of each stage of a plan."""
        return stages_of(self.scenario.model, plan.layout, plan.stages, self.scenario.job.sequence_length)

    def sums(self, index: np.ndarray, columns: PlanColumns) -> Sums:
        """Return the prices of rows that agree in schedule, layout, pp and vpp."""
        s, row = self.scenario, self.passes.row[index]
        tables = {name: (self.passes.tables[name], row) for name in (*PASSES, *PARAMETERS)}
        tables |= {name: (self.sharding[name], self.group_row[index]) for name in SHARDING}
        optimize = optimizer_of(s.model, columns, s.job, s.cluster)
        return Sums(_Rows(tables), tuple(self.passes.blocks), self.stages(columns.like), self.hop_s[index], self.norm_s, optimize)

    def bounds(self) -> np.ndarray:
        """Return the lower bound of every plan's step, seconds."""
        found = np.empty(len(self.table))
        kept = self._of_schedule(lambda name, pp, m: repeating(name, pp, m) if name in PAIRED else np.zeros_like(m))
        for index in self._alike(kept):
            columns = self.columns(index)
            order = _fewest(columns.like, self.micro_batches[index])
            found[index] = bound_s(columns, self.sums(index, columns), self.micro_batches[index], order)
        return found

    def tight_bounds(self, index: np.ndarray, pair_s: Callable[[np.ndarray, StageBlocks, StageBlocks], np.ndarray]) -> np.ndarray:
        """Return the bounds of plans in pairs, each pair of forward and backward as long as it takes by itself, seconds.

        Parameters
        ----------
        index : ndarray
            Rows of the table.
        pair_s : callable
            From positions in `index` and the blocks of two stages to seconds, as `Estimates.pair_seconds`.
        """
        found, plans, m = np.empty(len(index)), self.table.plans, self.micro_batches[index]
        for part in grouped(self.table.shape[index], plans.pp[index], plans.vpp[index], m):
            columns = self.columns(index[part])
            stages, order = self.stages(columns.like), _orders(columns.like)(int(m[part[0]]))

            def pairs(forward: int, backward: int, part: np.ndarray = part, stages: tuple[StageBlocks, ...] = stages) -> np.ndarray:
                return pair_s(part, stages[forward], stages[backward])

            found[part] = bound_s(columns, self.sums(index[part], columns), m[part], order, pairs)
        return found

    def peak_memory(self) -> np.ndarray:
        """Return the bytes of every plan's fullest stage."""
        found, s = np.empty(len(self.table)), self.scenario
        for index in self._alike(self._of_schedule(lambda name, pp, m: m if name == "gpipe" else repeating(name, pp, m))):
            columns, m = self.columns(index), int(self.micro_batches[index[0]])
            stages = self.stages(columns.like)
            found[index] = memory_per_stage(s.model, columns, s.job, stages, self.sizes(index), m, decisive=True)["total"].max(axis=-1)
        return found

    def _of_schedule(self, of: Any) -> np.ndarray:
        """Return ``of(schedule, pp, micro_batches)`` for every row."""
        found = np.zeros(len(self.table), dtype=np.int64)
        for code, (name, _) in enumerate(self.table.shapes):
            mine = np.flatnonzero(self.table.shape == code)
            found[mine] = of(name, self.table.plans.pp[mine], self.micro_batches[mine])
        return found

    def _alike(self, key: np.ndarray) -> Iterator[np.ndarray]:
        """Yield rows that agree in schedule, layout, pp, vpp and `key`, at most `CHUNK` at a time."""
        for group in grouped(self.table.shape, self.table.plans.pp, self.table.plans.vpp, key):
            yield from np.split(group, range(CHUNK, len(group), CHUNK))

    def sizes(self, index: np.ndarray) -> dict[str, Block]:
        """Return the blocks of rows, their sizes and no operations."""
        return _cut(self.passes.blocks, self.passes.row[index], len(self.passes.tables[PASSES[0]]))

    def estimates(self, index: np.ndarray | None = None) -> np.ndarray:
        """Return the estimate of the step of the plans at `index`, or of all, seconds."""
        index = np.arange(len(self.table)) if index is None else index
        prices, found = Estimates(self, index), np.empty(len(index))
        for part in prices.groups:
            found[part] = prices.of(part)
        return found


class Estimates:
    """Some plans of a table with all that an estimate needs, priced at once; estimated group by group.

    Parameters
    ----------
    priced : Priced
    index : ndarray (n,)
        Rows of its table.
    """

    def __init__(self, priced: Priced, index: np.ndarray):
        self.priced, self.index = priced, index
        s, table = priced.scenario, priced.table.take(index)
        self.micro_batches = priced.micro_batches[index]
        self.family, kinds = _families(table), len(table.recomputes)
        group = np.where(self.family < kinds, -1, self.family)
        self.groups = grouped(table.shape, table.plans.pp, table.plans.vpp, self.micro_batches, group)
        self.row = np.zeros(len(index), dtype=np.int64)
        self.prices: dict[int, tuple[dict[str, BlockPrice], int]] = {}
        place = self.family // kinds
        for one in np.unique(place).tolist():
            mine = np.flatnonzero(place == one)
            part = table.take(mine)
            first, self.row[mine] = distinct(part.plans, tuple(dict.fromkeys(_TOKENS + _GROUPS)))
            known = Known(s.model, _like(part.plans.take(first), part.row(0)), s.cluster)
            for number in np.unique(part.recompute).tolist():
                recompute, modules = table.recomputes[number]
                like = part.row(0).model_copy(update={"recompute": recompute, "recompute_modules": modules})
                columns = _like(part.plans.take(first), like)
                found = price_blocks(blocks(s.model, columns, s.job), s.model, columns, s.cluster, known=known)
                self.prices[one * kinds + number] = found, len(first)

    def of(self, part: np.ndarray) -> np.ndarray:
        """Return the estimates of one of the groups, or of a part of it."""
        s, like_rows = self.priced.scenario, self.index[part]
        columns, micro_batches = self.priced.columns(like_rows), int(self.micro_batches[part[0]])
        order_of = _orders(columns.like)
        times = stage_times(
            s.model,
            columns,
            s.job,
            s.cluster,
            self.priced.stages(columns.like),
            self.priced.sizes(like_rows),
            self._prices(part),
            order_of(micro_batches),
        )
        return estimate_s(columns, times, micro_batches, order_of)

    def pair_seconds(self) -> Callable[[np.ndarray, StageBlocks, StageBlocks], np.ndarray]:
        """Return a function from plans in pairs, of a forward and a backward stage, to what such a pair takes by itself, seconds."""
        known: dict[tuple, Number] = {}
        table = self.priced.table

        def pair_s(part: np.ndarray, forward: StageBlocks, backward: StageBlocks) -> np.ndarray:
            seconds, family, first = np.empty(len(part)), self.family[part], int(self.index[part[0]])
            schedule_of_all, _ = table.shapes[table.shape[first]]
            for one in np.unique(family).tolist():
                place = np.flatnonzero(family == one)
                key = one, schedule_of_all, forward, backward
                if key not in known:
                    prices, length = self.prices[one]
                    of = ([prices[name] for name in names] for names in (forward, backward))
                    known[key] = least_pair_s(*of, table.row(first), self.priced.scenario.cluster.accelerator, (length,))
                seconds[place] = known[key][self.row[part[place]]]
            return seconds

        return pair_s

    def _prices(self, part: np.ndarray) -> dict[str, BlockPrice]:
        """Return the prices of blocks for the plans of a group, put together from those of each recompute."""
        family = self.family[part]
        families = np.unique(family).tolist()
        if len(families) == 1:
            prices, length = self.prices[families[0]]
            return _cut(prices, self.row[part], length)
        places, cut = [np.flatnonzero(family == one) for one in families], []
        for one, place in zip(families, places, strict=True):
            prices, length = self.prices[one]
            bare = {name: replace(p, forward_runs=(), backward_runs=(), paired={}) for name, p in prices.items()}
            cut.append(_cut(bare, self.row[part[place]], length))
        joined = _joined(cut, [len(p) for p in places])
        return _cut(joined, np.argsort(np.concatenate(places), kind="stable"), len(part))


def _families(table: Table) -> np.ndarray:
    """Return numbers of plans whose blocks are alike: by recompute, the remainder; in pairs also by the axes in use, from 1 on.

    Pairs interleave segments, and segments are the same only where the same axes communicate; DualPipe has copies that meet, too.
    """
    kinds, p = len(table.recomputes), table.plans
    used = sum((np.asarray(axis) > 1) * 2**bit for bit, axis in enumerate((p.tp, p.cp, p.ep, p.etp)))
    paired, twice = table.runs(*PAIRED), table.runs("dualpipe")
    return np.where(paired, 1 + twice * 16 + used, 0) * kinds + table.recompute


def _cut(value: Any, index: np.ndarray, length: int) -> Any:
    """Return prices or sizes with every column of `length` cut down to `index`; constants stay."""
    if isinstance(value, np.ndarray) and value.shape == (length,):
        return value[index]
    if isinstance(value, dict):
        return {key: _cut(one, index, length) for key, one in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _cut(getattr(value, f.name), index, length) for f in fields(value)})
    return tuple(_cut(one, index, length) for one in value) if isinstance(value, tuple) else value


def _joined(values: list[Any], lengths: list[int]) -> Any:
    """Return prices or sizes of several parts, alike but for their numbers, as columns of all."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values], lengths) for key in first}
    if is_dataclass(first):
        return replace(first, **{f.name: _joined([getattr(value, f.name) for value in values], lengths) for f in fields(first)})
    if isinstance(first, tuple):
        return tuple(_joined(list(parts), lengths) for parts in zip(*values, strict=True))
    if isinstance(first, str):
        return first
    return np.concatenate([np.broadcast_to(value, (n,)) for value, n in zip(values, lengths, strict=True)])


def _orders(plan: Plan) -> Any:
    """Return a function from the number of micro-batches to the `Schedule` of `plan`."""
    return lambda m: schedule(plan.schedule, plan.pp, plan.vpp, m, plan.table)


def _fewest(plan: Plan, micro_batches: np.ndarray) -> Schedule:
    """Return the schedule of `plan` for a small number of micro-batches that has the places and kinds of actions of all."""
    m = int(min(micro_batches.min(), 2 * plan.pp))
    if plan.schedule in PAIRED:  # here it matters how many run alone
        m = int(repeating(plan.schedule, plan.pp, int(micro_batches[0])))
    elif plan.schedule in INTERLEAVED:
        m = plan.pp
    name = "zb-h1" if plan.schedule in ("zb-1p", "zb-2p") else plan.schedule  # whose tables are searched for, with the same places
    return schedule(name, plan.pp, plan.vpp, m)
