"""Build the program of one optimizer step: the schedule's actions as chains of tasks on the streams of each class of ranks.

A rank works through its row on one chain: segments follow one another, the tasks of a segment run side by side. A pair of
forward and backward runs as two chains that take turns, so that each computes while the other communicates. Messages
between stages, gradient reduction and parameter gathering hang off the chain on the ``pp`` and ``dp`` streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.schedules import EXCHANGE, Action, Entry, Pair, Schedule, by_segments, schedule, turn_ends
from simulator.workload.blocks import Block, passes
from simulator.workload.classes import RankClasses
from simulator.workload.ops import Op, host_time, host_wait
from simulator.workload.stages import blocks, stage_blocks
from simulator.workload.step import (
    NORM_OP,
    Body,
    StepProgram,
    Task,
    fused,
    gathers,
    gradient_ops,
    optimizer_ops,
    parameter_ops,
    send_op,
)

#: what a stage without blocks does with a micro-batch: it waits for the message and hands it on
_EMPTY: Body = ((Task("empty", "compute", "", ()),),)


@dataclass(frozen=True)
class _Pieces:
    """The bodies of one block by kind of action, what keeps the host busy with them in a pair, and its data-parallel tasks."""

    body: dict[str, Body]
    host: dict[str, tuple[Task, ...]]
    gather: tuple[Task, ...]
    reduce: tuple[Task, ...]

    @classmethod
    def of(cls, name: str, block: Block, plan: Plan) -> _Pieces:
        of = {kind: passes(block, kind) for kind in "FBIW"}
        return cls(
            {kind: fused((*segments, (host_wait(segments, plan.kernels),)), plan, (name, kind)) for kind, segments in of.items()},
            {kind: _tasks([host_time(segments, plan.kernels)], plan, (name, kind)) for kind, segments in of.items()},
            _tasks(parameter_ops(block, plan), plan),
            _tasks(gradient_ops(block, plan), plan),
        )


def _tasks(ops: Iterable[Op], plan: Plan, of: tuple[str, str] = ("", "")) -> tuple[Task, ...]:
    return tuple(task for segment in fused(((op,) for op in ops), plan, of) for task in segment)


@dataclass
class _Thread:
    """A chain of segments: each starts when the one before it has ended."""

    last: tuple[int, ...] = ()
    #: where blocks began, the newest last: as many as are gathered ahead
    begun: tuple[tuple[int, ...], ...] = ()


@dataclass
class _Row:
    """What the builder remembers of one class of ranks."""

    rank_class: int
    rank: int
    thread: _Thread = field(default_factory=_Thread)
    gathered: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    held: list[tuple[tuple[Task, ...], tuple[int, ...], Action | None]] = field(default_factory=list)
    done: Counter = field(default_factory=Counter)
    ended: dict[tuple[str, int, int], tuple[int, ...]] = field(default_factory=dict)
    leaving: tuple[int, ...] = ()
    #: the last kernel launched
    kernel: tuple[int, ...] = ()


class _Builder:
    def __init__(self, model: Model, plan: Plan, job: Job, classes: RankClasses, steps: int, post_validation: bool):
        self.model, self.plan, self.job = model, plan, job
        self.steps, self.post_validation = steps, post_validation
        self.ahead = max(plan.overlap.prefetch, 1) if plan.zero >= 3 else 1
        self.schedule: Schedule = schedule(plan.schedule, plan.pp, plan.vpp, job.global_batch // (plan.dp * plan.micro_batch), plan.table)
        self.by_segments = by_segments(plan.schedule, plan.table)
        self.stages, self.blocks = stage_blocks(model, plan, job), blocks(model, plan, job)
        self.pieces = {name: _Pieces.of(name, block, plan) for name, block in self.blocks.items()}
        self.program = StepProgram(classes)
        self.send = Task("send", "pp", "pp", (send_op(plan, model, job),))
        self.norm, self.stage_norm = (_tasks([op], plan) for op in (NORM_OP, replace(NORM_OP, axis="dp")))
        self.state = Task("norm", "pp", "pp", (Op("norm", "send", bytes=NORM_OP.bytes, axis="pp"),))
        self.numbers: dict[int, int] = {}
        self.meetings: dict[tuple, int] = {}
        self.times: Counter = Counter()
        self.sent: dict[tuple, int] = {}
        self.waiting: list[tuple[int, tuple]] = []

    def build(self) -> StepProgram:
        classes = self.program.classes
        for c in range(len(classes.stage)):
            row = _Row(c, int(classes.stage[c]))
            for step in range(self.steps):
                self.gather_ahead(row)
                for entry in self.schedule.table[row.rank]:
                    self.run_entry(row, _later(entry, step * self.schedule.micro_batches))
                self.finish(row, step)
                row.done.clear()
        for node, key in self.waiting:
            self.program.needs[node] += (self.sent[key],)
        return self.program

    # --- nodes ---

    def emit(self, row: _Row, task: Task, needs: tuple[int, ...], label: Action | None) -> int:
        p, node = self.program, len(self.program)
        number = self.numbers.get(id(task))  # the program keeps the task, so its id stays its own
        if number is None:
            number = self.numbers[id(task)] = len(p.tasks)
            p.tasks.append(task)
        meet, places = -1, p.classes.meets.get(task.axis)
        if places is not None and places[row.rank_class] >= 0:
            place = (task.axis, task.stream, int(places[row.rank_class]))
            self.times[place, row.rank_class] += 1
            meet = self.meetings.setdefault((place, self.times[place, row.rank_class]), len(self.meetings))
        p.task.append(number)
        p.rank_class.append(row.rank_class)
        p.needs.append(needs)
        p.meet.append(meet)
        p.label.append(label)
        p.pair.append(None)
        if task.stream == "compute":
            row.kernel = (node,)
        return node

    def aside(self, row: _Row, tasks: Iterable[Task], needs: tuple[int, ...], label: Action | None) -> tuple[int, ...]:
        """Emit tasks on their own streams beside the chain."""
        return tuple(self.emit(row, task, needs, label) for task in tasks)

    def segments(
        self, row: _Row, thread: _Thread, body: Body, label: Action | None, also: tuple[int, ...] = ()
    ) -> Iterator[tuple[tuple[int, ...], bool]]:
        """Append `body` to the chain segment by segment; the first one also waits for the nodes in `also`.

        Yields the nodes of each segment and whether the turn of its action ends there, and before where a turn ends without nodes.
        """
        exchanges = 0
        thread.begun = (*thread.begun, thread.last)[-self.ahead :]
        for segment in body:
            streams = [task.stream for task in segment]
            before, after = turn_ends(streams, label is not None and label.kind == "F", exchanges, self.by_segments)
            exchanges += EXCHANGE in streams
            if before:
                yield (), True
            if self.plan.overlap.queued and EXCHANGE in streams:
                also += row.kernel
            thread.last = tuple(self.emit(row, task, thread.last + also, label) for task in segment)
            also = ()
            yield thread.last, after
        thread.last += also

    def release(self, row: _Row, keep: int = 0) -> None:
        """Emit the held tasks but for the last `keep`: reductions that let the gathers of the next blocks go first."""
        while len(row.held) > keep:
            tasks, needs, label = row.held.pop(0)
            self.aside(row, tasks, needs, label)

    # --- the schedule ---

    def run_entry(self, row: _Row, entry: Entry) -> None:
        left, row.leaving = row.leaving, ()  # messages that hold up this entry
        if isinstance(entry, Action):
            for _ in self.action(row, row.thread, entry, left):
                pass
            return
        begin = len(self.program)
        threads = [_Thread(row.thread.last, row.thread.begun) for _ in entry]
        turns = [self.action(row, thread, action, left, paired=True) for thread, action in zip(threads, entry, strict=True)]
        if not self.by_segments:
            turns.reverse()
        while turns:
            turns = [turn for turn in turns if next(turn, None) is not None]
        row.thread.last = _either(*(thread.last for thread in threads))
        both = zip_longest(*(reversed(thread.begun) for thread in threads), fillvalue=())
        row.thread.begun = tuple(_either(*nodes) for nodes in both)[::-1]
        held = self.schedule.held[row.rank]
        pair = held[entry.forward.chunk], held[entry.backward.chunk]
        self.program.pair[begin:] = [pair] * (len(self.program) - begin)

    def action(self, row: _Row, thread: _Thread, action: Action, left: tuple[int, ...], paired: bool = False) -> Iterator[bool]:
        """Append an action of one chunk: wait for its message, run its blocks, send the result on; yields where its turn ends.

        It also waits for the nodes in `left`. In a pair no block ends before the host has launched it, which serves both actions;
        alone, a wait behind its kernels says the same.
        """
        stage = self.schedule.held[row.rank][action.chunk]
        names, forward = list(enumerate(self.stages[stage])), action.kind == "F"
        first, also = True, self.local_input(row, action)
        thread.last += left
        for i, name in names if forward else reversed(names):
            piece = self.pieces[name]
            also += self.parameters(row, thread, piece, action, i)
            self.release(row, keep=self.ahead - 1)
            body, host = piece.body[action.kind], piece.host[action.kind] if paired else ()
            launched = self.aside(row, host, thread.last, action)
            for nodes, ends in self.segments(row, thread, body[:-1] if host else body, action, also):
                if first and nodes:
                    self.await_message(row, nodes, action)
                    first = False
                if ends:
                    yield True
            also = ()
            if launched:
                thread.last += launched
                if self.by_segments:  # its end has a turn, as segments have
                    yield True
            if action.kind in "BW" and self.reduces_now(row, action):
                row.held.append((piece.reduce, thread.last, action))
        if first:  # a stage without blocks hands the message on
            self.release(row, keep=self.ahead - 1)
            for nodes, _ in self.segments(row, thread, _EMPTY, action, also):
                self.await_message(row, nodes, action)
        row.done[action.kind, action.chunk] += 1
        self.hand_on(row, thread, action)

    def parameters(self, row: _Row, thread: _Thread, piece: _Pieces, action: Action, i: int) -> tuple[int, ...]:
        """Return the gathers that block `i` waits for: ZeRO-3 gathers for each pass, some blocks ahead; ZeRO-1 and 2 once."""
        if times := gathers(self.plan, action.kind):
            ahead = self.plan.overlap.prefetch
            start = thread.last if not ahead else thread.begun[-ahead] if len(thread.begun) >= ahead else ()
            return self.aside(row, piece.gather * times, start, action)
        first = action.kind == "F" and not row.done["F", action.chunk]
        return row.gathered.get((action.chunk, i), ()) if first else ()

    def reduces_now(self, row: _Row, action: Action) -> bool:
        """Whether the gradients of a block are complete with this action, or reduced for every micro-batch."""
        done = row.done["B", action.chunk] + row.done["W", action.chunk] + 1
        return self.plan.zero >= 2 or (self.plan.overlap.grad_reduce and done == len(self.schedule.expected(action.chunk)))

    # --- messages ---

    def local_input(self, row: _Row, action: Action) -> tuple[int, ...]:
        """Return the nodes that this rank itself ended with the input of `action`: the turn of a V, chunks of a single rank."""
        source = self.schedule.source(row.rank, action)
        if source is None or source[0] != row.rank:
            return ()
        kind = "F" if action.kind == "F" else "G"
        return row.ended[kind, source[1], action.micro_batch]

    def await_message(self, row: _Row, nodes: tuple[int, ...], action: Action) -> None:
        source = self.schedule.source(row.rank, action)
        if source is None or source[0] == row.rank:
            return
        neighbours = self.program.classes.before if (row.rank - source[0]) % self.plan.pp == 1 else self.program.classes.after
        kind = "F" if action.kind == "F" else "G"
        key = (int(neighbours[row.rank_class]), kind, source[1], action.micro_batch)
        self.waiting += [(node, key) for node in nodes]

    def hand_on(self, row: _Row, thread: _Thread, action: Action) -> None:
        target = self.schedule.target(row.rank, action)
        if target is None:
            return
        kind = "F" if action.kind == "F" else "G"
        if target[0] == row.rank:
            row.ended[kind, action.chunk, action.micro_batch] = thread.last
        else:
            node = self.sent[row.rank_class, kind, action.chunk, action.micro_batch] = self.emit(row, self.send, thread.last, action)
            if not self.plan.overlap.pp:
                row.leaving += (node,)

    # --- the ends of the step ---

    def gather_ahead(self, row: _Row) -> None:
        """Gather the parameters that the last optimizer step sharded, ahead of the first forward."""
        if self.plan.zero in (1, 2) and self.plan.overlap.param_gather:
            held = self.schedule.held[row.rank]
            for chunk in sorted(range(len(held)), key=held.__getitem__):  # both copies of a stage gather it in the same turn
                stage = held[chunk]
                for i, name in enumerate(self.stages[stage]):
                    row.gathered[chunk, i] = self.aside(row, self.pieces[name].gather, row.thread.last, None)

    def own(self, row: _Row) -> list[str]:
        """Return the blocks of the rank, chunk by chunk."""
        return [name for stage in self.schedule.held[row.rank] for name in self.stages[stage]]

    def one_by_one(self, row: _Row, tasks: Iterable[Task]) -> None:
        for task in tasks:
            row.thread.last = (self.emit(row, task, row.thread.last, None),)

    def finish(self, row: _Row, step: int) -> None:
        """Append what is left of the gradient reduction, the global norm, the optimizer, and the gather that does not run ahead."""
        own, plan = self.own(row), self.plan
        self.release(row)
        if plan.zero < 2 and not plan.overlap.grad_reduce:
            self.one_by_one(row, (task for name in reversed(own) for task in self.pieces[name].reduce))
        # the norm is on the dp stream, so it also waits for every reduction before it
        self.partial_norm(row, step) if self.post_validation else self.one_by_one(row, self.norm)
        dense, expert = (sum(float(getattr(self.blocks[name], f)) for name in own) for f in ("dense_parameters", "expert_parameters"))
        optimizer = fused([(op,) for op in optimizer_ops(dense, expert, self.model, plan, self.job)], plan)
        for _ in self.segments(row, row.thread, optimizer, None):
            pass
        if plan.zero in (1, 2) and not plan.overlap.param_gather:
            self.one_by_one(row, (task for name in own for task in self.pieces[name].gather))
        row.thread.begun = (row.thread.last,) * self.ahead  # the next step gathers what the optimizer has written

    def partial_norm(self, row: _Row, step: int) -> None:
        """Sum the norm inside the stage, add what the stages before have, hand it on; nobody waits for the stages after."""
        self.one_by_one(row, self.stage_norm)
        if row.rank:
            place = self.program.classes.before[row.rank_class]
            (node,) = row.thread.last = (self.emit(row, _EMPTY[0][0], row.thread.last, None),)
            self.waiting.append((node, (int(place), "norm", 0, step)))
        if row.rank < self.plan.pp - 1:
            self.sent[row.rank_class, "norm", 0, step] = self.emit(row, self.state, row.thread.last, None)


def _either(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(one + other))


def _later(entry: Entry, micro_batches: int) -> Entry:
    """Return an entry of a later step, whose micro-batches are counted on."""
    if isinstance(entry, Pair):
        return Pair(*(_later(action, micro_batches) for action in entry))
    return entry._replace(micro_batch=entry.micro_batch + micro_batches)


def build_step(model: Model, plan: Plan, job: Job, classes: RankClasses, steps: int = 1, post_validation: bool = False) -> StepProgram:
    """Return the program of one optimizer step, or of several in a row.

    Parameters
    ----------
    model, plan, job
        What runs; `plan` must be legal (`simulator.feasibility`).
    classes : RankClasses
        For which ranks.
    steps : int
        Micro-batches are counted on from step to step.
    post_validation : bool
        Update the parameters with the gradient norm of the stages so far, and validate later, instead of waiting for all.

    Notes
    -----
    With post-validation the norm goes from stage to stage, and a stage begins the next step after its own optimizer. The whole
    norm comes back while the next forwards run, in messages of a few bytes that nothing waits for; a step that turns out to be
    wrong (clipped, or not finite) is rolled back: rare, and not simulated.

    References
    ----------
    Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, section 4 (optimizer post-validation).
    """
    return _Builder(model, plan, job, classes, steps, post_validation).build()
