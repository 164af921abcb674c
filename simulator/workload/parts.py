"""What layers are made of: shapes on one rank, norms, residuals, linear layers divided by tensor parallelism.

Shapes as in `simulator.workload.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.overlap import TensorParallel
from simulator.scenario.plan import ELEMENT_BYTES, Plan
from simulator.units import Number
from simulator.workload.blocks import BlockBuilder
from simulator.workload.ops import BF16, FP32, Op, Segment

#: bytes per element of an RMSNorm written in PyTorch: cast, square, mean, scale, cast back, weight; and their gradients
EAGER_NORM_BYTES = (36.0, 100.0)
#: launches of a collective that runs in pieces beside its product: none of its own, the product's call starts them from C++
IN_PIECES_LAUNCHES = 0.0
#: bytes of one element of a dropout mask
MASK = 1.0
#: how much longer PyTorch's sum of the parts that other ranks have sent takes than its traffic: it reaches 23 to 43 % of the
#: bandwidth where a kernel made for it reaches 82 to 88 % (pytorch/pytorch pull request 191803)
SUM_SLOWDOWN = 85 / 33


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one micro-batch on one rank, for one plan or a column of plans."""

    tokens: Number
    split_tokens: Number
    sequence: Number
    tp: Number
    cp: Number
    ep: Number
    etp: Number
    sequence_parallel: bool
    context_parallel: str
    style: TensorParallel

    @property
    def of_torch(self) -> bool:
        """Whether PyTorch's own tensor parallelism runs the collectives."""
        return self.style in ("torch", "torch_async")

    @property
    def several(self) -> Number:
        """1 where a tensor-parallel group has several ranks, else 0: what its collectives cost the host, in launches."""
        return 1.0 * (np.asarray(self.tp) > 1)

    @property
    def keeps_rows(self) -> bool:
        """Whether gathered rows serve all products of an input and stay for the weight gradients."""
        return self.of_torch or self.style == "kept"

    @classmethod
    def of(cls, plan: Plan, job: Job) -> Shape:
        """Return the sizes that `plan` gives to one micro-batch of `job`."""
        tokens = plan.micro_batch * job.sequence_length / plan.cp
        split = tokens / plan.tp if plan.sequence_parallel else tokens
        return cls(
            tokens,
            split,
            job.sequence_length,
            plan.tp,
            plan.cp,
            plan.ep,
            plan.etp,
            plan.sequence_parallel,
            plan.context_parallel,
            plan.overlap.tp,
        )


def builder(plan: Plan, load: Number = 1.0) -> BlockBuilder:
    """Return the builder of a block in the datatypes of `plan`, its routed operations at `load` times the mean tokens."""
    gemm = plan.precision.gemm
    return BlockBuilder(
        gemm,
        ELEMENT_BYTES[gemm],
        plan.recompute,
        plan.recomputed,
        plan.framework.stops_early,
        plan.overlap.beside_gradients,
        ELEMENT_BYTES[plan.precision.gradients],
        plan.kernels,
        (plan.precision.gathered, ELEMENT_BYTES[plan.precision.gathered]),
        load,
        plan.framework.casts,
        plan.precision.casts_weights,
        plan.recompute_share,
        plan.precision.layouts,
        plan.precision.block,
    )


def norm(
    b: BlockBuilder, name: str, tokens: Number, width: int, model: Model, saved: Number, modules: tuple[str, ...] = ("layernorm",)
) -> None:
    """Read and write the row forward; read it, its gradient, write the input's gradient backward.

    An eager RMSNorm is seven operations in fp32, with twice as many behind them, and keeps an fp32 copy of the row and the
    normalised row beside the row and the result, or in place of the row; LayerNorm is one kernel in PyTorch too.
    """
    eager = b.kernels.norm != "fused" and not model.layer_norm
    there, back = EAGER_NORM_BYTES if eager else (2 * BF16, 3 * BF16)
    if eager:
        saved = saved + tokens * width * (FP32 + BF16 * (b.kernels.norm == "eager"))
    b.memory(name, there * tokens * width, back * tokens * width, saved, modules, launches=(7, 14) if eager else (1, 2))
    b.dense_parameters = b.dense_parameters + width * (2 if model.layer_norm else 1)


def residual(b: BlockBuilder, x: Shape, model: Model, name: str = "residual") -> None:
    """Add a branch to the residual stream; dropout writes a mask and reads it back."""
    size, mask = x.split_tokens * model.hidden * BF16, x.split_tokens * model.hidden * MASK if b.kernels.dropout else 0.0
    b.memory(name, 3 * size + mask, 3 * size + mask, mask, plain=True)


