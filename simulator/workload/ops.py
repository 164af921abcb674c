"""The vocabulary of a step: one operation in FLOP and bytes, and blocks of them. No seconds, no hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simulator.scenario.kernels import Kernels
from simulator.units import Number

#: bytes of an element
BF16, FP32 = 2.0, 4.0
#: kernels of a matrix product of a linear layer: itself, and its bias, view or accumulation
LINEAR_LAUNCHES = 2
#: what one expert's product costs the host, over a kernel that the framework launches: Transformer Engine loops over the experts
#: in C++, but allocates and describes tensors for each. 64 experts take 1.2 ms forward, two products each, and 2.1 ms backward,
#: four each (NVIDIA/TransformerEngine issue 2897, on GB200): 8 to 9 us, a fifth of the 40 us that hosts are assumed to need
EXPERT_LAUNCH = 0.2
#: what a kernel costs the host that PyTorch's engine launches for a gradient, over one of a forward in Python: a plain GPT layer of
#: some 13 operations forward and twice as many backward takes 245 and 275 us (PyTorch 2.13 on one core, tensors of a few elements)
ENGINE_LAUNCH = 0.5
#: pieces that a product is cut into to be reduce-scattered beside itself (Transformer Engine's ``pipeline`` method with its
#: default ``num_splits``, transformer_engine/pytorch/module/base.py); where its rows arrive, one for each rank of the ring
SPLITS = 4
#: times that a cast to NVFP4 reads 16 bits: for the maximum of the tensor, then for its blocks (Transformer Engine @8f2e635,
#: transformer_engine/common/hadamard_transform, cast/nvfp4); published: docs/examples/gemm_profiling there times a layer on B300 with
#: and without casts: 1.1 ns per 1000 elements, 1.5 of MXFP8's 0.73, which reads once
NVFP4_READS = 2
#: kinds that run on the compute stream; the others are collectives
COMPUTE = ("gemm", "grouped_gemm", "attention", "memory")
#: kind that waits, on the compute stream, until the host has launched what came before
HOST = "host"


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel or one collective.

    Parameters
    ----------
    name : str
        Part of the layer, e.g. ``attn.qkv``.
    kind : str
        ``gemm``, ``grouped_gemm``, ``attention``, ``memory`` (bandwidth-bound), ``all_gather``, ``reduce_scatter``,
        ``all_reduce``, ``all_to_all`` or ``send``; ``host`` waits for the host that launches the kernels.
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
        Kernels that the host launches for it, as much of its time as ones that the framework launches singly.
    beside : tuple of Segment
        Of ``host``: what runs while the host launches.
    apart : bool or ndarray of bool
        Of a collective: it takes no multiprocessors from the kernels beside it, because copy engines move it or some are set
        aside for it. Of a kernel: it runs on the others only.
    turns : Number
        How often the same is done, one after the other: `flop` and `bytes` are of all turns, the shape of one.
    streams : Number
        Of a GEMM: how many like it run side by side on streams of their own, so that their tiles fill the multiprocessors together;
        `flop` and `bytes` are its own.
    listed : bool
        Of a collective: every rank's part is a tensor of its own, which a kernel copies from or to the buffer that travels.
    written : Number
        Of a GEMM: bytes that its epilogue moves per element of the result; adding to a main gradient reads it, too.
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
    beside: tuple[Segment, ...] = ()
    apart: Any = False
    turns: Number = 1.0
    streams: Number = 1.0
    written: Number = BF16
    listed: bool = False

    @property
    def stream(self) -> str:
        """The queue that it runs on: ``compute``, or one per kind of communication."""
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

    It launches while kernels and collectives run, but not during an expert all-to-all, whose sizes it has to read first.
    """
    ops = [op for segment in segments for op in segment if op.kind in COMPUTE and not kernels.captured(op.name)]
    cost = {"input": ENGINE_LAUNCH, "weight": ENGINE_LAUNCH} if kernels.backward == "engine" else {}
    launches = sum((op.launches * cost.get(op.grad, 1.0) for op in ops if np.any(op.bytes)), 0.0)
    beside = tuple(tuple(op for op in segment if hides_launches(op)) for segment in segments)
    return Op(HOST, HOST, launches=launches, beside=tuple(filter(None, beside)), routed=any(op.routed for op in ops))


def hides_launches(op: Op) -> bool:
    """Return whether the host goes on launching while `op` runs."""
    return op.kind in COMPUTE or not op.routed


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


@dataclass(frozen=True, slots=True)
class Block:
    """What one layer does and holds on one rank, for one micro-batch.

    Parameters
    ----------
    forward, backward : tuple of Segment
        In order of execution; `backward` includes what recompute repeats.
    dense_parameters, expert_parameters : Number
        Parameters on this rank: sharded over the dense data-parallel group or over the experts' one.
    saved_bytes : Number
        Activations kept from forward to backward.
    recompute_bytes : Number
        Activations that live only while the layer is computed again.
    weight_bytes : Number
        What the weight gradient still needs once the input gradient is done: inputs and output gradients of the linear
        layers.
    working_bytes : Number
        Gradients of activations and other temporaries of the block's own backward, at its fullest moment, less what it
        has given back of `saved_bytes` by then.
    matrices : tuple of (str, Number)
        Elements of one weight matrix of each linear layer, beside the layer's name.
    """

    forward: tuple[Segment, ...]
    backward: tuple[Segment, ...]
    dense_parameters: Number
    expert_parameters: Number
    saved_bytes: Number
    recompute_bytes: Number
    weight_bytes: Number
    working_bytes: Number = 0.0
    matrices: tuple[tuple[str, Number], ...] = ()


