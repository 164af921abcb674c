"""Which layers stand on which pipeline stage."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

import numpy as np

from simulator.errors import PlanError, Problem
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.units import Number
from simulator.workload.blocks import Block
from simulator.workload.layers import embedding, head, mtp_layer, transformer_layer
from simulator.workload.ops import total

#: Megatron's letters: embedding, transformer layer, MTP layer, head with the loss
_LETTERS = "EtmL"
_TOKEN = re.compile(r"([EtmL])(?:\*(\d{1,3}))?")
_REPEATED = re.compile(r"\(([^()]*)\)(?:\*(\d{1,3}))?")

#: kind of block -> how many of them
StageBlocks = tuple[str, ...]


def block_names(model: Model) -> list[str]:
    """Return the names of the kinds of blocks that `model` consists of."""
    kinds = [f"layer{i}" for i in range(len(model.kinds))]
    return ["embedding", *kinds, *(["mtp"] if model.mtp_layers else []), "head"]


def blocks(model: Model, plan: Plan, job: Job, load: Number = 1.0) -> dict[str, Block]:
    """Return every kind of block of `model` under `plan`, by the names of `block_names`; experts keep `load` times the mean."""
    found = {"embedding": embedding(model, plan, job)}
    for i, kind in enumerate(model.kinds):
        found[f"layer{i}"] = transformer_layer(model, kind, plan, job, load)
    if model.mtp_layers:
        found["mtp"] = mtp_layer(model, plan, job, load)
    found["head"] = head(model, plan, job)
    return {name: block.waited_for("tp") for name, block in found.items()} if plan.overlap.host_waits else found


def sequence(model: Model) -> list[str]:
    """Return the names of all blocks of `model`, in order."""
    kinds = {kind: f"layer{i}" for i, kind in enumerate(model.kinds)}
    return ["embedding", *(kinds[k] for k in model.layer_kinds), *["mtp"] * model.mtp_layers, "head"]


def _written(layout: str, model: Model, stages: int) -> tuple[StageBlocks, ...]:
    """Return the stages of a layout in Megatron's letters."""
    rows = []
    flat = _REPEATED.sub(lambda group: group[1] * int(group[2] or 1), layout.replace(" ", "").replace(",", ""))
    for part in flat.split("|"):
        letters, end = "", 0
        for token in _TOKEN.finditer(part):
            if token.start() != end:
                break
            end = token.end()
            letters += token[1] * int(token[2] or 1)
        if end != len(part):
            raise _problem(f"layout {layout!r}: {part[end:]!r} is not understood", f"use the letters {_LETTERS}, e.g. Et*3|t*4|tmL")
        rows.append(letters)
    count, names = Counter("".join(rows)), sequence(model)
    expected = {"E": 1, "t": model.layers, "m": model.mtp_layers, "L": 1}
    wrong = [f"{count[c]} {c} instead of {n}" for c, n in expected.items() if count[c] != n]
    if wrong:
        raise _problem(
            f"layout {layout!r} has {', '.join(wrong)}",
            f"write E once, t {model.layers} times, m {model.mtp_layers} times (mtp_layers of {model.name}), L once",
        )
    if len(rows) != stages:
        raise _problem(
            f"layout {layout!r} has {len(rows)} stages for pp * vpp = {stages}", f"write {stages} stages, or use pp * vpp = {len(rows)}"
        )
    order = "".join(rows)
    if not re.fullmatch(r"Et*m*L", order):
        raise _problem(f"layout {layout!r} is out of order", "write E first, then t, then m, then L")
    remaining = iter(names)
    return tuple(tuple(next(remaining) for _ in row) for row in rows)


def _problem(numbers: str, remedy: str) -> PlanError:
    return PlanError([Problem("pipeline layout", numbers, remedy)])


def _even(model: Model, stages: int) -> tuple[StageBlocks, ...]:
    if model.layers % stages:
        legal = [s for s in range(1, model.layers + 1) if model.layers % s == 0]
        raise PlanError(
            [
                Problem(
                    "layers divide by pp * vpp",
                    f"{model.layers} layers do not divide by pp * vpp = {stages}",
                    f"use pp * vpp of {', '.join(map(str, legal))}, or layout: balanced",
                )
            ]
        )
    names, per = sequence(model), model.layers // stages
    rows = [tuple(names[1 + i * per : 1 + (i + 1) * per]) for i in range(stages)]
    rows[0] = ("embedding", *rows[0])
    rows[-1] = (*rows[-1], *names[1 + model.layers :])
    return tuple(rows)


@lru_cache(maxsize=256)
def _balanced(model: Model, sequence_length: int, stages: int) -> tuple[StageBlocks, ...]:
    """Return the contiguous split with the lightest heaviest stage, FLOP as weight.

    Dynamic programme over (stages, blocks placed). Embedding and head stay with the first and last layer. Among equal
    splits the last stages take as much as they may, because the first ones hold the most activations.
    """
    first, *middle, last = sequence(model)
    job = Job(tokens=sequence_length, global_batch=1, sequence_length=sequence_length)
    flop = {k: float(total(b.forward, lambda op: op.flop)) for k, b in blocks(model, Plan(dp_shard=1), job).items()}
    weight = np.array([flop[name] for name in middle])
    weight[0] += flop[first]
    weight[-1] += flop[last]
    reach = np.concatenate([[0.0], np.cumsum(weight)])
    between = np.where(np.tri(len(reach), k=-1).T > 0, reach[None, :] - reach[:, None], np.inf)
    heaviest = [np.where(np.arange(len(reach)) == 0, 0.0, np.inf)]
    for _ in range(stages):
        heaviest.append(np.maximum(heaviest[-1][:, None], between).min(axis=0))
    limit, end = heaviest[-1][-1] * (1 + 1e-12), len(middle)
    rows: list[StageBlocks] = []
    for stage in range(stages - 1, -1, -1):
        begin = int(np.argmax((heaviest[stage] <= limit) & (between[:, end] <= limit)))
        rows.insert(0, tuple(middle[begin:end]))
        end = begin
    rows[0] = (first, *rows[0])
    rows[-1] = (*rows[-1], last)
    return tuple(rows)


def stage_blocks(model: Model, plan: Plan, job: Job) -> tuple[StageBlocks, ...]:
    """Return the kinds of blocks on each of the pp * vpp virtual stages, in the order of the model.

    Virtual stage ``chunk * pp + rank`` stands on pipeline rank ``rank``.

    Raises
    ------
    PlanError
        When the layers do not divide evenly and no layout is given, or the layout does not fit the model.
    """
    return stages_of(model, plan.layout, plan.stages, job.sequence_length)


@lru_cache(maxsize=1024)
def stages_of(model: Model, layout: str | None, stages: int, sequence_length: int) -> tuple[StageBlocks, ...]:
    """Return the blocks of each of `stages` stages under `layout`."""
    if layout not in (None, "balanced"):
        return _written(layout, model, stages)
    most = model.layers + model.mtp_layers
    if stages > most:
        numbers = f"{most} layers cannot fill pp * vpp = {stages} stages"
        raise PlanError([Problem("layers fill pp * vpp", numbers, f"use pp * vpp of at most {most}")])
    return _even(model, stages) if layout is None else _balanced(model, sequence_length, stages)
