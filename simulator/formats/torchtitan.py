"""torchtitan's configuration, read as a plan and written from one.

The TOML form is that of torchtitan 0.2 (``torchtitan/config/job_config.py``); later versions configure in Python and renamed
some keys, which are read from a mapping with the same sections.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulator.errors import PlanError, Problem, nearest
from simulator.formats.launch import Launch, loaded, refuse, refuse_unsaid
from simulator.scenario.plan import EVERY_OTHER_PRODUCT, Plan
from simulator.scenario.profiles import validated
from simulator.scenario.scenario import Scenario

#: torch.distributed.pipelining's names, lower case as torchtitan compares them -> ours
_SCHEDULES = {
    "gpipe": "gpipe",
    "1f1b": "1f1b",
    "interleaved1f1b": "interleaved",
    "interleavedzerobubble": "interleaved-zb",
    "zbvzerobubble": "zb-v",
    "dualpipev": "dualpipev",
}
_WRITTEN = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "interleaved-zb": "InterleavedZeroBubble", "zb-v": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
#: sections that do not change a step's time or memory, and switches that do but that no field of Plan says
_NOT_MODELLED = {
    "training.enable_cpu_offload": "parameters, gradients and optimizer state stay on the accelerator",
    "compile.enable": "kernels are those of the plan",
}


class _Config:
    """Values by section and key; collects problems, so that all are reported at once."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self.problems: list[Problem] = []

    def get(self, section: str, key: str, *later: str) -> Any:
        """Return the value under a key or one of its later names, None when none is given."""
        table = self.data.get(section)
        table = table if isinstance(table, Mapping) else {}
        return next((table[name] for name in (key, *later) if name in table), None)

    def whole(self, section: str, key: str, default: int | None, *later: str, least: int = 1) -> int | None:
        """Return a whole number from `least` up, -1 where that means what is left over."""
        value = self.get(section, key, *later)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.problems.append(
                Problem(f"{section}.{key}", f"{section}.{key} = {value!r} is not a whole number from {least} up", f"write {default or 1}")
            )
            return default
        return value

    def word(self, section: str, key: str, default: str, allowed: tuple[str, ...]) -> str:
        """Return one of the allowed texts."""
        value = self.get(section, key)
        if value is None:
            return default
        if value not in allowed:
            self.problems.append(Problem(f"{section}.{key}", f"{section}.{key} = {value!r} is not a choice", nearest(str(value), allowed)))
            return default
        return value


def plan_from_torchtitan(source: str | Path | Mapping[str, Any], layers: int | None = None) -> Launch:
    """Return the plan and the job fields of a torchtitan configuration.

    Parameters
    ----------
    source : path or mapping
        A TOML file, or sections with their keys; the names of later versions are read too.
    layers : int, optional
        Transformer layers of the model, needed where ``pipeline_parallel_layers_per_stage`` is given.

    Raises
    ------
    ProfileError
        When the file is not TOML.
    PlanError
        With every key whose value cannot be used.

    Notes
    -----
    torchtitan's defaults hold where a key is missing: FSDP over what is left of the cluster, parameters gathered again for the
    backward unless there is a pipeline, two stages on a rank of a looped schedule, every second layer recomputed.
    """
    c = _Config(loaded(source, "TOML", tomllib.loads))
    if not {"training", "parallelism"} & c.data.keys():
        raise PlanError([Problem("torchtitan configuration", "no [training] and no [parallelism] section", "give both")])
    warnings: list[str] = []
    pp = c.whole("parallelism", "pipeline_parallel_degree", 1)
    fields = _degrees(c) | _pipeline(c, pp, layers, warnings) | _recompute(c, warnings) | _batch(c, pp, warnings)
    fields |= {"zero": _sharding(c, pp, fields["dp_shard"], fields["cp"]), "precision": _precision(c)}
    fields |= {"framework": "fsdp", "kernels": {"gate": "separate"}}
    length = c.whole("training", "seq_len", None, "max_context_length")
    job = {"global_batch": c.whole("training", "global_batch_size", None, least=-1), "sequence_length": length}
    if job["global_batch"] is None:
        job["global_batch"] = _sequences(c, "num_tokens_per_train_step", length)
    if job["global_batch"] == -1:
        job["global_batch"] = None
        warnings.append("training.global_batch_size = -1 is local_batch_size on every data-parallel rank: give the job its global_batch")
    for name, instead in _NOT_MODELLED.items():
        if c.get(*name.split(".")) is True:
            warnings.append(f"{name} is not modelled: {instead}")
    if c.problems:
        raise PlanError(c.problems)
    return Launch(validated(Plan, fields, "torchtitan configuration"), {k: v for k, v in job.items() if v}, None, tuple(warnings))