def bias_gradients(b: BlockBuilder, name: str, elements: Number) -> None:
    """Sum gradients over the rows of a linear layer's result by a kernel of its own; Transformer Engine's products do it themselves.

    A bias that is added behind its product (Megatron's ``skip_bias_add``) has such a sum, too, behind the kernel that adds it.
    """
    if b.kernels.backward != "functions":
        b.memory(f"{name}.bias", 0.0, BF16 * elements, launches=(0, 1))


def enter_tp(b: BlockBuilder, name: str, x: Shape, width: Number, modules: tuple[str, ...] = ()) -> tuple[Op | None, Op | None]:
    """Gather the sequence-parallel rows for column-parallel layers.

    Returns the collectives that Megatron hides behind the layer's gradients: the rows are gathered again beside the
    input gradient and their gradient is reduce-scattered (without sequence parallel: all-reduced) beside the weight's. Others
    keep the gathered rows instead, unless checkpointing by operation gathers them again, and reduce-scatter behind both gradients.
    Megatron has them start ahead of these products (``CUDA_DEVICE_MAX_CONNECTIONS`` of 1 keeps the order of the launches).
    """
    size = x.tokens * width * BF16
    if not x.sequence_parallel:
        return None, Op(f"{name}.grad", "all_reduce", bytes=size, axis="tp", grad="input", ahead=True, launches=x.several)
    gather = _gather(b, x, f"{name}.gather", width)
    scatter = Op(f"{name}.scatter", "reduce_scatter", bytes=size, axis="tp", grad="input", launches=x.several)
    if x.keeps_rows:
        b.add(_joined(x, gather), _joined(x, scatter), _beyond_own(x, gather), (*modules, "tp_gather"))
        return None, None
    b.add([(gather,)], [], modules=(*modules, "tp_gather"))
    return replace(gather, grad="weight", ahead=True), replace(scatter, ahead=True)


def _gather(b: BlockBuilder, x: Shape, name: str, width: Number, launches: Number | None = None) -> Op:
    """Gather rows that are cast to the datatype of the products first."""
    dtype, element = b.gathered
    own = x.several if launches is None else launches
    return Op(name, "all_gather", bytes=x.tokens * width * element, axis="tp", dtype=dtype, launches=own)


def _for_both(b: BlockBuilder, gather: Op) -> Op:
    """Return the gather of a row-parallel layer's output gradient, for the gradients of its input and of its weights.

    Scaled in blocks, it goes by rows for the one and by columns for the other (``gather_along_first_dim``; NVIDIA/TransformerEngine pull
    request 1982 for userbuffers).
    """
    return replace(gather, bytes=gather.bytes * (2.0 if b.block and b.gathered[0] == b.dtype else 1.0))


def _scales(b: BlockBuilder, x: Shape, name: str, width: int, times: int = 1) -> list[Segment]:
    """Return the gathers of the scales of blocks, for which pieces wait: userbuffers carry the elements alone.

    References
    ----------
    NVIDIA/TransformerEngine pull request 1711: "MXFP8 scaling factors are communicated with blocking NCCL collectives".
    """
    if not b.block or x.style != "pieces" or b.gathered[0] != b.dtype:
        return []
    return [(Op(f"{name}.scales", "all_gather", bytes=x.tokens * width / b.block, axis="tp", dtype=b.dtype, launches=x.several),)] * times


def _beyond_own(x: Shape, gather: Op) -> Number:
    """Return the bytes of gathered rows that are kept beside a rank's own: none where it has all of them."""
    return np.where(np.asarray(x.tp) > 1, gather.bytes, 0.0)


def _joined(x: Shape, op: Op) -> list[Segment]:
    """Return a collective and, in PyTorch's own tensor parallelism, the copy behind a gather or ahead of a reduce-scatter.

    Notes
    -----
    Ranks' parts come one after the other along the first dimension, rows lie along the second: they are split and concatenated
    (``all_gather_tensor`` and ``reduce_scatter_tensor``, torch/distributed/_functional_collectives.py). What runs in pieces has
    no such copy, because its parts are laid out for it.
    """
    if not x.of_torch:
        return [(op,)]
    several = x.several
    copy = Op(f"{op.name}.copy", "memory", bytes=2 * op.bytes * several, grad=op.grad, launches=several)
    return [(op,), (copy,)] if op.kind == "all_gather" else [(copy,), (op,)]


