"""Operation to seconds: the one place where the workload meets compute and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from simulator.network import collectives
from simulator.network.sharing import share
from simulator.pricing import compute
from simulator.scenario.cluster import Cluster, InTraining
from simulator.scenario.kernels import Kernels
from simulator.scenario.mesh import Group, placed
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, Plan
from simulator.units import Number
from simulator.workload.attention import ATTENTION_BACKWARD_FLOP
from simulator.workload.experts import copies
from simulator.workload.ops import COMPUTE, EXPERT_LAUNCH, HOST, LAUNCH, Op, Segment, awaited, launched, launches_of, reads_back

_COLLECTIVES = {
    "all_gather": collectives.all_gather_s,
    "reduce_scatter": collectives.reduce_scatter_s,
    "all_reduce": collectives.all_reduce_s,
}


def op_s(op: Op, model: Model, plan: Plan, cluster: Cluster, load: Number = 1.0, graph: bool = False, slow: float = 1.0) -> Number:
    """Return the seconds of one operation; parameters as for `Known` and its `Known.op_s`."""
    return Known(model, plan, cluster, graph).op_s(op, load, slow)


class Known:
    """Prices of operations, each found once for what decides it.

    Recompute runs the same kernels again: tables of plans that differ only in it share most of their prices.

    Parameters
    ----------
    model, plan, cluster
        What decides groups and rates; `plan` may be columns of plans.
    graph : bool
        Ask the cluster's graph what concurrent groups leave each other (`simulator.network.sharing`; a single plan only), not
        the oversubscription of its tiers.
    """

    def __init__(self, model: Model, plan: Plan, cluster: Cluster, graph: bool = False):
        self._of = model, plan, cluster, graph
        self._dispatch_s = cluster.host.dispatch_s
        self._seconds: dict[tuple, Number] = {}

    def op_s(self, op: Op, load: Number = 1.0, slow: float = 1.0) -> Number:
        """Return the seconds of one operation.

        Parameters
        ----------
        op : Op
        load : Number
            Tokens routed to this rank over the mean; scales the routed operations. Many loads at once for a single plan.
        slow : float
            How many times as long kernels take beside communication (`simulator.pricing.beside`); the host launches more meanwhile.

        Returns
        -------
        Number
            Seconds, one per plan or per load.
        """
        if op.routed and (np.ndim(load) > 0 or load != 1.0):
            op = loaded(op, load)
        if op.kind == HOST:
            return wait_s(op.beside, lambda part: self.op_s(part, slow=slow), self._of[1].kernels, self._dispatch_s)
        if op.kind == LAUNCH:
            return op.launches * (self._dispatch_s or 0.0) + self.segments_s(op.beside, slow)
        words = op.name, op.kind, op.axis, op.dtype, op.listed, op.grad if op.grad in ("input", "weight") else ""  # again is forward
        behind = tuple((other.kind, other.axis, other.dtype, _hashable(other.bytes)) for other in op.behind)
        key = (*words, *behind, *map(_hashable, _NUMBERS(op)))
        if key not in self._seconds:
            self._seconds[key] = _full_s(op, *self._of)
        return slow * self._seconds[key] if op.kind in COMPUTE else self._seconds[key]

    def segments_s(self, segments: Iterable[Segment], slow: float = 1.0) -> Number:
        """Return the seconds of segments run one after the other; operations of a segment run side by side."""
        seconds: Number = 0.0
        for segment in segments:
            seconds = seconds + longest([self.op_s(op, slow=slow) for op in segment])
        return seconds

    def in_turn_s(self, ops: Iterable[Op]) -> Number:
        """Return the seconds of operations one after the other."""
        return sum(map(self.op_s, ops), 0.0)


def wait_s(segments: tuple[Segment, ...], seconds: Callable[[Op], Number], kernels: Kernels, dispatch_s: float | None) -> Number:
    """Return how much longer a pass of a block takes than its segments, because one thread launches its kernels.

    Parameters
    ----------
    segments : tuple of Segment
        All of the pass.
    seconds : callable
        Returns the seconds of an operation.
    dispatch_s : float or None
        What a kernel of a module of Transformer Engine costs the host; None costs nothing.

    Notes
    -----
    A host that never reads from the device is as far ahead as it gets: the pass takes the longer of all launches, with what the host
    waits for, and all segments. Where it reads how many rows the experts get, it has nothing launched ahead any more: the device waits
    for the next launch, and each part between two such reads takes its own time. Kernel i starts when the one before it has ended and
    its first launch is done, and ends no sooner than its last: the pace of equal blocks in a row is that of the second of two.
    """
    if dispatch_s is None:
        return 0.0
    priced = [[seconds(op) for op in segment] for segment in segments]
    lasts = list(map(longest, priced))
    device = sum(lasts, 0.0)
    reads = reads_back(segments, kernels)
    if not reads:
        meanwhile = device - sum((lasts[at] for at in awaited(segments, kernels)), 0.0)
        return compute.host_wait_s(launched(segments, kernels), meanwhile, dispatch_s)
    launches = launches_of(segments, kernels)
    host: Number = 0.0
    ended: Number = 0.0
    began: Number = 0.0
    for _ in range(2):
        began = ended
        for at, (row, lengths) in enumerate(zip(launches, priced, strict=True)):
            if reads.get(at) is False:
                host = np.maximum(host, ended)
            start = ended
            for many, length in zip(row, lengths, strict=True):
                if not np.any(many):
                    ended = np.maximum(ended, start + length)
                    continue
                first, host = host + np.minimum(many, 1.0) * dispatch_s, host + many * dispatch_s
                ended = np.maximum(np.maximum(ended, host), np.maximum(start, first) + length)
            if reads.get(at):
                host = np.maximum(host, ended)
    return np.maximum(ended - began - device, 0.0)


def longest(parts: list[Number]) -> Number:
    """Return the longest of operations that run side by side, for every plan."""
    return parts[0] if len(parts) == 1 else np.maximum.reduce(np.broadcast_arrays(*parts))


#: the numbers that decide what an operation costs
_NUMBERS = attrgetter(
    "flop", "bytes", "m", "n", "k", "groups", "turns", "streams", "launches", "kernels", "apart", "written", "addressed", "gathered"
)


def _hashable(value: Number) -> Any:
    return (value.dtype.char, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def _full_s(op: Op, model: Model, plan: Plan, cluster: Cluster, graph: bool) -> Number:
    """Return the seconds of one operation at full speed."""
    if np.any(np.not_equal(op.turns, 1.0)):
        one = replace(op, flop=op.flop / op.turns, bytes=op.bytes / op.turns, turns=1.0)
        return op.turns * _full_s(one, model, plan, cluster, graph)
    if op.kind in COMPUTE:
        seconds = _kernel_s(op, plan, cluster) / (1.0 - plan.overlap.collective_multiprocessors * np.asarray(op.apart))
        if op.behind and cluster.accelerator.displaced_product:
            # blocks without a place start when the collective has ended, or else the other blocks
            later = seconds * (1.0 / cluster.accelerator.displaced_product - 1.0)
            seconds = seconds + np.minimum(later, _full_s(op.behind[0], model, plan, cluster, graph))
        return seconds
    return _collective_s(op, model, plan, cluster, graph)


def _collective_s(op: Op, model: Model, plan: Plan, cluster: Cluster, graph: bool) -> Number:
    """Return the seconds of a collective or a message."""
    members, out, fan = placed(plan, op.axis, cluster.host.accelerators), 1.0, 0.0
    if op.kind != "send" and not op.listed and not np.any((np.asarray(members.size) > 1) & (np.asarray(op.bytes) > 0)):
        return np.zeros(np.broadcast_shapes(np.shape(members.size), np.shape(op.bytes)))  # none is called
    if graph and members.size > 1:
        kept = share(plan, cluster, op.axis, op.kind)
        members = replace(members, share=kept.rate if kept else 1.0)
    if op.kind == "send":
        seconds = collectives.send_s(op.bytes, members, cluster)
    elif op.kind == "all_to_all":
        out, fan = _copies(op, model, plan, cluster)
        seconds = collectives.expert_all_to_all_s(op.bytes, members, cluster, out, fan)
    else:
        seconds = _COLLECTIVES[op.kind](op.bytes, members, cluster) / _kept(members, cluster)
    for ranks in measured_ranks(op, cluster):
        talk = cluster.host.collectives[f"{op.kind}.{op.dtype}.{ranks}"]
        size = np.minimum(members.size, 2) if op.kind == "send" else np.asarray(members.size)  # a message has two ends
        seconds = np.where(size == ranks, collectives.measured_s(op.bytes * (out + fan), talk), seconds)
    if np.any(op.gathered):
        seconds = seconds + _collective_s(Op(op.name, "all_gather", bytes=op.gathered, axis="tp"), model, plan, cluster, graph)
    if op.listed:
        seconds = seconds + _copies_of_parts_s(op, members.size, cluster)
    return seconds if op.kind == "send" else np.where(np.asarray(op.bytes) > 0, seconds, 0.0)  # nothing to send: none is called


def _kept(members: Group, cluster: Cluster) -> Number:
    """Return the share of its benchmark's speed that a collective keeps in a step: all of it inside a scale-up domain."""
    _, domains = collectives.crossings(members, cluster)
    return np.where(domains > 1, cluster.accelerator.in_training.get("scale_out", 1.0), 1.0)


