"""Write a step as Chakra execution traces, which ASTRA-sim replays on its own network models.

One file per rank: kernels with their priced duration, collectives and messages with their bytes. What the network makes of
them is left to the simulator that reads the traces.

References
----------
MLCommons Chakra, ``schema/protobuf/et_def.proto``: messages, their field numbers, node and collective types.
ASTRA-sim, ``astra-sim/system/collective/Ring.cc``: the size of an all-gather is one rank's share.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from simulator.errors import PlanError, Problem, ProfileError
from simulator.feasibility import check
from simulator.scenario.mesh import group, members
from simulator.scenario.scenario import Scenario
from simulator.simulate import classify, node_seconds
from simulator.workload.build import build_step
from simulator.workload.experts import copies
from simulator.workload.ops import HOST, Op
from simulator.workload.step import StepProgram

VERSION = "0.0.4"
COMPUTE, SEND, RECEIVE, COLLECTIVE = 4, 5, 6, 7
_COLLECTIVES = {"all_reduce": 0, "all_gather": 2, "all_to_all": 6, "reduce_scatter": 7}
#: ranks of a written world: each is a file of thousands of nodes
MOST_RANKS = 1024

# protobuf's own numbers: types of fields, and whether one repeats
_UINT64, _INT32, _INT64, _BOOL, _STRING, _MESSAGE, _ENUM = 4, 5, 3, 8, 9, 11, 14
_ONE, _MANY = 1, 3
#: message -> fields: name, number, type, repeated, message or enum type, inside the oneof
_SCHEMA: dict[str, list[tuple[str, int, int, int, str, bool]]] = {
    "AttributeProto": [
        ("name", 1, _STRING, _ONE, "", False), ("int32_val", 7, _INT32, _ONE, "", True), ("int64_val", 9, _INT64, _ONE, "", True),
        ("bool_val", 27, _BOOL, _ONE, "", True), ("string_val", 29, _STRING, _ONE, "", True),
    ],
    "GlobalMetadata": [("version", 1, _STRING, _ONE, "", False), ("attr", 2, _MESSAGE, _MANY, "AttributeProto", False)],
    "Node": [
        ("id", 1, _UINT64, _ONE, "", False), ("name", 2, _STRING, _ONE, "", False), ("type", 3, _ENUM, _ONE, "NodeType", False),
        ("ctrl_deps", 4, _UINT64, _MANY, "", False), ("data_deps", 5, _UINT64, _MANY, "", False),
        ("duration_micros", 7, _UINT64, _ONE, "", False), ("attr", 10, _MESSAGE, _MANY, "AttributeProto", False),
    ],
}  # fmt: skip
_TYPES = {"INVALID_NODE": 0, "COMP_NODE": COMPUTE, "COMM_SEND_NODE": SEND, "COMM_RECV_NODE": RECEIVE, "COMM_COLL_NODE": COLLECTIVE}


@cache
def messages() -> dict[str, Any]:
    """Return the classes of Chakra's messages, made from the part of the schema that is written here.

    Raises
    ------
    ProfileError
        When protobuf is missing.
    """
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError:
        raise ProfileError("Chakra traces need protobuf; pip install 'myriad-simulator[chakra]'") from None
    package = "ChakraProtoMsg"
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package=package, syntax="proto3")
    kinds = file.enum_type.add(name="NodeType")
    for name, number in _TYPES.items():
        kinds.value.add(name=name, number=number)
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        if any(inside for *_, inside in fields):
            message.oneof_decl.add(name="value")
        for field, number, kind, label, of, inside in fields:
            added = message.field.add(name=field, number=number, type=kind, label=label)
            if of:
                added.type_name = f".{package}.{of}"
            if inside:  # else a false or a zero would be left out, and ASTRA-sim stops where is_cpu_op is missing
                added.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in _SCHEMA}


def save_chakra(scenario: Scenario, folder: str | Path, prefix: str = "step") -> list[Path]:
    """Write ``PREFIX.RANK.et`` of every rank and ``PREFIX.groups.json``, the ranks of every communicator, all or none.

    Parameters
    ----------
    scenario : Scenario
        Of at most `MOST_RANKS` ranks.
    folder : path
        Made when it does not exist.

    Returns
    -------
    list of Path
        The files, groups last.

    Raises
    ------
    PlanError
        When the scenario cannot run or has too many ranks.
    ProfileError
        When protobuf is missing.

    Notes
    -----
    Durations are whole microseconds, at least one. `comm_size` is in bytes: the buffer of an all-reduce or reduce-scatter,
    one rank's share of an all-gather, everything that a rank routes in an expert all-to-all, its own part included. Nodes of
    one stream follow one another by `ctrl_deps`. `is_cpu_op` is true for the host that launches the kernels of a pair beside them.
    """
    problems = check(scenario)
    if scenario.plan.world > MOST_RANKS:
        remedy = "write a smaller cluster with the same degrees and fewer data-parallel ranks"
        problems.append(Problem("few enough ranks", f"{scenario.plan.world} ranks are more than {MOST_RANKS} files", remedy))
    if problems:
        raise PlanError(problems)
    made, writer, folder = messages(), _Writer(scenario), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}.{rank}.et" for rank in range(scenario.plan.world)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as hidden:
        for rank, name in enumerate(names):
            with open(Path(hidden) / name, "wb") as file:
                for message in (made["GlobalMetadata"](version=VERSION), *writer.nodes(rank)):
                    data = message.SerializeToString()
                    file.write(_varint(len(data)) + data)
        names.append(f"{prefix}.groups.json")
        (Path(hidden) / names[-1]).write_text(json.dumps(writer.groups), encoding="utf-8")
        for name in names:
            (Path(hidden) / name).replace(folder / name)
    return [folder / name for name in names]


class _Writer:
    """Turns the program of a rank's class into the rank's own nodes."""

    def __init__(self, scenario: Scenario):
        model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
        self.scenario = scenario
        classes = classify(plan, cluster, job.expert_load if job.routing == "natural" else 1.0, every_rank=False)
        self.program: StepProgram = build_step(model, plan, job, classes)
        self.seconds = node_seconds(self.program, scenario)
        self.streams = self.program.streams()
        self.consumers: dict[int, int] = {}  # of a message: a node that waits for it, on another class
        for node, needs in enumerate(self.program.needs):
            for need in needs:
                if self.program.rank_class[need] != self.program.rank_class[node]:
                    self.consumers[need] = node
        axes = {task.axis for task in self.program.tasks if task.axis and task.axis != "pp"}
        self.member = {axis: members(plan, axis) for axis in sorted(axes)}
        self.groups: dict[str, list[int]] = {}
        self.number: dict[tuple[str, int], str] = {}
        for axis, of in self.member.items():
            for which in np.unique(of).tolist():
                self.number[axis, which] = str(len(self.groups) + 1)
                self.groups[self.number[axis, which]] = np.flatnonzero(of == which).tolist()

    def nodes(self, rank: int):
        """Yield the nodes of one rank, each after what it waits for on the same rank."""
        p, made = self.program, messages()["Node"]
        mine = int(p.classes.labels[rank])
        before = {n: m for (c, _), queue in self.streams.items() if c == mine for m, n in zip([None, *queue[:-1]], queue, strict=True)}
        received: dict[int, int] = {}
        for node in sorted(before):
            deps = []
            for need in p.needs[node]:
                if p.rank_class[need] == mine:
                    deps.append(need)
                    continue
                if need not in received:  # several nodes may wait for one message
                    received[need] = len(p) + need
                    yield self.message(made, RECEIVE, received[need], need, self.peer(rank, need, node), rank, [])
                deps.append(received[need])
            earlier = [] if before[node] is None or before[node] in deps else [before[node]]
            task = p.tasks[p.task[node]]
            if task.axis == "pp":
                consumer = self.consumers.get(node)
                if consumer is not None:
                    peer = self.peer(rank, node, consumer, back=True)
                    yield self.message(made, SEND, node, node, rank, peer, deps, earlier)
                continue
            made_node = made(id=node, name=f"{task.name} {p.label[node] or ''}".strip(), data_deps=deps, ctrl_deps=earlier)
            if task.axis:
                self.collective(made_node, task.ops[0], rank)
            else:
                made_node.type, made_node.duration_micros = COMPUTE, max(1, round(float(self.seconds[node]) * 1e6))
            made_node.attr.add(name="is_cpu_op", bool_val=task.stream == HOST)  # else it would keep the kernels of the pair waiting
            yield made_node

    def peer(self, rank: int, sender: int, receiver: int, back: bool = False) -> int:
        """Return the rank that sends to `rank`, or, going `back`, that receives from it: its place in the other stage."""
        plan, stage = self.scenario.plan, self.program.classes.stage
        hop = int(stage[self.program.rank_class[receiver]] - stage[self.program.rank_class[sender]])
        return (rank + (hop if back else -hop) * (plan.world // plan.pp)) % plan.world

    def message(self, made: Any, kind: int, number: int, sender: int, source: int, target: int, deps: list[int], earlier=()) -> Any:
        """Return the sending or receiving end of a message; the node that sends it is its tag."""
        task = self.program.tasks[self.program.task[sender]]
        node = made(id=number, name=f"{'send' if kind == SEND else 'receive'} {self.program.label[sender] or ''}".strip(), type=kind)
        node.data_deps.extend(deps)
        node.ctrl_deps.extend(earlier)
        node.attr.add(name="is_cpu_op", bool_val=False)
        node.attr.add(name="comm_size", int64_val=round(float(task.ops[0].bytes)))
        for name, value in (("comm_src", source), ("comm_dst", target), ("comm_tag", sender)):
            node.attr.add(name=name, int32_val=value)
        return node

    def collective(self, node: Any, op: Op, rank: int) -> None:
        node.type = COLLECTIVE
        node.attr.add(name="comm_type", int64_val=_COLLECTIVES[op.kind])
        node.attr.add(name="comm_size", int64_val=round(self.size(op)))
        node.attr.add(name="pg_name", string_val=self.number[op.axis, int(self.member[op.axis][rank])])

    def size(self, op: Op) -> float:
        """Return the bytes of a collective as ASTRA-sim counts them."""
        plan, cluster = self.scenario.plan, self.scenario.cluster
        g = group(plan, op.axis)
        if op.kind == "all_gather":
            return float(op.bytes) / float(g.size)
        if op.kind == "all_to_all" and op.axis == "ep":
            inside = g.within(cluster.host.scale_up_domain)
            out, fan = copies(self.scenario.model.experts, plan.fans_out, g.size, inside, np.ceil(g.size / inside))
            return float(op.bytes) * float(out + fan) * float(g.size) / max(float(g.size) - 1.0, 1.0)
        return float(op.bytes)


def _varint(number: int) -> bytes:
    """Return a length as protobuf's delimited streams write it: seven bits a byte, the last byte below 128."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