def _casting(b: BlockBuilder, x: Shape) -> Number:
    """Return the ranks that share the cast of rows: all of the group where they are gathered as they are multiplied."""
    return x.tp if x.sequence_parallel and b.gathered[0] == b.dtype else 1.0


def leave_tp(b: BlockBuilder, name: str, x: Shape, width: int, modules: tuple[str, ...] = ()) -> None:
    """Sum the partial rows of a row-parallel layer."""
    size = x.tokens * width * BF16
    if x.sequence_parallel:
        scatter = Op(f"{name}.scatter", "reduce_scatter", bytes=size, axis="tp", launches=x.several)
        gather = replace(_for_both(b, _gather(b, x, f"{name}.gather", width)), grad="input")
        b.add(_joined(x, scatter), _joined(x, gather), modules=modules)
    else:
        b.add([(Op(f"{name}.reduce", "all_reduce", bytes=size, axis="tp", launches=x.several),)], [], modules=modules)


def column_parallel(
    b: BlockBuilder,
    part: str,
    name: str,
    x: Shape,
    width: int,
    n: Number,
    modules: tuple[str, ...] = (),
    saved: Number = 0.0,
    gathers: bool = True,
) -> None:
    """Append a column-parallel linear layer with the collectives of its rows, as the plan overlaps them, or on rows that are there.

    In pieces, rows are gathered by copy engines (Transformer Engine's ``use_ce``). PyTorch sums the gradients of all products of
    an input before it reduce-scatters them, so that nothing runs beside that sum (the pattern that
    torch/_inductor/fx_passes/micro_pipeline_tp.py looks for is one product), nor beside a gather for a weight gradient.
    """
    shared = (_casting(b, x), 1.0)
    if not gathers or x.style not in ("pieces", "torch_async"):
        beside = enter_tp(b, part, x, width, modules) if gathers else (None, None)
        b.linear(name, x.tokens, width, n, saved=saved, modules=modules, beside=beside, shared=shared)
        return
    gather = _gather(b, x, f"{part}.gather", width, IN_PIECES_LAUNCHES)
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp", grad="input", launches=IN_PIECES_LAUNCHES)
    beside = replace(gather, grad="weight"), scatter
    if x.of_torch:
        b.add([], _joined(x, scatter), _beyond_own(x, gather), (*modules, "tp_gather"))
        beside = (None, None)
    scales = _scales(b, x, part, width)
    b.add(scales, [], modules=modules)
    b.linear(name, x.tokens, width, n, saved, modules, beside, gather=replace(gather, apart=True), pieces=x.tp, shared=shared)
    b.add([], [tuple(replace(op, grad="input") for op in segment) for segment in scales])
    if x.of_torch and "tp_gather" in b.recomputed:
        b.add([], _joined(x, replace(gather, grad="again")))


def row_parallel(
    b: BlockBuilder, part: str, name: str, x: Shape, k: Number, width: int, modules: tuple[str, ...] = (), saved: Number = 0.0
) -> None:
    """Append a row-parallel linear layer and the sum of its partial rows, as the plan overlaps them."""
    shared = (1.0, _casting(b, x))
    if x.style not in ("pieces", "torch_async"):
        b.linear(name, x.tokens, k, width, saved=saved, modules=modules, shared=shared)
        leave_tp(b, part, x, width, tuple(m for m in modules if m != "attn_out"))  # by operation, what is reduce-scattered is kept
        return
    size = x.tokens * width * BF16
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=size, axis="tp", launches=IN_PIECES_LAUNCHES)
    gather = replace(_for_both(b, _gather(b, x, f"{part}.gather", width, IN_PIECES_LAUNCHES)), grad="input", apart=True)
    b.linear(name, x.tokens, k, width, saved, modules, scatter=(replace(scatter, apart=True), gather), pieces=x.tp, shared=shared)
    b.add([], [tuple(replace(op, grad="input") for op in segment) for segment in _scales(b, x, part, width, 2)])
    if x.of_torch:
        several = x.several
        summed = (x.tokens + x.split_tokens) * width * BF16 * SUM_SLOWDOWN
        b.memory(f"{part}.sum", summed * several, 0.0, modules=modules, launches=(several, 0.0))


def twice(b: BlockBuilder, elements: Number) -> Number:
    """Bytes of a tensor that attention keeps in bf16 and a low-precision linear layer in its own datatype."""
    return elements * (BF16 + (b.kept if b.kept < BF16 else 0.0))
