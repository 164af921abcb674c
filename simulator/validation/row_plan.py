"""The plan and the job of a published row: degrees from columns, the rest from the words of its notes."""

from __future__ import annotations

import re
from typing import Any, Literal

from simulator.errors import ProfileError
from simulator.scenario.job import Job
from simulator.scenario.kernels import Kernels
from simulator.scenario.model import Model
from simulator.scenario.overlap import Overlap, TensorParallel
from simulator.scenario.plan import Plan, Precision
from simulator.validation.row import Row
from simulator.validation.row_kernels import BEFORE_2022, FULL_ITERATION_RECIPE, TRACED, kernels_of
from simulator.validation.row_layout import layout_of
from simulator.validation.row_products import BF16_MOMENTS, products_of
from simulator.validation.row_recompute import recompute_of
from simulator.validation.row_software import framework_of

#: what a source's notes may mention -> a mechanism that the simulator has no operation for
_NOT_MODELLED = {
    r"WITH_OPTIM_STEP=True|param_gather_with_optimizer_step": "parameter gather beside the optimizer",
    r"token-?drop|capacity factor": "capacity factor (balanced routing costs the same when it is 1)",
    r"cpu_offload_layers|activation_offloading=True": "activations offloaded to the host",
    r"paged[_ ]stash": "copies into and out of the pages of stashed activations (their room is)",
    r"Llama-3 variant": "Llama 3's 1F1B with N micro-batches in flight",
}
#: sources whose software waits for every message between stages: Megatron-LM before 2023 and the scripts that zero-bubble schedules are
#: compared with (its p2p_communication.py), DeepSpeed (deepspeed/runtime/pipe/p2p.py), Aleph-Alpha/scaling (its communicator.py)
_WAITS_FOR_MESSAGES = r"Zero Bubble|vTrain|SC'21|Korthikanti|MegaScale \(NSDI|BLOOM|MT-NLG|Aleph-Alpha"
#: sources on Megatron-Core, which waits for them where a rank has one model chunk (core/pipeline_parallel/schedules.py,
#: ``forward_backward_pipelining_without_interleaving``)
_MEGATRON_CORE = "Megatron|dgxc-benchmarking|NVIDIA NeMo|MLPerf|SimuMax|gpu-tpu-pedia"
#: the schedules or systems among them that do not (MegaScale, section 3.2)
_SENDS_ASIDE = "^ZB|^V-|^zero-bubble|^MegaScale;"
#: words for tensor-parallel collectives in pieces beside their products
_IN_PIECES = r"(?<!no )TP comm overlap|\bTP_COMM_OVERLAP=True|overlap of DP, TP and PP communication enabled"
#: source, models and datatypes left out -> recipes that turn tensor-parallel communication overlap on although the table of their
#: source prints nothing, or prints the configuration file that the launch script overrides (Nemotron-4 340B of 24.11.1); it is off
#: for DeepSeek-V3, Grok-1 and Qwen3-235B on H100
_RECIPES_IN_PIECES = [
    (
        "Megatron-Bridge",
        "Llama-3",
        "fp4",
        "tp_comm_overlap=True in src/megatron/bridge/recipes/llama (@3594df9, @0d5f555), off for NVFP4 in scripts/performance (@0013c9a)",
    ),
    (
        "dgxc-benchmarking|Megatron-LM examples/llama",
        "Llama-[34]|Nemotron-4|GPT-3",
        "mxfp8",
        "tp_comm_overlap=True of NVIDIA/NeMo nemo/collections/llm/recipes (@01d03c1), ub_tp_comm_overlap=True of "
        "NVIDIA/dgxc-benchmarking nemotron/configure.sh (@35a9aec)",
    ),
    (
        "Parallel Folding|Megatron-MoE-ModelZoo",
        "",
        "fp8",
        "--tp-comm-overlap of the authors' scripts in bf16 (yanring/Megatron-MoE-ModelZoo @0993e66 model_configs/benchmarking/"
        "Mixtral-8x22B.yaml, @38ce2ed sbatch_benchmarking.sh)",
    ),
    (
        "NVIDIA NeMo performance",
        "GPT(-3)? 175B|Llama-3 70B",
        "mxfp8",
        "ub_tp_comm_overlap of NVIDIA/NeMo-Framework-Launcher launcher_scripts/conf/training (@3dd3561 llama/llama3_70b.yaml, @1e46ac6 "
        "gpt3/175b_fp8_performance.yaml)",
    ),
]
#: words for expert all-to-all beside the compute of another micro-batch
_PAIRED = (
    r"(?:moe_a2a_|a2a-)overlap|EP-comm overlap|EP-comm/1F1B|EP-A2A overlap"
    "|overlap_moe_expert_parallel_comm=True|A2A_OVERLAP=1|DualPipe overlaps"
)
#: recipes whose MXFP8 version with a full-iteration CUDA graph multiplies with the output matrix in MXFP8, too (``fp8_output_proj``,
#: NVIDIA/Megatron-LM pull request 4825): DeepSeek-V3 (NVIDIA-NeMo/Megatron-Bridge pull requests 3983, 4226 and 4458) and GPT-OSS
#: (perf_recipes/gpt_oss/common.py @3564acf); Qwen3's do not
_NARROW_HEAD = r"(DEEPSEEK_V3|GPT_OSS_120B)\w*_FP8_MX|(deepseek_v3|gpt_oss_120b)\w*_fp8mx|gpu-tpu-pedia/\S*deepseekv3"
#: recipes that name a backend of the flexible dispatcher and set ``moe_token_dispatcher_type = "alltoall"``, so that it is not used
#: (NVIDIA-NeMo/Megatron-Bridge @05c0c90 scripts/performance/configs/qwen/qwen3_llm_pretrain.py)
_ALLTOALL_RECIPE = "QWEN3_235B_A22B_PRETRAIN_CONFIG_(H100|B200)"
#: zero-bubble schedules written by hand -> the automatic one that may keep as many activations (Qi et al. 2023, sections 3 and 4)
_HANDCRAFTED = {"ZB-H1": "ZB-1p", "ZB-H2": "ZB-2p"}
#: dispatchers with the interface and the copies of DeepEP: UCCL-EP, AMD's MORI
_LIKE_DEEPEP = r"\b(?:uccl|mori)\b"
#: sources from before sequence parallelism, or whose default is without it
_NO_SEQUENCE_PARALLEL = "BLOOM|vTrain|SC'21|InternEvo|JAX-Toolbox|MT-NLG"
#: sources whose Megatron-LM could not yet reduce gradients beside the backward
_NO_GRADIENT_OVERLAP = r"SC'21|MegaScale \(NSDI|Korthikanti|Zero Bubble"
#: sources whose public recipe reduces gradients in bf16 (performance scripts of NeMo and Megatron-Bridge: grad_reduce_in_fp32=False;
#: foundation-model-stack/fms-fsdp @2e76f99 pretraining/policies/mixed_precision.py: reduce_dtype=bfloat16)
_BF16_GRADIENTS = "Megatron-Bridge|Megatron-Core MoE|gpu-tpu-pedia|dgxc|NVIDIA NeMo|MLPerf|Megatron-LM examples/llama|InternEvo|fms-fsdp"


