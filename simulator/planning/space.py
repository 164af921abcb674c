"""Which plans are legal: every combination of what a plan can say, within the user's constraints, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, get_args

import numpy as np
from pydantic import Field, field_validator

from simulator.errors import PlanError, Problem, nearest
from simulator.scenario.facts import Frozen
from simulator.scenario.model import Model
from simulator.scenario.overlap import Overlap
from simulator.scenario.placement import ORDER, PIPELINE_INSIDE, Placement
from simulator.scenario.plan import COLUMNS, INTERLEAVED, TWO_CHUNKS, Module, Plan, PlanColumns, Precision, Schedule
from simulator.scenario.scenario import Scenario
from simulator.workload.stages import StageBlocks, stages_of

#: what a degree may be when it is free and no fact of the question says more
CHUNKS, MICRO_BATCHES, EXPERT_TENSOR, CONTEXT = (1, 2, 3, 4, 6, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32)
#: schedules that can be searched: all that have a name; a table is the user's own
SCHEDULES = tuple(name for name in get_args(Schedule) if name != "table")
#: those that are tried when nothing else is said: DualPipe runs the pairs of DualPipeV, as fast, on twice the parameters per rank
USUAL = tuple(name for name in SCHEDULES if name != "dualpipe")
#: orders of the axes that launchers know
ORDERS = (ORDER, PIPELINE_INSIDE)
#: modules in the order in which selective recompute takes them on, cheapest seconds per byte first: dense and routed MLPs in one step
LADDER: tuple[tuple[Module, ...], ...] = (("layernorm",), ("mlp_act", "moe_act"), ("mla_up_proj",), ("core_attn",))
Recomputes = tuple[tuple[str, tuple[Module, ...]], ...]


class Space(Frozen):
    """What the search may choose: for each choice the values allowed, None for every one that is legal.

    Parameters
    ----------
    tp, cp, pp, vpp, ep, etp, micro_batch : tuple of int, optional
        Free: every value that divides, with `CHUNKS`, `MICRO_BATCHES`, `EXPERT_TENSOR` and, above 8,192 tokens, `CONTEXT`.
    zero : tuple of int
        Sharding of the state.
    schedule : tuple of str
        Names; `USUAL` unless said otherwise, which leaves out DualPipe.
    recompute : tuple of str, optional
        ``none``, ``full`` or modules joined by ``+``, e.g. ``layernorm+moe_act``. Free: none, every first few of `LADDER` that
        the model has, and full.
    layout : tuple of str
        ``even``, ``balanced`` by FLOP, or stages in letters.
    dp_replicate, precision, dispatcher, overlap : tuple, optional
        None keeps the scenario's plan: they change the numerics or need other software.
    order : tuple of str, optional
        Orders of the axes on the cluster, as in `Placement`. Free: the scenario's, and where some tier of the fabric is
        oversubscribed also `ORDERS`.
    """

    tp: tuple[int, ...] | None = None
    cp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    vpp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    etp: tuple[int, ...] | None = None
    micro_batch: tuple[int, ...] | None = None
    dp_replicate: tuple[int, ...] | None = None
    zero: tuple[int, ...] = Field(default=(0, 1, 2, 3), min_length=1)
    schedule: tuple[Schedule, ...] = Field(default=USUAL, min_length=1)
    recompute: tuple[str, ...] | None = None
    layout: tuple[str, ...] = Field(default=("balanced", "even"), min_length=1)
    precision: tuple[Precision, ...] | None = None
    dispatcher: tuple[str, ...] | None = None
    overlap: tuple[Overlap, ...] | None = None
    order: tuple[str, ...] | None = None

    @field_validator("recompute")
    @classmethod
    def _modules_exist(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for word in (word for text in value or () if text not in ("none", "full") for word in text.split("+")):
            if word not in get_args(Module):
                raise ValueError(f"recompute {word!r}: {nearest(word, get_args(Module))}")
        return value

    @classmethod
    def like(cls, plan: Plan, *fixed: str, **choices: Any) -> Space:
        """Return the space in which the choices named `fixed` are those of `plan`, and `choices` as given."""
        own = {name: ("even" if getattr(plan, name) is None else getattr(plan, name),) for name in fixed if name != "recompute"}
        if "recompute" in fixed:
            own["recompute"] = ("+".join(plan.recompute_modules) if plan.recompute == "selective" else plan.recompute,)
        return cls(**(own | choices))

    @property
    def constraints(self) -> tuple[str, ...]:
        """The names of the choices that the user has narrowed."""
        free = Space()
        return tuple(name for name in type(self).model_fields if getattr(self, name) != getattr(free, name))

    def without(self, name: str) -> Space:
        """Return the space in which one choice is free again."""
        return self.model_copy(update={name: getattr(Space(), name)})

    def placements(self, scenario: Scenario) -> tuple[Placement, ...]:
        """Return the placements to try: that of the scenario in each order; one by hand is kept as it is."""
        own = scenario.plan.placement
        if own.accelerators is not None:
            return (own,)
        thin = any(tier.oversubscription > 1 for tier in scenario.cluster.fabric.tiers)
        orders = self.order or (own.order, *(ORDERS if thin else ()))
        return tuple(Placement.model_validate(own.model_dump() | {"order": order}) for order in dict.fromkeys(orders))

    def recomputes(self, model: Model) -> Recomputes:
        """Return the kinds of recompute as a plan writes them, (recompute, modules): each once, without modules that the model lacks."""
        steps = ["+".join(module for rung in LADDER[:n] for module in rung) for n in range(1, len(LADDER) + 1)]
        has = {
            **dict.fromkeys(("mlp_act", "mlp"), not all(k.moe for k in model.kinds)),
            **dict.fromkeys(("moe_act", "moe"), model.experts is not None),
            "mla_up_proj": model.latent is not None,
        }
        found: dict[object, tuple[str, tuple[Module, ...]]] = {}
        for text in self.recompute if self.recompute is not None else ("none", *steps, "full"):
            modules = () if text in ("none", "full") else tuple(module for module in text.split("+") if has.get(module, True))
            kind = ("selective", modules) if modules else (text if text == "full" else "none", ("core_attn",))
            found.setdefault((kind[0], frozenset(kind[1])), kind)
        return tuple(found.values())


@dataclass(frozen=True)
class Table:
    """Legal plans: one row for each, degrees in columns, schedule with layout and recompute as numbers of a list.

    Parameters
    ----------
    plans : PlanColumns
        Their `like` is the plan of what no row differs in.
    shape, recompute : ndarray
        Number in `shapes` and in `recomputes`.
    shapes : tuple of (str, str or None)
        Schedule and layout.
    recomputes : tuple of (str, tuple)
        Recompute and its modules.
    """

    plans: PlanColumns
    shape: np.ndarray
    recompute: np.ndarray
    shapes: tuple[tuple[str, str | None], ...]
    recomputes: Recomputes

    def __len__(self) -> int:
        return len(self.shape)

    def of_kind(self, **choices: Any) -> Table:
        """Return the same rows with another sharding, precision, dispatcher or overlap."""
        plans = PlanColumns(**{name: getattr(self.plans, name) for name in COLUMNS}, like=self.plans.like.model_copy(update=choices))
        return Table(plans, self.shape, self.recompute, self.shapes, self.recomputes)

    def take(self, index: np.ndarray) -> Table:
        """Return the plans at `index`."""
        return Table(self.plans.take(index), self.shape[index], self.recompute[index], self.shapes, self.recomputes)

    def runs(self, *schedules: str) -> np.ndarray:
        """Return which plans run one of `schedules`."""
        return np.isin(self.shape, [i for i, (name, _) in enumerate(self.shapes) if name in schedules])

    def row(self, index: int) -> Plan:
        """Return one of the plans."""
        schedule, layout = self.shapes[self.shape[index]]
        recompute, modules = self.recomputes[self.recompute[index]]
        said = {"schedule": schedule, "layout": layout, "recompute": recompute, "recompute_modules": modules}
        return self.plans.row(index).model_copy(update=said)

    @cached_property
    def groups(self) -> list[np.ndarray]:
        """The rows of each combination of schedule, layout, pp and vpp."""
        return grouped(self.shape, self.plans.pp, self.plans.vpp)


def numbered(*keys: np.ndarray) -> tuple[np.ndarray, int]:
    """Return for every row the number of its combination of whole numbers, in their order, and how many combinations there are.

    Notes
    -----
    What sorting would give, by marking what occurs: linear in the rows. A new key makes at most as many codes as there are
    combinations so far times its values, and they are numbered anew each time.
    """
    code, count = _dense(keys[0])
    for key in keys[1:]:
        own, values = _dense(key)
        code, count = _dense(code * values + own)
    return code, count


def _dense(key: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the place of every whole number among those that occur, and how many do."""
    if not len(key):
        return np.zeros(0, dtype=np.int64), 0
    from_zero = key - key.min()
    occurs = np.zeros(int(from_zero.max()) + 1, dtype=bool)
    occurs[from_zero] = True
    place = np.cumsum(occurs) - 1
    return place[from_zero], int(place[-1]) + 1


