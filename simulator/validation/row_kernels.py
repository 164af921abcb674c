"""The kernels of a published row: what its notes name, else what the source's software ran at the time."""

from __future__ import annotations

import re
from typing import Any

from simulator.scenario.kernels import Kernels
from simulator.validation.row import Row

#: sources on Megatron-LM of 2021 or forks of it: no --gradient-accumulation-fusion, no asynchronous all-reduce of an input gradient
BEFORE_2022 = "vTrain|SC'21|BLOOM|MT-NLG"
#: rows that are no measured steps: the sum of the kernels of one layer, of embedding and of head, traced on one GPU with the gaps
#: between them, and of a table of all-reduces. To 1 us the differences between their data-parallel degrees are those of the source's
#: own formulas, also of the one for more than 1 GiB, which takes the bus bandwidth for the rate of the buffer whatever the ranks
#: (VIA-Research/vTrain @f8dda84 src/predictor.py, ``compute_comm_time``, and trace/a100)
TRACED = r"vTrain ground truth \(single"
#: sources of one software generation -> its kernels and why
_STACKS: list[tuple[str, dict[str, Any], str]] = [
    (
        "vTrain|SC'21|Korthikanti|MT-NLG|Zero Bubble",
        {"attention": "unfused", "dropout": True},
        "Megatron-LM before FlashAttention: scores in memory, fused softmax, dropout",
    ),
    (
        BEFORE_2022,
        {"accumulation": "separate"},
        "forks of Megatron-LM before 2022: gradients added to those of earlier micro-batches by a kernel of its own",
    ),
    (
        "vTrain|SC'21|Korthikanti|MT-NLG|Zero Bubble|BLOOM|MosaicML|InternEvo|Aleph-Alpha",
        {"backward": "engine"},
        "gradients by PyTorch's engine",
    ),
    (
        TRACED,
        {"accumulation": "none"},
        "a trace of one layer between embedding and head, gradients set to None before (VIA-Research/vTrain @f8dda84 src/trainer.py)",
    ),
    ("BLOOM", {"attention": "unfused"}, "Megatron-DeepSpeed before FlashAttention: scores in memory, fused softmax, no dropout"),
    ("MosaicML", {"attention": "flash1", "pointwise": "eager"}, "llm-foundry of 2023: first FlashAttention in Triton, eager PyTorch"),
    (
        "InternEvo",
        {"attention": "flash1", "gate": "separate", "accumulation": "separate"},
        "InternEvo of 2023: first FlashAttention, fused norms, gate and up-projection apart, gradients added by PyTorch "
        "(InternLM/InternEvo @0a4ffea internlm/model/linear.py)",
    ),
    (
        "Aleph-Alpha",
        {"norm": "eager", "pointwise": "eager", "gate": "separate", "accumulation": "separate"},
        "eager rotary embedding, activation and loss, gate and up-projection apart (Aleph-Alpha/scaling)",
    ),
    (
        "torchtitan",
        {"attention": "flash2", "gate": "separate"},
        "PyTorch's attention is FlashAttention-2; torch.compile fuses the rest, but gate and up-projection stay apart",
    ),
    (
        "Megatron-Bridge|gpu-tpu-pedia|Megatron-LM dev|Megatron-Core MoE|Megatron-MoE-ModelZoo",
        {"router": "fused"},
        "routing in the fused kernels of Transformer Engine, as recipes since 25.09 ask (moe_router_fusion: NVIDIA-NeMo/Megatron-Bridge "
        "@05c0c90 scripts/performance/configs/qwen/qwen3_llm_pretrain.py, @0132842 .../deepseek, @0501207 .../gpt_oss; NVIDIA/Megatron-LM "
        "@8a2ac1f examples/moe_recipes)",
    ),
    ("Llama 3 Herd|NeMo24.03", {"attention": "flash2"}, "early 2024: FlashAttention-2's speed on Hopper, before FlashAttention-3"),
]
#: recipes whose table prints none of their options: NVIDIA-NeMo/Megatron-Bridge src/megatron/bridge/perf_recipes/gpt_oss,
#: ``_apply_gpt_oss_120b_full_iter_fp8mx_configs``
FULL_ITERATION_RECIPE = r"gpt_oss_120b_pretrain_64gpu_gb[23]00_fp8mx_config"
#: recipes whose MXFP8 version with a full-iteration CUDA graph also attends in 8 bits, which their table does not print: Qwen3, GPT-OSS
#: and, except on GB200, DeepSeek-V3 (NVIDIA-NeMo/Megatron-Bridge pull requests 4249, 4606, 4173, 3983, ``fp8_dot_product_attention``).
#: Transformer Engine attends in MXFP8 since its pull request 2719, with sinks, too (3441 tells from which cuDNN), and has no other
#: kernel to fall back on
_FP8_ATTENTION_RECIPE = (
    r"(QWEN3|GPT_OSS_120B|DEEPSEEK_V3(?!_PRETRAIN_CONFIG_GB200))\w*_FP8_MX|(qwen3|gpt_oss_120b|deepseek_v3(?!\w*_gb200))\w*_fp8mx"
)
#: releases whose cuDNN is older than 9.11, the first that trains latent attention (keys of 192, values of 128) on Blackwell as one kernel
#: (NVIDIA/TransformerEngine common/fused_attn/fused_attn.cpp). Their recipes recompute ``core_attn`` there, which keeps scores (NVIDIA/
#: dgxc-benchmarking @1f6d9f4 deepseek_v3/pretraining/launch.sh, NeMo 25.04.01); the next one, on NeMo 25.07.01, does not
_NEMO_2504 = r"dgxc-benchmarking/deepseek_v3/\S*@v25\.0[1-7]"
#: beginning of what follows ``kernel=``, in Aleph-Alpha's words or in others' -> fields; the first match counts
_NAMED: dict[str, dict[str, str]] = {
    "torch": {"attention": "eager"},
    "fused": {"attention": "unfused"},
    "flash_attentionv1": {"attention": "flash1"},
    "flash_attention2": {"attention": "flash2"},
    "flash2": {"attention": "flash2"},
    "sdpa": {"attention": "flash2"},
    "xformers": {"attention": "flash2"},
    "triton": {"attention": "flash2"},
    "flash": {"attention": "flash"},
    "cudnn": {"attention": "flash"},
    "aiter": {"attention": "flash"},
}


