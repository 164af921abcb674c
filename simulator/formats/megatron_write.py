"""Write a scenario as a Megatron-LM launch line, so that what was decided can be started."""

from __future__ import annotations

import itertools

from simulator.formats.launch import refuse, refuse_unsaid
from simulator.formats.megatron import plan_from_megatron
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.placement import PIPELINE_INSIDE
from simulator.scenario.plan import NARROW, Plan
from simulator.scenario.scenario import Scenario
from simulator.workload.stages import stage_blocks

_SCHEDULES = ("1f1b", "interleaved", "interleaved-overlapped")
_SHARDING = {2: "optim_grads", 3: "optim_grads_params"}
_LETTER = {"embedding": "E", "mtp": "m", "head": "L"}


def megatron_flags(scenario: Scenario, dimensions: bool = True) -> list[str]:
    """Return the flags of ``pretrain_gpt.py`` for a scenario, one string each with its value.

    Parameters
    ----------
    scenario : Scenario
        A layout that Myriad balances is written out stage by stage.
    dimensions : bool
        Whether to write the dimensions of the model, too.

    Raises
    ------
    PlanError
        When Megatron-LM has no words for a term of the plan or of the model; names every such term.

    Notes
    -----
    What is written is read again by `plan_from_megatron` and must give the same plan. `--expert-tensor-parallel-size` is
    always written: where it is left out Megatron-LM takes the tensor-parallel size.
    """
    plan = _explicit(scenario)
    refuse("Megatron-LM", _unsayable(plan))
    flags = [*_degrees(plan), *_pipeline(plan), *_sharding(plan), *_recompute(plan), *_precision(plan), *_dispatcher(plan)]
    flags += _job(scenario.job, scenario.model)
    refuse_unsaid("Megatron-LM", plan, plan_from_megatron(" ".join(flags)).plan)
    return flags + (_dimensions(scenario.model) if dimensions else [])


def megatron_command(scenario: Scenario) -> str:
    """Return the whole launch line: ``torchrun`` on every host of the cluster, with the flags of `megatron_flags`."""
    cluster = scenario.cluster
    start = f"torchrun --nnodes {cluster.hosts} --nproc-per-node {cluster.host.accelerators} pretrain_gpt.py"
    return " \\\n    ".join([start, *megatron_flags(scenario)]) + "\n"


def _explicit(scenario: Scenario) -> Plan:
    """Return the plan with a balanced or abbreviated layout written out in letters."""
    plan = scenario.plan
    if plan.layout is None:
        return plan
    stages = stage_blocks(scenario.model, plan, scenario.job)
    return plan.model_copy(update={"layout": "|".join("".join(_LETTER.get(name, "t") for name in stage) for stage in stages)})


#: modules that no --recompute-modules names
_NOT_RECOMPUTED = frozenset({"mlp_act", "attn_out", "mlp_gate", "tp_gather"})


def _unsayable(plan: Plan) -> dict[str, str]:
    """Return what of a plan Megatron-LM has no flag for, with the remedy."""
    found = {}
    if plan.schedule not in _SCHEDULES:
        found[f"schedule: {plan.schedule}"] = f"choose from {', '.join(_SCHEDULES)}"
    if plan.vpp > 1 and plan.pp == 1:
        found[f"vpp: {plan.vpp} on one pipeline rank"] = "use pp of 2 or more"
    if plan.recompute == "selective":
        for name in _NOT_RECOMPUTED.intersection(plan.recompute_modules):
            found[f"recompute_modules: {name}"] = "drop it; Megatron-LM recomputes moe_act and mlp"
    if plan.precision.head in NARROW:  # pull request 4825 of NVIDIA/Megatron-LM adds it; TransformerConfig of release 0.16.1 is without
        remedy = "use head: bf16; a Megatron-LM newer than 0.16.1 may have --fp8-output-proj, for fp8 with --fp8-recipe mxfp8"
        found[f"precision.head: {plan.precision.head}"] = remedy
    return found


def _degrees(plan: Plan) -> list[str]:
    flags = {
        "tensor-model-parallel-size": plan.tp,
        "context-parallel-size": plan.cp,
        "pipeline-model-parallel-size": plan.pp,
        "expert-model-parallel-size": plan.ep,
        "expert-tensor-parallel-size": plan.etp,
        "micro-batch-size": plan.micro_batch,
    }
    inside = ["--use-tp-pp-dp-mapping"] * (plan.placement.order == PIPELINE_INSIDE)
    switches = ["--sequence-parallel"] * plan.sequence_parallel + ["--tp-comm-overlap"] * (plan.overlap.tp == "pieces")
    return [f"--{name} {value}" for name, value in flags.items()] + switches + inside


def _pipeline(plan: Plan) -> list[str]:
    flags = []
    if plan.layout is not None:
        flags.append(f"--pipeline-model-parallel-layout '{plan.layout}'")
    elif plan.vpp > 1:
        flags.append(f"--num-virtual-stages-per-pipeline-rank {plan.vpp}")
    flags += ["--no-overlap-p2p-communication"] * (not plan.overlap.pp)
    return flags + ["--overlap-moe-expert-parallel-comm"] * (plan.schedule == "interleaved-overlapped")


