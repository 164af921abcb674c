"""The columns of a table of measured runs: what they mean, what a user's file must have, and what is wrong with a cell."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from simulator.scenario.plan import Module


@dataclass(frozen=True)
class Column:
    """One column of a table of training runs.

    Parameters
    ----------
    name, meaning : str
    kind : str
        ``text``, ``whole`` (a whole number above 0), ``count`` (0 or more), ``number`` (above 0).
    needed : str
        ``always``, ``moe`` (for rows whose arch is moe), or nothing.
    """

    name: str
    kind: Literal["text", "whole", "count", "number"]
    meaning: str
    needed: Literal["always", "moe", ""] = ""


RUNS = (
    Column("id", "text", "name of the row; unique", "always"),
    Column("source", "text", "who measured; rows of one source and release share their software"),
    Column("release", "text", "software release: container, tag or commit; source and year when left out"),
    Column("provenance", "text", "where the row can be read"),
    Column("year", "whole", "year of the measurement"),
    Column("model", "text", "name of the model; a shipped name brings latent attention, windows, MTP and norms", "always"),
    Column("arch", "text", "dense or moe", "always"),
    Column("total_params_b", "number", "parameters in all, 1e9; not used"),
    Column("active_params_b", "number", "parameters per token, 1e9; not used"),
    Column("layers", "whole", "transformer layers", "always"),
    Column("hidden", "whole", "hidden width", "always"),
    Column("ffn_hidden", "whole", "width of a dense MLP"),
    Column("heads", "whole", "query heads", "always"),
    Column("kv_heads", "whole", "key-value heads", "always"),
    Column("head_dim", "whole", "width of a head", "always"),
    Column("vocab", "whole", "vocabulary, padded as trained", "always"),
    Column("experts", "whole", "routed experts per layer", "moe"),
    Column("topk", "whole", "experts per token", "moe"),
    Column("moe_ffn_hidden", "whole", "width of one expert", "moe"),
    Column("shared_experts", "count", "shared experts, of the width of a routed one"),
    Column("dense_layers", "count", "layers with a dense MLP", "moe"),
    Column("seq_len", "whole", "tokens per sequence", "always"),
    Column("gpu", "text", "accelerator: a profile (myriad clusters) or a name that the published rows use", "always"),
    Column("gpus", "whole", "accelerators", "always"),
    Column("gpus_per_node", "whole", "accelerators per host"),
    Column("intra_node", "text", "links inside a host, in words; '2 domains x 36 GPUs' sets the NVLink domain"),
    Column("inter_node", "text", "links between hosts, in words; '8x400 Gb/s' sets the NICs"),
    Column("tp", "whole", "tensor parallel", "always"),
    Column("pp", "whole", "pipeline parallel", "always"),
    Column("vpp", "whole", "model chunks per pipeline rank"),
    Column("cp", "whole", "context parallel", "always"),
    Column("ep", "whole", "expert parallel", "moe"),
    Column("etp", "whole", "tensor parallelism inside an expert"),
    Column("dp", "whole", "data parallel: gpus / (tp pp cp) when left out"),
    Column("zero_stage", "count", "0 nothing sharded, 1 optimizer state, 2 and gradients, 3 and parameters"),
    Column("mbs", "whole", "sequences per micro-batch"),
    Column("gbs", "whole", "sequences per optimizer step", "always"),
    Column("precision", "text", "bf16, fp16, fp8 or fp4 of the matrix products, in words"),
    Column("recompute", "text", "none, full, full(block,num_layers=N), or selective(...) of " + ", ".join(get_args(Module))),
    Column("pp_schedule", "text", "1F1B, interleaved 1F1B, ZB-1p, ZB-2p, DualPipe"),
    Column("overlap_notes", "text", "options, ';' between: pp_layout= dispatcher= kernel= cuda_graph= moe_a2a_overlap"),
    Column("metric", "text", "what value is: step_time_s or tokens_per_s_per_gpu"),
    Column("value", "number", "the measurement"),
    Column("flop_convention", "text", "how the source counts FLOP; not used"),
    Column("notes", "text", "anything else; 'natural routing', 'muon', 'bf16 moments' are understood"),
    Column("other_metrics", "text", "more numbers of the same run, key=value; not used"),
    Column("step_time_s_derived", "number", "seconds per optimizer step; wins over value"),
    Column("missing_fields", "text", "what had to be guessed"),
    Column("complete", "text", "yes when nothing had to be guessed (the default), else partial"),
)  # fmt: skip
_PEAKS = {
    "metric": Column("metric", "text", "what value_GiB counts: max_memory_allocated, max_memory_reserved, or nvidia-smi used", ""),
    "value_GiB": Column("value_GiB", "number", "the peak on the fullest accelerator, 2^30 bytes; blank where the run failed"),
    "outcome": Column("outcome", "text", "fits or OOM"),
    "training_run_id": Column("training_run_id", "text", "published run that supplies what this row leaves out"),
}
_OPTIONAL = ("kv_heads", "head_dim", "vocab", "dense_layers", "cp", "gbs")
_NOT_TIMED = ("value", "step_time_s_derived", "flop_convention", "other_metrics", "missing_fields", "total_params_b", "active_params_b")
PEAKS = (
    *(replace(c, needed="") if c.name in _OPTIONAL else c for c in RUNS if c.name not in (*_NOT_TIMED, "metric", "release")),
    *_PEAKS.values(),
)
COLLECTIVES = (
    Column("source", "text", "who measured"),
    Column("gpu", "text", "accelerator, as in the table of runs", "always"),
    Column("nodes", "whole", "hosts", "always"),
    Column("gpus", "whole", "accelerators in the group", "always"),
    Column("fabric", "text", "links, in words"),
    Column("collective", "text", "all_reduce, all_gather, reduce_scatter, alltoall, moe_dispatch or moe_combine", "always"),
    Column("bytes", "whole", "size as nccl-tests counts it", "always"),
    Column("algbw_GBps", "number", "size / time, 1e9 bytes/s"),
    Column("busbw_GBps", "number", "bus bandwidth as nccl-tests counts it, 1e9 bytes/s"),
    Column("notes", "text", "anything else; 'time 13.67 us' is understood"),
    Column("provenance", "text", "where it can be read"),
)


@dataclass(frozen=True)
class Schema:
    """The columns of one kind of table.

    Parameters
    ----------
    columns : tuple of Column
    measured : tuple of str
        Columns of which one must hold the measurement, and the remedy where none does.
    """

    columns: tuple[Column, ...]
    measured: tuple[str, ...]
    remedy: str

    @property
    def by_name(self) -> dict[str, Column]:
        """The columns by their names."""
        return {column.name: column for column in self.columns}


SCHEMAS = {
    "data": Schema(RUNS, ("step_time_s_derived", "value"), "write the measured seconds of one optimizer step"),
    "memory": Schema(PEAKS, ("value_GiB", "outcome"), "write the peak in 2^30 bytes, or fits or OOM as outcome"),
    "collectives": Schema(COLLECTIVES, ("algbw_GBps", "busbw_GBps"), "write the bandwidth in 1e9 bytes/s"),
}
#: units that people write behind numbers -> what to multiply by for the unit of the column
_UNITS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "k": 1e3, "M": 1e6, "B": 1e9, "%": 1e-2}


def wrong(column: Column, text: str) -> tuple[str, str] | None:
    """Return what is wrong with a cell and the remedy, or None.

    Parameters
    ----------
    text : str
        The cell; blank cells are never wrong here.
    """
    if column.kind == "text" or not text:
        return None
    number = _number(text)
    asked = {"whole": "a whole number above 0", "count": "a whole number, 0 or more", "number": "a number above 0"}[column.kind]
    if number is None:
        bare = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ%/ ").replace(",", "")
        unit, value = text[len(bare) :].strip() if text.startswith(bare) else "", _number(bare)
        if value is not None and unit in _UNITS:
            return f"{text!r} carries a unit", f"write {value * _UNITS[unit]:g}"
        if value is not None:
            return f"{text!r} is more than a number", f"write {value:g}, if that is {column.meaning}"
        return f"{text!r} is not a number", f"write {asked}: {column.meaning}"
    low = 0 if column.kind == "count" else 1e-300
    if not (math.isfinite(number) and number >= low and (column.kind == "number" or number == int(number))):
        return f"{text!r} is not {asked}", f"write {asked}: {column.meaning}"
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
