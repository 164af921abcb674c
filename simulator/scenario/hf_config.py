"""Read a Hugging Face ``config.json`` through a table of aliases.

The field names were read from the configuration classes of the model families.
"""

from __future__ import annotations

import re
import sys

from simulator.errors import ProfileError
from simulator.scenario.model import MOST_LAYERS, Experts, LatentAttention, Model

_ALIASES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "vocab": ("vocab_size",),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "kv_n_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "n_inner"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_count": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "shared_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    "groups": ("n_group", "num_expert_groups"),
    "top_groups": ("topk_group", "num_limited_groups"),
    "mtp": ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
    "positions": ("n_positions",),
}
#: keys that say "expert" and change neither dimensions nor FLOP
_HARMLESS = {"experts_implementation", "output_expert_logits", "log_expert_load", "expert_dropout"}
_KNOWN_EXPERT_KEYS = {name for names in _ALIASES.values() for name in names if "expert" in name} | _HARMLESS
#: keys of mechanisms that would be priced as plain attention if they were passed over, and how their families begin
_NOT_MODELLED = {
    "mamba_": "state-space layers",
    "hybrid_override_pattern": "state-space layers",
    "layers_block_type": "state-space layers",
    "linear_": "linear attention",
    "index_": "sparse attention",
}
#: model types in which every layer slides when only the window is given
_ALL_LAYERS_SLIDE = ("mistral", "mixtral")
#: model types whose details do not stand in the file but in the class of that name
_CLASSES: dict[str, dict[str, bool]] = {
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gpt_oss": {"scaled_rotary": True, "clamped": True, "sinks": True, "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "gpt2": {
        "layer_norm": True,
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated": False,
        "tied_embeddings": True,
    },
    "qwen2": {"attention_bias": True},
    "qwen2_moe": {"attention_bias": True},
}


def _layer_numbers(config: dict, key: str) -> list[int]:
    pattern = config.get(key) or []
    if not isinstance(pattern, list) or not all(isinstance(i, int) for i in pattern):
        raise ProfileError(f"{key} = {pattern!r} must be a list of layer numbers")
    return pattern


def _kinds(config: dict, key: str) -> list[str]:
    kinds = config.get(key) or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ProfileError(f"{key} = {kinds!r} must be a list of layer kinds")
    return kinds


def _whole(config: dict, key: str, default: int | None = None) -> int | None:
    """Return the whole number under `key`; a list with one entry per layer counts when all entries agree."""
    value = config.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProfileError(f"{key} = {value!r} must be one whole number")
    return value


def _read(config: dict, field: str) -> int | None:
    """Return the dimension `field` under whichever of its aliases the file uses."""
    return next((value for key in _ALIASES[field] if (value := _whole(config, key)) is not None), None)


def _moe_layers(config: dict, layers: int) -> tuple[bool, ...]:
    """Return which layers are MoE, from whichever of the nine notations the file uses."""
    if "mlp_layer_types" in config:
        return tuple(t in ("sparse", "moe") for t in _kinds(config, "mlp_layer_types"))
    if isinstance(config.get("moe_layer_freq"), list):
        return tuple(bool(flag) for flag in config["moe_layer_freq"])
    if config.get("moe_layers") is not None:
        listed = _layer_numbers(config, "moe_layers")
        return tuple(i in listed for i in range(layers))
    if "decoder_sparse_step" in config:
        step, dense = _whole(config, "decoder_sparse_step") or 1, _layer_numbers(config, "mlp_only_layers")
        return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
    if "interleave_moe_layer_step" in config:
        step = _whole(config, "interleave_moe_layer_step") or 1
        return tuple((i + 1) % step == 0 for i in range(layers))
    if "expert_layer_period" in config:
        period, offset = _whole(config, "expert_layer_period") or 1, _whole(config, "expert_layer_offset", 0)
        return tuple(i % period == offset for i in range(layers))
    if "moe_layer_start_index" in config or "moe_layer_interval" in config:
        first, last = _whole(config, "moe_layer_start_index", 0), _whole(config, "moe_layer_end_index", -1)
        last, step = layers - 1 if last == -1 else last, _whole(config, "moe_layer_interval") or 1
        return tuple(first <= i <= last and (i + 1) % step == 0 for i in range(layers))
    dense = _whole(config, "first_k_dense_replace", _whole(config, "num_dense_layers", 0))
    step = _whole(config, "moe_layer_freq") or 1
    return tuple(i >= dense and i % step == 0 for i in range(layers))