def _sharding(plan: Plan) -> list[str]:
    flags = ["--use-distributed-optimizer"] * (plan.zero > 0)
    if plan.zero > 1:
        flags.append(f"--use-megatron-fsdp --data-parallel-sharding-strategy {_SHARDING[plan.zero]}")
    if plan.dp_replicate > 1:
        flags.append(f"--num-distributed-optimizer-instances {plan.dp_replicate}")
    return [*flags, *["--overlap-grad-reduce"] * plan.overlap.grad_reduce, *["--overlap-param-gather"] * plan.overlap.param_gather]


def _recompute(plan: Plan) -> list[str]:
    if plan.recompute == "full":
        return ["--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"]
    if plan.recompute == "selective":
        return [f"--recompute-granularity selective --recompute-modules {' '.join(plan.recompute_modules)}"]
    return []


def _precision(plan: Plan) -> list[str]:
    p = plan.precision
    flags = ["--fp16" if p.parameters == "fp16" else "--bf16"]
    if p.gradients == "fp32":
        flags.append("--accumulate-allreduce-grads-in-fp32")
    elif p.gradients == "bf16" and p.parameters == "bf16":
        flags.append("--grad-reduce-in-bf16")
    if p.gemm in NARROW:
        flags.append({"fp8": "--fp8-format hybrid", "fp4": "--fp4-format e2m1"}[p.gemm])
    if p.master == "fp16" or p.moments != "fp32":
        flags.append("--use-precision-aware-optimizer")
    if p.master == "fp16":
        flags.append("--main-params-dtype fp16")
    if p.moments != "fp32":
        flags.append(f"--exp-avg-dtype {p.moments} --exp-avg-sq-dtype {p.moments}")
    return flags


def _dispatcher(plan: Plan) -> list[str]:
    if plan.dispatcher == "alltoall":
        return ["--moe-token-dispatcher-type alltoall"]
    return [f"--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend {plan.dispatcher}"]


def _job(job: Job, model: Model) -> list[str]:
    flags = [f"--global-batch-size {job.global_batch}", f"--seq-length {job.sequence_length}"]
    flags += [f"--train-samples {job.tokens // job.sequence_length}", f"--optimizer {job.optimizer}"]
    return flags + ["--moe-router-force-load-balancing"] * (model.experts is not None and job.routing == "balanced")


def _dimensions(model: Model) -> list[str]:
    """Return the flags of the model's dimensions.

    Raises
    ------
    PlanError
        When the model has a detail whose flags are not written here.
    """
    details = {name: getattr(model, name) for name in ("scaled_rotary", "clamped", "sinks")}
    details |= {"windows": any(model.windows), "shared_gate": bool(model.experts and model.experts.shared_gate)}
    details["biases of a part"] = len({model.attention_bias, model.output_bias, model.mlp_bias}) > 1
    refuse("the writer", {f"model.{k}": "take the model's flags from its recipe: dimensions=False" for k, v in details.items() if v})
    flags = [
        f"--num-layers {model.layers}", f"--hidden-size {model.hidden}", f"--num-attention-heads {model.heads}",
        f"--ffn-hidden-size {model.ffn or (model.experts.ffn if model.experts else 0)}",
        f"--vocab-size {model.vocab}", f"--normalization {'LayerNorm' if model.layer_norm else 'RMSNorm'}",
    ]  # fmt: skip
    flags += ["--swiglu"] * model.gated + ["--disable-bias-linear"] * (not model.mlp_bias) + ["--qk-layernorm"] * model.qk_norm
    flags += ["--untie-embeddings-and-output-weights"] * (not model.tied_embeddings)
    flags.append(
        f"--position-embedding-type learned_absolute --max-position-embeddings {model.positions}"
        if model.positions
        else "--position-embedding-type rope"
    )
    return [*flags, *_attention(model), *_experts(model), *[f"--mtp-num-layers {model.mtp_layers}"] * (model.mtp_layers > 0)]


def _attention(model: Model) -> list[str]:
    if model.latent is None:
        grouped = [f"--group-query-attention --num-query-groups {model.kv_heads}"] * (model.kv_heads != model.heads)
        return [f"--kv-channels {model.head_dim}", *grouped]
    mla = model.latent
    rank = [f"--q-lora-rank {mla.q_rank}"] * (mla.q_rank is not None)
    widths = f"--qk-head-dim {mla.nope_dim} --qk-pos-emb-head-dim {mla.rope_dim} --v-head-dim {mla.v_dim}"
    return ["--multi-latent-attention", *rank, f"--kv-lora-rank {mla.kv_rank}", widths]


def _experts(model: Model) -> list[str]:
    experts = model.experts
    if experts is None:
        return []
    runs = [(len(list(run)), int(moe)) for moe, run in itertools.groupby(model.moe_layers)]
    flags = [
        f"--num-experts {experts.count}", f"--moe-router-topk {experts.top_k}", f"--moe-ffn-hidden-size {experts.ffn}",
        f"--moe-layer-freq '({'+'.join(f'[{moe}]*{count}' for count, moe in runs)})'", "--moe-grouped-gemm",
    ]  # fmt: skip
    if experts.shared_ffn:
        flags.append(f"--moe-shared-expert-intermediate-size {experts.shared_ffn}")
    if experts.groups > 1:
        flags.append(f"--moe-router-num-groups {experts.groups} --moe-router-group-topk {experts.top_groups}")
    return flags
