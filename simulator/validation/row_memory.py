"""The scenario of a memory row: dimensions that its own columns leave out, and what its software keeps in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simulator.errors import ProfileError
from simulator.scenario.plan import NARROW, Plan
from simulator.scenario.scenario import Scenario
from simulator.validation.row import Row
from simulator.validation.row_cluster import cluster_of
from simulator.validation.row_model import BLOOM_VOCAB, model_of, shipped
from simulator.validation.row_names import named, plain, usual_vocab
from simulator.validation.row_plan import job_of, plan_of
from simulator.validation.row_scripts import with_scripts

#: columns of a training run that describe the model and that a memory row lacks
DIMENSIONS = ("ffn_hidden", "head_dim", "vocab", "shared_experts", "dense_layers")
#: beginning of a model's name -> dimensions that its memory rows leave out: tencent/Hy3 config.json, as the source of the rows lists
#: it (yangwhale/gpu-tpu-pedia @33cf8c3 gpu/a4x-max/07-megatron-training/07f-gb300-hy3-295b-gke)
_DIMENSIONS_OF = {
    "Tencent Hunyuan 3": {"ffn_hidden": "13312", "head_dim": "128", "vocab": "120832", "shared_experts": "1", "dense_layers": "1"}
}
#: recipes whose optimizer keeps, beside bf16 weights, the low 16 bits of their masters: ``distributed_fused_adam`` of Apex, with
#: ``store_param_remainders`` where weights are bf16 (NVIDIA/dgxc-benchmarking @8f5cbb3 nemotron/nemotron4-340b-synth.yaml;
#: NVIDIA/NeMo nemo/collections/nlp/models/language_modeling/megatron_base_model.py, ``setup_optimization``)
_REMAINDERS = r"dgxc-benchmarking/nemotron/\S*@v24\.11|dgxc-benchmarking/nemotron/\S*@v25\.02"
#: sources whose public recipe of DeepSeek-V3 keeps Adam's moments in bf16
_BF16_MOMENTS = "Megatron-Bridge|gpu-tpu-pedia"


def memory_scenario(cells: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> tuple[Scenario, tuple[str, ...]]:
    """Return the scenario of one memory row and what had to be assumed for it.

    Parameters
    ----------
    cells : mapping
        A row in the columns of ``memory.csv``, or of ``training_runs.csv``.
    runs : mapping
        Training runs by id: a memory row that names its run takes what it leaves out from there.

    Raises
    ------
    ProfileError
        When the row is out of reach, with a short reason that rows can be counted by.
    """
    row = with_scripts(_filled(cells, runs))
    if row.has("with (?:activation )?offload", "notes"):
        raise ProfileError("activations offloaded, not printed how many")
    cluster, model = cluster_of(row), model_of(row)
    plan = _with_software(row, plan_of(row, model))
    return Scenario(model=model, cluster=cluster, plan=plan, job=job_of(row)), tuple(row.assumptions)


def _filled(cells: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> Row:
    """Return the row with what it leaves out: from its own training run, from one of the same model, or assumed."""
    own = named(Row(cells))
    model, hidden = own.text("model"), own.text("hidden")
    cells = {**cells, "model": model}
    run = runs.get(own.text("training_run_id"))
    if run is not None:
        notes = {name: "; ".join(filter(None, (own.text(name), Row(run).text(name)))) for name in ("notes", "overlap_notes")}
        return _assumed({**run, **{name: value for name, value in cells.items() if own.text(name)}, **notes}, own.assumptions)
    known = next((v for k, v in _DIMENSIONS_OF.items() if model.startswith(k)), None)
    if known is not None:
        missing = {name: value for name, value in known.items() if not own.text(name)}
        said = [f"{', '.join(missing)} not printed: those of its published configuration"] if missing else []
        return _assumed({**cells, **missing}, [*own.assumptions, *said])
    like = next((r for r in runs.values() if r["model"] == model and r["hidden"] == hidden), None)
    if like is None:
        return _assumed(cells, own.assumptions)
    missing = {name: like[name] for name in DIMENSIONS if not own.text(name) and Row(like).text(name)}
    said = [f"dimensions not printed: those of {like['id']}"] if missing else []
    return _assumed({**cells, **missing}, [*own.assumptions, *said])


def _assumed(cells: dict[str, Any], said: list[str]) -> Row:
    """Return the row with the usual values of dimensions that are still missing."""
    row = Row(cells)
    hidden, heads = row.whole("hidden"), row.whole("heads")

    def assume(column: str, value: Any, why: str) -> None:
        if not row.text(column) and value:
            cells[column] = str(value)
            said.append(f"{column} not printed: {value}, {why}")

    known = shipped(row.text("model"))  # its own file says what its row does not
    if not known:
        assume("vocab", BLOOM_VOCAB if row.has("BLOOM", "source") else usual_vocab(row.text("model")), "of its usual tokenizer")
    if hidden and plain(row.text("model")):
        assume("layers", _layers(row, hidden), "from the parameters in its name")
        if row.text("arch") != "moe":
            assume("ffn_hidden", 4 * hidden, "4 x hidden")
        assume("heads", None if heads else hidden // 128, "heads of 128")
        heads = row.whole("heads")
        assume("kv_heads", heads, "one for each head")
        assume("head_dim", heads and hidden // heads, "hidden / heads")
    dp, pp = row.whole("dp"), row.whole("pp") or 1
    if not dp and row.whole("gpus") and row.whole("tp"):
        dp = row.need("gpus") // (row.need("tp") * pp * (row.whole("cp") or 1))
    assume("cp", 1, "no long sequence")
    assume("dense_layers", "0" if row.text("arch") == "moe" and not known else None, "every layer is MoE")
    assume("gbs", dp and dp * (row.whole("mbs") or 1) * 4 * pp, "enough micro-batches to fill the pipeline")
    found = Row(cells)
    for text in said:
        found.assume(text)
    return found


def _layers(row: Row, hidden: int) -> int | None:
    """Return the layers that give a plain GPT the parameters in its name, as many on every stage."""
    billions = re.match(r"GPT ([\d.]+)B", row.text("model"))
    if not billions:
        return None
    pp = row.whole("pp") or 1
    layers = (float(billions.group(1)) * 1e9 - (row.whole("vocab") or 0) * hidden) / (12 * hidden**2)
    return max(1, round(layers / pp)) * pp


def _with_software(row: Row, plan: Plan) -> Plan:
    """Return the plan with the dtypes and dimensions by which the row's software decides memory and not time."""
    changes: dict[str, Any] = {}
    dtypes = _dtypes(row, plan)
    if dtypes:
        changes["precision"] = plan.precision.model_copy(update=dtypes)
    if row.has("Zero Bubble", "source") and row.text("pp_schedule") == "1F1B-I":
        vpp = (row.need("layers") + 2) // row.need("pp")
        changes |= {"vpp": vpp, "schedule": "interleaved", "layout": f"E|(t|)*{row.need('layers')}L"}
        row.assume(f"virtual stages not printed: {vpp}, one layer each")
    if "tensor parallel only" in row.text("metric"):
        changes["sequence_parallel"] = False
    return plan.model_copy(update=changes)


