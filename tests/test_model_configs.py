"""Hugging Face configurations: the shipped models, every alias, the traps, and what is refused."""

from __future__ import annotations

import json

import pytest

from simulator.errors import ProfileError
from simulator.scenario.hf_config import model_from_hf
from simulator.scenario.model import Experts, LatentAttention, LayerKind, Model
from simulator.scenario.profiles import MODELS, profile_root

DENSE = {"num_hidden_layers": 8, "hidden_size": 64, "vocab_size": 1000, "num_attention_heads": 4, "intermediate_size": 256}
MOE = DENSE | {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def read(config: dict, *without: str) -> Model:
    return model_from_hf({k: v for k, v in config.items() if k not in without}, "m", "a test")


def layers(model: Model) -> str:
    """The layers as letters: m for MoE, d for dense."""
    return "".join("m" if kind.moe else "d" for kind in model.layer_kinds)


# --- parameters: an independent count, written from the papers, against counts of instantiated models ---


def counted(model: Model) -> tuple[int, int]:
    """Return (all, routed-expert) parameters, matrix by matrix."""
    h, heads, kv = model.hidden, model.heads, model.kv_heads
    norm = 2 * h if model.layer_norm else h
    if model.latent:
        a = model.latent
        attention = h * a.q_rank + a.q_rank + a.q_rank * heads * (a.nope_dim + a.rope_dim)
        attention += h * (a.kv_rank + a.rope_dim) + a.kv_rank + a.kv_rank * heads * (a.nope_dim + a.v_dim) + heads * a.v_dim * h
    else:
        d = model.head_dim
        attention = 2 * h * heads * d + 2 * h * kv * d
        attention += model.attention_bias * (heads + 2 * kv) * d + model.output_bias * h + model.qk_norm * 2 * d + model.sinks * heads
    total = model.vocab * h * (1 if model.tied_embeddings else 2) + model.positions * h + norm
    routed = 0
    matrices = 3 if model.gated else 2
    for kind in model.layer_kinds:
        total += attention + 2 * norm
        if kind.moe:
            e = model.experts
            one = matrices * h * e.ffn + model.mlp_bias * ((matrices - 1) * e.ffn + h)
            routed += e.count * one
            total += e.count * one + matrices * h * e.shared_ffn + h * e.count + model.mlp_bias * e.count
        else:
            total += matrices * h * model.ffn + model.mlp_bias * ((matrices - 1) * model.ffn + h)
    return total, routed


@pytest.mark.parametrize(
    ("name", "total", "routed"),
    [  # transformers 5.23.0 on the meta device, billions to three digits
        ("deepseek-v3", 671.026, 653.909),
        ("kimi-k2", 1026.408, 1014.686),
        ("qwen3-235b-a22b", 235.094, 227.096),
        ("gpt-oss-120b", 116.829, 114.702),
        ("mixtral-8x7b", 46.703, 45.097),
        ("llama-3-405b", 405.853, 0.0),
    ],
)
def test_shipped_models_have_the_parameters_of_the_instantiated_ones(name, total, routed):
    counts = counted(MODELS.load(name))
    assert [round(c / 1e9, 3) for c in counts] == [total, routed]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # counts of the hub's safetensors indexes, unless said otherwise
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x22b", 140_620_634_112),  # the checkpoint has 281,241,493,344 bytes in bf16, headers included
        ("gpt-3-175b", 174_604_259_328),  # Narayanan et al. 2021, eq. 2: 12 L h^2 (1 + 13/12h + (V + s)/12Lh), and the last norm
    ],
)
def test_shipped_models_have_the_published_parameters(name, parameters):
    assert counted(MODELS.load(name))[0] == parameters


def test_every_shipped_model_loads_under_its_file_name_and_says_where_it_is_from():
    assert MODELS.names() == sorted(
        ["deepseek-v3", "gpt-3-175b", "gpt-oss-120b", "kimi-k2", "llama-3-405b", "llama-3-70b", "llama-3-8b"]
        + ["mixtral-8x22b", "mixtral-8x7b", "qwen3-235b-a22b", "qwen3-30b-a3b"]
    )
    for name in MODELS.names():
        model = MODELS.load(name)
        assert model.name == name
        assert "config.json" in model.source or "arXiv" in model.source


