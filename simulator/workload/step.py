"""One optimizer step as a program: what each class of ranks does, on which stream, in which order. No seconds.

A rank works through its schedule on one chain: segments follow one another, the tasks of a segment run side by side on
their streams. Messages between stages, gradient reduction and parameter gathering hang off the chain on the ``pp`` and
``dp`` streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from simulator.scenario.job import Job
from simulator.scenario.mesh import group
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, Plan
from simulator.workload.classes import RankClasses
from simulator.workload.memory import MOMENTS
from simulator.workload.ops import BF16, Block, Op, Segment
from simulator.workload.schedules import Action, schedule
from simulator.workload.stages import blocks, stage_blocks

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
    """

    name: str
    stream: str
    axis: str
    ops: tuple[Op, ...]


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
    """

    classes: RankClasses
    tasks: list[Task] = field(default_factory=list)
    task: list[int] = field(default_factory=list)
    rank_class: list[int] = field(default_factory=list)
    needs: list[tuple[int, ...]] = field(default_factory=list)
    meet: list[int] = field(default_factory=list)
    label: list[Action | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.task)

    def streams(self) -> dict[tuple[int, str], list[int]]:
        """Return the nodes of each (class, stream), in order."""
        queues: dict[tuple[int, str], list[int]] = {}
        for node, (rank, task) in enumerate(zip(self.rank_class, self.task, strict=True)):
            queues.setdefault((rank, self.tasks[task].stream), []).append(node)
        return queues


def fused(segments: Iterable[Segment], plan: Plan) -> Body:
    """Return segments as tasks: kernels in a row become one task, collectives of a single rank disappear."""
    body: list[tuple[Task, ...]] = []
    run: list[Op] = []

    def flush() -> None:
        if run:
            weight: dict[str, float] = {}
            for op in run:
                part = op.name.split(".")[0]
                weight[part] = weight.get(part, 0.0) + float(op.bytes) + float(op.flop)
            body.append((Task(max(weight, key=weight.__getitem__), "compute", "", tuple(run)),))
            run.clear()

    for segment in segments:
        ops = [op for op in segment if op.flop or op.bytes]
        ops = [op for op in ops if not op.axis or group(plan, op.axis).size > 1]
        if len(ops) == 1 and ops[0].stream == "compute":
            run.append(ops[0])
        elif ops:
            flush()
            body.append(tuple(Task(op.name, op.stream, op.axis, (op,)) for op in ops))
    flush()
    return tuple(body)


def gradient_ops(block: Block, plan: Plan) -> tuple[Op, ...]:
    """Return the collectives that sum a block's gradients over its replicas.

    ZeRO shards reduce-scatter over the sharding group, then the replicas of a shard all-reduce it.
    """
    element = ELEMENT_BYTES[plan.precision.gradient_reduce]
    kind = "reduce_scatter" if plan.zero else "all_reduce"
    ops = []
    for axis, parameters, shard in (("dp", block.dense_parameters, plan.shard), ("edp", block.expert_parameters, plan.expert_shard)):
        ops.append(Op(f"gradients.{axis}", kind, bytes=parameters * element, axis=axis))
        ops.append(
            Op(f"gradients.{axis}.replicas", "all_reduce", bytes=parameters * element / (shard if plan.zero else 1), axis="dp_replicate")
        )
    return tuple(ops)


def parameter_ops(block: Block, plan: Plan) -> tuple[Op, ...]:
    """Return the collectives that gather a block's parameters from their shards."""
    element = ELEMENT_BYTES[plan.precision.parameters]
    return (
        Op("parameters.dp", "all_gather", bytes=block.dense_parameters * element, axis="dp"),
        Op("parameters.edp", "all_gather", bytes=block.expert_parameters * element, axis="edp"),
    )


def optimizer_ops(dense, expert, model: Model, plan: Plan, job: Job) -> tuple[Op, ...]:
    """Return the optimizer's kernels on one rank.

    Notes
    -----
    Reads gradient, master and moments, writes master, moments and parameter. Muon adds, per a x b matrix with a <= b,
    ``5 (4 a^2 b + 2 a^3)`` FLOP of Newton-Schulz iterations (Jordan et al., 2024), here per parameter with a = b = hidden
    for dense and a, b = expert width, hidden for expert matrices.
    """
    p = plan.precision
    owned_dense, owned_expert = (dense / plan.shard, expert / plan.expert_shard) if plan.zero else (dense, expert)
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
    tokens = plan.micro_batch * job.sequence_length / plan.cp
    split = plan.tp if plan.sequence_parallel else 1
    return Op("send", "send", bytes=tokens / split * model.hidden * BF16, axis="pp")