def _degrees(c: _Config) -> dict[str, Any]:
    shard = c.whole("parallelism", "data_parallel_shard_degree", -1, least=-1)
    backend = c.word("parallelism", "expert_parallel_comm_backend", "standard", ("standard", "deepep", "hybridep"))
    return {
        "tp": c.whole("parallelism", "tensor_parallel_degree", 1),
        "cp": c.whole("parallelism", "context_parallel_degree", 1),
        "ep": c.whole("parallelism", "expert_parallel_degree", 1),
        "etp": c.whole("parallelism", "expert_tensor_parallel_degree", 1),
        "dp_replicate": c.whole("parallelism", "data_parallel_replicate_degree", 1),
        "dp_shard": None if shard in (-1, 0) else shard,
        "dispatcher": "alltoall" if backend == "standard" else backend,
        "overlap": {"tp": "torch_async" if c.get("parallelism", "enable_async_tensor_parallel") is True else "torch"},
    }


def _pipeline(c: _Config, pp: int, layers: int | None, warnings: list[str]) -> dict[str, Any]:
    name = str(c.get("parallelism", "pipeline_parallel_schedule") or "1F1B")
    schedule = _SCHEDULES.get(name.lower())
    if schedule is None:
        c.problems.append(Problem("parallelism.pipeline_parallel_schedule", f"{name} is not a choice", nearest(name, _WRITTEN.values())))
        schedule = "1f1b"
    if pp == 1:
        return {"pp": 1, "vpp": 1, "schedule": "1f1b"}
    if schedule in ("gpipe", "1f1b"):
        return {"pp": pp, "vpp": 1, "schedule": schedule}
    each = c.whole("parallelism", "pipeline_parallel_layers_per_stage", None)
    vpp = 2
    if each is not None and layers is None:
        c.problems.append(
            Problem(
                "parallelism.pipeline_parallel_layers_per_stage", f"{each} layers per stage of a model of unknown depth", "give layers="
            )
        )
    elif each is not None:
        # embedding and head count as a layer each unless the configuration says otherwise
        edges = [c.whole("parallelism", f"pipeline_parallel_{end}_stage_less_layers", 1, least=0) for end in ("first", "last")]
        stages = -(-(layers + sum(edges)) // each)
        vpp = stages // pp
        if stages % pp:
            c.problems.append(
                Problem(
                    "parallelism.pipeline_parallel_layers_per_stage",
                    f"{layers} layers by {each} make {stages} stages, not a multiple of {pp} ranks",
                    "change it so that it divides",
                )
            )
    elif schedule == "interleaved":
        warnings.append("parallelism.pipeline_parallel_layers_per_stage is missing: 2 stages on a rank, torchtitan's default")
    return {"pp": pp, "vpp": vpp, "schedule": schedule}


def _recompute(c: _Config, warnings: list[str]) -> dict[str, Any]:
    mode = c.word("activation_checkpoint", "mode", "selective", ("none", "selective", "full", "memory_budget"))
    if mode == "full":
        return {"recompute": "full"}
    if mode == "none":
        return {"recompute": "none"}
    if mode == "memory_budget":
        warnings.append(f"activation_checkpoint.mode = {mode} lets the compiler choose: priced as recompute of every other product")
    return {"recompute": "selective", "recompute_modules": list(EVERY_OTHER_PRODUCT)}


def _sequences(c: _Config, key: str, length: int | None) -> int | None:
    """Return how many sequences the tokens under a key of later versions are, None when it is not given."""
    tokens = c.whole("training", key, None)
    if tokens is None:
        return None
    if length is None or tokens % length:
        what = f"training.{key} = {tokens} is no whole number of sequences of {length or 'unknown length'}"
        c.problems.append(Problem(f"training.{key}", what, "give max_context_length, and tokens that it divides"))
        return None
    return tokens // length


def _batch(c: _Config, pp: int, warnings: list[str]) -> dict[str, Any]:
    length = c.whole("training", "seq_len", None, "max_context_length")
    later = _sequences(c, "num_tokens_per_microbatch_per_dp_rank", length)
    if later is not None:
        return {"micro_batch": later}
    if pp == 1:
        return {"micro_batch": c.whole("training", "local_batch_size", 8)}
    local, micro = c.whole("training", "local_batch_size", 8), c.whole("parallelism", "pipeline_parallel_microbatch_size", 1)
    total = c.get("training", "global_batch_size")
    if isinstance(total, int) and total > local:
        warnings.append(
            f"local_batch_size = {local} goes through the pipeline at once and the gradients of several are added up: priced as one "
            "pass of all micro-batches of the step"
        )
    return {"micro_batch": micro}


def _sharding(c: _Config, pp: int, shard: int | None, cp: int) -> int:
    """Return the ZeRO stage: FSDP that gathers parameters again for the backward is 3, FSDP that keeps them is 2."""
    again = c.word("parallelism", "fsdp_reshard_after_forward", "default", ("default", "always", "never"))
    if shard == 1 and cp == 1:
        return 0  # DDP
    return 2 if again == "never" or (again == "default" and pp > 1) else 3


def _precision(c: _Config) -> dict[str, Any]:
    half = _DTYPES[c.word("training", "mixed_precision_param", "bfloat16", tuple(_DTYPES))]
    reduce = _DTYPES[c.word("training", "mixed_precision_reduce", "float32", tuple(_DTYPES))]
    converters = c.get("model", "converters") or []
    gemm = "fp8" if any("float8" in str(name) or "mx" in str(name) for name in converters) else half
    return {"parameters": half, "gradients": "fp32", "gradient_reduce": reduce, "gemm": gemm, "dispatch": half, "combine": half}


def torchtitan_config(scenario: Scenario) -> dict[str, dict[str, Any]]:
    """Return the sections of a torchtitan 0.2 configuration for a scenario; the model's name and flavor are the user's.

    Raises
    ------
    PlanError
        When torchtitan has no words for a term of the plan.

    Notes
    -----
    What is written is read again by `plan_from_torchtitan` and must give the same plan.
    """
    plan, job, layers = scenario.plan, scenario.job, scenario.model.layers
    refuse("torchtitan", _unsayable(plan))
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": plan.dp_replicate,
        "data_parallel_shard_degree": plan.dp_shard,
        "fsdp_reshard_after_forward": "always" if plan.zero == 3 else "never",
        "tensor_parallel_degree": plan.tp,
        "enable_async_tensor_parallel": plan.overlap.tp == "torch_async",
        "context_parallel_degree": plan.cp,
        "pipeline_parallel_degree": plan.pp,
        "expert_parallel_degree": plan.ep,
        "expert_tensor_parallel_degree": plan.etp,
        "expert_parallel_comm_backend": "standard" if plan.dispatcher == "alltoall" else plan.dispatcher,
    }
    local = job.global_batch // plan.dp
    if plan.pp > 1:
        parallelism |= {
            "pipeline_parallel_schedule": _WRITTEN[plan.schedule],
            "pipeline_parallel_microbatch_size": plan.micro_batch,
        }
        if plan.schedule == "interleaved":
            parallelism["pipeline_parallel_layers_per_stage"] = -(-(layers + 2) // plan.stages)
    converters = ["quantize.linear.float8"] if plan.precision.gemm == "fp8" else []
    config = {
        "model": {"converters": converters},
        "training": {
            "local_batch_size": local if plan.pp > 1 else plan.micro_batch,
            "global_batch_size": job.global_batch,
            "seq_len": job.sequence_length,
            "steps": max(1, int(job.steps)),
            "mixed_precision_param": "float32" if plan.precision.parameters == "fp32" else "bfloat16",
            "mixed_precision_reduce": "float32" if plan.precision.gradient_reduce == "fp32" else "bfloat16",
        },
        "parallelism": parallelism,
        "activation_checkpoint": {"mode": plan.recompute},
    }
    refuse_unsaid("torchtitan", plan, plan_from_torchtitan(config, layers).plan, fills=False)
    return config


def _unsayable(plan: Plan) -> dict[str, str]:
    found = {}
    if plan.schedule not in _WRITTEN:
        found[f"schedule: {plan.schedule}"] = f"choose from {', '.join(_WRITTEN)}"
    if plan.layout is not None:
        found[f"layout: {plan.layout}"] = "leave it out; torchtitan divides the layers evenly"
    if plan.recompute == "selective" and plan.recompute_modules != EVERY_OTHER_PRODUCT:
        found["recompute_modules"] = f"torchtitan chooses by operation: use {', '.join(EVERY_OTHER_PRODUCT)}, or none or full"
    return found


def torchtitan_text(scenario: Scenario) -> str:
    """Return `torchtitan_config` as TOML."""
    lines = []
    for section, table in torchtitan_config(scenario).items():
        # a JSON text, number, boolean or list of texts is the same in TOML
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)