def test_deepseek_v3_exactly():
    model = MODELS.load("deepseek-v3")
    assert layers(model) == "ddd" + 58 * "m"
    assert model.experts == Experts(count=256, top_k=8, ffn=2048, shared_ffn=2048, groups=8, top_groups=4)
    assert model.latent == LatentAttention(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
    assert (model.head_dim, model.kv_heads, model.ffn, model.mtp_layers, model.tied_embeddings) == (192, 128, 18432, 1, False)


def test_kimi_k2_exactly():
    model = MODELS.load("kimi-k2")
    assert layers(model) == "d" + 60 * "m"
    assert model.experts == Experts(count=384, top_k=8, ffn=2048, shared_ffn=2048, groups=1, top_groups=1)
    assert (model.heads, model.vocab, model.mtp_layers) == (64, 163840, 0)


def test_gpt_oss_alternates_windows():
    model = MODELS.load("gpt-oss-120b")
    assert model.windows == (128, None) * 18
    assert model.kinds == (LayerKind(moe=True, window=128), LayerKind(moe=True))
    assert (model.sinks, model.attention_bias, model.output_bias, model.mlp_bias) == (True, True, True, True)


def test_gpt_3_takes_its_details_from_the_class_gpt2():
    model = MODELS.load("gpt-3-175b")
    assert (model.gated, model.tied_embeddings, model.layer_norm, model.positions) == (False, True, True, 2048)
    assert (model.layers, model.hidden, model.heads, model.head_dim, model.ffn) == (96, 12288, 96, 128, 49152)


def test_gpt2_without_n_inner_is_four_times_as_wide():
    assert read({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 10, "n_inner": None}).ffn == 256


# --- aliases ---


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_layers", "n_layers", "n_layer"])
def test_layers_under_every_name(key):
    assert read(DENSE | {key: 8}, *({"num_hidden_layers"} - {key})).layers == 8


@pytest.mark.parametrize("key", ["hidden_size", "d_model", "n_embd"])
def test_hidden_under_every_name(key):
    assert read(DENSE | {key: 64}, *({"hidden_size"} - {key})).hidden == 64


@pytest.mark.parametrize("key", ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"])
def test_experts_under_every_name(key):
    model = read(MOE | {key: 16}, *({"num_experts"} - {key}))
    assert model.experts == Experts(count=16, top_k=2, ffn=32)
    assert layers(model) == "mmmmmmmm"


@pytest.mark.parametrize("key", ["num_experts_per_tok", "experts_per_token", "moe_topk", "moe_top_k", "moe_k"])
def test_top_k_under_every_name(key):
    assert read(MOE | {key: 4}, *({"num_experts_per_tok"} - {key})).experts.top_k == 4


@pytest.mark.parametrize(
    ("key", "width"), [("moe_intermediate_size", 48), ("expert_ffn_hidden_size", 48), ("intermediate_size", 48), ("ffn_hidden_size", 48)]
)
def test_expert_width_under_every_name(key, width):
    without = {"moe_intermediate_size", "intermediate_size"} - {key}
    assert read(MOE | {key: width}, *without).experts.ffn == width


@pytest.mark.parametrize("key", ["n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"])
def test_shared_experts_as_a_count_of_routed_widths(key):
    assert read(MOE | {key: 2}).experts.shared_ffn == 2 * 32


@pytest.mark.parametrize("key", ["shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"])
def test_shared_experts_as_a_width(key):
    assert read(MOE | {key: 80, "n_shared_experts": 1}).experts.shared_ffn == 80


@pytest.mark.parametrize("keys", [("n_group", "topk_group"), ("num_expert_groups", "num_limited_groups")])
def test_group_limited_routing(keys):
    experts = read(MOE | dict(zip(keys, (4, 2), strict=True))).experts
    assert (experts.groups, experts.top_groups) == (4, 2)


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
def test_mtp_layers(key):
    assert read(DENSE | {key: 1}).mtp_layers == 1


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ({}, "mmmmmmmm"),
        ({"first_k_dense_replace": 3}, "dddmmmmm"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "ddmdmdmd"),  # DeepSeek: from layer k on, those divisible by the frequency
        ({"num_dense_layers": 2}, "ddmmmmmm"),  # AFMoE
        ({"moe_layer_freq": [0, 1, 1, 1, 0, 1, 1, 1]}, "dmmmdmmm"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, "mmmmmmmm"),  # Qwen
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, "dmdmdmdm"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 5]}, "dmmmmdmm"),
        ({"interleave_moe_layer_step": 2}, "dmdmdmdm"),  # Llama 4
        ({"interleave_moe_layer_step": 2, "moe_layers": [0, 3]}, "mddmdddd"),
        ({"interleave_moe_layer_step": 2, "moe_layers": None}, "dmdmdmdm"),
        ({"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 5}, "dddmmmmm"),  # DeepSeek-V3.2, GLM
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 6, "moe_layer_interval": 1}, "dmmmmmmd"),  # ERNIE
        ({"moe_layer_start_index": 3, "moe_layer_end_index": -1, "moe_layer_interval": 2}, "dddmdmdm"),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": None, "moe_layer_interval": 1}, "dmmmmmmm"),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, "dmdmdmdm"),  # Jamba
        ({"expert_layer_period": 4, "expert_layer_offset": 0}, "mdddmddd"),
    ],
)
def test_moe_layers_in_every_notation(notation, expected):
    assert layers(read(MOE | notation)) == expected