#: what a stage without blocks does with a micro-batch: it waits for the message and hands it on
_EMPTY: Body = ((Task("empty", "compute", "", ()),),)

NORM_OP = Op("optimizer.norm", "all_reduce", bytes=4.0, axis="world")


@dataclass
class _Chain:
    """Emits the nodes of one class of ranks."""

    program: StepProgram
    rank: int
    meeting: dict[tuple, int]
    numbers: dict[int, int]
    last: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()
    counts: dict[tuple, int] = field(default_factory=dict)
    held: list[tuple[tuple[Task, ...], tuple[int, ...], Action | None]] = field(default_factory=list)

    def emit(self, task: Task, needs: tuple[int, ...], label: Action | None) -> int:
        p, node = self.program, len(self.program)
        number = self.numbers.get(id(task))  # the program keeps the task, so its id stays its own
        if number is None:
            number = self.numbers[id(task)] = len(p.tasks)
            p.tasks.append(task)
        meet, places = -1, p.classes.meets.get(task.axis)
        if places is not None and places[self.rank] >= 0:
            place = (task.axis, task.stream, int(places[self.rank]))
            self.counts[place] = count = self.counts.get(place, 0) + 1
            meet = self.meeting.setdefault((*place, count), len(self.meeting))
        p.task.append(number)
        p.rank_class.append(self.rank)
        p.needs.append(needs)
        p.meet.append(meet)
        p.label.append(label)
        return node

    def run(self, body: Body, label: Action | None, also: tuple[int, ...] = ()) -> None:
        """Append `body` to the chain; its first segment also waits for the nodes in `also`."""
        self.earlier = self.last
        for segment in body:
            self.last = tuple(self.emit(task, self.last + also, label) for task in segment)
            also = ()
        if also:
            self.last += also

    def aside(self, tasks: Iterable[Task], needs: tuple[int, ...], label: Action | None) -> tuple[int, ...]:
        """Emit tasks on their own streams beside the chain; the last of each stream is returned."""
        return tuple(self.emit(task, needs, label) for task in tasks)

    def release(self) -> None:
        """Emit the held tasks: reductions that let the gather of the next block go first."""
        for tasks, needs, label in self.held:
            self.aside(tasks, needs, label)
        self.held.clear()


@dataclass(frozen=True)
class _Pieces:
    """The bodies and side tasks of one block."""

    forward: Body
    backward: Body
    gather: tuple[Task, ...]
    reduce: tuple[Task, ...]


def _tasks(ops: Iterable[Op], plan: Plan) -> tuple[Task, ...]:
    return tuple(task for segment in fused(((op,) for op in ops), plan) for task in segment)


def _pieces(all_blocks: Mapping[str, Block], plan: Plan) -> dict[str, _Pieces]:
    return {
        name: _Pieces(
            fused(b.forward, plan), fused(b.backward, plan), _tasks(parameter_ops(b, plan), plan), _tasks(gradient_ops(b, plan), plan)
        )
        for name, b in all_blocks.items()
    }


def build_step(model: Model, plan: Plan, job: Job, classes: RankClasses) -> StepProgram:
    """Return the program of one optimizer step.

    Parameters
    ----------
    model, plan, job
        What runs; `plan` must be legal (`simulator.feasibility`).
    classes : RankClasses
        For which ranks.
    """
    stages, all_blocks = stage_blocks(model, plan, job), blocks(model, plan, job)
    pieces, program = _pieces(all_blocks, plan), StepProgram(classes)
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    table = schedule(plan.schedule, plan.pp, plan.vpp, micro_batches)
    send = Task("send", "pp", "pp", (send_op(plan, model, job),))
    meeting: dict[tuple, int] = {}
    numbers: dict[int, int] = {}
    sent: dict[tuple, int] = {}
    waiting: list[tuple[int, tuple]] = []
    for c in range(len(classes.stage)):
        chain, rank = _Chain(program, c, meeting, numbers), int(classes.stage[c])
        gathered = _gather_ahead(chain, pieces, stages, plan, rank)
        for action in table[rank]:
            _run_action(chain, action, pieces, stages, plan, micro_batches, gathered, (send, sent, waiting))
        _finish(chain, pieces, all_blocks, stages, model, plan, job, rank)
    for node, key in waiting:
        program.needs[node] += (sent[key],)
    return program


