"""Parameters and FLOP of the whole model, by each of the field's conventions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.workload.attention import attended
from simulator.workload.blocks import Block
from simulator.workload.ops import total
from simulator.workload.stages import blocks, sequence


@dataclass(frozen=True, slots=True)
class ModelCount:
    """What a model counts to.

    Parameters
    ----------
    parameters, expert_parameters, active_parameters : int
        All, those of routed experts, and those that one token uses; embeddings included, MTP layers not.
    mtp_parameters : int
        Parameters of the MTP layers, shared ones not counted again.
    flop_per_token_6n : float
        ``6 * active_parameters``: the rule of thumb, no attention.
    flop_per_token_causal, flop_per_token_noncausal : float
        Forward and backward (3 x forward) of every GEMM and of attention, head and MTP layers included; attention over
        the keys that the causal mask leaves, or over all of them (Megatron-LM's formula).
    """

    parameters: int
    expert_parameters: int
    active_parameters: int
    mtp_parameters: int
    flop_per_token_6n: float
    flop_per_token_causal: float
    flop_per_token_noncausal: float


def _forward_flop(block: Block, attention_scale: float = 1.0) -> float:
    return float(total(block.forward, lambda op: op.flop * (attention_scale if op.kind == "attention" else 1.0)))


@lru_cache(maxsize=64)
def count(model: Model, sequence_length: int) -> ModelCount:
    """Return the parameters and the FLOP per token of `model`, from its dimensions alone.

    Parameters
    ----------
    model : Model
    sequence_length : int
        Tokens per sequence, which attention grows with.
    """
    job = Job(tokens=sequence_length, global_batch=1, sequence_length=sequence_length)
    all_blocks = blocks(model, Plan(dp_shard=1), job)
    names = sequence(model)
    main = [n for n in names if n != "mtp"]
    dense = sum(float(all_blocks[n].dense_parameters) for n in main)
    expert = sum(float(all_blocks[n].expert_parameters) for n in main)
    used = expert * model.experts.top_k / model.experts.count if model.experts else 0.0
    mtp = all_blocks.get("mtp")
    windows = {f"layer{i}": kind.window for i, kind in enumerate(model.kinds)}
    all_keys = {name: sequence_length / float(attended(sequence_length, windows.get(name))) for name in all_blocks}
    causal = {name: _forward_flop(block) for name, block in all_blocks.items()}
    noncausal = {name: _forward_flop(block, all_keys[name]) for name, block in all_blocks.items()}
    return ModelCount(
        parameters=round(dense + expert),
        expert_parameters=round(expert),
        active_parameters=round(dense + used),
        mtp_parameters=round(model.mtp_layers * float(mtp.dense_parameters + mtp.expert_parameters)) if mtp else 0,
        flop_per_token_6n=6 * (dense + used),
        flop_per_token_causal=3 * sum(causal[name] for name in names) / sequence_length,
        flop_per_token_noncausal=3 * sum(noncausal[name] for name in names) / sequence_length,
    )


def hardware_flop(model: Model, plan: Plan, job: Job, names: list[str]) -> float:
    """Return the FLOP that one rank really executes for one micro-batch through the blocks `names`, recompute included."""
    all_blocks = blocks(model, plan, job)
    return sum(float(total(all_blocks[n].forward + all_blocks[n].backward, lambda op: op.flop)) for n in names)