def test_dbrx_nests_its_tables_and_their_defaults_do_not_win():
    config = {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352, "tie_word_embeddings": False,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "model_type": "", "tie_word_embeddings": True},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "model_type": "", "tie_word_embeddings": True},
    }  # fmt: skip
    model = read(config)
    assert model.experts == Experts(count=16, top_k=4, ffn=10752)
    assert (model.kv_heads, model.head_dim, model.tied_embeddings) == (8, 128, False)
    assert counted(model)[0] == 131_596_523_520  # "132B"


def test_llama_4_maverick_names_its_dense_width_apart_and_has_a_shared_expert_in_its_class():
    text = {
        "model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "vocab_size": 202048, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    model = read({"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 1408}})
    assert model.experts == Experts(count=128, top_k=1, ffn=8192, shared_ffn=8192)
    assert model.ffn == 16384
    assert layers(model) == "dm" * 24
    assert round(counted(model)[0] / 1e9, 1) == 400.7  # "400B" without the vision tower


def test_hunyuan_repeats_one_value_per_layer():
    model = read(MOE | {"moe_topk": [2] * 8, "moe_intermediate_size": [32] * 8, "num_shared_expert": [1] * 8}, "num_experts_per_tok")
    assert model.experts == Experts(count=16, top_k=2, ffn=32, shared_ffn=32)


def test_trinity_says_every_how_many_layers_attention_is_global():
    window = {"sliding_window": 16, "global_attn_every_n_layers": 4, "num_expert_groups": 1, "num_limited_groups": 1, "n_group": 1}
    assert read(MOE | window).windows == (16, 16, 16, None) * 2


# --- the traps ---


def test_trap_1_qwen3_saved_by_transformers_5_says_num_local_experts():
    qwen3 = MOE | {"model_type": "qwen3_moe", "head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
    resaved = {("num_local_experts" if k == "num_experts" else k): v for k, v in qwen3.items()}
    assert "num_experts" not in resaved
    assert read(resaved) == read(qwen3)


def test_trap_2_head_dim_beside_kv_lora_rank_is_the_rotary_part_only():
    mla = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = read(DENSE | mla | {"head_dim": 4, "num_key_value_heads": 4})
    assert model.head_dim == 16
    assert model == read(DENSE | mla)


def test_mla_with_a_plain_query_projection():
    mla = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 8}
    assert read(DENSE | mla).latent == LatentAttention(q_rank=None, kv_rank=16, nope_dim=12, rope_dim=4, v_dim=8)


def test_trap_3_head_dim_is_not_always_hidden_over_heads():
    assert (MODELS.load("qwen3-235b-a22b").head_dim, 4096 // 64) == (128, 64)
    assert (MODELS.load("gpt-oss-120b").head_dim, 2880 // 64) == (64, 45)
    assert read(DENSE).head_dim == 16
    assert read(DENSE | {"head_dim": None}).head_dim == 16


def test_trap_4_kimi_k2_is_read_with_the_fields_of_v3():
    kimi = json.loads((profile_root() / "models" / "kimi-k2.json").read_text())
    assert kimi["model_type"] == "kimi_k2"
    as_v3 = {k: v for k, v in kimi.items() if not k.startswith("_")} | {"model_type": "deepseek_v3"}
    assert model_from_hf(as_v3, "kimi-k2", kimi["_source"]) == MODELS.load("kimi-k2")


def test_trap_5_multimodal_files_nest_the_language_model():
    assert read({"model_type": "x", "text_config": MOE, "vision_config": {"num_hidden_layers": 99}}) == read(MOE)


def test_trap_6_rope_theta_may_move():
    assert read(DENSE | {"rope_parameters": {"rope_theta": 1e6}}) == read(DENSE | {"rope_theta": 1e6}) == read(DENSE)


# --- details ---


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 4}, (16, None) * 4),
        ({"sliding_window": None}, ()),
        ({"sliding_window": 16, "use_sliding_window": False}, ()),  # Qwen2 writes both
        ({"sliding_window": 16, "model_type": "mistral"}, (16,) * 8),
        ({"sliding_window": 131072, "max_position_embeddings": 131072}, ()),  # Phi: a window as long as the sequence
    ],
)
def test_windows(keys, windows):
    assert read(DENSE | keys).windows == windows


@pytest.mark.parametrize(
    ("keys", "detail"),
    [
        ({"tie_word_embeddings": True}, "tied_embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_bias": True}, "output_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen3"}, "qk_norm"),
        ({"model_type": "qwen2"}, "attention_bias"),
    ],
)
def test_details(keys, detail):
    assert getattr(read(DENSE | keys), detail) is True
    assert getattr(read(DENSE), detail) is False


