"""DeepSpeed's JSON configuration, read as a plan and written from one.

Keys follow ``deepspeed/runtime/config.py`` and ``deepspeed/runtime/zero/config.py``. A DeepSpeed configuration is not the
whole plan: pipeline stages and, before ``expert_parallel``, expert parallelism are set in the training script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator.errors import PlanError, Problem
from simulator.formats.launch import Launch, loaded, refuse_unsaid
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import validated
from simulator.scenario.scenario import Scenario

#: switches that change a step in a way that no field of Plan says, and what is priced instead
_NOT_MODELLED = {
    "zero_optimization.offload_optimizer": "optimizer state stays on the accelerator",
    "zero_optimization.offload_param": "parameters stay on the accelerator",
    "zero_optimization.zero_quantized_weights": "parameters are gathered in 16 bit",
    "zero_optimization.zero_quantized_gradients": "gradients are reduced unquantized",
    "activation_checkpointing": "what is recomputed is set in the script; the plan keeps all activations",
    "curriculum_learning": "every step has the full sequence",
    "sparse_attention": "attention is dense",
    "compression_training": "weights are not compressed",
}


def plan_from_deepspeed(source: str | Path | Mapping[str, Any]) -> Launch:
    """Return the plan and the job fields of a DeepSpeed configuration.

    Parameters
    ----------
    source : path or mapping
        A JSON file, or what is in it.

    Raises
    ------
    ProfileError
        When the file is not a JSON object.
    PlanError
        With every key whose value cannot be used.
    """
    data, warnings, problems = loaded(source, "JSON", json.loads), [], []

    def number(key: str, default: int | None) -> int | None:
        value = _at(data, key)
        if value == "auto":
            warnings.append(
                f"{key}: auto is set by the launcher; priced as {default}" if default else f"{key}: auto is set by the launcher"
            )
            return default
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            problems.append(Problem(key, f"{key} = {value!r} is not a whole number from 0 up", f"write, for example, {default or 1}"))
            return default
        return value

    zero = number("zero_optimization.stage", 0)
    if zero not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", f"zero_optimization.stage = {zero}", "write 0, 1, 2 or 3"))
        zero = 0
    half = "fp16" if _on(data, "fp16") else "bf16"
    if half == "bf16" and not _on(data, "bf16"):
        warnings.append("neither bf16 nor fp16 is enabled, which means fp32: priced as bf16")
    gradients = _accumulation(data, half, problems)
    overlap = _at(data, "zero_optimization.overlap_comm")
    overlapped = zero == 3 if overlap is None else overlap is True  # DeepSpeed's default: on for stage 3 alone
    shard, hpz = number("zero_optimization.mics_shard_size", 0), number("zero_optimization.zero_hpz_partition_size", 0)
    if hpz and hpz > 1:
        warnings.append("zero_optimization.zero_hpz_partition_size is not modelled: parameters are gathered from every shard")
    fields = {
        "tp": number("tensor_parallel.autotp_size", 1) or 1,
        "cp": number("sequence_parallel_size", 1) or 1,
        "ep": number("expert_parallel.autoep_size", 1) or 1,
        "etp": number("expert_parallel.expert_tensor_parallel_size", 1) or 1,
        "dp_shard": shard or None,
        "zero": zero,
        "micro_batch": number("train_micro_batch_size_per_gpu", 1) or 1,
        "context_parallel": "all_to_all" if (number("sequence_parallel_size", 1) or 1) > 1 else "ring",
        "sequence_parallel": False,
        "overlap": {"grad_reduce": overlapped, "param_gather": overlapped},
        "precision": {"parameters": half, "gradients": gradients, "gradient_reduce": half, "gemm": half, "dispatch": half, "combine": half},
        "framework": "deepspeed",
    }
    job = {"global_batch": number("train_batch_size", None)} if data.get("train_batch_size") is not None else {}
    for key, instead in _NOT_MODELLED.items():
        if _at(data, key) not in (None, False, {}):
            warnings.append(f"{key} is not modelled: {instead}")
    if problems:
        raise PlanError(problems)
    return Launch(
        validated(Plan, fields, "DeepSpeed configuration"), {k: v for k, v in job.items() if v}, None, tuple(dict.fromkeys(warnings))
    )


def deepspeed_config(scenario: Scenario) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a scenario.

    Raises
    ------
    PlanError
        When it has no words for a term of the plan, e.g. pipeline stages, which are set in the training script.

    Notes
    -----
    What is written is read again by `plan_from_deepspeed` and must give the same plan.
    """
    plan, job = scenario.plan, scenario.job
    micro = job.global_batch // (plan.dp * plan.micro_batch)
    config: dict[str, Any] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": plan.zero, "overlap_comm": plan.overlap.grad_reduce},
        plan.precision.parameters if plan.precision.parameters in ("bf16", "fp16") else "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": plan.precision.gradients},
    }
    if plan.dp_replicate > 1:
        config["zero_optimization"]["mics_shard_size"] = plan.dp_shard
    if plan.tp > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tp}
    if plan.cp > 1:
        config["sequence_parallel_size"] = plan.cp
    if plan.ep > 1 or plan.etp > 1:
        config["expert_parallel"] = {"enabled": True, "autoep_size": plan.ep, "expert_tensor_parallel_size": plan.etp}
    understood = plan_from_deepspeed(config).plan
    if plan.dp_replicate > 1:  # the replicas fill the cluster, not the shards
        understood = understood.model_copy(update={"dp_replicate": plan.dp_replicate})
    refuse_unsaid("DeepSpeed", plan, understood, fills=plan.dp_replicate == 1)
    return config


def deepspeed_text(scenario: Scenario) -> str:
    """Return `deepspeed_config` as JSON."""
    return json.dumps(deepspeed_config(scenario), indent=2) + "\n"


def _at(data: Mapping[str, Any], key: str) -> Any:
    """Return the value under a dotted key, None when a part of the way is missing or is no table."""
    found: Any = data
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _on(data: Mapping[str, Any], section: str) -> bool:
    return _at(data, f"{section}.enabled") is True


def _accumulation(data: Mapping[str, Any], half: str, problems: list[Problem]) -> str:
    """Return the datatype in which gradients are accumulated; DeepSpeed's default is that of the parameters for fp16, fp32 for bf16."""
    name = _at(data, "data_types.grad_accum_dtype")
    if name is None:
        return "fp32" if half == "bf16" else half
    if name not in ("fp32", "bf16", "fp16"):
        problems.append(Problem("data_types.grad_accum_dtype", f"data_types.grad_accum_dtype = {name!r}", "write fp32, bf16 or fp16"))
        return half
    return name
