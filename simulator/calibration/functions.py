# ruff: noqa: D102 - forward and backward are the names that torch.autograd.Function gives them
"""Autograd around the kernels: each function runs one kernel forward and one or two backward, timed by the simulator's names.

Weights are no autograd leaves: their gradients are added to the fp32 main gradients where the backward computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from simulator.calibration import kernels
from simulator.calibration.comm import Ranks
from simulator.calibration.recorder import Recorder
from simulator.calibration.weights import Weight

Tensor = torch.Tensor


class Linear(torch.autograd.Function):
    """``x W^T``; with `ranks` the rows of all tensor-parallel ranks are gathered first, and again for the weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, recorder: Recorder, ranks: Ranks | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.recorder, ctx.ranks = weight, recorder, ranks
        rows = ranks.all_gather("tp", x) if ranks else x
        with recorder.region("gemm.forward"):
            return kernels.linear(rows, weight.value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        with ctx.recorder.region("gemm.input"):
            into = kernels.linear_input(g, ctx.weight.value)
        rows = ctx.ranks.all_gather("tp", x) if ctx.ranks else x
        with ctx.recorder.region("gemm.weight"):
            kernels.linear_weight(g, rows, ctx.weight.main)
        return ctx.ranks.reduce_scatter("tp", into) if ctx.ranks else into, None, None, None


class Grouped(torch.autograd.Function):
    """``x_e W_e^T`` for the rows of each local expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, counts: Sequence[int], last: Tensor | None, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.counts, ctx.last, ctx.recorder = weight, counts, last, recorder
        with recorder.region("grouped_gemm.forward"):
            return kernels.grouped(x, weight.value, counts, last)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        with ctx.recorder.region("grouped_gemm.input"):
            into = kernels.grouped_input(g, ctx.weight.value, ctx.counts, ctx.last)
        with ctx.recorder.region("grouped_gemm.weight"):
            kernels.grouped_weight(g, x, ctx.weight.main, ctx.counts, ctx.last)
        return into, None, None, None, None


class Norm(torch.autograd.Function):
    """RMSNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, recorder: Recorder) -> Tensor:
        with recorder.region("norm.forward"):
            out, scale = kernels.norm(x, weight.value)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.recorder = weight, recorder
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("norm.backward"):
            return kernels.norm_backward(g, *ctx.saved_tensors, ctx.weight.value, ctx.weight.main), None, None


class SwiGLU(torch.autograd.Function):
    """The gated activation, each row times its routing weight if there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder = recorder
        with recorder.region("activation.forward"):
            return kernels.swiglu(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("activation.backward"):
            return *kernels.swiglu_backward(g, *ctx.saved_tensors), None


class Fork(torch.autograd.Function):
    """Two uses of one tensor; their gradients are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorder: Recorder) -> tuple[Tensor, Tensor]:
        ctx.recorder = recorder
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple:
        with ctx.recorder.region("residual.backward"):
            return kernels.add(one, other), None


class Join(torch.autograd.Function):
    """The sum of a residual connection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, recorder: Recorder) -> Tensor:
        with recorder.region("residual.forward"):
            return kernels.add(x, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return g, g, None


class Rotary(torch.autograd.Function):
    """Rotation in place of the first `heads` heads of rows viewed as `shape` (batch, sequence, heads, width), from column `begin` on."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: tuple[int, ...], heads: int, begin: int, table: tuple[Tensor, Tensor], recorder: Recorder
    ) -> Tensor:
        ctx.part, ctx.shape, ctx.table, ctx.recorder = (..., slice(heads), slice(begin, None)), shape, table, recorder
        ctx.mark_dirty(x)
        with recorder.region("rotary.forward"):
            kernels.rotate_(x.view(shape)[ctx.part], table)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("rotary.backward"):
            kernels.rotate_(g.view(ctx.shape)[ctx.part], ctx.table, back=True)
        return g, None, None, None, None, None


