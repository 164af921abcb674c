"""A real mixture-of-experts transformer on one rank: the blocks that the simulator describes, made of tensors.

Shapes: T tokens of a micro-batch, Ts = T / tp of them between the tensor-parallel parts, h width, E experts, k of them per
token, R rows that a rank's experts receive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from simulator.calibration import kernels
from simulator.calibration.comm import Ranks
from simulator.calibration.functions import (
    AllToAll,
    Balanced,
    Embed,
    Fork,
    GatherRows,
    Grouped,
    Join,
    Linear,
    Loss,
    Norm,
    Permute,
    Piece,
    Rotary,
    ScatterRows,
    SwiGLU,
    Unpermute,
)
from simulator.calibration.recorder import Recorder
from simulator.calibration.weights import Kind, Part, Weight
from simulator.scenario.model import Model

Tensor = torch.Tensor


@dataclass(frozen=True)
class Options:
    """What a step leaves open beside model, plan and job.

    Parameters
    ----------
    dtype : torch.dtype
        Of parameters and activations; main gradients, master weights and moments are fp32.
    scoring : str
        ``softmax`` or ``sigmoid`` router.
    auxiliary_loss : float
        Weight of the load-balancing loss of each micro-batch on each rank (Fedus et al., "Switch Transformers", 2022, eq. 4); 0 for none.
    bias_rate : float
        Step of the bias that balances the choice of experts (Wang et al., 2024), after every optimizer step; 0 for none.
    capacity_factor : float or None
        An expert takes at most this many times the mean of a micro-batch on a rank and drops the rest; None drops nothing.
    explicit_attention : bool
        Attention as two products instead of the fused kernel.
    lr, clip : float
        Learning rate, and the largest norm of the gradient.
    seed : int
        Of the initial parameters.
    """

    dtype: torch.dtype = torch.bfloat16
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    auxiliary_loss: float = 0.0
    bias_rate: float = 0.0
    capacity_factor: float | None = None
    explicit_attention: bool = False
    lr: float = 1e-4
    clip: float = math.inf
    seed: int = 0


@dataclass
class Context:
    """What every block needs of its surroundings.

    Parameters
    ----------
    model, options, ranks, recorder
    sequences, length : int
        Sequences of a micro-batch and tokens of each.
    tokens : float
        Tokens of the global batch: every gradient is that of the mean loss over them.
    """

    model: Model
    options: Options
    ranks: Ranks
    recorder: Recorder
    sequences: int
    length: int
    tokens: float
    table: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        width = self.model.latent.rope_dim if self.model.latent else self.model.head_dim
        self.table = kernels.rotary_table(self.length, width, self.options.dtype, self.ranks.device)


class Block:
    """A named list of weights, with the means to make them."""

    def __init__(self, name: str, context: Context):
        self.name, self.context = name, context
        self.weights: dict[str, Weight] = {}

    def weight(self, name: str, *parts: tuple[str, tuple[int, ...], str], kind: Kind = "dense") -> Weight:
        """Add a weight of parts (name, full shape, axis that splits it: ``tp``, ``ep`` or nothing)."""
        ranks = self.context.ranks
        made = []
        for part, shape, axis in parts:
            dim = 1 if part.endswith(":columns") else 0
            made.append(Part(f"{self.name}.{part}", shape, dim, ranks.index(axis) if axis else 0, ranks.size(axis) if axis else 1))
        if kind == "dense" and ranks.size("tp") > 1 and not any(axis for _, _, axis in parts):
            kind = "replicated"
        self.weights[name] = Weight(tuple(made), kind)
        return self.weights[name]

    def linear(self, x: Tensor, name: str, gathered: bool = False) -> Tensor:
        """Return ``x W^T``, after gathering the rows of all tensor-parallel ranks if `gathered`."""
        ranks = self.context.ranks if gathered and self.context.ranks.size("tp") > 1 else None
        return Linear.apply(x, self.weights[name], self.context.recorder, ranks)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Return RMSNorm of the rows."""
        return Norm.apply(x, self.weights[name], self.context.recorder)

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's rows of the sum over tensor-parallel ranks."""
        return ScatterRows.apply(x, self.context.ranks) if self.context.ranks.size("tp") > 1 else x


