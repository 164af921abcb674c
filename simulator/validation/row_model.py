"""The model of a published row: from its columns, on a shipped model where the columns cannot say it all."""

from __future__ import annotations

import re
from typing import Any

from simulator.errors import ProfileError
from simulator.scenario.model import Experts, LatentAttention, Model
from simulator.scenario.profiles import MODELS
from simulator.validation.row import Row
from simulator.validation.row_names import GPT, canonical, plain, usual_vocab, whole_heads

#: beginning of the published name -> shipped model: the columns lack latent attention, routing groups, windows, MTP
_SHIPPED = {
    "DeepSeek-V3": "deepseek-v3",
    "Kimi-K2": "kimi-k2",
    "Qwen3-235B-A22B": "qwen3-235b-a22b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "GPT-OSS": "gpt-oss-120b",  # 20B has fewer layers and experts, which the columns say, and is the same else (arXiv:2508.10925)
    "Mixtral 8x7B": "mixtral-8x7b",
    "Mixtral 8x22B": "mixtral-8x22b",
}
#: architectures outside the simulator's vocabulary of layers
_NOT_STANDARD = r"mamba|hybrid|latent-moe|qwen3-next|qwen3\.5|deepseek-v4|nemotron-h"
#: beginning of the published name -> what its layers are beside the printed dimensions, and how to name that
_STYLES: dict[str, tuple[dict[str, bool], str]] = {
    f"{GPT}|BLOOM|MT-NLG": (
        {"gated": False, "layer_norm": True, "attention_bias": True, "output_bias": True, "mlp_bias": True, "tied_embeddings": True},
        "layer details not printed: Megatron's GPT (plain MLP, LayerNorm, biases, tied embeddings)",
    ),
    "MPT": (
        {"gated": False, "layer_norm": True, "tied_embeddings": True},
        "layer details not printed: MPT (plain MLP, LayerNorm, tied embeddings)",
    ),
    "Tencent Hunyuan|Hy3|Qwen3": ({"qk_norm": True}, "layer details not printed: queries and keys normalised (config.json of its models)"),
    "Nemotron-4": ({"gated": False, "layer_norm": True}, "layer details not printed: Nemotron-4 (plain MLP, LayerNorm)"),
}
#: BLOOM's 250,680 tokens, padded by Megatron (config.json of bigscience/bloom)
BLOOM_VOCAB = 250880
#: runs of Megatron-LM and its forks, which pad every vocabulary (megatron/tokenizer/tokenizer.py, ``_vocab_size_with_padding``), also
#: one that tp divides
_PADS = r"vTrain ground truth \(multi|SC'21|Korthikanti|MT-NLG"
#: what vTrain ran on one host is its own model of a layer and of the head, each of whose ranks has ``vocab_size // world_size`` rows
#: (VIA-Research/vTrain @f8dda84 src/model/gpt_modeling.py, ``ShardedGptLogit``): one step takes 8.5 ms per sequence and head of
#: width 2,048 on one rank and 1.6 ms on each of two, where 50,257 rows are no whole vectors and 25,128 are
_CUTS = r"vTrain ground truth \(single"
_LATENT = re.compile(r"MLA: q_lora (\d+), kv_lora (\d+), qk_nope (\d+), qk_rope (\d+), v_head (\d+)")


def usual(name: str, column: str) -> bool:
    """Return whether a model's name tells what a blank cell of `column` stands for; it is taken as an assumption by name."""
    name = canonical(name)
    told = {"vocab": usual_vocab(name) is not None, "kv_heads": plain(name), "head_dim": whole_heads(name)}
    return column in told and (told[column] or shipped(name) is not None)


def shipped(name: str) -> str | None:
    """Return the shipped model that rows of a model, by its usual name, are read on."""
    return next((file for start, file in _SHIPPED.items() if name.startswith(start)), None)


def model_of(row: Row) -> Model:
    """Return the model of a published row.

    Parameters
    ----------
    row : Row
        Its assumptions are added to the row.

    Raises
    ------
    ProfileError
        When the architecture is outside what a `Model` can say, or a main dimension is not printed.
    """
    name = row.text("model")
    if re.search(_NOT_STANDARD, name, re.IGNORECASE) or row.has("non-standard|modified architecture", "missing_fields"):
        raise ProfileError("non-standard architecture")
    if row.has("fine-tuning", "missing_fields"):
        raise ProfileError("fine-tuning, not pre-training")
    file = shipped(name)
    data = _on_shipped(row, MODELS.load(file)) if file else _from_columns(row)
    data["vocab"] = _divisible_vocab(row, data["vocab"])
    return Model.model_validate(data | {"name": name, "source": row.text("provenance") or row.text("source")})


