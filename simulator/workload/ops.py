"""The vocabulary of a step: one operation in FLOP and bytes, and the products of layers. No seconds, no hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.scenario.kernels import Kernels
from simulator.units import Number

#: bytes of an element
BF16, FP32 = 2.0, 4.0
#: kernels of a matrix product of a linear layer: itself, and its bias, view or accumulation
LINEAR_LAUNCHES = 2
#: what one expert's product costs the host, over a kernel of a module of Transformer Engine: that loops over the experts in C++, but
#: allocates and describes tensors for each. 64 experts take 1.2 ms forward, two products each, and 2.1 ms backward, four each
#: (NVIDIA/TransformerEngine issue 2897, on GB200): 8.2 to 9.4 us, 0.11 to 0.13 of the 72 us that hosts are assumed to need for such
#: a kernel (`simulator.validation.parameters`); that share stays where those are fitted
EXPERT_LAUNCH = 0.12
#: what a kernel costs the host that PyTorch's engine launches for a gradient, over one of a forward in Python: a plain GPT layer of
#: some 13 operations forward and twice as many backward takes 245 and 275 us (PyTorch 2.13 on one core, tensors of a few elements)
ENGINE_LAUNCH = 0.5
#: what an operation in plain PyTorch (`Op.plain`) costs the host forward, over a kernel of a module of Transformer Engine, whose Python
#: prepares quantizers, workspaces and what is saved: the 245 us of 13 operations, 19 us each, over the same 72 us
PLAIN_LAUNCH = 0.26
#: what a CUDA graph of parts of a layer costs the host each way: a copy of what it is given and its replay (``Graphed`` of
#: NVIDIA/TransformerEngine transformer_engine/pytorch/graph.py; Megatron captures one per layer)
GRAPH_LAUNCHES = 2
#: pieces that a product is cut into to be reduce-scattered beside itself (Transformer Engine's ``pipeline`` method with its
#: default ``num_splits``, transformer_engine/pytorch/module/base.py); where its rows arrive, one for each rank of the ring
SPLITS = 4
#: times that a cast reads 16 bits where it looks for the maximum of the tensor first. To NVFP4, then for its blocks (Transformer
#: Engine @8f2e635, transformer_engine/common/hadamard_transform, cast/nvfp4); published: docs/examples/gemm_profiling there times a layer
#: on B300 with and without casts: 1.1 ns per 1000 elements, 1.5 of MXFP8's 0.73, which reads once. To FP8 with one scale for the
#: tensor as it is (``Float8CurrentScalingQuantizer``, transformer_engine/pytorch/csrc/quantizer.cpp)
MAXIMUM_READS = 2
#: kernels of such a cast to FP8 (the same): it clears the maximum, finds it, makes a scale of it, and casts
CURRENT_LAUNCHES = 4
#: kinds that run on the compute stream; the others are collectives
COMPUTE = ("gemm", "grouped_gemm", "attention", "memory")
#: kind that waits, on the compute stream, until the host has launched what came before; also the stream of the host itself
HOST = "host"
#: kind that keeps the host busy with one action of a pair, beside which the other one runs
LAUNCH = "launch"


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel or one collective.

    Parameters
    ----------
    name : str
        Part of the layer, e.g. ``attn.qkv``.
    kind : str
        ``gemm``, ``grouped_gemm``, ``attention``, ``memory`` (bandwidth-bound), ``all_gather``, ``reduce_scatter``,
        ``all_reduce``, ``all_to_all`` or ``send``; ``host`` waits for the host that launches the kernels, ``launch`` is the host that does.
    flop : Number
        Floating-point operations on this rank.
    bytes : Number
        Compute: bytes read and written in device memory. Collective: the full buffer as nccl-tests count it (gathered,
        to be reduced), for the experts' all-to-all one copy of every local token, for send the message.
    m, n, k, groups : Number
        Shape of a GEMM: `groups` independent products (m, k) x (k, n). Of attention: tokens, widths of values and keys, heads.
    axis : str
        Group of ranks that a collective spans.
    dtype : str
        Datatype of a GEMM's inputs, or of what a collective carries.
    grad : str
        ``""`` forward, ``input`` or ``weight`` gradient, ``again`` recomputed forward.
    routed : bool
        Whether the work grows with the tokens that the router sends to this rank.
    launches : Number
        Kernels that the host launches for it, as much of its time as ones that the framework launches singly; of a tensor-parallel
        collective its own call, if it has one.
    kernels : Number
        Of memory-bound operations: kernels that the device runs one after the other, where that is more than `launches`, because a
        loop in C++ launches them.
    beside : tuple of Segment
        Of ``host``: what it launches. Of ``launch``: what it waits for in between.
    apart : bool or ndarray of bool
        Of a collective: it takes no multiprocessors from the kernels beside it, because copy engines move it or some are set
        aside for it. Of a kernel: it runs on the others only.
    turns : Number
        How often the same is done, one after the other: `flop` and `bytes` are of all turns, the shape of one.
    share : Number
        Share of the layers that has it, of whose average it is; `flop`, `bytes` and `turns` are of that share, launches are not.
    streams : Number
        Of a GEMM: how many like it run side by side on streams of their own, so that their tiles fill the multiprocessors together;
        `flop` and `bytes` are its own.
    listed : bool
        Of a collective: every rank's part is a tensor of its own, which a kernel copies from or to the buffer that travels.
    holds : bool
        Whether the host waits for its end before it launches more.
    plain : bool
        Whether every stack writes its kernels in plain PyTorch, so that its engine launches their gradients.
    ahead : bool
        Of a collective: it has its multiprocessors before the kernel beside it starts.
    behind : tuple of Op
        Of a product: the collective beside it that is `ahead`, which may displace some of its blocks
        (`simulator.scenario.cluster.Accelerator.displaced_product`).
    written : Number
        Of a GEMM: bytes that its epilogue moves per element of the result; adding to a main gradient reads it, too.
    gathered : Number
        Of a message: bytes that the receiver's tensor-parallel group puts together of it, each rank having got a part.
    addressed : Number
        Of memory-bound kernels: elements of those kernels, beside the ones that `bytes` counts, whose places PyTorch computes one by
        one, because rows are parts of longer ones or meet a row or a column (`simulator.pricing.compute.ADDRESSED_FLOP`).
    """

    name: str
    kind: str
    flop: Number = 0.0
    bytes: Number = 0.0
    m: Number = 0.0
    n: Number = 0.0
    k: Number = 0.0
    groups: Number = 1.0
    axis: str = ""
    dtype: str = "bf16"
    grad: str = ""
    routed: bool = False
    launches: Number = 1.0
    kernels: Number = 0.0
    beside: tuple[Segment, ...] = ()
    apart: Any = False
    turns: Number = 1.0
    share: Number = 1.0
    streams: Number = 1.0
    written: Number = BF16
    listed: bool = False
    gathered: Number = 0.0
    addressed: Number = 0.0
    holds: bool = False
    plain: bool = False
    ahead: bool = False
    behind: Segment = ()

    @property
    def stream(self) -> str:
        """The queue that it runs on: ``compute``, or one per kind of communication."""
        if self.kind == LAUNCH:
            return HOST
        return "compute" if self.kind in COMPUTE or self.kind == HOST else STREAMS[self.axis]