def grouped(*keys: np.ndarray) -> list[np.ndarray]:
    """Return the indices of rows that agree in all `keys`."""
    code, count = numbered(*keys)
    if count <= np.iinfo(np.uint16).max:
        code = code.astype(np.uint16)  # which numpy sorts by its digits
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(code) else []


def divisors(n: int) -> list[int]:
    """Return the divisors of `n`, ascending."""
    return [int(d) for d in np.flatnonzero(n % np.arange(1, n + 1) == 0) + 1]


def _degrees(scenario: Scenario, space: Space) -> dict[str, list[int]]:
    """Return the values of every degree that are worth combining."""
    model, job, n, like = scenario.model, scenario.job, scenario.ranks(scenario.plan), scenario.plan
    own, layers = divisors(n), model.layers + model.mtp_layers
    free = {
        "tp": [t for t in own if t <= scenario.cluster.host.scale_up_domain],
        "cp": [c for c in CONTEXT if c == 1 or job.sequence_length > 8192],
        "pp": [p for p in own if p <= layers],
        "vpp": list(CHUNKS),
        "ep": divisors(model.experts.count) if model.experts else [1],
        "etp": list(EXPERT_TENSOR),
        "micro_batch": list(MICRO_BATCHES),
        "dp_replicate": [like.dp_replicate],
    }
    return {name: list(dict.fromkeys(getattr(space, name) or values)) for name, values in free.items()}