def _divisible_vocab(row: Row, vocab: int) -> int:
    tp = row.whole("tp") or 1
    if row.has("vocab '250k'", "notes"):
        row.assume(f"vocabulary printed rounded: {BLOOM_VOCAB:,}, as BLOOM was trained")
        return BLOOM_VOCAB
    if row.has(_CUTS, "source"):
        row.assume("vocabulary not padded: every tensor-parallel rank has a whole part of it, rounded down")
        return vocab // tp * tp
    if vocab % tp == 0 and not row.has(_PADS, "source"):
        return vocab
    unit = 128 * tp  # Megatron's make_vocab_size_divisible_by, times tp
    padded = -(-vocab // unit) * unit
    if padded != vocab:
        row.assume("vocabulary padded to a multiple of 128 x tp")
    return padded


def _on_shipped(row: Row, base: Model) -> dict[str, Any]:
    """Return the fields of a shipped model with what the row prints; a printed dimension always wins."""
    data = base.model_dump()
    columns = {"layers": "layers", "hidden": "hidden", "vocab": "vocab", "heads": "heads", "ffn": "ffn_hidden"}
    if base.latent is None:  # with latent attention these two columns describe something else than the file
        columns |= {"kv_heads": "kv_heads", "head_dim": "head_dim"}
    for field, column in columns.items():
        printed = row.whole(column)
        if printed is not None:
            data[field] = printed
        elif column in ("vocab", "kv_heads", "head_dim"):
            row.assume(f"{column} not printed: {data[field]}, as in {base.name}")
    data["windows"] = _repeated(base.windows, data["layers"])
    if base.experts is not None:
        for field, column in (("count", "experts"), ("top_k", "topk"), ("ffn", "moe_ffn_hidden")):
            printed = row.whole(column)
            if printed is not None:
                data["experts"][field] = printed
        dense = row.whole("dense_layers")
        data["moe_layers"] = base.moe_layers[: data["layers"]] if dense is None else _moe_layers(row, data["layers"], dense)
        if len(data["moe_layers"]) != data["layers"]:
            raise ProfileError("not printed: dense_layers")
    if row.has(r"(?:without|w/o|no) MTP", "notes"):
        data["mtp_layers"] = 0
    elif base.mtp_layers and not row.has("mtp", "notes", "model"):
        row.assume(f"MTP layers not printed: {base.mtp_layers}")
    return data


def _repeated(pattern: tuple, layers: int) -> tuple:
    return tuple(pattern[i % len(pattern)] for i in range(layers)) if pattern else ()


def _moe_layers(row: Row, layers: int, dense: int) -> tuple[bool, ...]:
    if row.has("MoE every 2nd layer", "notes"):
        pattern = tuple(i % 2 == 1 for i in range(layers))
        if pattern.count(False) != dense:
            raise ProfileError("dense_layers contradicts 'MoE every 2nd layer'")
        return pattern
    return tuple(i >= dense for i in range(layers))


def _from_columns(row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {k: row.need(k) for k in ("layers", "hidden", "heads")}
    name, width = row.text("model"), data["hidden"] // data["heads"]
    data["kv_heads"] = row.default("key-value heads", data["heads"], row.whole("kv_heads")) if plain(name) else row.need("kv_heads")
    data["head_dim"] = row.default("width of heads", width, row.whole("head_dim")) if whole_heads(name) else row.need("head_dim")
    vocab = usual_vocab(name)
    data["vocab"] = row.default("vocab", vocab, row.whole("vocab")) if vocab else row.need("vocab")
    moe = row.text("arch") == "moe"
    dense = row.need("dense_layers") if moe else data["layers"]
    data["ffn"] = _ffn(row, data["hidden"]) if dense else (row.whole("ffn_hidden") or 0)
    latent = _LATENT.search(row.text("notes"))
    if latent:
        q, kv, nope, rope, value = (int(n) for n in latent.groups())
        data["latent"] = LatentAttention(q_rank=q, kv_rank=kv, nope_dim=nope, rope_dim=rope, v_dim=value)
        data |= {"head_dim": nope + rope, "kv_heads": data["heads"]}
    if moe:
        data |= _experts(row, data["layers"], dense)
    data |= _style(row, data["hidden"], data["ffn"], moe)
    if data.get("tied_embeddings") and re.match(f"{GPT}|MPT", name):
        data["positions"] = row.need("seq_len")  # GPT and, as benchmarked, MPT learn one embedding per position
    return data


def _ffn(row: Row, hidden: int) -> int:
    if re.match(GPT, row.text("model")):
        return row.default("MLP width", 4 * hidden, row.whole("ffn_hidden"))
    return row.need("ffn_hidden")


def _experts(row: Row, layers: int, dense: int) -> dict[str, Any]:
    width = row.need("moe_ffn_hidden")
    count = row.whole("shared_experts")
    together = row.default("shared experts", 0, count) * width
    experts = Experts(count=row.need("experts"), top_k=row.need("topk"), ffn=width, shared_ffn=together)
    return {"experts": experts, "moe_layers": _moe_layers(row, layers, dense)}


def _style(row: Row, hidden: int, ffn: int, moe: bool) -> dict[str, bool]:
    name = row.text("model")
    for start, (details, said) in _STYLES.items():
        if re.match(f"(?:{start})", name):
            row.assume(said)
            return dict(details)
    if not moe and ffn == 4 * hidden:
        # gating adds a third matrix, so gated MLPs are made narrower; a width of exactly 4 h is the plain one
        row.assume("MLP not printed: plain, because its width is 4 x hidden")
        return {"gated": False}
    return {}
