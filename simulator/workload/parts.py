"""What layers are made of: shapes on one rank, norms, residuals, linear layers divided by tensor parallelism.

Shapes as in `simulator.workload.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, Dtype, Plan, TensorParallel
from simulator.units import Number
from simulator.workload.ops import BF16, FP32, BlockBuilder, Op, Segment

#: bytes per element of an RMSNorm written in PyTorch: cast, square, mean, scale, cast back, weight; and their gradients
EAGER_NORM_BYTES = (36.0, 100.0)
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
    ulysses: bool
    style: TensorParallel

    @property
    def of_torch(self) -> bool:
        """Whether PyTorch's own tensor parallelism runs the collectives."""
        return self.style in ("torch", "torch_async")

    @classmethod
    def of(cls, plan: Plan, job: Job) -> Shape:
        """Return the sizes that `plan` gives to one micro-batch of `job`."""
        tokens = plan.micro_batch * job.sequence_length / plan.cp
        split = tokens / plan.tp if plan.sequence_parallel else tokens
        ulysses = plan.context_parallel == "all_to_all"
        return cls(
            tokens,
            split,
            job.sequence_length,
            plan.tp,
            plan.cp,
            plan.ep,
            plan.etp,
            plan.sequence_parallel,
            ulysses,
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
        plan.overlap.tp in (True, "pieces"),
        ELEMENT_BYTES[plan.precision.gradients],
        plan.kernels,
        load,
        plan.precision.rows or gemm,
    )


def norm(
    b: BlockBuilder, name: str, tokens: Number, width: int, model: Model, saved: Number, modules: tuple[str, ...] = ("layernorm",)
) -> None:
    """Read and write the row forward; read it, its gradient, write the input's gradient backward.

    An eager RMSNorm is seven operations in fp32, with twice as many behind them, and keeps an fp32 copy of the row and the
    normalised row beside the row and the result; LayerNorm is one kernel in PyTorch too.
    """
    eager = b.kernels.norm == "eager" and not model.layer_norm
    there, back = EAGER_NORM_BYTES if eager else (2 * BF16, 3 * BF16)
    if eager:
        saved = saved + tokens * width * (FP32 + BF16)
    b.memory(name, there * tokens * width, back * tokens * width, saved, modules, launches=(7, 14) if eager else (1, 2))
    b.dense_parameters = b.dense_parameters + width * (2 if model.layer_norm else 1)


def residual(b: BlockBuilder, x: Shape, model: Model) -> None:
    """Add a branch to the residual stream; dropout writes a mask and reads it back."""
    size, mask = x.split_tokens * model.hidden * BF16, x.split_tokens * model.hidden * MASK if b.kernels.dropout else 0.0
    b.memory("residual", 3 * size + mask, 3 * size + mask, mask)


def enter_tp(
    b: BlockBuilder, name: str, x: Shape, width: Number, modules: tuple[str, ...] = (), dtype: Dtype = "bf16"
) -> tuple[Op | None, Op | None]:
    """Gather the sequence-parallel rows for column-parallel layers, in `dtype`, to which every rank has cast its own before.

    Returns the collectives that Megatron hides behind the layer's gradients: the rows are gathered again beside the
    input gradient and their gradient is reduce-scattered (without sequence parallel: all-reduced) beside the weight's. PyTorch
    keeps the gathered rows instead, unless its checkpointing gathers them again, and sums the gradient after both.
    """
    if not x.sequence_parallel:
        return None, Op(f"{name}.grad", "all_reduce", bytes=x.tokens * width * BF16, axis="tp", grad="input")
    rows, gather = cast_and_gather(name, x, width, dtype)
    scatter = Op(f"{name}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp", grad="input")
    if not x.of_torch:
        b.add(rows, [], modules=(*modules, "tp_gather"))
        return replace(gather, grad="weight"), scatter
    kept = np.where(np.asarray(x.tp) > 1, gather.bytes, 0.0)
    b.add(rows, [(scatter,)], kept, (*modules, "tp_gather"))
    return None, None


def cast_and_gather(name: str, x: Shape, width: Number, dtype: Dtype, grad: str = "") -> tuple[list[Segment], Op]:
    """Return how the rows of all ranks are gathered, and the gather alone.

    Notes
    -----
    In low precision a rank casts its own rows before they travel: Transformer Engine (``gather_along_first_dim`` of the quantised
    tensor, transformer_engine/pytorch/module/linear.py) and torchao with one scale per tensor
    (torchao/float8/float8_tensor_parallel.py); the cast of an input's rows is the product's own otherwise.
    """
    gather = Op(f"{name}.gather", "all_gather", bytes=x.tokens * width * ELEMENT_BYTES[dtype], axis="tp", dtype=dtype, grad=grad)
    if dtype == "bf16":
        return [(gather,)], gather
    own, travels = x.split_tokens * width * (BF16 + ELEMENT_BYTES[dtype]), 1.0 * _travels(x, dtype)
    cast = Op(f"{name}.cast", "memory", bytes=own * travels, grad=grad, launches=travels)
    return [(cast,), (gather,)], gather