class Embedding(Block):
    """Token embedding, vocabulary split over tp."""

    def __init__(self, name: str, context: Context):
        super().__init__(name, context)
        self.weight("table", ("table", (context.model.vocab, context.model.hidden), "tp"))
        self.anchor = torch.zeros((), requires_grad=True, device=context.ranks.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of (T,) tokens, (Ts, h)."""
        table, ranks = self.weights["table"], self.context.ranks
        begin = ranks.index("tp") * table.shape[0] if ranks.size("tp") > 1 else None
        return self.scatter(Embed.apply(self.anchor, tokens, table, begin, self.context.recorder))


class Head(Block):
    """Final norm, output projection, vocabulary split over tp, and cross-entropy."""

    def __init__(self, name: str, context: Context):
        super().__init__(name, context)
        m = context.model
        self.weight("norm", ("norm", (m.hidden,), ""))
        self.weight("logits", ("logits", (m.vocab, m.hidden), "tp"))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the loss over the tokens of a micro-batch."""
        c = self.context
        logits = self.linear(self.norm(x, "norm"), "logits", gathered=True)
        begin = c.ranks.index("tp") * self.weights["logits"].shape[0]
        return Loss.apply(logits, targets, begin, c.ranks, c.recorder)


class Layer(Block):
    """A transformer layer: grouped-query or latent attention, then a dense MLP or a mixture of experts."""

    def __init__(self, name: str, context: Context, moe: bool):
        super().__init__(name, context)
        m, self.moe = context.model, moe
        self.weight("attn.norm", ("attn.norm", (m.hidden,), ""))
        self._latent_weights() if m.latent else self._attention_weights()
        self.weight("mlp.norm", ("mlp.norm", (m.hidden,), ""))
        if not moe:
            self._mlp_weights("mlp", m.ffn)
            return
        e = m.experts
        assert e is not None
        self.weight("router", ("router", (e.count, m.hidden), ""))
        self.weight("moe.up", ("moe.up", (e.count, 2 * e.ffn, m.hidden), "ep"), kind="expert")
        self.weight("moe.down", ("moe.down", (e.count, m.hidden, e.ffn), "ep"), kind="expert")
        if e.shared_ffn:
            self._mlp_weights("shared", e.shared_ffn)
        self.bias = torch.zeros(e.count, device=context.ranks.device)
        self.routed = torch.zeros(e.count, dtype=torch.int64)
        self.dropped = 0

    def _attention_weights(self) -> None:
        m = self.context.model
        width, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
        self.weight("qkv", ("q", (width, m.hidden), "tp"), ("k", (kv, m.hidden), "tp"), ("v", (kv, m.hidden), "tp"))
        self.weight("out", ("out:columns", (m.hidden, width), "tp"))

    def _latent_weights(self) -> None:
        m, a = self.context.model, self.context.model.latent
        assert a is not None
        if a.q_rank:
            self.weight("q_down", ("q_down", (a.q_rank, m.hidden), ""))
            self.weight("q_norm", ("q_norm", (a.q_rank,), ""))
        self.weight("kv_down", ("kv_down", (a.kv_rank + a.rope_dim, m.hidden), ""))
        self.weight("kv_norm", ("kv_norm", (a.kv_rank,), ""))
        self.weight("q_up", ("q_up", (m.heads * (a.nope_dim + a.rope_dim), a.q_rank or m.hidden), "tp"))
        self.weight("kv_up", ("kv_up", (m.heads * (a.nope_dim + a.v_dim), a.kv_rank), "tp"))
        self.weight("out", ("out:columns", (m.hidden, m.heads * a.v_dim), "tp"))

    def _mlp_weights(self, name: str, ffn: int) -> None:
        h = self.context.model.hidden
        self.weight(f"{name}.up", (f"{name}.gate", (ffn, h), "tp"), (f"{name}.up", (ffn, h), "tp"))
        self.weight(f"{name}.down", (f"{name}.down:columns", (h, ffn), "tp"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows (Ts, h) after the layer."""
        recorder = self.context.recorder
        beside, x = Fork.apply(x, recorder)
        x = self.norm(x, "attn.norm")
        x = self._latent_attention(x) if self.context.model.latent else self._attention(x)
        beside, x = Fork.apply(Join.apply(beside, x, recorder), recorder)
        x = self.norm(x, "mlp.norm")
        return Join.apply(beside, self._experts(x) if self.moe else self._mlp(x, "mlp"), recorder)

    def _core(self, function: Callable, *inputs: Tensor, **how: Any) -> Tensor:
        """Return attention as rows (T, heads * width)."""
        c = self.context
        core = kernels.attention_by_products if c.options.explicit_attention else kernels.attention
        return Piece.apply(partial(function, core=core, **how), ("attention.forward", "attention.backward"), c.recorder, *inputs)

    def _attention(self, x: Tensor) -> Tensor:
        c, m = self.context, self.context.model
        tp = c.ranks.size("tp")
        heads, kv = m.heads // tp, m.kv_heads // tp
        shape = (c.sequences, c.length, heads + 2 * kv, m.head_dim)
        qkv = Rotary.apply(self.linear(x, "qkv", gathered=True), shape, heads + kv, 0, c.table, c.recorder)
        return self.scatter(self.linear(self._core(kernels.grouped_query, qkv, shape=shape, heads=heads), "out"))

    def _latent_attention(self, x: Tensor) -> Tensor:
        c, a = self.context, self.context.model.latent
        assert a is not None
        heads = c.model.heads // c.ranks.size("tp")
        one, other = Fork.apply(x, c.recorder)
        q = self.norm(self.linear(one, "q_down"), "q_norm") if a.q_rank else one
        latent, rope = self.linear(other, "kv_down").split([a.kv_rank, a.rope_dim], dim=1)
        rows = torch.cat([q, self.norm(latent, "kv_norm"), rope], dim=1)
        rows = GatherRows.apply(rows, c.ranks) if c.ranks.size("tp") > 1 else rows
        q, latent, rope = (part.contiguous() for part in rows.split([q.shape[1], a.kv_rank, a.rope_dim], dim=1))
        shape = (c.sequences, c.length, heads)
        q = Rotary.apply(self.linear(q, "q_up"), (*shape, a.nope_dim + a.rope_dim), heads, a.nope_dim, c.table, c.recorder)
        rope = Rotary.apply(rope, (*shape[:2], 1, a.rope_dim), 1, 0, c.table, c.recorder)
        widths = (a.nope_dim, a.v_dim)
        return self.scatter(
            self.linear(self._core(kernels.latent, q, self.linear(latent, "kv_up"), rope, shape=shape, widths=widths), "out")
        )

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        up = self.linear(x, f"{name}.up", gathered=True)
        return self.scatter(self.linear(SwiGLU.apply(up, None, self.context.recorder), f"{name}.down"))

    # --- experts ---

    def _experts(self, x: Tensor) -> Tensor:
        c, e = self.context, self.context.model.experts
        assert e is not None
        if e.shared_ffn:
            x, beside = Fork.apply(x, c.recorder)
        x, scored = Fork.apply(x, c.recorder)
        weights, experts = self._route(self.linear(scored, "router"))
        most = None if c.options.capacity_factor is None else math.ceil(c.options.capacity_factor * experts.numel() / e.count)
        with c.recorder.region("topk.forward"):
            places, order, counts, dropped = kernels.order(experts, e.count, most)
            counts = counts.cpu()  # the only time that a layer makes the host wait
            self.routed += counts
            self.dropped += dropped
            kept = (counts if most is None else counts.clamp(max=most)).tolist()
        rows = Permute.apply(x, order // e.top_k, places, c.recorder)
        weights = Permute.apply(weights.reshape(-1, 1), order, places.reshape(-1, 1), c.recorder)
        rows = self._visit(rows, weights, kept)
        out = Unpermute.apply(rows, order // e.top_k, places, c.recorder)
        return Join.apply(out, self._mlp(beside, "shared"), c.recorder) if e.shared_ffn else out

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and experts (Ts, k) of the tokens."""
        c, e = self.context, self.context.model.experts
        assert e is not None

        def route(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return kernels.route(x.float(), self.bias, e.top_k, c.options.scoring)

        weights, experts, scores = Piece.apply(route, ("topk.forward", "topk.backward"), c.recorder, logits)
        if c.options.auxiliary_loss:
            share = torch.bincount(experts.reshape(-1), minlength=e.count) / experts.numel()
            auxiliary = e.count * (share * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
            weights = Balanced.apply(weights, auxiliary, c.options.auxiliary_loss * len(experts) / c.tokens)
        return weights, experts

    def _visit(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """Return the rows after their experts, wherever these stand; `counts` are the rows of every expert of the layer."""
        c = self.context
        ep = c.ranks.size("ep")
        if ep == 1:
            return self._compute(rows, weights, counts)
        local = len(counts) // ep
        told = c.ranks.all_to_all("ep", torch.tensor(counts, device=rows.device), [local] * ep, [local] * ep).tolist()
        sent = [sum(counts[r * local : (r + 1) * local]) for r in range(ep)]
        received = [sum(told[r * local : (r + 1) * local]) for r in range(ep)]
        rows, weights = (AllToAll.apply(x, sent, received, c.ranks) for x in (rows, weights))
        # from (rank, expert) to (expert, rank) and back
        pieces = [(r, e) for e in range(local) for r in range(ep)]
        rows, weights = (self._chunks(x, told, [r * local + e for r, e in pieces]) for x in (rows, weights))
        sums = [sum(told[e::local]) for e in range(local)]
        out = self._compute(rows, weights, sums)
        mixed = [told[r * local + e] for r, e in pieces]
        out = self._chunks(out, mixed, [e * ep + r for r in range(ep) for e in range(local)])
        return AllToAll.apply(out, received, sent, c.ranks)

    @staticmethod
    def _chunks(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
        chunks = x.split(sizes)
        return torch.cat([chunks[i] for i in order])

    def _compute(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        recorder, last = self.context.recorder, kernels.ends(counts, rows.device)
        up = Grouped.apply(rows, self.weights["moe.up"], counts, last, recorder)
        act = SwiGLU.apply(up, weights.reshape(-1), recorder)
        return Grouped.apply(act, self.weights["moe.down"], counts, last, recorder)

    def balance(self, counts: Tensor) -> None:
        """Move the bias of the router towards the experts that got fewer than the mean of `counts`."""
        mean = counts.float().mean()
        self.bias += self.context.options.bias_rate * torch.sign(mean - counts.float()).to(self.bias.device)