def _rules(p: PlanColumns, scenario: Scenario) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the rules of `simulator.feasibility.structure` on degrees: name and which plans keep it."""
    model, job, experts = scenario.model, scenario.job, scenario.model.experts
    sparse = all(kind.moe for kind in model.kinds)
    wide = model.heads % p.tp == 0
    wide &= (model.kv_heads % p.tp == 0) | (p.tp % model.kv_heads == 0)
    yield "heads and widths divide by tp", wide & (sparse | (model.ffn % p.tp == 0))
    inside = (p.dp_shard * p.cp * p.tp) % (p.etp * p.ep) == 0
    yield "etp * ep divides dp * cp * tp", inside & (p.etp <= p.tp)
    if experts:
        fits = (experts.count % p.ep == 0) & (experts.ffn % p.etp == 0) & ((p.tp == 1) | p.sequence_parallel)
        yield "experts divide by ep and etp", fits & ((p.ep == 1) | (job.routing == "balanced") | (job.expert_load <= p.ep))
    else:
        yield "expert axes need experts", (p.ep == 1) & (p.etp == 1)
    yield "batch divides by dp * micro-batch", job.global_batch % (p.dp * p.micro_batch) == 0
    parts = p.cp * np.where(p.cp > 1, 2, 1) * (p.tp if p.sequence_parallel else 1)
    yield "sequence divides by cp and tp", job.sequence_length % parts == 0


def _of_schedule(name: str, layout: str | None, before: Sequence[str | None], p: PlanColumns, scenario: Scenario) -> np.ndarray:
    """Return which plans a schedule and a layout exist for, and no layout `before` it divides the layers in the same way."""
    model, job = scenario.model, scenario.job
    chunks = (p.vpp == 2) if name in TWO_CHUNKS else (p.vpp > 1) if name in INTERLEAVED else (p.vpp == 1)
    m = job.global_batch // (p.dp * p.micro_batch)
    legal = chunks & ((p.vpp == 1) | (p.pp > 1))
    if name in INTERLEAVED:
        legal &= (m >= p.pp) & (m % np.maximum(m // p.pp, 1) == 0)
    stages = np.where(name == "dualpipe", p.pp, p.pp * p.vpp)
    for pp, vpp, count in set(zip(p.pp[legal].tolist(), p.vpp[legal].tolist(), stages[legal].tolist(), strict=True)):
        own = _divided(model, layout, count, job.sequence_length)
        if own is None or own in [_divided(model, other, count, job.sequence_length) for other in before]:
            legal &= (p.pp != pp) | (p.vpp != vpp)
    return legal & _exists(name, p, m)


def _divided(model: Model, layout: str | None, stages: int, sequence_length: int) -> tuple[StageBlocks, ...] | None:
    """Return the blocks of each stage; None where the layers do not divide so."""
    try:
        return stages_of(model, layout, stages, sequence_length)
    except PlanError:
        return None


def _exists(name: str, p: PlanColumns, m: np.ndarray) -> np.ndarray:
    """Return which plans have the micro-batches that a schedule needs; DualPipe divides ranks and micro-batches in two."""
    least = {"zb-h2": 2 * p.pp - 1, "zb-v": 2 * p.pp - 1, "dualpipe": 2 * p.pp, "dualpipev": 2 * p.pp}.get(name, 1)
    halves = (p.pp % 2 == 0) & (m % 2 == 0)
    return (m >= least) & (halves | (name != "dualpipe"))


def legal_table(scenario: Scenario, space: Space) -> Table:
    """Return the legal plans of `scenario` within `space`, sharding, precision, dispatcher and overlap being the scenario's.

    Raises
    ------
    PlanError
        When there is none; names the constraint that leaves nothing, or the rule.
    """
    found = _table(scenario, space)
    if isinstance(found, str):
        raise PlanError([_nothing_left(scenario, space, found)])
    return found


def _table(scenario: Scenario, space: Space) -> Table | str:
    """Return the legal plans, or the rule that leaves none."""
    n, degrees = scenario.ranks(scenario.plan), _degrees(scenario, space)
    grid = np.meshgrid(*degrees.values(), indexing="ij")
    columns = {name: axis.ravel().astype(np.int64) for name, axis in zip(degrees, grid, strict=True)}
    inner = columns["tp"] * columns["cp"] * columns["pp"] * columns["dp_replicate"]
    keep = n % inner == 0
    columns = {name: axis[keep] for name, axis in columns.items()} | {"dp_shard": n // inner[keep]}
    plans = PlanColumns(**{name: columns[name] for name in COLUMNS}, like=scenario.plan.model_copy(update={"table": None}))
    left = np.ones(len(plans), dtype=bool)
    for rule, kept in (("degrees divide the accelerators", left), *_rules(plans, scenario)):
        left = left & kept
        if not left.any():
            return rule
    plans = plans.take(np.flatnonzero(left))
    shapes = tuple((name, None if layout == "even" else layout) for name, layout in product(space.schedule, space.layout))
    layouts = list(dict.fromkeys(layout for _, layout in shapes))
    rows = [np.flatnonzero(_of_schedule(name, layout, layouts[: layouts.index(layout)], plans, scenario)) for name, layout in shapes]
    recomputes, index = space.recomputes(scenario.model), np.concatenate(rows)
    if not len(index):
        return "the layers fill pp * vpp and the schedule exists for pp, vpp and the micro-batches"
    shape, kinds = np.repeat(np.arange(len(shapes)), [len(r) for r in rows]), len(recomputes)
    return Table(plans.take(np.tile(index, kinds)), np.tile(shape, kinds), np.repeat(np.arange(kinds), len(index)), shapes, recomputes)


def placeable(p: PlanColumns) -> np.ndarray:
    """Return which plans the order of their placement is legal for, as `simulator.feasibility.structure` has it."""
    order = p.placement.order.split("-")
    at, before = order.index, order[: order.index("pp")]
    dense, expert = ({"tp": p.tp, "cp": p.cp, "dp": p.dp}, {"tp": p.etp, "ep": p.ep, "dp": p.edp})
    meshes = [np.prod([of[axis] for axis in before if axis in of] or [np.ones_like(p.tp)], axis=0) for of in (dense, expert)]
    legal = (p.pp == 1) | (meshes[0] == meshes[1])
    if at("cp") > at("dp") or at("cp") < at("tp") < at("dp"):
        legal &= (p.cp == 1) | (p.dp == 1)
    if at("dp") < max(at("tp"), at("ep")):
        legal &= p.dp_replicate == 1
    return legal


def kinds_of(scenario: Scenario, space: Space) -> list[dict[str, Any]]:
    """Return the combinations of sharding, precision, dispatcher, overlap and placement that the accelerator can compute."""
    like = scenario.plan
    choices = {
        "precision": space.precision or (like.precision,),
        "dispatcher": space.dispatcher or (like.dispatcher,),
        "overlap": space.overlap or (like.overlap,),
        "placement": space.placements(scenario),
        "zero": space.zero,
    }
    found = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    peaks = scenario.cluster.accelerator.peak_flop_per_s
    able = [kind for kind in found if kind["precision"].gemm in peaks]
    if not able:
        wanted = ", ".join(sorted({kind["precision"].gemm for kind in found}))
        numbers = f"precision.gemm = {wanted}, {scenario.cluster.accelerator.name} has {', '.join(peaks)}"
        raise PlanError([Problem("the accelerator computes in the datatype", numbers, f"use {' or '.join(peaks)}")])
    return able


def _nothing_left(s: Scenario, space: Space, rule: str) -> Problem:
    """Return why no plan is legal: the constraints each of which alone leaves nothing, or the rule and the numbers."""
    culprits = [name for name in space.constraints if isinstance(_table(s, space.without(name)), Table)]
    sizes = f"{s.cluster.accelerators} accelerators, {s.model.heads} heads, {s.model.layers} layers and global_batch {s.job.global_batch}"
    if culprits:
        said = "; ".join(f"{name} = {' or '.join(map(str, getattr(space, name)))}" for name in culprits)
        return Problem("some plan is legal", f"{said} leaves none: '{rule}' fails for {sizes}", f"free or widen {' or '.join(culprits)}")
    widen = f"free {', '.join(space.constraints)}, or " if space.constraints else ""
    remedy = f"{widen}choose a global_batch with more divisors in common with the accelerators"
    return Problem("some plan is legal", f"'{rule}' fails for {sizes}", remedy)