#: axis of a collective -> stream that carries it
STREAMS = {
    "tp": "tp",
    "cp": "cp",
    "ep": "ep",
    "etp": "ep",
    "pp": "pp",
    "dp": "dp",
    "edp": "dp",
    "dp_replicate": "dp",
    "copies": "dp",
    "world": "dp",
}

#: operations that start together, on different streams; the next segment starts when all are done
Segment = tuple[Op, ...]


def host_wait(segments: tuple[Segment, ...], kernels: Kernels) -> Op:
    """Return what the last kernel of `segments` waits for: the host, which launches them one after the other.

    How long it waits, `simulator.pricing.operations.wait_s` says.
    """
    routed = any(op.routed for segment in segments for op in segment)
    return Op(HOST, HOST, launches=launched(segments, kernels), beside=segments, routed=routed)


def host_time(segments: tuple[Segment, ...], kernels: Kernels) -> Op:
    """Return what keeps the host busy with `segments` in a pair, where it does nothing for the other action meanwhile.

    One thread launches both (megatron/core/models/common/model_chunk_schedule_plan.py, ``TransformerLayerSchedulePlan.run``), and
    waits for what either of them reads back. Left out: that the device then waits for the next launch, which
    `simulator.pricing.operations.wait_s` counts outside of pairs only.
    """
    beside = tuple(segments[at] for at in sorted(awaited(segments, kernels)))
    return Op(HOST, LAUNCH, launches=launched(segments, kernels), beside=beside, routed=any(op.routed for s in beside for op in s))


