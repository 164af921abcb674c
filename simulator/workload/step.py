"""The parts of a step program: tasks, who runs them, and the operations at the ends of a step. No seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.mesh import group
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, Plan
from simulator.schedules import Action
from simulator.workload.blocks import Block
from simulator.workload.classes import RankClasses
from simulator.workload.memory import MOMENTS
from simulator.workload.ops import BF16, COMPUTE, HOST, LAUNCH, Op, Segment

#: Newton-Schulz iterations of Muon per step (Jordan et al., "Muon", 2024)
MUON_ITERATIONS = 5


@dataclass(frozen=True, slots=True)
class Task:
    """What one stream executes without interruption: one collective, or kernels one after the other.

    Parameters
    ----------
    name, stream, axis : str
        For people; the queue; the axis of the collective, empty for kernels.
    ops : tuple of Op
        Run one after the other.
    of : (str, str)
        The block and the pass (F, B, I or W) that it is part of; empty for the rest of the step.
    """

    name: str
    stream: str
    axis: str
    ops: tuple[Op, ...]
    of: tuple[str, str] = ("", "")

    @property
    def computes(self) -> bool:
        """Whether it is kernels, whose speed is the device's; not communication, nor a wait for the host."""
        return self.stream == "compute" and not any(op.kind == HOST for op in self.ops)


Body = tuple[tuple[Task, ...], ...]


@dataclass(slots=True)
class StepProgram:
    """Tasks in the order of their streams, with what each waits for.

    Parameters
    ----------
    classes : RankClasses
    tasks : list of Task
        The distinct ones.
    task, rank_class : list of int
        For each node: its task and the class of ranks that runs it.
    needs : list of tuple of int
        Nodes that must end before it starts.
    meet : list of int
        Nodes of different classes with the same number start together and last as long as the longest; -1 for none.
    label : list of Action or None
        The forward or backward that it belongs to; None for the rest of the step.
    pair : list of (int, int) or None
        Stages of the forward and the backward in whose pair it runs, where communication hides beside compute.
    """

    classes: RankClasses
    tasks: list[Task] = field(default_factory=list)
    task: list[int] = field(default_factory=list)
    rank_class: list[int] = field(default_factory=list)
    needs: list[tuple[int, ...]] = field(default_factory=list)
    meet: list[int] = field(default_factory=list)
    label: list[Action | None] = field(default_factory=list)
    pair: list[tuple[int, int] | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.task)

    def streams(self) -> dict[tuple[int, str], list[int]]:
        """Return the nodes of each (class, stream), in order."""
        queues: dict[tuple[int, str], list[int]] = {}
        for node, (rank, task) in enumerate(zip(self.rank_class, self.task, strict=True)):
            queues.setdefault((rank, self.tasks[task].stream), []).append(node)
        return queues


def fused(segments: Iterable[Segment], plan: Plan, of: tuple[str, str] = ("", "")) -> Body:
    """Return segments as tasks: kernels in a row become one task, collectives of a single rank disappear."""
    body: list[tuple[Task, ...]] = []
    run: list[Op] = []

    def flush() -> None:
        if run:
            weight: dict[str, float] = {}
            for op in run:
                part = op.name.split(".")[0]
                weight[part] = weight.get(part, 0.0) + float(op.bytes) + float(op.flop)
            body.append((Task(max(weight, key=weight.__getitem__), "compute", "", tuple(run), of),))
            run.clear()

    for segment in segments:
        ops = [op for op in segment if op.flop or op.bytes or op.addressed or (op.kind in (HOST, LAUNCH) and op.launches)]
        ops = [op for op in ops if not op.axis or group(plan, op.axis).size > 1]
        if len(ops) == 1 and ops[0].kind in COMPUTE:
            run.append(ops[0])
        elif ops:
            flush()
            body.append(tuple(Task(op.name, op.stream, op.axis, (op,), of) for op in ops))
    flush()
    return tuple(body)