def test_qwen2_moe_gates_its_shared_expert():
    assert read(MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64}).experts.shared_gate is True
    assert read(MOE | {"model_type": "qwen2_moe"}).experts.shared_gate is False


@pytest.mark.parametrize("count", [0, 1, None])
def test_one_expert_is_a_dense_model(count):
    model = read(MOE | {"num_experts": count})
    assert model.experts is None
    assert model.moe_layers == ()


# --- refusals ---


def refusal(config: dict, *without: str) -> str:
    with pytest.raises(ProfileError) as caught:
        read(config, *without)
    return str(caught.value)


@pytest.mark.parametrize("key", ["num_expert", "zero_expert_num", "moe_expert_count", "NumExperts"])
def test_an_unknown_key_that_says_expert_is_refused(key):
    text = refusal(MOE | {key: 2})
    assert text.startswith(f"m: unknown key {key} may change the experts' cost; rename it to one of ")
    assert "n_routed_experts" in text


def test_experts_without_their_number_are_not_taken_for_a_dense_model():
    text = refusal(MOE, "num_experts")
    assert "num_experts_per_tok without the number of experts; add n_routed_experts or" in text


@pytest.mark.parametrize("key", ["output_expert_logits", "experts_implementation"])
def test_keys_that_say_expert_and_cost_nothing_pass(key):
    assert read(MOE | {key: "x"}) == read(MOE)


def test_missing_dimensions_are_listed_all_at_once():
    assert refusal({}) == (
        "m: missing layers (num_hidden_layers or num_layers or n_layers or n_layer); hidden (hidden_size or d_model or n_embd); "
        "vocab (vocab_size); heads (num_attention_heads or n_heads or n_head); "
        "ffn (intermediate_size_mlp or intermediate_size or ffn_hidden_size or n_inner)"
    )


def test_missing_dimensions_of_experts_and_latent_attention_are_in_the_same_list():
    assert refusal({"hidden_size": 64, "vocab_size": 10, "num_attention_heads": 4, "num_experts": 8, "kv_lora_rank": 16}) == (
        "m: missing layers (num_hidden_layers or num_layers or n_layers or n_layer); "
        "top_k (num_experts_per_tok or experts_per_token or moe_topk or moe_top_k or moe_k); "
        "expert_ffn (moe_intermediate_size or expert_ffn_hidden_size or intermediate_size); "
        "qk_nope_head_dim; qk_rope_head_dim; v_head_dim"
    )


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"num_hidden_layers": "8"}, "m: num_hidden_layers = '8' must be one whole number"),
        ({"hidden_size": 64.5}, "m: hidden_size = 64.5 must be one whole number"),
        ({"moe_topk": [1, 2], "num_experts_per_tok": None}, "m: moe_topk = [1, 2] must be one whole number"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": "0"}, "m: mlp_only_layers = '0' must be a list of layer numbers"),
        ({"num_attention_heads": 0}, "m: heads: must be greater than 0; found 0; kv_heads: must be greater than 0; found 0"),
        ({"num_key_value_heads": 3}, "m: 3 kv_heads do not divide 4 heads"),
        ({"num_experts_per_tok": 17}, "m: top_k = 17 exceeds 16 experts"),
        ({"n_group": 3}, "m: 3 groups do not divide 16 experts"),
        ({"moe_layer_freq": [1, 0]}, "m: moe_layers has 2 entries for 8 layers"),
        ({"sliding_window": 16, "layer_types": ["sliding_attention"]}, "m: layer_types has 1 entries for 8 layers"),
        ({"sliding_window": 16}, "m: sliding_window = 16, but not in which layers; add layer_types, or remove it for full attention"),
    ],
)
def test_unusable_values_name_the_key(keys, text):
    assert refusal(MOE | keys) == text


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"mamba_d_state": 128}, "state-space layers (mamba_d_state)"),
        ({"hybrid_override_pattern": "M-M*-"}, "state-space layers (hybrid_override_pattern)"),
        ({"linear_num_value_heads": 32}, "linear attention (linear_num_value_heads)"),
        ({"index_n_heads": 64, "index_topk": 2048}, "sparse attention (index_n_heads, index_topk)"),
    ],
)
def test_mechanisms_that_are_not_modelled_are_refused_rather_than_priced_as_attention(keys, what):
    assert refusal(MOE | keys) == f"m: {what} not modelled; remove the keys to price it as full attention"


def test_layer_types_with_linear_attention_are_refused():
    assert "linear attention" in refusal(MOE | {"layer_types": ["linear_attention"] * 8})


def test_a_configuration_is_an_object():
    with pytest.raises(ProfileError, match=r"^m: a model configuration is a JSON object, not list$"):
        model_from_hf([DENSE], "m", "a test")