def _copies_of_parts_s(op: Op, ranks: Number, cluster: Cluster) -> Number:
    """Return the seconds of copying every rank's part of a collective, read and written, by a kernel for each.

    A loop in C++ launches them while the device waits (`simulator.workload.ops.EXPERT_LAUNCH`).
    """
    launched = compute.host_wait_s(np.asarray(ranks) * EXPERT_LAUNCH, 0.0, cluster.host.dispatch_s)
    return np.maximum(launched, compute.memory_s(2.0 * op.bytes, cluster.accelerator, ranks))


def _kernel_s(op: Op, plan: Plan, cluster: Cluster) -> Number:
    """Return the seconds of a kernel at full speed: as measured on this machine, or by the model of its kind."""
    kernels = cluster.accelerator.kernels
    if kernels and (cost := kernels.get(kernel_name(op))):
        kept = cluster.accelerator.in_training.get(training_part(kernel_name(op)), 1.0)
        return compute.measured_s(op.flop, op.bytes, op.groups, cost, keys_of(op), kept)
    if op.kind in ("gemm", "grouped_gemm"):
        apart = op.kind == "grouped_gemm" and plan.kernels.experts != "fused"
        weights = op.n * (op.m * op.written if op.grad == "weight" else op.k * ELEMENT_BYTES[op.dtype])
        grouped = op.groups * weights * (np.asarray(op.groups) > 1) if apart else 0.0
        whole = compute.whole_vectors(op.m if op.grad == "weight" else op.k, op.n, op.dtype)  # the rest counts tokens: no row
        batched = op.kind == "gemm" and np.any(np.asarray(op.groups) > 1)
        shape = op.m, op.n, op.k, op.groups * op.streams, op.dtype
        return compute.gemm_s(op.flop, op.bytes, *shape, grouped, cluster.accelerator, whole, batched, op.written)
    if op.kind == "attention":
        width, backward = (op.k + op.n) / 2, op.grad == "input"
        seen, rows = keys_of(op), op.m * op.groups
        return compute.attention_s(op.flop, op.bytes, width, seen, rows, backward, cluster.accelerator, plan.kernels.attention)
    run = np.maximum(op.launches, op.kernels)
    return compute.memory_s(op.bytes, cluster.accelerator, run, gathers=op.name.endswith("permute"), addressed=op.addressed)