def _own(stages: tuple, plan: Plan, rank: int) -> list[str]:
    return [name for chunk in range(plan.vpp) for name in stages[chunk * plan.pp + rank]]


def _gather_ahead(
    chain: _Chain, pieces: Mapping[str, _Pieces], stages: tuple, plan: Plan, rank: int
) -> dict[tuple[int, int], tuple[int, ...]]:
    """Gather the parameters that the last optimizer step sharded, ahead of the first forward; by (chunk, position)."""
    if plan.zero not in (1, 2) or not plan.overlap.param_gather:
        return {}
    return {
        (chunk, i): chain.aside(pieces[name].gather, (), None)
        for chunk in range(plan.vpp)
        for i, name in enumerate(stages[chunk * plan.pp + rank])
    }


def _run_action(
    chain: _Chain,
    action: Action,
    pieces: Mapping[str, _Pieces],
    stages: tuple,
    plan: Plan,
    micro_batches: int,
    gathered: dict,
    messages: tuple,
) -> None:
    """Append a forward or backward of one chunk: wait for its message, run its blocks, send the result on."""
    send, sent, waiting = messages
    classes, forward = chain.program.classes, action.kind == "F"
    stage = action.chunk * plan.pp + int(classes.stage[chain.rank])
    first, last = (0, len(stages) - 1) if forward else (len(stages) - 1, 0)
    alone = plan.pp == 1  # chunks of one rank hand over without a message
    names = list(enumerate(stages[stage]))
    start = len(chain.program)
    for i, name in names if forward else reversed(names):
        piece, also = pieces[name], ()
        if plan.zero >= 3:  # gathered again for each pass, one block ahead
            also = chain.aside(piece.gather, chain.earlier, action)
        elif forward and action.micro_batch == 0:
            also = gathered.get((action.chunk, i), ())
        chain.release()
        chain.run(piece.forward if forward else piece.backward, action, also)
        final = action.micro_batch == micro_batches - 1
        if not forward and (plan.zero >= 2 or (final and plan.overlap.grad_reduce)):
            chain.held.append((piece.reduce, chain.last, action))
    if not names:
        chain.release()
        chain.run(_EMPTY, action)
    if stage != first and not alone:
        neighbour = classes.before if forward else classes.after
        key = (int(neighbour[chain.rank]), action.kind, stage + (-1 if forward else 1), action.micro_batch)
        body = next(n for n in range(start, len(chain.program)) if chain.program.tasks[chain.program.task[n]].stream != "dp")
        waiting.append((body, key))
    if stage != last and not alone:
        node = chain.emit(send, chain.last, action)
        sent[(chain.rank, action.kind, stage, action.micro_batch)] = node


def _finish(
    chain: _Chain,
    pieces: Mapping[str, _Pieces],
    all_blocks: Mapping[str, Block],
    stages: tuple,
    model: Model,
    plan: Plan,
    job: Job,
    rank: int,
) -> None:
    """Append the end of the step: what is left of the gradient reduction, the global norm, the optimizer, the gather."""
    own = _own(stages, plan, rank)
    chain.release()
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        for name in reversed(own):
            for task in pieces[name].reduce:
                chain.last = (chain.emit(task, chain.last, None),)
    norm = fused([(NORM_OP,)], plan)
    chain.run(norm, None)  # on the dp stream, so it also waits for every reduction before it
    dense, expert = (sum(float(getattr(all_blocks[name], f)) for name in own) for f in ("dense_parameters", "expert_parameters"))
    chain.run(fused([(op,) for op in optimizer_ops(dense, expert, model, plan, job)], plan), None)
    if plan.zero in (1, 2) and not plan.overlap.param_gather:
        for name in own:
            for task in pieces[name].gather:
                chain.last = (chain.emit(task, chain.last, None),)
