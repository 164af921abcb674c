"""Blocks of a step, and how they are put together: the forward, the backward, and what waits in memory between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from simulator.scenario.kernels import Kernels
from simulator.units import Number
from simulator.workload.ops import (
    BF16,
    CURRENT_LAUNCHES,
    EXPERT_LAUNCH,
    FP32,
    MAXIMUM_READS,
    SPLITS,
    Op,
    Segment,
    arriving,
    gemm,
    leaving,
    one_by_one,
)

#: times that torchao's casts read or write an element in 16 bits: of an input, of the same for the weight gradient, of an output's
#: gradient, of a weight forward, of the same backward. With one scale per tensor the maximum is a pass of its own, whose result is
#: kept; with one per row a cast finds its own, but along the columns copies the transpose first (torchao/testing/training/
#: roofline_utils.py, ``get_tensor_memory_traffic_ovhd_s``; measured: pytorch/pytorch issue 130015)
TORCHAO_CASTS = {"tensorwise": (2, 1, 2, 2, 1), "rowwise": (1, 3, 3, 1, 3)}
#: times that torchao reads or writes a gradient in 16 bits beside the product that makes it: with one scale per row a kernel of its own
#: scales what cuBLAS has multiplied without (pytorch/ao pull request 1377 and issue 2184)
TORCHAO_RESCALES = {"tensorwise": 0, "rowwise": 2}


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

    def waited_for(self, axis: str) -> Block:
        """Return the block with a host that waits for the collectives of an axis before it launches what follows."""
        forward, backward = (
            tuple(tuple(replace(op, holds=op.holds or op.axis == axis) for op in segment) for segment in segments)
            for segments in (self.forward, self.backward)
        )
        return replace(self, forward=forward, backward=backward)


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
    stops_early : bool
        Whether recompute, of a layer or of modules, ends with the last activation that is saved, rather than with the output.
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
    casts : str
        Who casts for linear layers in low precision, as in `simulator.scenario.framework.Framework`.
    cast_weights : bool
        Whether weights arrive in 16 bits and are cast for every pass.
    share : float
        Share of such layers that full recompute covers; the block is their average.
    layouts : int
        Copies of a tensor in low precision that products read: scaled or laid out along the rows, and along the columns.
    block : int
        Elements that share a scale, 0 where a tensor has one.
    """

    dtype: str
    element: float
    recompute: str = "none"
    recomputed: frozenset[str] = frozenset()
    stops_early: bool = False
    overlap: bool = True
    gradient: float = FP32
    kernels: Kernels = Kernels()
    gathered: tuple[str, float] = ("bf16", BF16)
    load: Number = 1.0
    casts: str = "transformer_engine"
    cast_weights: bool = False
    share: float = 1.0
    layouts: int = 2
    block: int = 0
    dense_parameters: Number = 0.0
    expert_parameters: Number = 0.0
    weight_bytes: Number = 0.0
    matrices: dict[str, Number] = field(default_factory=dict)
    _entries: list[_Entry] = field(default_factory=list)
    _working: list[tuple[int, Number]] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """Bytes of an element of what a linear layer keeps of its input."""
        return BF16 if self.casts in TORCHAO_CASTS else self.element

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
        addressed: tuple[Number, Number] = (0.0, 0.0),
        plain: bool = False,
    ) -> None:
        """Append bandwidth-bound kernels that move `forward` and `backward` bytes, and as many `launches` and elements `addressed`."""
        there = Op(name, "memory", bytes=forward, routed=routed, launches=launches[0], addressed=addressed[0], plain=plain)
        back = replace(there, bytes=backward, grad="input", launches=launches[1], addressed=addressed[1])
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
        arrives: tuple[int, int] = (0, 0),
        gather: Op | None = None,
        scatter: tuple[Op, Op] | None = None,
        pieces: Number = 1.0,
        shared: tuple[Number, Number] = (1.0, 1.0),
        **more: Any,
    ) -> None:
        """Append a linear layer (m, k) -> (m, n).

        Its input gradient is (m, n) x (n, k), its weight gradient (k, m) x (m, n), added to the main gradient as it is
        written (Megatron's gradient accumulation fusion). Low-precision inputs and gradients of outputs are cast from bf16 by one kernel
        into all `layouts` that the products read. `arrives` says in how many the input and the output's gradient come already: where
        that is row-wise only, it is read and cast again along the columns before the weight gradient (DeepSeek-V3 report, section
        3.3). `beside` are collectives that run next to the input and the weight gradient; `dtype`
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
        ahead = [(other,) if other and other.ahead and self.overlap else () for other in beside]
        back, wgrad = replace(dgrad(m), behind=ahead[0]), replace(wgrad, behind=ahead[1])
        for ops in (tuple(op for op in pair if op) for pair in zip((back, wgrad), beside, strict=True)):
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
            several = CURRENT_LAUNCHES if self.casts == "current" else 1  # of which all but the first come from C++
            kernels = several * groups
            looped = (kernels if "groups" in more else several - 1.0) * EXPERT_LAUNCH
            host = {"routed": routed, "launches": 1 + looped, "kernels": several if self.kernels.experts == "fused" else kernels}
            rows, weight = groups * m, groups * k * n * (1.0 * self.cast_weights)
            sizes = rows / shared[0] * k, rows * k, rows / shared[1] * n, rows * n, weight
            there_b, again_b, back_b = self._cast_bytes(d, e, sizes, arrives)
            forward.insert(0, (_cast(name, there_b, "", **host),))
            backward.insert(0, (_cast(name, back_b, "input", **host),))
            again = _cast(name, again_b, "weight", **host)
            (before,) = (i for i, ops in enumerate(backward) if any(op is wgrad for op in ops))
            backward.insert(before, (again,))
        self.add(forward, backward, saved, modules)

    def _cast_bytes(self, dtype: str, e: float, sizes: tuple[Number, ...], arrives: tuple[int, int]) -> tuple[Number, Number, Number]:
        """Return the bytes that casts move forward, ahead of the weight gradient and ahead of the input gradient.

        `sizes` are elements: of the input as it is cast forward and as it is read for the weight gradient, of the output's gradient
        likewise, of the weight. Rows that other ranks gather are laid out along the columns where they arrive, with one scale for the
        tensor; with scales of blocks they come in both layouts.
        """
        taken, again, back, read, weight = sizes
        if self.casts in TORCHAO_CASTS:
            there, later, grads, forward, backward = (BF16 * times for times in TORCHAO_CASTS[self.casts])
            scaled = BF16 * TORCHAO_RESCALES[self.casts]  # the gradients of the input and of the weight
            ahead = back * (grads + 2 * e) + weight * (backward + e) + again * scaled
            return taken * (there + e) + weight * (forward + e), again * (later + e) + weight * scaled, ahead
        reads, laid_out = (MAXIMUM_READS if dtype == "fp4" or self.casts == "current" else 1) * BF16, (self.layouts - 1) * e
        missing = [2 * max(self.layouts - known, 0) * e for known in arrives]  # read row-wise, written along the columns
        moved, later = [], []
        for known, lacking, cast, whole in zip(arrives, missing, (taken, back), (again, read), strict=True):
            gathered = np.not_equal(cast, whole) & (self.block == 0)
            moved.append(0.0 if known else cast * (reads + e + np.where(gathered, 0.0, laid_out)))
            later.append(whole * (lacking if known else 2 * laid_out * gathered))
        return moved[0], later[0] + (0.0 if arrives[1] else later[1]), moved[1] + (later[1] if arrives[1] else 0.0)

    def collective(self, forward: Op, backward: Op, modules: Iterable[str] = ()) -> None:
        """Append a collective and the one that its gradient needs."""
        self.add([(forward,)], [(replace(backward, grad="input"),)], modules=modules)

    def exchange(self, name: str, forward: Number, backward: Number, modules: Iterable[str] = (), holds: bool = False) -> None:
        """Append an expert all-to-all that carries `forward` and `backward` bytes per copy of the local tokens.

        The host waits for it forward if it `holds`; its gradient repeats what was counted then.
        """
        there, back = (Op(name, "all_to_all", bytes=size, axis="ep", routed=True) for size in (forward, backward))
        self.collective(replace(there, holds=holds), back, modules)

    def _repeat(self, entries: list[_Entry]) -> list[Segment]:
        """Return the segments that compute entries again: all of them, or up to the last one that leaves something to a gradient."""
        last = max((i for i, e in enumerate(entries) if np.any(e.saved)), default=-1)
        return _again(s for e in (entries[: last + 1] if self.stops_early else entries) for s in e.forward)

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
            backward += [tuple(_partly(op, self.share) for op in segment) for segment in self._repeat(self._entries)]
        pending, repeated = set(self.recomputed), set[int]()
        for entry in reversed(self._entries):
            due = entry.modules & pending
            if due:
                several = [e for e in self._entries if e.modules & due and id(e) not in repeated]
                backward += self._repeat(several)
                repeated.update(map(id, several))
                pending -= due
            backward += entry.backward
        everything = sum(e.saved for e in self._entries)
        kept = sum(e.saved for e in self._entries if not e.modules & self.recomputed)
        saved, dropped = kept, everything - kept
        if self.recompute == "full":
            dropped = everything - layer_input
            saved = everything - self.share * dropped
        sizes = (self.dense_parameters, self.expert_parameters, saved, dropped, self.weight_bytes, self._fullest())
        return Block(forward, tuple(backward), *sizes, matrices=tuple(self.matrices.items()))


def _partly(op: Op, share: float) -> Op:
    """Return an operation that a share of the layers has, as their average."""
    return op if share == 1 else replace(op, flop=op.flop * share, bytes=op.bytes * share, turns=op.turns * share, share=share)


def _cast(name: str, size: Number, grad: str, launches: Number, kernels: Number, routed: bool) -> Op:
    """Return the casts ahead of a product: none, which nothing launches, where all comes as it is read."""
    some = np.asarray(size) > 0
    return Op(f"{name}.cast", "memory", bytes=size, grad=grad, launches=launches * some, kernels=kernels * some, routed=routed)


def _again(segments: Iterable[Segment]) -> list[Segment]:
    return [tuple(replace(op, grad="again") for op in segment) for segment in segments]


def passes(block: Block, kind: str) -> tuple[Segment, ...]:
    """Return the segments of a pass: F, B, I (the input gradient, recompute included) or W (the weight gradient).

    I and W tear products and the collectives beside them apart.
    """
    if kind in "FB":
        return block.forward if kind == "F" else block.backward
    own = (tuple(op for op in segment if (op.grad == "weight") == (kind == "W")) for segment in block.backward)
    parts = (tuple(replace(op, behind=()) if op.behind else op for op in segment) for segment in own)
    return tuple(part for part in parts if part)