def _by_tensor(block: Block, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return, by axis, the fields of a collective that moves a block's matrices one by one; none when it moves all at once.

    Vectors stay with the matrices: DeepSpeed does not shard what is smaller than its ``param_persistence_threshold``.
    """
    if not (plan.overlap.by_tensor and plan.zero):
        return {"dp": {}, "edp": {}}
    routed = sum(name.startswith("moe.") for name, _ in block.matrices)
    return {"dp": {"turns": max(len(block.matrices) - routed, 1), "listed": True}, "edp": {"turns": max(routed, 1), "listed": True}}


def gradient_ops(block: Block, plan: Plan) -> tuple[Op, ...]:
    """Return the collectives that sum a block's gradients over its replicas.

    ZeRO shards reduce-scatter over the sharding group, or all-reduce and keep a shard (`Framework.reduces_whole`), then the replicas of
    a shard all-reduce it, then the two copies of the model in a DualPipe pipeline share it out.
    """
    dtype = plan.precision.gradient_reduce
    element = ELEMENT_BYTES[dtype]
    kind = "reduce_scatter" if plan.zero and not plan.framework.reduces_whole else "all_reduce"
    ops = []
    by_tensor = _by_tensor(block, plan)
    for axis, parameters, shard in (("dp", block.dense_parameters, plan.shard), ("edp", block.expert_parameters, plan.expert_shard)):
        ops.append(Op(f"gradients.{axis}", kind, bytes=parameters * element, axis=axis, dtype=dtype, **by_tensor[axis]))
        ops.append(
            Op(
                f"gradients.{axis}.replicas",
                "all_reduce",
                bytes=parameters * element / (shard if plan.zero else 1),
                axis="dp_replicate",
                dtype=dtype,
            )
        )
        ops.append(
            Op(f"gradients.{axis}.copies", kind, bytes=parameters * element / (shard if plan.zero else 1), axis="copies", dtype=dtype)
        )
    return tuple(ops)


def parameter_ops(block: Block, plan: Plan) -> tuple[Op, ...]:
    """Return the collectives that gather a block's parameters from their shards."""
    kept, cast = plan.precision.parameters, plan.precision.parameter_gather
    element = ELEMENT_BYTES[cast if cast and block.matrices else kept]  # embedding and head are no linear layers in low precision
    dense, expert = block.dense_parameters * element, block.expert_parameters * element
    by_tensor = _by_tensor(block, plan)
    return (
        Op("parameters.dp.copies", "all_gather", bytes=dense / plan.shard, axis="copies"),
        Op("parameters.dp", "all_gather", bytes=dense, axis="dp", **by_tensor["dp"]),
        Op("parameters.edp.copies", "all_gather", bytes=expert / plan.expert_shard, axis="copies"),
        Op("parameters.edp", "all_gather", bytes=expert, axis="edp", **by_tensor["edp"]),
    )


def gathers(plan: Plan, kind: str) -> int:
    """Return how often a pass F, B, I or W gathers the parameters of a block: under ZeRO-3 once, but for the weight gradients.

    Matrix by matrix, a layer that is computed again has dropped its parameters before its gradients need them: they come once more
    (DeepSpeed's hooks release them behind every forward, that of a recompute too, and fetch them ahead of a backward:
    ``post_sub_module_forward_function`` and ``pre_sub_module_backward_function``, deepspeed/runtime/zero).
    """
    if plan.zero < 3 or kind == "W":
        return 0
    return 2 if plan.overlap.by_tensor and plan.recompute == "full" and kind != "F" else 1


def optimizer_ops(dense, expert, model: Model, plan: Plan, job: Job) -> tuple[Op, ...]:
    """Return the optimizer's kernels on one rank.

    Notes
    -----
    Reads gradient, master and moments, writes master, moments and parameter. Muon adds, per a x b matrix with a <= b,
    ``5 (4 a^2 b + 2 a^3)`` FLOP of Newton-Schulz iterations (Jordan et al., 2024), here per parameter with a = b = hidden
    for dense and a, b = expert width, hidden for expert matrices.
    """
    p = plan.precision
    owned_dense, owned_expert = (
        (dense / plan.shard / plan.copies, expert / plan.expert_shard / plan.copies) if plan.zero else (dense, expert)
    )
    state = (ELEMENT_BYTES[p.master] if p.master else 0.0) + MOMENTS[job.optimizer] * ELEMENT_BYTES[p.moments]
    per_parameter = ELEMENT_BYTES[p.gradients] + 2 * state + ELEMENT_BYTES[p.parameters]
    owned = owned_dense + owned_expert
    ops = [Op("optimizer.norm", "memory", bytes=owned * ELEMENT_BYTES[p.gradients]), Op("optimizer", "memory", bytes=owned * per_parameter)]
    if job.optimizer == "muon":
        h, f = float(model.hidden), float(model.experts.ffn if model.experts else model.hidden)
        short, long = min(h, f), max(h, f)
        per_dense, per_expert = 6 * h, 4 * short + 2 * short**2 / long
        flop = MUON_ITERATIONS * (owned_dense * per_dense + owned_expert * per_expert)
        ops.insert(1, Op("optimizer.muon", "gemm", flop=flop, bytes=owned * BF16 * 2 * MUON_ITERATIONS, m=h, n=h, k=h))
    return tuple(ops)


def send_op(plan: Plan, model: Model, job: Job) -> Op:
    """Return the message that carries one micro-batch's activations (or their gradients) to the next stage."""
    whole = plan.micro_batch * job.sequence_length / plan.cp * model.hidden * BF16
    parts = plan.framework.splits_messages and not plan.sequence_parallel
    gathered = np.where(np.asarray(plan.tp) > 1, whole, 0.0) if parts else 0.0
    return Op("send", "send", bytes=whole / (plan.tp if plan.sequence_parallel or parts else 1), axis="pp", gathered=gathered)


NORM_OP = Op("optimizer.norm", "all_reduce", bytes=4.0, axis="world", dtype="fp32")
