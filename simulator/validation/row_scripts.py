"""What a table of published rows leaves out and the scripts that ran its rows say."""

from __future__ import annotations

from typing import NamedTuple

from simulator.validation.row import Row

#: columns in words: what a script says is put behind what the row prints
_WORDS = ("notes", "overlap_notes")


class Script(NamedTuple):
    """What a script says of some rows.

    Parameters
    ----------
    rows : dict
        Column -> regular expression that its cell matches.
    says : dict
        Column -> its cell where the row leaves it blank or `rows` asks for the cell that is replaced; ``{tp}`` stands for the row's cell.
    where : str
        Where the script can be read.
    """

    rows: dict[str, str]
    says: dict[str, str]
    where: str


_BRIDGE = "NVIDIA-NeMo/Megatron-Bridge"
_25_09, _25_11 = r"\(25\.09 container\)", r"\(25\.11 container\)"
_ZOO = "yanring/Megatron-MoE-ModelZoo"
_DGXC = "NVIDIA/dgxc-benchmarking"
_GRAPHS = "cuda_graph_scope=attn moe_router moe_preprocess"
_SCRIPTS = [
    Script(
        {"source": "Parallel Folding", "notes": r"strategy '(?!.*Folding)"},
        {"etp": "{tp}"},
        "experts are divided as the rest of a layer where nothing is folded: what the paper sets its method against",
    ),
    Script(
        {"source": "Parallel Folding", "pp": r"^(?!1$)", "vpp": "^$"},
        {"notes": "every layer is its own chunk"},
        "NVIDIA/NeMo @00138e2 nemo/collections/llm/recipes/mixtral_8x22b.py and its 8x7b: virtual stages of one layer",
    ),
    Script(
        {"source": "Parallel Folding", "mbs": "^$"},
        {"mbs": "1"},
        f"{_ZOO} @0993e66 best_practice/Mixtral/run_mixtral_8x22B.sh, the authors' own",
    ),
    Script(
        {"source": "JAX-Toolbox Pax", "model": "5B|175B", "recompute": "^$"},
        {"recompute": "full"},
        "google/paxml @04516ac contrib/gpu/scripts_gpu/configs.py on tasks/lm/model_params.py: SAVE_NOTHING where layers repeat",
    ),
    Script(
        {"source": "JAX-Toolbox Pax", "precision": "^bf16"},
        {"overlap_notes": "kernel=fused"},
        "NVIDIA/JAX-Toolbox rosetta/projects/pax @2860390: without Transformer Engine, XLA's own softmax over scores in memory",
    ),
    Script(
        {"source": "MLPerf Training", "gpu": "[BH][123]00", "precision": "^$"},
        {"precision": "FP8"},
        "mlcommons/training_results: configurations of NVIDIA's implementation train in 8 bits, where they name no 4",
    ),
    Script(
        {"provenance": "dgxc-benchmarking/maxtext", "recompute": "^$"},
        {"recompute": "selective(layernorm,core_attn,attn_out,mlp,mlp_act)"},
        f"remat_policy=save_qkv_proj of {_DGXC} @0b71cfd maxtext/configure.sh",
    ),
    Script(
        {"provenance": "dgxc-benchmarking/maxtext", "notes": "FSDP=128 x", "overlap_notes": "^$"},
        {"overlap_notes": "optimizer-shard group = 128"},
        "the row's own notes",
    ),
    Script({"provenance": r"dgxc-benchmarking/maxtext/.*@v25\.04", "mbs": "^$"}, {"mbs": "2"}, f"{_DGXC} maxtext/configure.sh"),
    Script(
        {"provenance": r"dgxc-benchmarking/maxtext/.*@v25\.04", "gpus": "^(512|1024|2048)$", "overlap_notes": "^$"},
        {"overlap_notes": "optimizer-shard group = 128"},
        f"{_DGXC} maxtext/configure.sh, as in the releases before",
    ),
    Script(
        {"provenance": "dgxc-benchmarking/paxml/README_175b", "recompute": "^$"},
        {"recompute": "selective(layernorm,core_attn,mlp,mlp_act)", "overlap_notes": "optimizer-shard group = 128"},
        f"SAVE_QKV_OUT_PROJ of {_DGXC} @35a9aec paxml/paxml_mod_configs.py, the meshes of its configure.sh",
    ),
    Script(
        {"provenance": "dgxc-benchmarking/paxml/README_5b", "recompute": "^$"},
        {"recompute": "selective(layernorm,core_attn,mlp_act)", "overlap_notes": "optimizer-shard group = 8"},
        f"SAVE_DOT_ONLY of {_DGXC} @35a9aec paxml/paxml_mod_configs.py, the meshes of its configure.sh",
    ),
    Script(
        {"provenance": "dgxc-benchmarking/nemotron", "model": "340B", "gpu": "H100", "pp": "^8$", "vpp": "^$"},
        {"vpp": "12"},
        "NVIDIA/NeMo scripts/performance/recommended_model_configs, for the same model and mapping",
    ),
    Script(
        {"source": "GB200 DeepSeek-V3 optimi", "overlap_notes": "^(?!.*pp_layout)"},
        {"overlap_notes": "pp_layout=Et|(tt|)*30L", "notes": "without MTP; forced load balancing; bf16 moments; grads fp32"},
        f"NVIDIA/Megatron-LM examples of this optimisation; {_ZOO} best-practice/DeepSeekV3/run_gb200.sh",
    ),
    Script(
        {"source": "GB200 DeepSeek-V3 optimi", "overlap_notes": r"cumulative step ([6-9]|1\d):(?!.*cuda_graph)"},
        {"overlap_notes": _GRAPHS},
        "CUDA graphs are its sixth step",
    ),
    Script(
        {"source": "GB200 DeepSeek-V3 optimi", "recompute": r"^selective\(mlp\)$"},
        {"recompute": "selective(mlp,moe_act)"},
        "the text of the guide that the table is of",
    ),
    Script(
        {"source": "Megatron-MoE-ModelZoo", "gpu": "GB200", "precision": "^mxfp8", "recompute": "^$"},
        {"recompute": "selective(moe_act,layernorm)"},
        f"{_ZOO} @020b813 best_practice/qwen3/run_gb200_235b.sh",
    ),
    Script(
        {"source": "Megatron-MoE-ModelZoo", "gpu": "GB[23]00", "seq_len": "^4096$", "recompute": "^$"},
        {"recompute": "none", "overlap_notes": _GRAPHS},
        f"{_ZOO} @020b813 best_practice/qwen3/run_gb200_235b.sh and its run_gb300_235b.sh",
    ),
    Script(
        {"source": "Megatron-MoE-ModelZoo", "gpu": "H100", "recompute": "modules in the command line"},
        {"recompute": "selective(layernorm,moe)", "mbs": "1"},
        f"{_ZOO} @020b813 best_practice/qwen3/readme.md, run_h100_235b.sh",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_11}", "gpu": "GB[23]00", "model": "DeepSeek-V3|Qwen3", "overlap_notes": "^$"},
        {"overlap_notes": "cuda_graph=transformer_engine:['moe_router', 'moe_preprocess']; dispatcher=hybridep"},
        f"the recipes of this container on Grace Blackwell ({_BRIDGE} @v0.2.0 scripts/performance/configs)",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_11}", "gpu": "B200", "model": "GPT-OSS", "recompute": "^$"},
        {"recompute": "selective(layernorm,moe_act)"},
        f"{_BRIDGE} @6b296ac scripts/performance/configs/gpt_oss/workload_base_configs.py, the batches of this container",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_11}", "gpu": "GB300", "model": "GPT-OSS", "overlap_notes": "^$"},
        {"overlap_notes": "cuda_graph=transformer_engine:['attn', 'moe_router', 'moe_preprocess']"},
        f"{_BRIDGE} @6b296ac scripts/performance/configs/gpt_oss/workload_base_configs.py, the batches of this container",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_11}", "model": "DeepSeek-V3", "recompute": "^$"},
        {"recompute": "selective(mla_up_proj)"},
        f"{_BRIDGE} @v0.2.0 scripts/performance/configs/deepseek/workload_base_configs.py",
    ),
    Script(
        {"source": "gpu-tpu-pedia GB300 Qwen3-235B", "overlap_notes": "^$"},
        {"overlap_notes": "cuda_graph=full_iteration; hybridep; moe_a2a_overlap; cutedsl; fp8 attention; paged stash"},
        "the recipe that its script starts, version 2 in MXFP8 (yangwhale/gpu-tpu-pedia @d50b896 gpu/a4x-max/07-megatron-training/"
        "07d-gb300-qwen3-235b-gke/run-qwen3-yw.sh)",
    ),
    Script(
        {"source": "Megatron-Bridge", "model": "Llama-3 70B", "gpu": "B[23]00", "pp": "^4$", "vpp": "^$"},
        {"vpp": "5"},
        f"{_BRIDGE} @00919dc scripts/performance/configs/llama/llama3_workload_base_configs.py",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_09}", "notes": "EP 32 is the largest possible", "ep": "^64$"},
        {"ep": "32"},
        "64 do not fit a stage of 32; the row's own notes",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_09}", "model": "DeepSeek-V3", "recompute": "^$"},
        {"recompute": "selective(mla_up_proj)"},
        f"{_BRIDGE} @0132842 scripts/performance/configs/deepseek/deepseek_llm_pretrain.py",
    ),
    Script(
        {"provenance": f"{_BRIDGE}.*{_25_09}", "gpu": "GB200", "model": "Qwen3", "overlap_notes": "^$"},
        {"overlap_notes": "cuda_graphs"},
        f"{_BRIDGE} @27dfb3d scripts/performance/configs/qwen3/qwen3_235b_a22b_llm_pretrain.py, qwen3_235b_a22b_gb200_*",
    ),
]


def with_scripts(row: Row) -> Row:
    """Return a row with what the scripts of its source say; each cell that they fill in is one of its assumptions."""
    for script in _SCRIPTS:
        if not all(row.has(pattern, column) for column, pattern in script.rows.items()):
            continue
        for column, says in script.says.items():
            says, printed = says.format(tp=row.text("tp")), row.text(column)
            words = column in _WORDS
            if printed and not words and column not in script.rows:
                continue
            row = row.replaced({column: "; ".join(filter(None, (printed, says))) if words else says})
            row.assume(f"{column} {'not printed' if words or not printed else f'printed as {printed}'}: {says} ({script.where})")
    return row
