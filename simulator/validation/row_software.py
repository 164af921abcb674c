"""The training framework of a published row: how its loss is computed, and what it keeps in memory."""

from __future__ import annotations

import re
from typing import Any

from simulator.scenario.framework import PRESETS, Framework
from simulator.validation.row import Row
from simulator.validation.row_kernels import TRACED

#: sources of one software -> its habits, and how they are known
_SOFTWARE: list[tuple[str, dict[str, Any], str]] = [
    (
        "SimuMax|Megatron-Bridge|gpu-tpu-pedia|Megatron-MoE|moe_recipes|Megatron-Core MoE",
        {"cross_entropy": "in_place"},
        "Megatron with the cross-entropy of Transformer Engine, in place",
    ),
    (
        "NVIDIA/NeMo/scripts/performance",
        {"cross_entropy": "in_place"},
        "NeMo's performance scripts take the cross-entropy of Transformer Engine (scripts/performance/helpers.py @02a0e6a)",
    ),
    (
        "Aleph-Alpha",
        {"cross_entropy": "gathered", "weight_gradients": "copied", "keeps_outputs": True, "reduces_whole": True},
        "loss on gathered logits, 16-bit gradients all-reduced in fp32 and copied to a flat shard, stage outputs kept (Aleph-Alpha/scaling "
        "@7848929 src/scaling/core/optimizer/allreduce.py)",
    ),
    (
        "InternEvo",
        {"cross_entropy": "in_place", "weight_gradients": "copied", "reduces_whole": True},
        "FlashAttention's cross-entropy, 16-bit gradients all-reduced whole, whose shard is copied to fp32 (InternLM/InternEvo @00a2a34 "
        "internlm/solver/optimizer/hybrid_zero_optim.py)",
    ),
    ("torchtitan|fms-fsdp", PRESETS["fsdp"], "PyTorch FSDP with eager cross-entropy, which torchtitan could not compile before 2025"),
    (
        "dgxc-benchmarking/(?:maxtext|paxml)|JAX-Toolbox",
        {"cross_entropy": "compiled", "weight_gradients": "fused", "stops_early": True},
        "XLA: one kernel for the loss, and nothing computed again that no gradient reads",
    ),
    (
        "MosaicML",
        PRESETS["fsdp"] | {"cross_entropy": "in_place", "metrics": 2},
        "PyTorch FSDP with llm-foundry's fused cross-entropy; Composer computes it twice more of every micro-batch, for the log "
        "(`Trainer._train_microbatch`; llm-foundry's `use_train_metrics`)",
    ),
    ("BLOOM|MT-NLG", PRESETS["deepspeed"], "Megatron-DeepSpeed: flat fp32 copies, stage outputs and default buckets kept"),
    ("Zero Bubble|Korthikanti|SC'21|vTrain|MegaScale", PRESETS["megatron-2022"], "Megatron-LM before Transformer Engine"),
    (
        TRACED,
        {"cross_entropy": "half", "splits_messages": False},
        "PyTorch's cross-entropy in 16 bits, messages between stages whole (VIA-Research/vTrain @f8dda84 src/trainer.py, src/predictor.py)",
    ),
]
#: torchtitan's pages of June 2025: since its pull request 1033 (April) the loss is compiled wherever the model is
_COMPILED_LOSS = r"torchtitan/benchmarks/\S*_2025-?06"


def framework_of(row: Row) -> Framework:
    """Return the framework of a published row; what the row does not print is added to its assumptions."""
    habits = row.of_source(_SOFTWARE, "framework")
    if habits.get("bucket_elements") and "bf16" in row.text("precision"):
        # DeepSpeed's bf16 optimizer all-reduces its fp32 gradients (deepspeed/runtime/pipe/engine.py, ``_bf16_reduce_grads``)
        habits |= {"weight_gradients": "kept", "reduces_whole": True}
    if row.has(_COMPILED_LOSS, "provenance") and row.has("torch.compile", "overlap_notes"):
        row.assume("loss compiled with the model: torchtitan pull request 1033")
        habits["cross_entropy"] = "compiled"
    if row.has("mp_mode=PURE", "precision"):
        habits["stops_early"] = False
        row.assume(
            "recompute repeats whole layers: the PURE rows are of early 2023 and PyTorch 1.13; the DEFAULT ones of that August are up to "
            "7 % faster than PyTorch 2.0.1 in llm-foundry's torches.md @beb8dee, which a last product less explains: a nightly of 2.1"
        )
    if row.has("torchtitan", "source") and row.has("rowwise", "precision"):
        habits["casts"] = "rowwise"
    if not row.has("torchtitan", "source") and (row.has("fp8_cs", "id", "provenance") or row.has("current|tensorwise", "precision")):
        habits["casts"] = "current"
    offloaded = re.search(r"cpu_offload_layers=(\d+)", row.text("overlap_notes"))
    if offloaded:
        habits["offloaded_layers"] = int(offloaded.group(1))
    return Framework(**habits)