def kernel_name(op: Op) -> str:
    """Return the kind of kernel that `op` is, as measurements name it: ``gemm.weight``, ``norm.backward``, ``optimizer`` ..."""
    if op.name.startswith("optimizer"):
        return op.name
    if op.kind in ("gemm", "grouped_gemm"):
        return f"{op.kind}.{op.grad if op.grad in ('input', 'weight') else 'forward'}"
    kind = "attention" if op.kind == "attention" else op.name.split(".")[-1]
    return f"{kind}.{'backward' if op.grad == 'input' else 'forward'}"


#: the part of ``Accelerator.in_training`` that a measured kind of kernel belongs to; all others are bound by memory
_TRAINING_PARTS: dict[str, InTraining] = {"gemm": "gemm", "grouped_gemm": "grouped", "attention": "attention", "optimizer": "optimizer"}


def training_part(name: str) -> InTraining:
    """Return the part of ``Accelerator.in_training`` that a kind of kernel, as `kernel_name` names it, belongs to."""
    return _TRAINING_PARTS.get(name.split(".")[0], "memory")


def keys_of(op: Op) -> Number:
    """Return the mean number of keys that a query of an attention sees; 0 for another kernel."""
    if op.kind != "attention":
        return 0.0
    passes = ATTENTION_BACKWARD_FLOP if op.grad == "input" else 1.0
    return op.flop / (2.0 * passes * op.m * op.groups * (op.k + op.n))