def plan_of(row: Row, model: Model) -> Plan:
    """Return the plan of a published row.

    Parameters
    ----------
    row : Row
        Its assumptions are added to the row.
    model : Model
        The row's model, for the layers that the stages share out.

    Raises
    ------
    ProfileError
        When degrees are not printed or contradict the accelerator count, or the schedule is not modelled.
    """
    degrees = _degrees(row, model)
    for pattern, mechanism in _NOT_MODELLED.items():
        if row.has(pattern, "overlap_notes", "notes", "pp_schedule", "precision"):
            row.assume(f"not modelled: {mechanism}")
    recompute, modules, share = recompute_of(row, model)
    sequence_parallel = _sequence_parallel(row, degrees["tp"])
    table = None
    schedule = _schedule(row, degrees)
    if schedule == "dualpipe":
        degrees["vpp"] = 2  # a stage of each direction; both hold the same layers
        row.assume("micro-batches run through the pipe in both directions (DualPipe)")
    elif model.experts is not None and (row.has(_PAIRED, "overlap_notes", "notes") or row.has(FULL_ITERATION_RECIPE, "provenance")):
        schedule, table = _paired(row, degrees, schedule)
    overlap, kernels = _overlap(row, degrees, sequence_parallel), kernels_of(row)
    if row.has(TRACED, "source"):
        row.assume("collectives timed apart from the kernels: nothing is launched meanwhile (src/predictor.py)")
        overlap = overlap.model_copy(update={"host_waits": True})
    if schedule != "dualpipe" and row.has("A100|H[128]00", "gpu"):
        overlap = overlap.model_copy(update={"queued": True})  # DeepSeek's kernels leave multiprocessors to communication
    return Plan(
        **degrees,
        zero=_zero(row),
        micro_batch=row.default("micro-batch", 1, row.whole("mbs")),
        schedule=schedule,
        table=table,
        layout=layout_of(row, model, degrees["pp"] * (1 if schedule == "dualpipe" else degrees["vpp"])),
        recompute=recompute,
        recompute_modules=modules,
        recompute_share=share,
        sequence_parallel=sequence_parallel,
        dispatcher=_dispatcher(row, model),
        context_parallel=_context_parallel(row),
        precision=_precision(row, kernels),
        overlap=overlap,
        kernels=kernels,
        framework=framework_of(row),
    )