def launched(segments: tuple[Segment, ...], kernels: Kernels) -> Number:
    """Return what the host launches for `segments`, in kernels of a module of Transformer Engine.

    A tensor-parallel collective is a call of torch.distributed in Python, as much as such a kernel; where collectives were timed apart,
    the host waits and none counts (`Overlap.host_waits`). Those of experts are among the launches of their dispatcher. Left out, so that
    they cost the host nothing: the calls of context parallelism, of ZeRO's gathers and reductions, and of messages between stages.
    """
    return sum((launches for row in launches_of(segments, kernels) for launches in row), 0.0)


def launches_of(segments: tuple[Segment, ...], kernels: Kernels) -> list[list[Number]]:
    """Return what the host launches for every operation of `segments`; the replay of a graph with the first kernel that it holds."""
    found: list[list[Number]] = []
    replays = GRAPH_LAUNCHES * float("full" not in kernels.graphs)
    for segment in segments:
        row: list[Number] = []
        for op in segment:
            first = replays if op.kind in COMPUTE and kernels.captured(op.name) else 0.0
            replays -= first
            row.append(op.launches * op.share * _cost(op, kernels) if _launched(op, kernels) else first)
        found.append(row)
    return found


def reads_back(segments: tuple[Segment, ...], kernels: Kernels) -> dict[int, bool]:
    """Return the segments that send experts' rows, where the host waits for the device (`awaited`), and whether it does behind them."""
    if "full" in kernels.graphs:
        return {}
    sent = {at: s for at, s in enumerate(segments) if any(op.name == "moe.dispatch" and op.grad in ("", "again") for op in s)}
    return {at: any(op.holds for op in segment) for at, segment in sent.items()}


def _does_work(op: Op) -> bool:
    """Return whether `op` is a kernel that has something to do for any plan."""
    return op.kind in COMPUTE and bool(np.any(op.bytes) or np.any(op.addressed))


def _launched(op: Op, kernels: Kernels) -> bool:
    """Return whether the host launches `op` by itself."""
    return (_does_work(op) or (op.axis == "tp" and not op.holds)) and not kernels.captured(op.name)


def awaited(segments: tuple[Segment, ...], kernels: Kernels) -> set[int]:
    """Return the positions of the segments during which the host launches nothing.

    Forward it reads on the device how many rows every rank gets before it has the experts' rows sent
    (megatron/core/transformer/moe/token_dispatcher.py, ``cuda_sync_point``; DeepEP waits for its counts inside the dispatch); the
    backward repeats them. What it has launched one by one has run by then. What it has replayed from a CUDA graph since has not: the
    counts are results of that graph (``cuda_dtoh_point`` is behind it where it holds ``moe_preprocess``). HybridEP is asked behind its
    dispatch, so that the host waits for that, too (`Op.holds`; deepseek-ai/DeepEP @0237ba6 csrc/hybrid_ep/executor/executor.cu).
    """
    found: set[int] = set()
    replayed: set[int] = set()
    for at, segment in enumerate(() if "full" in kernels.graphs else segments):
        if any(op.name == "moe.dispatch" and op.grad in ("", "again") for op in segment):
            found |= replayed
        if any(op.holds for op in segment):
            found.add(at)
        names = [op.name for op in segment if _does_work(op)]
        if names:
            replayed = replayed | {at} if all(map(kernels.captured, names)) else set()
    return found