def _travels(x: Shape, dtype: Dtype) -> Any:
    """Return whether rows come from other ranks in low precision."""
    return (np.asarray(x.tp) > 1) & x.sequence_parallel & (dtype != "bf16")


def leave_tp(b: BlockBuilder, name: str, x: Shape, width: int, modules: tuple[str, ...] = (), dtype: Dtype = "bf16") -> None:
    """Sum the partial rows of a row-parallel layer; the gradients of a rank's own rows are gathered in `dtype`."""
    size = x.tokens * width * BF16
    if x.sequence_parallel:
        scatter = Op(f"{name}.scatter", "reduce_scatter", bytes=size, axis="tp")
        b.add([(scatter,)], cast_and_gather(name, x, width, dtype, "input")[0], modules=modules)
    else:
        b.add([(Op(f"{name}.reduce", "all_reduce", bytes=size, axis="tp"),)], [], modules=modules)


def column_parallel(
    b: BlockBuilder,
    part: str,
    names: tuple[str, ...],
    x: Shape,
    width: int,
    n: Number,
    modules: tuple[tuple[str, ...], ...] = ((),),
    saved: Number = 0.0,
) -> None:
    """Append column-parallel linear layers of one input, with the collectives of its rows, as the plan overlaps them.

    In pieces, rows are gathered in the datatype of the product, as Transformer Engine's buffers are (``fp8_buf``), by copy
    engines (``use_ce``). PyTorch gathers once for all layers of an input; others for each layer.
    """
    for first, name, own in zip((True, *[False] * (len(names) - 1)), names, modules, strict=True):
        several = f"{part}.{name.rsplit('.', 1)[-1]}" if len(names) > 1 else part
        if x.style in ("pieces", "torch_async") and (first or x.style == "pieces"):
            _arriving(b, several if x.style == "pieces" else part, name, x, width, n, own, saved)
            continue
        beside: tuple[Op | None, Op | None] = (None, None)
        if first or not x.of_torch:
            beside = enter_tp(b, part if x.of_torch else several, x, width, own if not x.of_torch else modules[-1], b.rows)
        b.linear(name, x.tokens, width, n, saved=saved, modules=own, beside=beside, arrives=(_travels(x, b.rows), False))


def _arriving(b: BlockBuilder, part: str, name: str, x: Shape, width: int, n: Number, modules: tuple[str, ...], saved: Number) -> None:
    """Append a column-parallel layer whose product runs beside the gather of its rows.

    PyTorch sums the gradients of all products of an input before it reduce-scatters them, so that nothing runs beside
    that (the pattern of torch/_inductor/fx_passes/micro_pipeline_tp.py is one product), nor beside a gather for a weight gradient.
    """
    _, gather = cast_and_gather(part, x, width, b.rows)
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp", grad="input")
    beside: tuple[Op | None, Op | None] = (replace(gather, grad="weight"), scatter)
    if x.of_torch:
        b.add([], [(scatter,)], np.where(np.asarray(x.tp) > 1, gather.bytes, 0.0), (*modules, "tp_gather"))
        beside = (None, None)
    b.linear(name, x.tokens, width, n, saved, modules, beside, gather=replace(gather, apart=True), pieces=x.tp)
    if x.of_torch and "tp_gather" in b.recomputed:
        b.add([], [(replace(gather, grad="again"),)])


def row_parallel(
    b: BlockBuilder, part: str, name: str, x: Shape, k: Number, width: int, modules: tuple[str, ...] = (), saved: Number = 0.0
) -> None:
    """Append a row-parallel linear layer and the sum of its partial rows, as the plan overlaps them."""
    if x.style not in ("pieces", "torch_async"):
        b.linear(name, x.tokens, k, width, saved=saved, modules=modules, arrives=(False, _travels(x, b.rows)))
        # by operation, what is reduce-scattered is kept
        leave_tp(b, part, x, width, tuple(m for m in modules if m != "attn_out"), b.rows)
        return
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp")
    _, gather = cast_and_gather(part, x, width, b.rows, "input")
    b.linear(name, x.tokens, k, width, saved, modules, scatter=(replace(scatter, apart=True), replace(gather, apart=True)), pieces=x.tp)
    if x.of_torch:
        several = 1.0 * (np.asarray(x.tp) > 1)
        summed = (x.tokens + x.split_tokens) * width * BF16 * SUM_SLOWDOWN
        b.memory(f"{part}.sum", summed * several, 0.0, modules=modules, launches=(several, 0.0))


def twice(b: BlockBuilder, elements: Number) -> Number:
    """Bytes of a tensor that attention keeps in bf16 and a low-precision linear layer in its own datatype."""
    return elements * (BF16 + (b.element if b.element < BF16 else 0.0))