@dataclass(slots=True)
class _Entry:
    forward: tuple[Segment, ...]
    backward: tuple[Segment, ...]
    saved: Number
    modules: frozenset[str]


@dataclass(slots=True)
class BlockBuilder:
    """Collects the pieces of a layer in forward order and derives backward, recompute and saved activations.

    Parameters
    ----------
    dtype, element : str and float
        Datatype of the linear layers and bytes of one element of it.
    recompute : str
        ``none``, ``selective`` or ``full``.
    recomputed : frozenset of str
        Modules that selective recompute drops.
    overlap : bool
        Whether collectives of a linear layer's backward run beside its gradients.
    gathered : (str, float)
        Datatype and bytes of an element of tensor-parallel all-gathers.
    gradient : float
        Bytes of one element of the main gradients, to which every weight gradient is added in place.
    kernels : Kernels
        Which kernels the layer runs.
    load : Number
        Tokens that the rank's experts receive, over the mean: what they keep grows with it. FLOP and traffic are for the mean;
        `simulator.pricing.operations.loaded` makes them grow.
    """

    dtype: str
    element: float
    recompute: str = "none"
    recomputed: frozenset[str] = frozenset()
    overlap: bool = True
    gradient: float = FP32
    kernels: Kernels = Kernels()
    gathered: tuple[str, float] = ("bf16", BF16)
    load: Number = 1.0
    dense_parameters: Number = 0.0
    expert_parameters: Number = 0.0
    weight_bytes: Number = 0.0
    matrices: dict[str, Number] = field(default_factory=dict)
    _entries: list[_Entry] = field(default_factory=list)
    _working: list[tuple[int, Number]] = field(default_factory=list)

    def add(self, forward: Iterable[Segment], backward: Iterable[Segment], saved: Number = 0.0, modules: Iterable[str] = ()) -> None:
        """Append a piece: its forward and backward segments, the activations it saves and the modules it belongs to."""
        self._entries.append(_Entry(tuple(forward), tuple(backward), saved, frozenset(modules)))

    def works(self, bytes: Number) -> None:
        """Note that temporaries take `bytes` in the backward of the last piece, when what later pieces saved is given back."""
        self._working.append((len(self._entries), bytes))

    def _fullest(self) -> Number:
        """Return the temporaries of the fullest moment of the backward, less what has been given back by then."""
        most: Number = 0.0
        for after, size in self._working:
            most = np.maximum(most, size - sum((e.saved for e in self._entries[after:]), 0.0))
        return most

    def memory(
        self,
        name: str,
        forward: Number,
        backward: Number,
        saved: Number = 0.0,
        modules: Iterable[str] = (),
        routed: bool = False,
        launches: tuple[Number, Number] = (1, 1),
    ) -> None:
        """Append bandwidth-bound kernels that move `forward` and `backward` bytes, and as many `launches`."""
        there = Op(name, "memory", bytes=forward, routed=routed, launches=launches[0])
        back = Op(name, "memory", bytes=backward, grad="input", routed=routed, launches=launches[1])
        self.add([(there,)], [(back,)], saved, modules)

    def linear(
        self,
        name: str,
        m: Number,
        k: Number,
        n: Number,
        saved: Number = 0.0,
        modules: Iterable[str] = (),
        beside: tuple[Op | None, Op | None] = (None, None),
        dtype: str | None = None,
        arrives: tuple[bool, bool] = (False, False),
        gather: Op | None = None,
        scatter: tuple[Op, Op] | None = None,
        pieces: Number = 1.0,
        shared: tuple[Number, Number] = (1.0, 1.0),
        **more: Any,
    ) -> None:
        """Append a linear layer (m, k) -> (m, n).

        Its input gradient is (m, n) x (n, k), its weight gradient (k, m) x (m, n), added to the main gradient as it is
        written (Megatron's gradient accumulation fusion). Low-precision inputs are cast from bf16, once forward and twice
        (row- and column-wise) for the output's gradient; before the weight gradient the saved input is read and cast again
        along the other axis (DeepSeek-V3 report, section 3.3). `arrives` says whether the input and the output's gradient
        come in low precision already. `beside` are collectives that run next to the input and the weight gradient; `dtype`
        keeps a layer out of low precision. In pieces beside the product go the `gather` of its input, or the `scatter` of its
        output and the gather of that one's gradient, around a ring of as many ranks as `pieces`. Casts come before a gather: `shared`
        are the ranks that cast rows of the input, and of the output's gradient.
        """
        d, e, groups = dtype or self.dtype, BF16 if dtype else self.element, more.get("groups", 1.0)
        routed = more.get("routed", False)
        self.weight_bytes = self.weight_bytes + groups * m * (k + n) * e * (self.load if routed else 1.0)
        self.matrices[name] = k * n
        product = one_by_one if self.kernels.experts == "sequential" and "groups" in more else gemm
        there, dgrad = (
            (lambda rows: product(name, rows, k, n, d, e, **more)),
            (lambda rows: product(name, rows, n, k, d, e, "input", **more)),
        )
        wgrad = product(name, k, m, n, d, e, grad="weight", **more)
        if self.kernels.accumulation == "fused":
            added = 2 * self.gradient  # read and written
            wgrad = replace(wgrad, bytes=wgrad.bytes + groups * k * n * (added - BF16), written=added)
        forward: list[Segment] = [(there(m),)]
        backward: list[Segment] = []
        for grad, other in zip((dgrad(m), wgrad), beside, strict=True):
            ops = (grad, other) if other else (grad,)
            backward += [ops] if self.overlap else [(op,) for op in ops]
        if gather:
            forward = arriving(there, m, gather, pieces)
        if scatter:
            forward = leaving(there, m, scatter[0], np.where(np.asarray(pieces) > 1, SPLITS, 1.0))
            backward = [*arriving(dgrad, m, scatter[1], pieces), (wgrad,)]
        if self.kernels.accumulation == "separate":
            added = groups * k * n * (BF16 + 2 * self.gradient)
            backward.append((Op(f"{name}.accumulate", "memory", bytes=added, grad="weight", routed=routed),))
        if e < BF16:
            host = {"routed": routed, "launches": 1 + (EXPERT_LAUNCH * groups if "groups" in more else 0.0)}
            in_cast, back = (0.0 if known else (NVFP4_READS if d == "fp4" else 1) * BF16 + e for known in arrives)
            forward.insert(0, (Op(f"{name}.cast", "memory", bytes=groups * m / shared[0] * k * in_cast, **host),))
            back = back + e if back else 2 * e  # the column-wise one reads the row-wise one where only that arrives
            backward.insert(0, (Op(f"{name}.cast", "memory", bytes=groups * m / shared[1] * n * back, grad="input", **host),))
            again = Op(f"{name}.cast", "memory", bytes=groups * m * k * 2 * e, grad="weight", **host)
            backward.insert(next(i for i, ops in enumerate(backward) if any(op is wgrad for op in ops)), (again,))
        self.add(forward, backward, saved, modules)

    def collective(self, forward: Op, backward: Op, modules: Iterable[str] = ()) -> None:
        """Append a collective and the one that its gradient needs."""
        self.add([(forward,)], [(replace(backward, grad="input"),)], modules=modules)

    def exchange(self, name: str, forward: Number, backward: Number, modules: Iterable[str] = ()) -> None:
        """Append an expert all-to-all that carries `forward` and `backward` bytes per copy of the local tokens."""
        there, back = (Op(name, "all_to_all", bytes=size, axis="ep", routed=True) for size in (forward, backward))
        self.collective(there, back, modules)

    def build(self, layer_input: Number) -> Block:
        """Return the block.

        Parameters
        ----------
        layer_input : Number
            Bytes of the layer's input, all that full recompute keeps.
        """
        forward = tuple(s for e in self._entries for s in e.forward)
        backward: list[Segment] = []
        if self.recompute == "full":
            backward += _again(forward)
        pending, repeated = set(self.recomputed), set[int]()
        for entry in reversed(self._entries):
            due = entry.modules & pending
            if due:
                several = [e for e in self._entries if e.modules & due and id(e) not in repeated]
                backward += _again(s for e in several for s in e.forward)
                repeated.update(map(id, several))
                pending -= due
            backward += entry.backward
        everything = sum(e.saved for e in self._entries)
        kept = sum(e.saved for e in self._entries if not e.modules & self.recomputed)
        saved = layer_input if self.recompute == "full" else kept
        sizes = (self.dense_parameters, self.expert_parameters, saved, everything - saved, self.weight_bytes, self._fullest())
        return Block(forward, tuple(backward), *sizes, matrices=tuple(self.matrices.items()))


def _again(segments: Iterable[Segment]) -> list[Segment]:
    return [tuple(replace(op, grad="again") for op in segment) for segment in segments]


def total(segments: Iterable[Segment], what: Callable[[Op], Number]) -> Number:
    """Return the sum of ``what(op)`` over the operations of `segments`."""
    return sum((what(op) for segment in segments for op in segment), 0.0)


def passes(block: Block, kind: str) -> tuple[Segment, ...]:
    """Return the segments of a pass: F, B, I (the input gradient, recompute included) or W (the weight gradient)."""
    if kind in "FB":
        return block.forward if kind == "F" else block.backward
    parts = (tuple(op for op in segment if (op.grad == "weight") == (kind == "W")) for segment in block.backward)
    return tuple(part for part in parts if part)
