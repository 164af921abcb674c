"""The network being trained, as dimensions. No FLOP and no bytes here: those are `simulator.workload.layers`."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from simulator.scenario.facts import Frozen

#: a layer is an entry of a tuple: more of them are a mistake, not a model
MOST_LAYERS = 10_000
Size = Annotated[int, Field(gt=0, lt=2**31)]
SizeOrZero = Annotated[int, Field(ge=0, lt=2**31)]


class LatentAttention(Frozen):
    """Dimensions of multi-head latent attention (MLA).

    Parameters
    ----------
    q_rank : int or None
        Rank of the query projection; None for a plain one.
    kv_rank : int
        Rank of the compressed keys and values.
    nope_dim, rope_dim, v_dim : int
        Per head: key width without and with rotary position, value width.
    """

    q_rank: Size | None
    kv_rank: Size
    nope_dim: SizeOrZero
    rope_dim: SizeOrZero
    v_dim: Size


class Experts(Frozen):
    """A mixture-of-experts MLP.

    Parameters
    ----------
    count, top_k : int
        Routed experts per layer and how many each token visits.
    ffn : int
        Width of one routed expert.
    shared_ffn : int
        Total width of the shared experts; 0 for none.
    shared_gate : bool
        Whether a learned gate weighs the shared expert (Qwen2-MoE).
    groups, top_groups : int
        Group-limited routing: the top-k come from the best `top_groups` of `groups`; 1 and 1 for none.
    """

    count: Size
    top_k: Size
    ffn: Size
    shared_ffn: SizeOrZero = 0
    shared_gate: bool = False
    groups: Size = 1
    top_groups: Size = 1

    @model_validator(mode="after")
    def _groups_fit(self) -> Experts:
        if self.top_k > self.count:
            raise ValueError(f"top_k = {self.top_k} exceeds {self.count} experts")
        if self.count % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {self.count} experts")
        if not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"top_groups = {self.top_groups} must be 1 to groups = {self.groups}")
        if self.top_groups * (self.count // self.groups) < self.top_k:
            raise ValueError(f"{self.top_groups} groups of {self.count // self.groups} experts hold fewer than top_k = {self.top_k}")
        return self


class LayerKind(Frozen):
    """What sets one transformer layer apart from another: its MLP and its attention span.

    Parameters
    ----------
    moe : bool
        Mixture of experts, or dense MLP.
    window : int or None
        Tokens of a sliding window; None attends to the whole sequence.
    """

    moe: bool
    window: int | None = None


class Model(Frozen):
    """Dimensions of a decoder-only transformer.

    Parameters
    ----------
    layers, hidden, vocab : int
        Transformer layers (without MTP layers), width, vocabulary.
    heads, kv_heads, head_dim : int
        Query heads, key-value heads and width of a head; for MLA see `latent`.
    ffn : int
        Width of the dense MLP.
    gated : bool
        Gated MLP (SwiGLU: three matrices) or plain (two).
    experts : Experts or None
    moe_layers : tuple of bool
        For each layer, whether its MLP is a mixture of experts.
    windows : tuple of (int or None)
        For each layer, its sliding window; empty when every layer sees the whole sequence.
    latent : LatentAttention or None
    mtp_layers : int
        Multi-token-prediction layers trained beside the main model.
    scaled_rotary, clamped : bool
        Whether rotary embedding also multiplies by YaRN's factor of attention, and experts clamp what they activate (GPT-OSS).
    tied_embeddings, attention_bias, output_bias, mlp_bias, qk_norm, sinks, layer_norm : bool
        Details that carry parameters: shared input and output embedding, biases of q/k/v, of the attention output and of
        the MLP, norms of queries and keys, learned attention sinks, LayerNorm (with bias) instead of RMSNorm.
    positions : int
        Learned position embeddings; 0 for rotary.
    source : str
        Where the dimensions come from.
    """

    name: str
    source: str
    layers: int = Field(gt=0, le=MOST_LAYERS)
    hidden: Size
    vocab: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    ffn: SizeOrZero
    gated: bool = True
    scaled_rotary: bool = False
    clamped: bool = False
    experts: Experts | None = None
    moe_layers: tuple[bool, ...] = ()
    windows: tuple[Size | None, ...] = ()
    latent: LatentAttention | None = None
    mtp_layers: int = Field(default=0, ge=0, le=MOST_LAYERS)
    tied_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    layer_norm: bool = False
    positions: SizeOrZero = 0

    @model_validator(mode="after")
    def _dimensions_agree(self) -> Model:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv_heads do not divide {self.heads} heads")
        if self.moe_layers and len(self.moe_layers) != self.layers:
            raise ValueError(f"moe_layers has {len(self.moe_layers)} entries for {self.layers} layers")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.layers} layers")
        if any(self.moe_layers) != (self.experts is not None):
            raise ValueError("experts and moe_layers must be given together")
        if not all(self.moe_layers or (False,)) and not self.ffn:
            raise ValueError("ffn = 0, but some layers have a dense MLP")
        return self

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer, in order."""
        return _layer_kinds(self.layers, self.moe_layers, self.windows)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The distinct layer kinds, in order of first appearance."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @property
    def arch(self) -> Literal["dense", "moe"]:
        """``dense`` or ``moe``."""
        return "moe" if self.experts else "dense"


@lru_cache(maxsize=256)
def _layer_kinds(layers: int, moe_layers: tuple[bool, ...], windows: tuple[int | None, ...]) -> tuple[LayerKind, ...]:
    every = zip(moe_layers or (False,) * layers, windows or (None,) * layers, strict=True)
    return tuple(LayerKind(moe=moe, window=window) for moe, window in every)