def _windows(config: dict, layers: int) -> tuple[int | None, ...]:
    window, kinds, every = _whole(config, "sliding_window"), _kinds(config, "layer_types"), _whole(config, "global_attn_every_n_layers")
    if any("linear" in kind for kind in kinds):
        raise ProfileError("layer_types names linear attention, which is not modelled; write full_attention to price it as full attention")
    if not window or config.get("use_sliding_window") is False or window >= _whole(config, "max_position_embeddings", sys.maxsize):
        return ()
    if not kinds and every:
        kinds = ["full" if (i + 1) % every == 0 else "sliding" for i in range(layers)]
    if not kinds and config.get("model_type") in _ALL_LAYERS_SLIDE:
        kinds = ["sliding"] * layers
    if not kinds:
        raise ProfileError(f"sliding_window = {window}, but not in which layers; add layer_types, or remove it for full attention")
    if len(kinds) != layers:
        raise ProfileError(f"layer_types has {len(kinds)} entries for {layers} layers")
    return tuple(window if "sliding" in kind else None for kind in kinds)


def _expert_ffn(config: dict) -> int | None:
    """Return the width of one expert; without a width of its own it is the MLP's (Mixtral, GPT-OSS, Llama 4, DBRX)."""
    return _read(config, "expert_ffn") or _whole(config, "intermediate_size") or _whole(config, "ffn_hidden_size")


def _experts(config: dict) -> Experts:
    ffn, kind = _expert_ffn(config), str(config.get("model_type", ""))
    shared = _read(config, "shared_ffn")
    if shared is None:  # Llama 4 has one shared expert in its class, not in its file
        shared = _read(config, "shared_count") or (1 if kind.startswith("llama4") else 0)
        shared *= ffn
    groups = _read(config, "groups") or 1
    return Experts(
        count=_read(config, "experts"),
        top_k=_read(config, "top_k"),
        ffn=ffn,
        shared_ffn=shared,
        shared_gate=kind == "qwen2_moe" and shared > 0,
        groups=groups,
        top_groups=(_read(config, "top_groups") or 1) if groups > 1 else 1,
    )


def _flat(config: dict) -> dict:
    """Return the language model's part of a multimodal file, and DBRX's nested tables, as one table."""
    flat = dict(_table(config, "text_config") or config)
    for nested in ("ffn_config", "attn_config"):
        flat = _table(flat, nested) | {k: v for k, v in flat.items() if k != nested}  # the file's own keys win over such tables' defaults
    return flat


def _table(config: dict, key: str) -> dict:
    value = config.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ProfileError(f"{key} must be a table of 'key: value'; found {value!r}")
    return value


def _refuse_unknown(config: dict, name: str) -> None:
    unknown = sorted(k for k in config if "expert" in k.lower() and k not in _KNOWN_EXPERT_KEYS and not re.match(r"expert_layer_", k))
    if unknown:
        raise ProfileError(
            f"{name}: unknown key {', '.join(unknown)} may change the experts' cost; rename it to one of "
            f"{', '.join(sorted(_KNOWN_EXPERT_KEYS))} or remove it"
        )
    told = sorted(k for field in ("top_k", "shared_count", "expert_ffn") for k in _ALIASES[field] if config.get(k))
    if told and not any(k in config for k in _ALIASES["experts"]):
        raise ProfileError(
            f"{name}: {', '.join(told)} without the number of experts; add {' or '.join(_ALIASES['experts'])}, 1 for a dense model"
        )
    for start, what in _NOT_MODELLED.items():
        found = sorted(k for k in config if k.startswith(start) and config[k])
        if found:
            raise ProfileError(f"{name}: {what} ({', '.join(found)}) not modelled; remove the keys to price it as full attention")