def measured_ranks(op: Op, cluster: Cluster) -> list[int]:
    """Return the sizes of groups for which the collective `op` was measured on this machine."""
    start = f"{op.kind}.{op.dtype}."
    return [int(name.removeprefix(start)) for name in cluster.host.collectives if name.startswith(start)]


def _copies(op: Op, model: Model, plan: Plan, cluster: Cluster) -> tuple[Number, Number]:
    """Return the copies of a token, or the parts of an evenly exchanged buffer, that leave the scale-up domain, and that stay in it."""
    members = placed(plan, op.axis, cluster.host.accelerators)
    inside, domains = collectives.crossings(members, cluster)
    if op.axis != "ep":
        return (members.size - inside) / members.size, (inside - 1) / members.size
    assert model.experts is not None
    return copies(model.experts, plan.fans_out, members.size, inside, domains)


#: bytes that a ring collective moves in device memory per byte of its buffer: the neighbour writes, the next step reads; a
#: reduction also reads the rank's own part; an all-reduce is a reduce-scatter and an all-gather
_PASSES = {"all_gather": 2.0, "reduce_scatter": 3.0, "all_reduce": 5.0}


def device_bytes(op: Op, model: Model, plan: Plan, cluster: Cluster) -> Number:
    """Return the bytes that a collective reads and writes in this rank's device memory.

    Notes
    -----
    An expert all-to-all reads each copy that it sends and writes each that it gets; what ``deepep`` fans out inside the
    scale-up domain has come there before.
    """
    if op.kind == "all_to_all":
        out, fan = _copies(op, model, plan, cluster)
        return 2.0 * op.bytes * (out + fan)
    return (_PASSES[op.kind] + (2.0 if op.listed else 0.0)) * op.bytes


def loaded(op: Op, load: Number) -> Op:
    """Return an operation for `load` times the tokens: more rows forward, a deeper product for the weights."""
    if op.kind in (HOST, LAUNCH):
        return replace(op, beside=tuple(tuple(loaded(o, load) if o.routed else o for o in segment) for segment in op.beside))
    deeper = op.grad == "weight"
    sizes = {name: getattr(op, name) * load for name in ("flop", "bytes", "addressed")}
    sizes["behind"] = tuple(loaded(other, load) for other in op.behind)
    return replace(op, **sizes, m=op.m * (1.0 if deeper else load), k=op.k * (load if deeper else 1.0))