def _dtypes(row: Row, plan: Plan) -> dict[str, Any]:
    """Return the datatypes of the states where the software is known to differ from what the time of a row needs."""
    found: dict[str, Any] = {}
    if plan.precision.gemm in NARROW and plan.zero < 3:
        row.assume("weights kept in FP8 (fp8_param_gather): recipes of Megatron, NeMo and Megatron-Bridge")
        found["parameters"] = "fp8"
    return found | _states(row, plan)


def _states(row: Row, plan: Plan) -> dict[str, str | None]:
    if row.has("Aleph-Alpha", "source"):
        return {"gradients": "bf16", "gradient_reduce": "bf16"}
    if row.text("precision").startswith("bf16/fp16"):
        row.assume("gradient precision not printed: 16 bits")
        return {"gradients": "fp16"}
    if row.has("Korthikanti", "source"):
        row.assume("gradients in fp32: 18 bytes per parameter, as the paper counts them")
        return {"gradients": "fp32"}
    if row.has(_REMAINDERS, "provenance") and plan.precision.gemm == "bf16":
        row.assume("masters kept as the low 16 bits beside bf16 weights: distributed_fused_adam")
        return {"master": "bf16"}
    if row.has(_BF16_MOMENTS, "source") and row.text("model").startswith("DeepSeek-V3"):
        row.assume("Adam moments in bf16: the public recipe of DeepSeek-V3")
        return {"moments": "bf16"}
    if plan.zero == 3 and row.has("FSDP", "overlap_notes", "source"):
        row.assume("FSDP shards fp32 weights, which are their own master")
        return {"parameters": "fp32", "master": None}
    return {}


def metric_of(text: str) -> str:
    """Return what a row counts: ``allocated``, ``reserved``, ``device``, ``states``, ``optimizer`` or ``activations``.

    Raises
    ------
    ProfileError
        When the words are not known.
    """
    known = {
        r"nvidia-smi": "device",
        r"reserved": "reserved",
        r"^optimizer": "optimizer",
        r"parameters\+optimizer|states": "states",
        r"activations|activation[ _]mem": "activations",
        r"allocated": "allocated",
        # words of how a device is filled say whose count it is only where none of those above does
        r"device|(?:\b|_)used\b|\bHBM\b": "device",
        r"(?:peak|max)\w*[ _]mem|^total$|^peak$": "allocated",
    }
    for pattern, metric in known.items():
        if re.search(pattern, text, re.IGNORECASE):
            return metric
    raise ProfileError(f"metric not known: {text or 'empty'}")