class Permute(torch.autograd.Function):
    """Copies of the tokens in the order of their experts: row i is token ``index[i]``; ``places`` (T, k) is where its copies went."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(places)
        ctx.recorder = recorder
        with recorder.region("permute.forward"):
            return kernels.gather_rows(x, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("permute.backward"):
            return kernels.sum_copies(g, *ctx.saved_tensors), None, None, None


class Unpermute(torch.autograd.Function):
    """The sum of every token's copies: `Permute` backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(index)
        ctx.recorder = recorder
        with recorder.region("unpermute.forward"):
            return kernels.sum_copies(x, places)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("unpermute.backward"):
            return kernels.gather_rows(g, *ctx.saved_tensors), None, None, None


class AllToAll(torch.autograd.Function):
    """Rows to the ranks that hold their experts, or back; the gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Ranks) -> Tensor:
        ctx.sent, ctx.received, ctx.ranks = sent, received, ranks
        return ranks.all_to_all("ep", x, sent, received)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return ctx.ranks.all_to_all("ep", g, ctx.received, ctx.sent), None, None, None


class GatherRows(torch.autograd.Function):
    """The rows of all tensor-parallel ranks; the gradient is reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.all_gather("tp", x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return ctx.ranks.reduce_scatter("tp", g), None


class ScatterRows(torch.autograd.Function):
    """The rows of this rank of the sum over the tensor-parallel ranks; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.reduce_scatter("tp", x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return ctx.ranks.all_gather("tp", g), None


class Embed(torch.autograd.Function):
    """Rows of the embedding; `anchor` only makes autograd come here."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tokens: Tensor, weight: Weight, begin: int | None, recorder: Recorder) -> Tensor:
        ctx.tokens, ctx.weight, ctx.begin, ctx.recorder = tokens, weight, begin, recorder
        with recorder.region("embedding.forward"):
            return kernels.embed(tokens, weight.value, begin)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("embedding.backward"):
            kernels.embed_backward(g, ctx.tokens, ctx.weight.main, ctx.begin)
        return None, None, None, None, None


class Loss(torch.autograd.Function):
    """Sum of the cross-entropy over tokens, the vocabulary split over the tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, begin: int, ranks: Ranks, recorder: Recorder) -> Tensor:
        with recorder.region("loss.forward"):
            each, probabilities = kernels.loss(
                logits, targets, begin, lambda x: ranks.all_reduce("tp", x, largest=True), lambda x: ranks.all_reduce("tp", x)
            )
        ctx.probabilities, ctx.targets, ctx.begin, ctx.dtype, ctx.recorder = probabilities, targets, begin, logits.dtype, recorder
        return each.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        with ctx.recorder.region("loss.backward"):
            into = kernels.loss_backward(ctx.probabilities, ctx.targets, g, ctx.dtype, ctx.begin)
        ctx.probabilities = None
        return into, None, None, None, None


class Piece(torch.autograd.Function):
    """A function whose backward autograd derives, run and timed as one kernel each way.

    Attention and the router: the library has the gradient, and only the time is ours to take.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable, names: tuple[str, str], recorder: Recorder, *inputs: Tensor) -> Any:
        with recorder.region(names[0]), torch.enable_grad():
            own = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            outputs = function(*own)
            several = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.own, ctx.outputs, ctx.name, ctx.recorder = own, several, names[1], recorder
        given = tuple(out.detach() for out in several)
        ctx.mark_non_differentiable(*(out for out in given if not out.is_floating_point()))
        return given if isinstance(outputs, tuple) else given[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        wanted = [i for i, x in enumerate(ctx.own) if x.requires_grad and ctx.needs_input_grad[3 + i]]
        pairs = [(out, g) for out, g in zip(ctx.outputs, gradients, strict=True) if out.requires_grad]
        with ctx.recorder.region(ctx.name):
            found = torch.autograd.grad([o for o, _ in pairs], [ctx.own[i] for i in wanted], [g for _, g in pairs])
        into: list[Tensor | None] = [None] * len(ctx.own)
        for i, g in zip(wanted, found, strict=True):
            into[i] = g
        ctx.own = ctx.outputs = None
        return None, None, None, *into


class Balanced(torch.autograd.Function):
    """The scores as they are; backward adds the gradient of an auxiliary loss, which counts `scale` in the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, auxiliary: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        return g, g.new_full((), ctx.scale, dtype=torch.float32), None
