"""What a training framework keeps in memory beside the states of ZeRO and the activations that autograd saves, and computes again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from simulator.scenario.facts import Frozen

CrossEntropy = Literal["in_place", "compiled", "fused", "vocab_parallel", "eager", "half", "gathered"]
WeightGradients = Literal["fused", "placeholders", "kept", "copied"]
Casts = Literal["transformer_engine", "current", "tensorwise", "rowwise"]

#: name -> habits of frameworks that their repositories show; `Framework` itself is today's Megatron
PRESETS: dict[str, dict[str, Any]] = {
    "megatron": {},
    "megatron-2022": {"cross_entropy": "vocab_parallel", "weight_gradients": "fused", "splits_messages": True},
    "deepspeed": {
        "cross_entropy": "vocab_parallel",
        "weight_gradients": "copied",
        "keeps_outputs": True,
        "bucket_elements": 1_000_000_000,
        "splits_messages": True,
    },
    "fsdp": {"cross_entropy": "eager", "weight_gradients": "fused", "stops_early": True, "casts": "tensorwise"},
}


class Framework(Frozen):
    """Habits of a training framework that decide what stays in memory and what is computed again.

    In a scenario file a name stands for a preset: ``megatron`` (the default), ``megatron-2022`` (before Transformer
    Engine), ``deepspeed``, ``fsdp``.

    Parameters
    ----------
    cross_entropy : str
        What the loss keeps of the logits. ``in_place``: their gradient overwrites them (Transformer Engine, Liger);
        ``compiled``: they stay, and one kernel makes their gradient from them (torch.compile, torchtitan pull request 1033);
        ``fused``: one copy in fp32 (Megatron ``--cross-entropy-loss-fusion``); ``vocab_parallel``: two (without that flag);
        ``eager``: PyTorch's functions one by one; ``half``: the same without a copy in fp32; ``gathered``: eager, on logits gathered
        over tp.
    weight_gradients : str
        ``fused``: added to the main gradients by the matrix product itself, or themselves the main gradients;
        ``placeholders``: likewise, but autograd is shown one tensor per weight shape, which stays (Transformer Engine 2
        with Megatron, ``get_dummy_wgrad``); ``kept``: whole 16-bit gradients beside the main ones (DeepSpeed's bf16
        optimizer); ``copied``: 16-bit main gradients, whose shard is copied to one flat fp32 tensor for the optimizer
        (DeepSpeed's ZeRO-1 and 2), in memory that no activation can use.
    keeps_outputs : bool
        Whether a pipeline stage keeps the output that it sent on until its backward; Megatron frees it.
    offloaded_layers : int
        Transformer layers per replica whose saved activations wait in the host's memory; their traffic is not priced.
    reduces_whole : bool
        Whether ZeRO-1 all-reduces gradients, of which every rank then keeps its shard, instead of reduce-scattering them.
    splits_messages : bool
        Whether the ranks of a tensor-parallel group without sequence parallelism each send their part of a message to the next stage,
        whose ranks then gather it (Narayanan et al. 2021, section 4.1; DeepSpeed's partitioned pipeline), instead of all sending all.
    bucket_elements : int
        Gradient elements that are copied into buckets for their reduction; 0 where they are reduced in place.
    casts : str
        How linear layers in low precision cast. ``transformer_engine``: inputs and weights stay in low precision, scaled or laid out for
        both products, by scales that are known before (delayed scaling) or found for every block. ``current``: the same with one scale
        for a tensor as it is, whose maximum is a pass of its own (``Float8CurrentScaling``). ``tensorwise``, ``rowwise``: torchao with
        one scale per tensor or per row; inputs stay in 16 bits and are cast again for the weight gradient, weights for every pass
        (``matmul_with_hp_or_float8_args``, torchao/float8/float8_linear.py).
    metrics : int
        Losses that are computed of every micro-batch's logits for the log, beside the one that is trained on, by eager PyTorch.
    stops_early : bool
        Whether recompute of a layer or of its modules ends with the last tensor that the backward needs, which leaves out the last
        product and what follows (PyTorch's non-reentrant checkpoint since 2.1, ``set_checkpoint_early_stop``; XLA, which computes
        nothing that no one reads); else it repeats all.
    """

    cross_entropy: CrossEntropy = "fused"
    weight_gradients: WeightGradients = "placeholders"
    keeps_outputs: bool = False
    offloaded_layers: int = Field(default=0, ge=0)
    reduces_whole: bool = False
    splits_messages: bool = False
    bucket_elements: int = Field(default=0, ge=0)
    casts: Casts = "transformer_engine"
    metrics: int = Field(default=0, ge=0)
    stops_early: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in PRESETS:
            raise ValueError(f"{value} is not known; use one of {', '.join(PRESETS)}, or its fields")
        return PRESETS[value]