def _cost(op: Op, kernels: Kernels) -> float:
    """Return what a launch of `op` costs the host, over one of a forward by what most of the stack is written in."""
    by_engine = op.grad in ("input", "weight") and op.kind in COMPUTE and (kernels.backward == "engine" or op.plain)
    return (ENGINE_LAUNCH if by_engine else 1.0) * (PLAIN_LAUNCH if op.plain and kernels.backward == "functions" else 1.0)


def gemm(name: str, m: Number, k: Number, n: Number, dtype: str, element: float, grad: str = "", **more: Any) -> Op:
    """Return a matrix product (m, k) x (k, n): ``2 m k n`` FLOP, and the bytes of its three matrices.

    Parameters
    ----------
    m, k, n : Number
        Shape of one product.
    dtype : str
        Datatype of the inputs; the output is bf16.
    element : float
        Bytes of one input element.
    """
    groups = more.get("groups", 1.0)
    kind = "grouped_gemm" if "groups" in more else "gemm"
    flop = 2.0 * groups * m * k * n
    traffic = groups * ((m * k + k * n) * element + BF16 * m * n)
    launches = LINEAR_LAUNCHES + (EXPERT_LAUNCH * groups if "groups" in more else 0.0)
    return Op(name, kind, flop=flop, bytes=traffic, m=m, n=n, k=k, dtype=dtype, grad=grad, launches=launches, **more)


def one_by_one(*shape: Any, **more: Any) -> Op:
    """Return the products of `gemm` one after the other, each launched by the framework."""
    op = gemm(*shape, **more)
    return replace(op, groups=1.0, turns=op.groups, launches=LINEAR_LAUNCHES * op.groups)


def _cut(product: Callable[[Number], Op], rows: Number, pieces: Number) -> tuple[Op, Op]:
    """Return one of the equal pieces of a product, and all the others in turn.

    Transformer Engine gives them to three streams in turn (``NVTE_COMM_OVERLAP_MAX_STREAMS``; ``split_overlap_ag`` and
    ``split_overlap_rs`` in transformer_engine/common/comm_gemm_overlap/comm_gemm_overlap.cpp @015939a): when the tiles of one run
    out, those of the next already run.
    """
    one, others = replace(product(rows / pieces), streams=pieces), pieces - 1.0
    launches = EXPERT_LAUNCH * others  # from a loop in C++, as those of experts
    return one, replace(one, flop=one.flop * others, bytes=one.bytes * others, turns=np.maximum(others, 1.0), launches=launches)


def arriving(product: Callable[[Number], Op], rows: Number, gather: Op, pieces: Number) -> list[Segment]:
    """Return a product that begins with the rank's own rows while those of the others arrive around a ring.

    Parameters
    ----------
    product : callable
        Returns the product of so many rows.
    rows : Number
        All rows.
    pieces : Number
        Ranks of the ring.

    Notes
    -----
    Of p pieces that take g each and arrive every c, the first is there: ``max(p g, (p - 1) c + g)``. Written as the p - 1 pieces
    beside the gather and one more, which takes as long.

    References
    ----------
    Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models", ASPLOS 2023.
    """
    one, others = _cut(product, rows, pieces)
    return [(others, gather), (one,)]


def leaving(product: Callable[[Number], Op], rows: Number, scatter: Op, pieces: Number) -> list[Segment]:
    """Return a product whose pieces are reduce-scattered while the next ones are computed.

    Notes
    -----
    Of p pieces that take g and leave in c each: ``g + (p - 1) max(g, c) + c``; the first and the last stand alone. The product
    leaves multiprocessors aside for the collective from its first piece to its last (Transformer Engine's ``set_sm_margin``).
    """
    one, others = (replace(op, apart=np.asarray(pieces) > 1) for op in _cut(product, rows, pieces))
    last = replace(scatter, bytes=scatter.bytes / pieces)
    return [(one,), (others, replace(scatter, bytes=scatter.bytes - last.bytes)), (last,)]


def total(segments: Iterable[Segment], what: Callable[[Op], Number]) -> Number:
    """Return the sum of ``what(op)`` over the operations of `segments`."""
    return sum((what(op) for segment in segments for op in segment), 0.0)
