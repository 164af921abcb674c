"""Oracle: parameters counted elsewhere from the same dimensions.

Totals and routed-expert parts: Hugging Face transformers 5.23.0 on torch 2.13.0, `AutoModelForCausalLM.from_config` on the
meta device (Kimi-K2 as DeepSeek-V3's class with its own sizes). Active and MTP parameters: what the vendors print.
"""

from __future__ import annotations

import pytest

from simulator.scenario.profiles import MODELS
from simulator.workload.flop import count

#: model -> (all, routed experts), 1e9
TRANSFORMERS = {
    "deepseek-v3": (671.026, 653.909),
    "kimi-k2": (1026.408, 1014.686),
    "qwen3-235b-a22b": (235.094, 227.096),
    "gpt-oss-120b": (116.829, 114.702),
    "mixtral-8x7b": (46.703, 45.097),
    "llama-3-405b": (405.853, 0.0),
}

#: model -> (active 1e9 as printed, embeddings that the print leaves out, half a unit of its last digit)
PRINTED_ACTIVE = {
    "deepseek-v3": (37.0, 0, 0.6),  # README: 37 B activated
    "kimi-k2": (32.0, 0, 1.0),  # README: 32 B activated
    "qwen3-235b-a22b": (22.0, 0, 0.5),  # README: 22 B activated
    "mixtral-8x7b": (12.9, 0, 0.05),  # Jiang et al., 2024: 13 B; 12.9 B in the blog
    "mixtral-8x22b": (39.0, 0, 0.5),  # blog: 39 B active
    "gpt-oss-120b": (5.13, 1, 0.005),  # model card: 5.13 B active, input embedding left out
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_parameters(name):
    assert count(MODELS.load(name), 4096).parameters / 1e9 == pytest.approx(TRANSFORMERS[name][0], abs=0.001)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_routed_experts(name):
    assert count(MODELS.load(name), 4096).expert_parameters / 1e9 == pytest.approx(TRANSFORMERS[name][1], abs=0.001)


@pytest.mark.parametrize("name", PRINTED_ACTIVE)
def test_active_parameters(name):
    printed, left_out, half_digit = PRINTED_ACTIVE[name]
    model = MODELS.load(name)
    active = count(model, 4096).active_parameters - left_out * model.vocab * model.hidden
    assert active / 1e9 == pytest.approx(printed, abs=half_digit)


def test_mtp_layer_of_deepseek_v3():
    """README_WEIGHTS.md of DeepSeek-V3 prints 11.5 B that are not shared with the main model; by its dimensions it is 11.61 B.

    Two norms, the 2h -> h projection, one MoE layer and the norm before the shared head:
    attention 187.107 M, 256 experts of 44.040 M, shared expert 44.040 M, router 1.835 M, projection 102.760 M, 5 norms of h.
    """
    h, expert = 7168, 3 * 7168 * 2048
    attention = h * 1536 + 1536 * 128 * 192 + h * 576 + 512 * 128 * 256 + 128 * 128 * h + 1536 + 512
    by_hand = attention + 257 * expert + 256 * h + 2 * h * h + 5 * h
    found = count(MODELS.load("deepseek-v3"), 4096).mtp_parameters
    assert found == by_hand
    assert found / 1e9 == pytest.approx(11.5, abs=0.15)