def kernels_of(row: Row) -> Kernels:
    """Return the kernels of a published row; what the row does not print is added to its assumptions."""
    fields = row.of_source(_STACKS, "kernels")
    if row.has("fp8 dot-product attention|fp8 attention", "overlap_notes", "notes"):
        fields["attention"] = "flash_fp8"
    if row.has(_NEMO_2504, "provenance"):
        if row.has("B[23]00", "gpu"):
            row.assume("latent attention not printed: scores in memory (cuDNN before 9.11 has no gradient of it on Blackwell)")
            fields["attention"] = "unfused"
        row.assume("rotary embedding of latent attention not printed: not fused (Megatron's configuration refused it until mid-2025)")
        fields["latent_rotary"] = "eager"
    named = re.search(r"kernel=([^;]*)", row.text("overlap_notes"))
    if named:
        kernel = named.group(1).strip()
        known = next((found for name, found in _NAMED.items() if kernel.startswith(name)), None)
        if known is None and kernel:
            row.assume(f"kernel not known: {kernel} (taken as the fastest fused attention)")
        fields |= known or {}
        if "RMS kernel" in kernel:
            fields["norm"] = "fused"
    if row.has(r"\beager\b", "overlap_notes"):
        fields |= {"norm": "eager_fp32" if row.has("torchtitan", "source") else "eager", "pointwise": "eager"}
    graphs = _graphs(row)
    if "full" in graphs and row.has("MXFP8", "precision") and row.has(_FP8_ATTENTION_RECIPE, "provenance"):
        row.assume("attention not printed: in 8 bits, as the recipe says")
        fields["attention"] = "flash_fp8"
    if row.has("grouped_gemm=false", "overlap_notes"):
        fields["experts"] = "sequential"
    if row.text("arch") == "moe" and (row.has("cutedsl", "overlap_notes") or "full" in graphs):
        # loads that the host reads back cannot be captured: a whole step as a graph needs products that read them on the device, also
        # those of GPT-OSS, clamped and with biases (NVIDIA-NeMo/Megatron-Bridge pull request 4173, NVIDIA/cudnn-frontend issue 256)
        if not row.has("cutedsl", "overlap_notes"):
            row.assume("experts' kernels not printed: fused, because the whole step is a CUDA graph")
        fields["experts"] = "fused"
    return Kernels(**fields, graphs=graphs)


def _graphs(row: Row) -> tuple[str, ...]:
    """Return the parts of a layer that run from CUDA graphs, in Megatron's words for their scope."""
    if row.has(FULL_ITERATION_RECIPE, "provenance") and not row.text("overlap_notes"):
        row.assume("options not in the table: full-iteration CUDA graph, HybridEP and all-to-all overlap, as the recipe says")
        return ("full",)
    notes = f"{row.text('overlap_notes')}; {row.text('notes')}"
    if re.search(r"full[-_]iteration|FULL_CUDA_GRAPH=1|cuda_graph=full", notes) and not re.search(r"cuda_graph=none", notes):
        return ("full",)
    if re.search(r"MCORE_CUDA_GRAPH=1|LAYER_CUDA_GRAPH=1", notes):
        return ("attn", "mlp")
    scope = re.search(r"cuda_graph_scope=([^;]*)|cuda_graph=transformer_engine:([^;]*)|CUDA graphs \(([^)]*)\)", notes)
    if scope:
        words = " ".join(part for part in scope.groups() if part)
        names = {"attn": "attn", "moe_router|router": "moe_router", "preprocess": "moe_preprocess", r"\bmlp": "mlp"}
        return tuple(name for pattern, name in names.items() if re.search(pattern, words))
    if re.search(r"\bcuda_graphs\b", notes) and re.search("token-?drop", notes):
        # NVIDIA/Megatron-LM core/transformer/cuda_graphs.py: experts that all get their capacity are captured with their layer
        row.assume("scope of CUDA graphs not printed: whole layers, whose experts are padded to their capacity")
        return ("attn", "moe", "mlp")
    if re.search(r"\bcuda_graphs\b", notes):
        row.assume("scope of CUDA graphs not printed: attention")
        return ("attn",)
    return ()