def job_of(row: Row) -> Job:
    """Return the job of a published row: one optimizer step."""
    batch, sequence = row.need("gbs"), row.need("seq_len")
    natural = row.has(r"natural routing|no force-?balanc|unforced", "notes", "overlap_notes")
    if row.has("ISCA'25", "source") and not row.has("force-balanced", "notes"):
        row.assume("routing not printed: natural, as the production run that it was")
        natural = True
    if row.text("arch") == "moe" and not natural and not row.has(r"balanc|capacity factor|tokendrop", "notes", "overlap_notes"):
        row.assume("routing not printed: balanced")
    return Job(
        tokens=batch * sequence,
        global_batch=batch,
        sequence_length=sequence,
        optimizer="muon" if row.has(r"\bmuon\b", "notes", "overlap_notes") or row.text("model").startswith("Kimi-K2") else "adam",
        routing="natural" if natural else "balanced",
    )


def _degrees(row: Row, model: Model) -> dict[str, int]:
    degrees = {axis: row.need(axis) for axis in ("tp", "pp", "cp")}
    world, held = row.need("gpus"), degrees["tp"] * degrees["pp"] * degrees["cp"]
    dp = row.whole("dp") or world // held
    if held * dp != world:
        raise ProfileError("degrees do not multiply to the accelerators")
    replicas = 1
    group = re.search(r"optimizer-shard group = (\d+)", row.text("overlap_notes"))
    if group:
        replicas = max(1, dp // int(group.group(1)))
    degrees |= {"dp_replicate": replicas, "dp_shard": dp // replicas, "vpp": 1}
    if degrees["pp"] > 1:
        degrees["vpp"] = row.default("virtual stages", 1, row.whole("vpp") or _said_chunks(row, model, degrees["pp"]))
    if model.experts is not None:
        degrees["ep"] = row.need("ep")
        degrees["etp"] = row.default("expert tensor parallelism", 1, row.whole("etp"))
        if dp * degrees["cp"] * degrees["tp"] % (degrees["ep"] * degrees["etp"]):
            raise ProfileError("ep x etp does not divide dp x cp x tp")
    return degrees


def _context_parallel(row: Row) -> Literal["ring", "all_gather", "all_to_all"]:
    if row.has("Ulysses", "overlap_notes"):
        return "all_to_all"
    return "all_gather" if row.has("all-gather CP", "overlap_notes", "notes") else "ring"


def _zero(row: Row) -> int:
    if row.has("Llama 3 Herd", "source"):
        row.assume("gradients accumulated over the micro-batches and reduced once: section 3.3.2 of the paper")
        return 1
    return row.default("ZeRO stage", 1, row.whole("zero_stage"))


def _said_chunks(row: Row, model: Model, pp: int) -> int | None:
    """Return the model chunks of a pipeline rank that only the notes of a row tell, None when they do not."""
    alone = row.has("every layer is its own chunk", "notes")
    if row.has("Llama 3 Herd", "source"):
        row.assume("virtual stages: a layer each, as the first has only the embedding and the last only the output (section 3.3.2)")
        alone = True
    if alone:
        return (model.layers + 2) // pp  # embedding and head count as a layer each
    said = re.search(r"vpp not in the table \((\d+) for 175B", row.text("notes"))
    if said and row.text("model") == "GPT 175B":
        row.assume(f"virtual stages recalled, not printed: {said.group(1)}")
        return int(said.group(1))
    if row.has("^(ZB-V|V-half|V-min)", "pp_schedule"):
        row.assume("virtual stages: 2, which these schedules are made for")
        return 2
    if row.has("interleaved|1F1B-I", "pp_schedule"):
        # embedding and head count as a layer each where the layers alone do not divide
        each = next((layers // pp for layers in (model.layers, model.layers + 2) if layers % pp == 0), 1)
        chunks = next((v for v in range(2, each + 1) if each % v == 0), 1)
        row.assume(f"virtual stages not printed: {chunks}, the fewest that interleave")
        return chunks
    return None


def _schedule(row: Row, degrees: dict[str, int]) -> str:
    printed = row.text("pp_schedule")
    if degrees["pp"] == 1:
        return "1f1b"
    if printed in ("ZB-1p", "ZB-2p", "DualPipe") or (printed in ("ZB-V", "V-half", "V-min") and degrees["vpp"] == 2):
        return printed.lower()
    if printed in _HANDCRAFTED:
        row.assume(f"{printed} as the automatic schedule of the same memory, {_HANDCRAFTED[printed]}")
        return _HANDCRAFTED[printed].lower()
    if degrees["vpp"] == 1 and re.search(r"gpipe|\bafab\b", printed, re.IGNORECASE):
        return "gpipe"
    if re.search(r"\bZB|zero-bubble|V-half|V-min", printed):
        raise ProfileError(f"pipeline schedule not modelled: {printed.split(' (')[0]}")
    found = "interleaved" if degrees["vpp"] > 1 else "1f1b"
    if printed and not re.search("1F1B|interleaved|PipeDream|none", printed, re.IGNORECASE):
        row.assume(f"not modelled: pipeline schedule '{printed}' (taken as {found})")
    return found


def _paired(row: Row, degrees: dict[str, int], schedule: str) -> tuple[str, str | None]:
    """Return the schedule whose forwards and backwards run in pairs, so that each hides the other's all-to-all.

    Without a pipeline it is a table: a forward ahead, then every further one beside the backward of the one before it, as
    Megatron-Core's combined forward and backward does. One micro-batch has nothing to pair with.
    """
    if schedule == "interleaved":
        return "interleaved-overlapped", None
    if schedule != "1f1b" or degrees["pp"] > 1:
        row.assume("not modelled: expert all-to-all beside compute without virtual stages")
        return schedule, None
    dp = degrees["dp_shard"] * degrees["dp_replicate"]
    micro_batches = row.need("gbs") // (dp * (row.whole("mbs") or 1))
    pairs = " ".join(f"0F{i + 1}+0B{i}" for i in range(micro_batches - 1))
    return "table", f"0F0 {pairs} 0B{micro_batches - 1}\n"


def _sequence_parallel(row: Row, tp: int) -> bool:
    printed = re.search(r"sequence_parallel=(True|False)", row.text("overlap_notes"))
    if printed:
        return printed.group(1) == "True"
    if row.has("sequence-parallel", "recompute"):
        return True
    if row.has("sequence parallelism only in the 'selective' row", "notes"):
        return False
    off = row.has(_NO_SEQUENCE_PARALLEL, "source")
    if tp > 1:
        row.assume(f"sequence parallelism not printed: {'off' if off else 'on'}")
    return not off


def _dispatcher(row: Row, model: Model) -> str:
    if model.experts is None:
        return "alltoall"
    if row.has(_ALLTOALL_RECIPE, "provenance"):
        row.assume("dispatcher: alltoall, which the recipe sets beside the backend that its table names")
        return "alltoall"
    if row.has("node-limited", "overlap_notes"):
        row.assume("dispatcher: one copy per host, fanned out there (node-limited routing)")
        return "deepep"
    if row.has(FULL_ITERATION_RECIPE, "provenance") or row.has("hybrid-?ep", "overlap_notes", "notes"):
        return "hybridep"
    if row.has(_LIKE_DEEPEP, "overlap_notes", "notes"):
        row.assume("dispatcher priced as DeepEP, whose interface it has")
        return "deepep"
    if not row.has("deepep", "overlap_notes", "notes"):
        if not row.has("dispatcher|all-?to-?all", "overlap_notes", "notes"):
            row.assume("dispatcher not printed: alltoall")
        return "alltoall"
    return "deepep"


def _precision(row: Row, kernels: Kernels) -> Precision:
    products = products_of(row)
    fields: dict[str, Any] = {"gemm": products}
    if products == "fp16":
        row.assume("gradient precision not printed: fp16")
        fields |= dict.fromkeys(("parameters", "gradients", "dispatch", "combine", "gradient_reduce"), "fp16")
    if row.has("Aleph-Alpha", "source"):
        fields["gradients"] = "bf16"
    if row.has("torchtitan", "source") and row.has("rowwise", "precision"):
        row.assume("tensor-parallel gathers in bf16: torchao casts before them only for tensorwise scaling (torchao/float8/README.md)")
        fields["gather"] = "bf16"
    if products == "fp8" and row.has("B[23]00", "gpu") and not row.has("MX|1x|block", "precision"):
        row.assume("one copy of a tensor in FP8: one scale for it, either layout")
        fields["layouts"] = 1
    if products == "fp4":
        fields["block"] = 16
    elif products == "fp8" and row.has(r"\bMX|1x32", "precision"):
        fields["block"] = 32
    if "full" in kernels.graphs and row.has("MXFP8", "precision") and row.has(_NARROW_HEAD, "provenance"):
        row.assume("output projection not printed: in MXFP8, as the recipe says (fp8_output_proj)")
        fields["head"] = "fp8"
    if row.has("fp8 all-gather", "precision"):
        fields["parameter_gather"] = "fp8"
    if row.has("FP8_PARAMS=True", "overlap_notes"):
        fields["parameters"] = "fp8"
    if row.has("1x128 act", "precision"):
        row.assume("dispatch in fp8, Adam moments in bf16: DeepSeek-V3 technical report, section 3.3")
        fields |= {"dispatch": "fp8", "moments": "bf16"}
    if row.has(BF16_MOMENTS, "notes", "precision"):
        fields["moments"] = "bf16"
    printed = row.text("precision").lower()
    if "pure" in printed:  # MosaicML: PURE reduces in the compute type, DEFAULT in fp32
        fields["gradient_reduce"] = "bf16"
    elif row.has(_BF16_GRADIENTS, "source"):
        row.assume("gradients kept and reduced in bf16: the public recipe")
        fields |= {"gradients": "bf16", "gradient_reduce": "bf16"}
    elif "gradient_reduce" not in fields and not re.search("default|fp32 grad", printed) and not row.has("grads fp32", "notes"):
        row.assume("gradient precision not printed: fp32")
    return Precision(**fields)


def _overlap(row: Row, degrees: dict[str, int], sequence_parallel: bool) -> Overlap:
    notes = row.text("overlap_notes")
    # Megatron-LM reduces an input's gradient beside the weight's since 2022;
    # autograd functions of their own reduce it after both gradients in Aleph-Alpha/scaling (src/scaling/core/nn/linear/utils.py)
    tp: TensorParallel = not row.has(f"Aleph-Alpha|{BEFORE_2022}", "source")
    if row.has("torchtitan", "source"):
        tp = "torch_async" if row.has("async TP", "overlap_notes") else "torch"
    if row.has("Aleph-Alpha", "source") and sequence_parallel:
        tp = "kept"  # the norm gathers behind itself, for all products, and saves what it gathered (src/scaling/core/nn/norm)
    if degrees["tp"] > 1 and sequence_parallel and _in_pieces(row):
        tp = "pieces"
    alone = degrees["vpp"] == 1 and row.has(_MEGATRON_CORE, "source")
    waits = (alone or row.has(_WAITS_FOR_MESSAGES, "source")) and not row.has(_SENDS_ASIDE, "pp_schedule", "notes")
    pp = degrees["pp"] == 1 or not waits
    if not pp:
        row.assume("messages between stages not printed: none beside compute, as in its software (schedules that send aside say so)")
    if degrees["dp_shard"] * degrees["dp_replicate"] * degrees["cp"] == 1:  # ranks of a context share their gradients, too
        return Overlap(tp=tp, pp=pp)
    listed = row.has("full ARGS in the yaml", "notes") and "overlap_grad_reduce=True" not in notes  # what it lists is all there is
    if listed or re.search("no overlap-grad-reduce|all-reduce not overlapped", notes):
        return Overlap(grad_reduce=False, param_gather=False, tp=tp, pp=pp)
    if row.has("SC'21", "source") and row.whole("zero_stage") == 3:
        row.assume("ZeRO-3 as DeepSpeed's of early 2021: matrix by matrix, from lists of tensors, gathers waited for (its issue 1069)")
        return Overlap(tp=tp, prefetch=0, by_tensor=True, pp=pp)
    if row.has(_NO_GRADIENT_OVERLAP, "source") and not row.has("DDP=torch", "overlap_notes"):
        # --overlap-grad-reduce came at the end of 2023; MegaScale's ablation adds it to its baseline
        row.assume("gradient reduction not printed: after the backward (Megatron-LM before 2024)")
        return Overlap(grad_reduce=False, param_gather=False, tp=tp, pp=pp)
    if row.has("Aleph-Alpha", "source"):
        row.assume("gradient reduction not printed: in fp32 after the backward (Aleph-Alpha/scaling, src/scaling/core/optimizer)")
        return Overlap(grad_reduce=False, param_gather=False, tp=tp, pp=pp)
    if "(DeepSpeed)" in row.text("pp_schedule"):
        # its pipeline engine reduces gradients in an instruction after the last backward
        row.assume("gradient reduction not printed: after the backward (DeepSpeed pipeline)")
        return Overlap(grad_reduce=False, param_gather=False, tp=tp, pp=pp)
    if not re.search(r"overlap_grad_reduce=True|grad/param sync overlap|FSDP", notes, re.IGNORECASE):
        row.assume("gradient overlap not printed: on")
    return Overlap(tp=tp, pp=pp)


def _in_pieces(row: Row) -> bool:
    """Return whether tensor-parallel collectives run in pieces beside their products: as printed, else as the recipe says."""
    if row.has(_IN_PIECES, "overlap_notes", "notes"):
        return True
    for source, model, but, where in _RECIPES_IN_PIECES:
        if row.has(source, "source") and row.has(model, "model") and not row.has(but, "precision"):
            row.assume(f"tensor-parallel collectives in pieces, which the table leaves out: {where}")
            return True
    return False