def _missing(config: dict) -> list[str]:
    """Return every dimension that the file lacks, with the names it may have."""
    needed = ["layers", "hidden", "vocab", "heads"]
    moe = (_read(config, "experts") or 0) > 1
    if moe:
        needed.append("top_k")
    elif config.get("model_type") != "gpt2":
        needed.append("ffn")
    missing = [f"{f} ({' or '.join(_ALIASES[f])})" for f in needed if _read(config, f) is None]
    if moe and _expert_ffn(config) is None:
        missing.append(f"expert_ffn ({' or '.join(_ALIASES['expert_ffn'])} or intermediate_size)")
    if config.get("kv_lora_rank"):
        missing += [k for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim") if config.get(k) is None]
    return missing


def model_from_hf(config: dict, name: str, source: str) -> Model:
    """Return the Model that a Hugging Face configuration describes.

    Parameters
    ----------
    config : dict
        Content of ``config.json``.
    name, source : str
        Name to give the model and where the file came from.

    Raises
    ------
    ProfileError
        When a dimension is missing, or a key that contains "expert" is not understood: ignoring it would price a
        mixture of experts as something else.
    """
    if not isinstance(config, dict):
        raise ProfileError(f"{name}: a model configuration is a JSON object, not {type(config).__name__}")
    config = _flat(config)
    _refuse_unknown(config, name)
    try:
        missing = _missing(config)
        if missing:
            raise ProfileError(f"missing {'; '.join(missing)}")
        return _model(config, name, source)
    except ProfileError as error:
        raise ProfileError(f"{name}: {error}") from None


def _details(config: dict) -> dict[str, bool]:
    details = dict(_CLASSES.get(str(config.get("model_type")), {}))
    if config.get("attention_bias"):
        details["attention_bias"] = details["output_bias"] = True
    if config.get("mlp_bias"):
        details["mlp_bias"] = True
    if "tie_word_embeddings" in config:
        details["tied_embeddings"] = bool(config["tie_word_embeddings"])
    return details


def _model(config: dict, name: str, source: str) -> Model:
    layers, hidden, heads = _read(config, "layers"), _read(config, "hidden"), _read(config, "heads")
    if layers > MOST_LAYERS:
        raise ProfileError(f"{layers} layers; at most {MOST_LAYERS} can be described")
    experts = _experts(config) if (_read(config, "experts") or 0) > 1 else None
    latent = None
    if config.get("kv_lora_rank"):
        nope, rope, value = (_whole(config, k) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        ranks = _whole(config, "q_lora_rank"), _whole(config, "kv_lora_rank")
        latent = LatentAttention(q_rank=ranks[0], kv_rank=ranks[1], nope_dim=nope, rope_dim=rope, v_dim=value)
        head_dim = nope + rope  # transformers 5 writes only the rotary part under head_dim
    else:
        head_dim = _read(config, "head_dim") or hidden // max(heads, 1)
    return Model(
        name=name,
        source=source,
        layers=layers,
        hidden=hidden,
        vocab=_read(config, "vocab"),
        heads=heads,
        kv_heads=heads if latent else (_read(config, "kv_heads") or heads),
        head_dim=head_dim,
        ffn=_read(config, "ffn") or (4 * hidden if config.get("model_type") == "gpt2" else 0),
        experts=experts,
        moe_layers=_moe_layers(config, layers) if experts else (),
        windows=_windows(config, layers),
        latent=latent,
        mtp_layers=_read(config, "mtp") or 0,
        positions=_read(config, "positions") or 0,
        **_details(config),
    )
