"""Published runs: every complete row becomes a scenario or says why not, and the error table adds up."""

from __future__ import annotations

import math
import re
from collections import Counter

import pandas as pd
import pytest
from small import moe, scenario

from simulator.closed_forms import estimate
from simulator.errors import PlanError, Problem, ProfileError
from simulator.scenario.cluster import Accelerator, Host
from simulator.scenario.plan import EVERY_OTHER_PRODUCT, Plan
from simulator.scenario.profiles import ACCELERATORS
from simulator.simulate import simulate_step
from simulator.validation.published import measured_step_s, published_runs, scenario_from_row, step_s, validate
from simulator.validation.row import Row
from simulator.validation.row_cluster import _nic_bytes_per_s
from simulator.validation.row_layout import expand_layout
from simulator.validation.row_machines import MACHINES, known_machine
from simulator.validation.row_names import canonical, plain, usual_vocab, whole_heads
from simulator.validation.row_recompute import recompute_of
from simulator.validation.row_scripts import with_scripts
from simulator.workload.flop import count

#: complete rows that become a scenario, by source; none is skipped
CONVERTED = {
    "Aleph-Alpha parallelization layouts": 246,
    "BigScience BLOOM sweep": 54,
    "InternEvo 7B benchmark": 18,
    "Korthikanti et al. 2022 Table 5": 8,
    "MLPerf Training v3.1 gpt3": 4,
    "MLPerf Training v4.0 gpt3": 1,
    "MLPerf Training v4.1 gpt3": 4,
    "MLPerf Training v5.1 llama31_8b": 10,
    "Megatron-Bridge perf summary": 94,
    "Megatron-Core MoE report (2026)": 1,
    "Megatron-LM dev examples/moe_recipes": 12,
    "Megatron-LM examples/llama FP8": 2,
    "Megatron-MoE-ModelZoo": 4,
    "MosaicML llm-foundry benchmarking": 140,
    "NVIDIA dgxc-benchmarking": 187,
    "Narayanan et al. SC'21 Table 1": 10,
    "Narayanan et al. SC'21 Table 2": 6,
    "SimuMax B200 measured": 31,
    "gpu-tpu-pedia GB200 Qwen3-30B": 3,
    "gpu-tpu-pedia GB300 DeepSeek-V3": 6,
    "torchtitan benchmarks": 25,
    "vTrain ground truth (multi-node)": 69,
    "vTrain ground truth (single node)": 878,
}
#: why rows that are not complete are out of reach; the other 233 of 413 become scenarios
SKIPPED = {
    "non-standard architecture": 51,
    "fine-tuning, not pre-training": 24,
    "not printed: heads": 16,
    "not printed: tp": 20,
    "not printed: layers": 12,
    "not printed: gbs": 20,
    "not printed: gpus": 7,
    "no step time follows from tflops_per_gpu": 5,
    "no accelerator profile: TPU v6e (Trillium)": 5,
    "no accelerator profile: TPU v7 (Ironwood)": 4,
    "no accelerator profile: TPU-v5p": 4,
    "no accelerator profile: TPU-trillium": 3,
    "no accelerator profile: TPU v5p": 2,
    "no accelerator profile: Intel Gaudi2": 2,
    "no step time follows from mfu": 1,
    "no step time follows from gpu_hours_per_T_tokens": 1,
    "no accelerator profile: TPU v4": 1,
    "pipeline schedule not modelled: ZB-B": 1,
    "pipeline schedule not modelled: zero-bubble": 1,
}
PAPER = "mcoremoe-dsv3-gb200-mxfp8-4096"


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return published_runs()


@pytest.fixture(scope="module")
def everything(runs) -> pd.DataFrame:
    """Every row against a step of one second."""
    return validate(lambda scenario: 1.0, runs, complete_only=False)


def row(runs: pd.DataFrame, name: str) -> dict:
    return runs[runs["id"] == name].iloc[0].to_dict()


def test_data_is_whole(runs):
    assert runs.shape == (2226, 49)
    assert runs["file"].value_counts().to_dict() == {"training_runs.csv": 1348, "training_runs_vtrain_single.csv": 878}
    assert runs["complete"].value_counts().to_dict() == {"yes": 1813, "partial": 246, "no": 167}
    assert runs["id"].is_unique
    assert (runs["source"] != "").all()
    assert (runs["provenance"] != "").all()


def test_every_complete_row_converts_or_says_why(everything):
    complete = everything[everything["complete"] == "yes"]
    assert complete[complete["skipped"] == ""].groupby("source").size().to_dict() == CONVERTED
    assert complete[complete["skipped"] != ""].empty
    assert complete["measured_s"].between(0.01, 1000).all()


def test_incomplete_rows_convert_or_say_why(everything):
    rest = everything[everything["complete"] != "yes"]
    assert Counter(rest["skipped"][rest["skipped"] != ""]) == SKIPPED
    assert (rest["skipped"] == "").sum() == 233


def test_world_batch_and_layers_agree_with_the_row(runs):
    for published in runs[runs["complete"] == "yes"].to_dict("records"):
        scenario, _ = scenario_from_row(published)
        plan = scenario.plan
        assert plan.world == int(published["gpus"]) == scenario.cluster.accelerators, published["id"]
        assert plan.dp == int(published["dp"])
        assert scenario.job.global_batch % (plan.dp * plan.micro_batch) == 0
        assert scenario.job.steps == 1
        assert scenario.model.layers == int(published["layers"])
        assert scenario.model.arch == published["arch"]
        assert scenario.model.vocab % plan.tp == 0
        if plan.layout is None and plan.pp > 1:
            assert scenario.model.layers % (plan.pp * plan.vpp) == 0
        elif plan.layout not in (None, "balanced"):
            letters = [expand_layout(f"({stage})*1").replace("t*", "") for stage in plan.layout.split("|")]
            assert len(letters) == plan.pp * plan.vpp
            assert letters[0].startswith("E")
            assert letters[-1].endswith("L")


def test_a_moe_row_field_by_field(runs):
    scenario, assumptions = scenario_from_row(row(runs, PAPER))
    model, cluster, plan, job = scenario.model, scenario.cluster, scenario.plan, scenario.job
    assert (model.layers, model.hidden, model.ffn, model.heads, model.vocab) == (61, 7168, 18432, 128, 129280)
    assert (model.experts.count, model.experts.top_k, model.experts.ffn, model.experts.shared_ffn) == (256, 8, 2048, 2048)
    assert (model.experts.groups, model.experts.top_groups) == (8, 4)  # from the shipped model: no column says it
    assert model.moe_layers == (False,) * 3 + (True,) * 58
    assert (model.latent.q_rank, model.latent.kv_rank, model.head_dim, model.mtp_layers) == (1536, 512, 192, 1)
    assert (plan.tp, plan.pp, plan.vpp, plan.cp, plan.ep, plan.etp, plan.dp, plan.edp) == (1, 4, 4, 1, 64, 1, 64, 1)
    assert (plan.zero, plan.micro_batch, plan.schedule) == (1, 1, "interleaved")
    assert (plan.recompute, plan.recompute_modules, plan.dispatcher) == ("selective", ("mlp",), "hybridep")
    assert plan.layout == "Et*4|" + "t*4|" * 14 + "tmL"
    assert (plan.precision.gemm, plan.precision.parameters) == ("fp8", "bf16")
    assert (job.global_batch, job.sequence_length, job.routing, job.optimizer) == (8192, 4096, "balanced", "adam")
    assert (cluster.accelerator.name, cluster.accelerators, cluster.host.scale_up_domain) == ("gb200-186", 256, 64)
    assert cluster.host.nic_bytes_per_s == pytest.approx(50e9)
    assert measured_step_s(row(runs, PAPER)) == 32.605
    for said in (
        "inter-node fabric not printed: vendor reference design",
        "NVLink domain: 64 of its 72 GPUs used",
        "MTP layers not printed: 1",
    ):
        assert said in assumptions


def test_a_gpt_row_field_by_field(runs):
    scenario, assumptions = scenario_from_row(row(runs, "korth-530b-full"))
    model, plan = scenario.model, scenario.plan
    assert (model.layers, model.hidden, model.ffn, model.heads, model.kv_heads, model.head_dim) == (105, 20480, 81920, 128, 128, 160)
    assert not model.gated
    assert model.layer_norm
    assert model.mlp_bias
    assert model.tied_embeddings
    assert (model.positions, model.vocab, model.experts) == (2048, 51200, None)
    assert (plan.tp, plan.pp, plan.vpp, plan.dp, plan.zero, plan.layout) == (8, 35, 3, 1, 0, None)
    assert (plan.schedule, plan.recompute, plan.sequence_parallel) == ("interleaved", "full", False)
    assert (plan.precision.gemm, plan.precision.gradient_reduce) == ("fp16", "fp16")
    assert (scenario.cluster.accelerator.name, scenario.cluster.host.nic_bytes_per_s) == ("a100-sxm4-80", pytest.approx(25e9))
    assert not any("fabric" in a for a in assumptions)
    assert measured_step_s(row(runs, "korth-530b-full")) == 49.05  # its derived column is blank
    selective, _ = scenario_from_row(row(runs, "korth-22b-sel"))
    assert selective.plan.sequence_parallel
    assert (selective.plan.recompute, selective.plan.recompute_modules) == ("selective", ("core_attn",))


def test_a_bloom_row_field_by_field(runs):
    scenario, assumptions = scenario_from_row(row(runs, "bloom-738"))
    assert (scenario.model.hidden, scenario.model.head_dim, scenario.plan.pp, scenario.plan.micro_batch) == (13824, 216, 6, 4)
    assert scenario.cluster.host.nic_bytes_per_s == pytest.approx(4 * 100e9 / 8 / 8)
    assert not scenario.plan.overlap.grad_reduce
    assert not scenario.plan.sequence_parallel
    assert "network is not InfiniBand: latencies and efficiency of ib-hdr-rail" in assumptions


def test_an_fsdp_row_field_by_field(runs):
    scenario, assumptions = scenario_from_row(row(runs, "tt-70b-256-2d"))
    accelerator, plan = scenario.cluster.accelerator, scenario.plan
    assert (accelerator.hbm_bytes, accelerator.hbm_bytes_per_s, accelerator.tdp_w) == (96e9, 2.4e12, 500.0)
    assert scenario.cluster.fabric.name == "roce-400g"
    assert (plan.tp, plan.dp_shard, plan.zero, plan.micro_batch, plan.recompute) == (8, 32, 3, 16, "full")
    assert plan.precision.gemm == "fp8"
    assert scenario.model.gated
    assert "clock under 500 W: products slow with the cube root of the power" in assumptions
    full = ACCELERATORS.load("h100-sxm5-80")
    assert accelerator.peak_flop_per_s["fp8"] == pytest.approx(full.peak_flop_per_s["fp8"] * (5 / 7) ** (1 / 3), rel=1e-14)


def test_layers_that_columns_alone_describe(runs):
    maverick, _ = scenario_from_row(row(runs, "dgxc-v25.05.05-llama4maverick-gb200-bf16-256"))
    assert maverick.model.moe_layers == (False, True) * 24
    assert (maverick.model.ffn, maverick.model.experts.ffn, maverick.model.experts.shared_ffn) == (16384, 8192, 8192)
    truncated, _ = scenario_from_row(row(runs, "simumax-deepseekv2_tp1_ep8_pp1_dp8_l4_mbc4_cef"))
    assert truncated.model.moe_layers == (False, True, True, True)
    assert (truncated.model.latent.kv_rank, truncated.model.experts.shared_ffn) == (512, 3072)
    assert (truncated.plan.overlap.grad_reduce, truncated.plan.overlap.param_gather) == (False, False)
    windowed, _ = scenario_from_row(row(runs, "mbridge-26.08-gptoss120b-gb300-fp8_mx-64"))
    assert set(windowed.model.windows) == {128, None}
    proxy, _ = scenario_from_row(row(runs, "dsv3-gb300-gke-256-2048-ep32-4d"))
    assert proxy.plan.layout == "Et*4|" + "t*4|" * 14 + "tmL"
    scripted, _ = scenario_from_row(row(runs, "dgxc-v25.05.05-dsv3-h100-bf16-512"))
    assert scripted.plan.layout == "Et*7|" + "t*8|" * 6 + "t*6mL"


def test_shards_within_the_data_parallel_group(runs):
    grouped = runs[(runs["overlap_notes"] == "zero1 optimizer-shard group = 8") & (runs["gpus"] == "512")].iloc[0]
    plan = scenario_from_row(grouped)[0].plan
    assert (plan.dp_replicate, plan.dp_shard) == (64, 8)


def test_adapted_profiles_keep_one_source_per_number(runs):
    for name, kind in (("tt-70b-256-2d", "accelerator"), ("bloom-738", "host"), (PAPER, "host")):
        profile = getattr(scenario_from_row(row(runs, name))[0].cluster, kind)
        again = {"accelerator": Accelerator, "host": Host}[kind].model_validate(profile.model_dump(mode="json"))
        assert again == profile
    facts = {f["fact"]: f for f in profile.provenance()}
    assert facts["scale_up_domain"]["grade"] == "assumed"
    assert facts["accelerators"]["grade"] == "datasheet"


@pytest.mark.parametrize(
    ("text", "per_host", "gbit_per_s"),
    [
        ("4x200Gbps HDR InfiniBand = 800 Gbps per node (config inter_node_bandwidth)", 8, 100),
        ("8x200Gbps = 1600 Gbps RoCE per node (section title)", 8, 200),
        ("8x200 Gbps NICs per node, 3-layer CLOS (Tomahawk 4)", 8, 200),
        ("4x100Gb RoCE per node", 8, 50),
        ("InfiniBand 8x50 GB/s per node", 8, 400),
        ("400 Gb/s RDMA per GPU", 8, 400),
        ("8 rails CX-8 RoCE, 3200 Gbps per 4-GPU node (A4X Max)", 4, 800),
        ("8x400G CX7 IB NDR per node, multi-plane (8-plane) two-layer fat-tree", 8, 400),
        ("Storage: 2x ConnectX-7 IB NDR 400Gb/s, Compute: 8x ConnectX-7 IB NDR 400Gb/s, Management: 100Gb/s Ethernet NIC", 8, 400),
        ("4x ConnectX-8 IB XDR 800 Gb/s", 4, 800),
    ],
)
def test_nics_as_sources_write_them(text, per_host, gbit_per_s):
    assert _nic_bytes_per_s(text, per_host) == pytest.approx(gbit_per_s * 1e9 / 8)


@pytest.mark.parametrize("text", ["", "n/a (single node)", "100GbE InfiniBand", "InfiniBand; Data bandwidth for GPU-PCIe: 504 GB/s"])
def test_no_nic_where_none_is_printed(text):
    assert _nic_bytes_per_s(text, 8) is None


def test_layouts_lose_their_brackets():
    assert expand_layout("Et*4|(tttt|)*2tmL") == "Et*4|t*4|t*4|tmL"
    assert expand_layout("Et|(tt|)*3mL") == "Et|t*2|t*2|t*2|mL"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("none", ("none", ("core_attn",))),
        ("full (every layer)", ("full", ("core_attn",))),
        ("selective(layernorm,moe_act)", ("selective", ("layernorm", "moe_act"))),
        ("selective(default:core_attn)", ("selective", ("core_attn",))),
        ("selective (per-op SAC)", ("selective", EVERY_OTHER_PRODUCT)),
        ("full(block,num_layers=5)", ("full", ("core_attn",))),
        ("No", ("none", ("core_attn",))),
        ("yes", ("full", ("core_attn",))),
        ("activation checkpointing", ("full", ("core_attn",))),
        ("50%", ("full", ("core_attn",))),
        ("selective", ("selective", ("core_attn",))),
        ("selective: norm, mlp", ("selective", ("layernorm", "mlp"))),
        ("moe_act", ("selective", ("moe_act",))),
        ("something else", ("selective", ("layernorm",))),
    ],
)
def test_recompute_in_the_words_of_sources(runs, printed, expected):
    model = scenario_from_row(row(runs, "mbridge-25.11-llama3_8b-h100-fp8_cs-8"))[0].model
    assert recompute_of(Row({"recompute": printed, "pp": "1"}), model)[:2] == expected


@pytest.mark.parametrize(
    ("printed", "share"), [("1/2", 0.5), ("25 %", 0.25), ("full (block, 20 layers)", 20 / 32), ("full", 1.0), ("0%", 1.0), ("none", 1.0)]
)
def test_shares_of_layers_as_people_write_them(runs, printed, share):
    model = scenario_from_row(row(runs, "mbridge-25.11-llama3_8b-h100-fp8_cs-8"))[0].model
    assert recompute_of(Row({"recompute": printed, "pp": "1"}), model)[2] == share


@pytest.mark.parametrize(
    ("printed", "stands_for"),
    [
        ("H100", "H100-SXM-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("DGX B200", "B200"),
        ("GB200 NVL72", "GB200"),
        ("A100 40GB", "A100-SXM-40GB"),
        ("A100-SXM4-80GB", "A100-SXM-80GB"),
        ("H20", "H20-SXM-96GB"),
        ("h100-sxm5-80", "h100-sxm5-80"),
        ("H100-PCIe", ""),
        ("GH200", ""),
        ("V100-SXM-16GB", ""),
        ("TPU v5p", ""),
    ],
)
def test_accelerators_as_people_write_them(printed, stands_for):
    assert known_machine(printed) == stands_for


@pytest.mark.parametrize(
    "gpu", ["A800", "H20", "V100-SXM2-32GB", "L40S", "MI350X", "MI300X", "MI325X", "MI355X", "H200", "H800", "B300", "GB300"]
)
def test_every_named_accelerator_gives_a_step_time(runs, gpu):
    published = row(runs, "korth-530b-full") | {"gpu": gpu}
    scenario, said = scenario_from_row(published)
    assert any("accelerator printed as" in text for text in said) == (gpu not in MACHINES)
    # nothing trains 530 B faster than its peak, nor a hundred times slower
    work = count(scenario.model, scenario.job.sequence_length).flop_per_token_causal * scenario.job.tokens_per_step
    ideal = work / scenario.cluster.accelerators / max(scenario.cluster.accelerator.peak_flop_per_s.values())
    assert ideal < step_s(scenario) < 100 * ideal


def test_variants_keep_one_source_per_number_and_cut_links(runs):
    cut = scenario_from_row(row(runs, "korth-530b-full") | {"gpu": "A800"})[0].cluster
    whole = scenario_from_row(row(runs, "korth-530b-full"))[0].cluster
    assert cut.host.scale_up_bytes_per_s == pytest.approx(whole.host.scale_up_bytes_per_s * 2 / 3)
    assert cut.accelerator == whole.accelerator
    for profile in (cut.host, scenario_from_row(row(runs, "korth-530b-full") | {"gpu": "V100"})[0].cluster.accelerator):
        named = [fact for source in profile.sources for fact in source.facts]
        assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("printed", "schedule"), [("ZB-H1", "zb-1p"), ("ZB-H2", "zb-2p"), ("GPipe", "gpipe"), ("hanayo", "1f1b"), ("V-half", "v-half")]
)
def test_schedules_by_other_names(runs, printed, schedule):
    scenario, said = scenario_from_row(row(runs, "zb-1.5b-1f1b-64") | {"pp_schedule": printed, "vpp": ""})
    assert scenario.plan.schedule == schedule
    assert any(printed in text or "virtual stages" in text for text in said)


def test_a_schedule_that_cannot_be_is_said(runs):
    scenario, said = scenario_from_row(row(runs, "zoo-q235-h100-0") | {"pp_schedule": "GPipe"})  # with four model chunks on a rank
    assert scenario.plan.schedule == "interleaved"
    assert "not modelled: pipeline schedule 'GPipe' (taken as interleaved)" in said


@pytest.mark.parametrize(("printed", "gemm"), [("E4M3", "fp8"), ("w8a8", "fp8"), ("TF32", "bf16"), ("AMP", "bf16"), ("bfloat16", "bf16")])
def test_datatypes_by_other_names(runs, printed, gemm):
    scenario, said = scenario_from_row(row(runs, "tt-8b-h200-32") | {"precision": printed})
    assert scenario.plan.precision.gemm == gemm
    assert any(f"'{printed.lower()}'" in text for text in said) == (printed in ("TF32", "AMP"))


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("mbridge-25.11-llama3_8b-h100-fp8_cs-8", 5 / 32),  # full(block,num_layers=5)
        ("tt-a100-llama2_13b-selective", 0.5),  # selective (every 2nd layer)
        ("tt-a100-llama3_70b-full", 1.0),
    ],
)
def test_a_share_of_the_layers_is_computed_again(runs, name, share):
    plan = scenario_from_row(row(runs, name))[0].plan
    assert (plan.recompute, plan.recompute_share) == ("full", share)


def test_a_recipe_with_a_whole_iteration_as_a_graph_does_nothing_again(runs):
    graph = row(runs, "dsv3-gb300-gke-256-4096-ep32-4d")
    assert graph["recompute"] == "selective(default:core_attn)"
    scenario, said = scenario_from_row(graph)
    assert scenario.plan.recompute == "none"
    assert "not modelled: copies into and out of the pages of stashed activations (their room is)" in said


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("dgxc-v25.05.05-dsv3-gb200-bf16-256", "unfused"),  # cuDNN before 9.11
        ("dgxc-v25.05.05-dsv3-h100-bf16-512", "flash"),
        ("dgxc-v25.05.05-llama4maverick-gb200-bf16-256", "flash"),
        ("mbridge-26.06-qwen3_30b-gb300-fp8_mx-8", "flash_fp8"),
        ("mbridge-26.04-qwen3_30b-gb300-fp8_mx-8", "flash"),
        ("mbridge-26.06-gptoss120b-gb300-fp8_mx-64", "flash_fp8"),
        ("mbridge-26.04-gptoss120b-gb300-bf16-64", "flash"),
    ],
)
def test_attention_that_only_the_recipe_tells(runs, name, attention):
    assert scenario_from_row(row(runs, name))[0].plan.kernels.attention == attention


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("dsv3-gb300-gke-256-4096-ep32-4d", "fp8"),
        ("mbridge-26.06-gptoss120b-gb300-fp8_mx-64", "fp8"),
        ("mbridge-26.06-qwen3_30b-gb300-fp8_mx-8", "bf16"),
        ("mbridge-26.04.01-dsv3-b200-fp8_mx-256", "bf16"),  # before the option
    ],
)
def test_output_projection_that_only_the_recipe_tells(runs, name, head):
    assert scenario_from_row(row(runs, name))[0].plan.precision.head == head


@pytest.mark.parametrize(("name", "rotary"), [("dgxc-v25.05.05-dsv3-h100-bf16-512", "eager"), (PAPER, "fused")])
def test_latent_rotary_embedding_of_a_release(runs, name, rotary):
    assert scenario_from_row(row(runs, name))[0].plan.kernels.latent_rotary == rotary


def test_products_of_experts_and_keys_as_their_sources_have_them(runs):
    kernels = scenario_from_row(row(runs, "dgxc-v25.02.02-grok1-h100-bf16-8"))[0].plan.kernels
    assert kernels.experts == "sequential"
    assert scenario_from_row(row(runs, "llama3-t4-16384-131072"))[0].plan.context_parallel == "all_gather"
    assert scenario_from_row(row(runs, "simumax-llama3_70b_l12_tp2_cp4_pp1_dp1_seq32768_mbc4_cef"))[0].plan.context_parallel == "all_to_all"


def test_blanks_are_blank_however_they_were_read(runs):
    published = row(runs, PAPER)
    numbers = {k: (float("nan") if v == "" else float(v) if v.isdigit() else v) for k, v in published.items()}
    assert scenario_from_row(numbers) == scenario_from_row(published)


def test_a_tuning_knob_that_is_not_printed_is_assumed_by_name(runs):
    scenario, assumptions = scenario_from_row(row(runs, PAPER) | {"mbs": "", "zero_stage": "", "etp": ""})
    assert (scenario.plan.micro_batch, scenario.plan.zero, scenario.plan.etp) == (1, 1, 1)
    assert {"micro-batch not printed: 1", "ZeRO stage not printed: 1", "expert tensor parallelism not printed: 1"} <= set(assumptions)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "TPU v4"}, "no accelerator profile: TPU v4"),
        ({"gpu": ""}, "no accelerator profile: not printed"),
        ({"gpus": ""}, "not printed: gpus"),
        ({"model": "Nemotron-H 56B (hybrid Mamba-2/attention)"}, "non-standard architecture"),
        ({"dp": "32"}, "degrees do not multiply to the accelerators"),
        ({"pp_schedule": "V-half"}, "pipeline schedule not modelled: V-half"),
        ({"ep": "48"}, "ep x etp does not divide dp x cp x tp"),
        ({"overlap_notes": "pp_layout=Et|(tt|)*30mL"}, "printed layout contradicts the model or the stages"),
        ({"hidden": "wide"}, "hidden is not a whole number"),
        ({"topk": "300"}, "top_k = 300 exceeds 256 experts"),
    ],
)
def test_rows_out_of_reach_say_why(runs, changes, reason):
    with pytest.raises(ProfileError, match=reason.replace("(", r"\(")):
        scenario_from_row(row(runs, PAPER) | changes)


@pytest.mark.parametrize(
    ("cells", "seconds"),
    [
        ({"step_time_s_derived": "2.5", "metric": "mfu", "value": "0.5"}, 2.5),
        ({"metric": "step_time_s", "value": "3"}, 3.0),
        ({"metric": "tokens_per_s_per_gpu", "value": "1000", "gbs": "32", "seq_len": "2000", "gpus": "8"}, 8.0),
    ],
)
def test_measured_step(cells, seconds):
    assert measured_step_s(cells) == pytest.approx(seconds)


def test_a_printed_rate_is_a_step_by_the_sources_count_of_flop(runs):
    published = row(runs, "llama3-t4-8192-8192")
    scenario, _ = scenario_from_row(published)
    counted = count(scenario.model, 8192)
    # all keys: the convention that the paper cites
    assert measured_step_s(published, scenario) == pytest.approx(counted.flop_per_token_noncausal * 2048 * 8192 / 8192 / 430e12)
    ladder = row(runs, "dsv3-gb200-ladder-13")
    scenario, _ = scenario_from_row(ladder)
    assert measured_step_s(ladder, scenario) == pytest.approx(249.7e9 * 4096 * 2048 / 256 / 970.01e12, rel=0.005)  # without MTP
    with pytest.raises(ProfileError, match="no step time follows from tflops_per_gpu"):
        measured_step_s(ladder)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fold-3-mixtral8x22b-tp+ep+dp-128-4096-bf16", {"etp": 4, "vpp": 1, "micro_batch": 1}),
        ("fold-3-mixtral8x22b-mcore+folding-128-4096-bf16", {"etp": 1, "vpp": 7, "schedule": "interleaved"}),
        ("zoo-q235-h100-16384-fb", {"recompute_modules": ("layernorm", "moe"), "micro_batch": 1}),
        ("mbridge-25.11-dsv3-gb300-bf16-256", {"dispatcher": "hybridep", "recompute_modules": ("mla_up_proj",)}),
        ("mbridge-26.02.01-llama3_70b-gb300-fp8_mx-64", {"vpp": 5}),
        ("mbridge-25.09-dsv3-gb200-fp8_mx-256", {"ep": 32, "recompute_modules": ("mla_up_proj",)}),
        ("jaxtb-175b-h100-tebf16", {"recompute": "full", "recompute_share": 1.0}),
    ],
)
def test_scripts_fill_in_what_their_tables_leave_out(runs, name, found):
    scenario, said = scenario_from_row(row(runs, name))
    assert {field: getattr(scenario.plan, field) for field in found} == found
    assert any("not printed" in text and re.search("recipe|Megatron|folded|paxml", text) for text in said)


def test_scripts_never_change_what_is_printed(runs):
    published = row(runs, "fold-3-mixtral8x22b-tp+ep+dp-128-4096-bf16")
    filled = with_scripts(Row(published | {"etp": "1", "mbs": "2"}))
    assert (filled.text("etp"), filled.text("mbs")) == ("1", "2")
    assert with_scripts(Row(row(runs, "bloom-738"))).assumptions == []


def test_utilisation_of_hardware_and_model_say_how_much_is_computed_again(runs):
    scenario, said = scenario_from_row(row(runs, "fms-13b-h100"))  # 0.46 of the hardware, 0.43 of the model
    assert (scenario.plan.recompute, scenario.plan.recompute_share) == ("full", pytest.approx(3 * (0.46 / 0.43 - 1)))
    assert any("21 % of the layers" in text for text in said)
    assert scenario_from_row(row(runs, "fms-70b-a100"))[0].plan.recompute_share == 1.0  # 0.74 over 0.55: more than a third
    without = row(runs, "fms-13b-h100") | {"other_metrics": "mfu=0.43"}
    assert scenario_from_row(without)[0].plan.recompute == "selective"


def test_submissions_that_name_no_datatype_train_in_8_bits(runs):
    scenario, said = scenario_from_row(row(runs, "mlperf-v5.1-llama31_8b-supermicro-as-8126gs-nb3rt"))
    assert scenario.plan.precision.gemm == "fp8"
    assert any(text.startswith("precision not printed: FP8") for text in said)


def test_experts_with_a_capacity_run_from_graphs_of_whole_layers(runs):
    scenario, said = scenario_from_row(row(runs, "mbridge-25.09-qwen3_235b-gb200-fp8_cs-64"))
    assert scenario.plan.kernels.graphs == ("attn", "moe", "mlp")
    assert any("cuda_graphs" in text for text in said)


def test_words_take_the_mtp_layer_away(runs):
    scenario, said = scenario_from_row(row(runs, "mbridge-25.11-dsv3-gb200-fp8_mx-256"))
    assert scenario.model.mtp_layers == 0
    assert scenario.plan.layout.startswith("Et|t*2|")
    assert scenario.plan.layout.endswith("|t*2|L")
    assert scenario.plan.layout.count("t*2") == 30
    assert not any("MTP layers" in text for text in said)
    assert scenario_from_row(row(runs, "mbridge-25.11-dsv3-b200-fp8_mx-256"))[0].model.mtp_layers == 1


def test_expert_all_to_all_beside_compute_is_a_schedule_of_pairs(runs):
    piped, _ = scenario_from_row(row(runs, "mbridge-26.04.01-dsv3-b200-fp8_mx-256"))
    assert piped.plan.schedule == "interleaved-overlapped"
    assert not piped.plan.overlap.queued
    assert scenario_from_row(row(runs, "zoo-q235-h100-1"))[0].plan.overlap.queued  # Hopper's products hold every multiprocessor
    alone, said = scenario_from_row(row(runs, "mlm-recipe-qwen3_235b-gb200-mxfp8-128"))
    assert alone.plan.table.split()[:3] == ["0F0", "0F1+0B0", "0F2+0B1"]
    assert len(alone.plan.table.split()) == alone.job.global_batch // alone.plan.dp + 1
    assert not any("beside compute" in text for text in said)


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("mbridge-26.06-llama31_405b-h100-fp8_cs-1024", "pieces"),
        ("mbridge-26.06-llama31_405b-gb300-nvfp4-256", True),
        ("dgxc-v25.05.05-nemotron4_340b-h100-bf16-256", "pieces"),
        ("dgxc-v24.11.1-nemotron4_340b-h100-bf16-256", "pieces"),  # printed: none; its launch script overrides that
        ("dgxc-v25.04.02-llama3_8b-h100-fp8-128", True),  # one rank: nothing to gather
        ("mlm-llama-fp8-405b", "pieces"),
    ],
)
def test_tensor_parallel_overlap_as_recipes_set_it(runs, name, tp):
    scenario, assumptions = scenario_from_row(row(runs, name))
    assert scenario.plan.overlap.tp == tp
    assert any("in pieces" in text for text in assumptions) == (tp == "pieces")


def test_layers_and_rows_as_scaling_shares_them_out(runs):
    """A table of 128,000 x 8,192 weighs as much as 1.3 layers: 8 stages cannot do with less than 11 layers in one, 4 with less than 21."""
    scenario, assumptions = scenario_from_row(row(runs, "aa-131657"))
    assert scenario.plan.layout == "Et*9|t*11|t*11|t*11|t*11|t*11|t*11|t*5L"
    assert scenario.plan.overlap.tp == "kept"
    assert any("balanced by parameters" in text for text in assumptions)
    assert scenario_from_row(row(runs, "aa-131648"))[0].plan.layout == "Et*19|t*21|t*21|t*19L"
    assert scenario_from_row(row(runs, "aa-131694"))[0].plan.layout == "Et*20|t*20L"
    assert scenario_from_row(row(runs, "aa-131813"))[0].plan.overlap.tp is False  # the same without sequence parallelism


def test_omni_path_as_fast_as_its_users_measured(runs):
    """40.55 Gbit/s through one of a host's four adapters, which serve eight accelerators; elsewhere the share of InfiniBand."""
    (bloom, assumptions), (other, _) = (scenario_from_row(row(runs, name)) for name in ("bloom-947", "sc21-t1-18.4b"))
    assert bloom.cluster.host.nic_bytes_per_s * bloom.cluster.fabric.efficiency == pytest.approx(40.55e9 / 8 * 4 / 8, rel=1e-12)
    assert other.cluster.fabric.efficiency == pytest.approx(0.895)
    assert any("Omni-Path" in text for text in assumptions)


def test_messages_between_stages_wait_and_split_as_software_does(runs):
    """Megatron without virtual stages waits for them, with them only before 2023; MegaScale and zero-bubble schedules send aside."""
    waits = {
        "bloom-947": True,
        "sc21-t1-145.6b": True,
        "megascale-megatron-lm-768-256": True,
        "zb-1.5b-1f1b-24": True,
        "zb-1.5b-zb-1p-24": False,
        "mbridge-26.04.01-qwen3_235b-b200-fp8_mx-256": True,
        "mbridge-26.06-llama31_405b-gb300-fp8_mx-256": False,
    }
    plans = {name: scenario_from_row(row(runs, name))[0].plan for name in waits}
    assert {name: not plan.overlap.pp for name, plan in plans.items()} == waits
    split = {name for name, plan in plans.items() if plan.framework.splits_messages and not plan.sequence_parallel}
    assert split == {"bloom-947", "sc21-t1-145.6b"}


def test_one_nvlink_domain_holds_a_job_that_fits(runs):
    small, _ = scenario_from_row(row(runs, "mbridge-26.02-gptoss120b-gb200-bf16-64"))
    assert small.cluster.host.scale_up_domain == 64
    large, said = scenario_from_row(row(runs, "mlm-recipe-qwen3_235b-gb200-mxfp8-128"))
    assert large.cluster.host.scale_up_domain == 64
    assert "NVLink domain: 64 of its 72 GPUs used" in said


def test_dualpipe_runs_both_ways(runs):
    scenario, said = scenario_from_row(row(runs, "dsv3-isca-mpft"))
    assert (scenario.plan.schedule, scenario.plan.vpp, scenario.plan.stages) == ("dualpipe", 2, 16)
    assert any("both directions" in text for text in said)
    assert (scenario.plan.dispatcher, scenario.job.routing) == ("deepep", "natural")
    assert step_s(scenario) > estimate(scenario)  # uneven experts are simulated


def test_chunks_that_only_words_tell(runs):
    megascale, said = scenario_from_row(row(runs, "megascale-megatron-lm-768-256"))
    assert megascale.plan.vpp == 6
    assert "virtual stages recalled, not printed: 6" in said
    llama, said = scenario_from_row(row(runs, "llama3-t4-8192-8192"))
    assert (llama.plan.schedule, llama.plan.vpp, llama.plan.zero) == ("interleaved", 8, 1)
    assert (llama.plan.layout or "").split("|") == ["E", *["t"] * 126, "L"]
    assert any(words.startswith("virtual stages: a layer each") for words in said)
    every, _ = scenario_from_row(row(runs, "zb-1.5b-1f1b-i-24"))
    assert every.plan.vpp == 3


@pytest.mark.parametrize(
    "cells", [{"metric": "mfu", "value": "0.4"}, {"metric": "step_time_s", "value": "fast"}, {"metric": "step_time_s", "value": "-1"}]
)
def test_no_measured_step(cells):
    with pytest.raises(ProfileError):
        measured_step_s(cells)


def test_derived_steps_agree_with_the_printed_throughput(runs):
    printed = runs[(runs["metric"] == "tokens_per_s_per_gpu") & (runs["complete"] == "yes")]
    for published in printed.to_dict("records"):
        again = measured_step_s(published | {"step_time_s_derived": ""})
        assert measured_step_s(published) == pytest.approx(again, rel=0.005), published["id"]


def test_bad_rows_never_stop_the_run(runs):
    some = runs[runs["id"].isin([PAPER, "korth-530b-full", "bloom-738", "tt-70b-256-2d"])].copy()
    some.loc[some["id"] == "bloom-738", "gpu"] = "abacus"
    calls: list[tuple[int, int]] = []

    def predict(scenario):
        if scenario.model.arch == "moe":
            raise PlanError([Problem("memory", "needs 90 GB of 80 GB", "raise tp")])
        if scenario.plan.zero == 3:
            return 1 / 0
        return 98.1

    table = validate(predict, some, progress=lambda done, total: calls.append((done, total)))
    by_id = table.set_index("id")
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert by_id["skipped"][PAPER] == "memory: needs 90 GB of 80 GB; raise tp"
    assert by_id["skipped"]["bloom-738"] == "no accelerator profile: abacus"
    assert by_id["skipped"]["tt-70b-256-2d"].startswith("ZeroDivisionError")
    assert by_id["skipped"]["korth-530b-full"] == ""
    assert by_id["relative_error"]["korth-530b-full"] == pytest.approx(98.1 / 49.05 - 1)
    assert math.isnan(by_id["relative_error"][PAPER])
    assert by_id["accelerator"]["bloom-738"] == "abacus"
    assert validate(lambda s: math.inf, some)["skipped"].ne("").all()


@pytest.mark.parametrize(("vpp", "schedule", "zero"), [(2, "interleaved", 1), (1, "1f1b", 2)])
def test_a_long_step_of_uneven_experts_is_that_of_its_simulation(vpp, schedule, zero):
    plan = Plan(pp=2, vpp=vpp, schedule=schedule, ep=2, zero=zero)
    long = scenario(moe(layers=8, leading=0), 4, plan, micro_batches=20, routing="natural")
    assert step_s(long) == pytest.approx(simulate_step(long).step_time_s, rel=1e-12)


@pytest.mark.parametrize(
    ("written", "usual"),
    [
        ("deepseek-ai/DeepSeek-V3", "DeepSeek-V3"),
        ("DeepSeek V3 671B", "DeepSeek-V3 671B"),
        ("Qwen3 235B A22B", "Qwen3-235B-A22B"),
        ("qwen3_30b_a3b", "Qwen3-30B-A3B"),
        ("openai/gpt-oss-120b", "GPT-OSS 120B"),
        ("Kimi K2", "Kimi-K2"),
        ("Meta-Llama-3-70B", "Llama-3 70B"),
        ("llama3.1-405b", "Llama-3.1 405B"),
        ("nemotron4-340b", "Nemotron-4 340B"),
        ("mixtral_8x22b", "Mixtral 8x22B"),
        ("gpt3 175b", "GPT-3 175B"),
        ("GPT 310.1B", "GPT 310.1B"),
        ("Mixtral-8x22B-G8T8 (fine-grained)", "Mixtral-8x22B-G8T8 (fine-grained)"),
        ("mistralai/mixtral-8x22b-g8t8", "Mixtral-8x22B-G8T8"),
        ("mistralai/Mixtral-8x22B-v0.1", "Mixtral 8x22B-v0.1"),
        ("Llama/13B", "Llama/13B"),
        ("GPT-MoE/1.3T", "GPT-MoE/1.3T"),
        ("lab/8x7B", "lab/8x7B"),
    ],
)
def test_models_by_other_names(written, usual):
    assert canonical(written) == usual


def test_published_names_are_the_usual_ones(runs):
    assert [name for name in runs["model"].unique() if canonical(name) != name] == []


@pytest.mark.parametrize("written", ["deepseek-v3", "deepseek-ai/DeepSeek-V3", "DeepSeek V3"])
def test_a_model_by_another_name_is_the_same_scenario(runs, written):
    """With its latent attention, which no column holds; only its name and that it was another differ."""
    printed = row(runs, "mbridge-26.04.01-dsv3-b200-fp8_mx-256")
    usual, said = scenario_from_row(printed)
    other, more = scenario_from_row(printed | {"model": written})
    assert other == usual
    assert set(more) - set(said) == {f"model printed as {written}: DeepSeek-V3"}


@pytest.mark.parametrize("printed", ["NVFP4", "mxfp4", "4-bit", "W4A4"])
def test_four_bits_by_other_names(runs, printed):
    scenario, _ = scenario_from_row(row(runs, "mbridge-26.04.01-llama3_70b-gb300-nvfp4-64") | {"precision": printed})
    assert scenario.plan.precision.gemm == "fp4"


@pytest.mark.parametrize(
    ("printed", "gemm", "aside"),
    [
        ("bf16; 4-bit Adam", "bf16", "4-bit adam"),
        ("bf16, 8-bit optimizer states", "bf16", "8-bit optimizer states"),
        ("bf16 (Adam in 8-bit)", "bf16", "adam in 8-bit"),
        ("fp8 with 4-bit optimizer states", "fp8", "4-bit optimizer states"),
        ("FP8 4-bit moments", "fp8", "4-bit moments"),
        ("bf16 and fp8 moments", "bf16", "fp8 moments"),
        ("bf16, 64-bit sums", "bf16", None),
        ("bf16; 128-bit loads", "bf16", None),
        ("8-bit, fp32 master weights", "fp8", None),
        ("optimised FP8", "fp8", None),
    ],
)
def test_bits_of_the_optimizer_are_not_those_of_products(runs, printed, gemm, aside):
    """And what is left aside is told."""
    scenario, said = scenario_from_row(row(runs, "mbridge-26.04.01-llama3_70b-gb300-nvfp4-64") | {"precision": printed})
    assert scenario.plan.precision.gemm == gemm
    told = [text for text in said if "states of the optimizer" in text]
    assert told == ([f"not modelled: '{aside}' (states of the optimizer as without it)"] if aside else [])


def test_moments_in_bf16_may_stand_beside_the_precision(runs):
    scenario, said = scenario_from_row(row(runs, "mbridge-26.04.01-llama3_70b-gb300-nvfp4-64") | {"precision": "FP8; bf16 moments"})
    assert (scenario.plan.precision.gemm, scenario.plan.precision.moments) == ("fp8", "bf16")
    assert "states of the optimizer" not in "; ".join(said)


def test_names_that_tell_dimensions_tell_those_that_are_printed(runs):
    """Of every published row: the width of heads and key-value heads, and for models of one vocabulary this, too."""
    told = 0
    for cells in runs[runs["heads"] != ""].to_dict("records"):
        if whole_heads(cells["model"]):
            assert int(cells["head_dim"]) == int(cells["hidden"]) // int(cells["heads"]), cells["id"]
            told += 1
        if plain(cells["model"]):
            assert cells["kv_heads"] == cells["heads"], cells["id"]
        if cells["model"].startswith(("DeepSeek", "Qwen3", "Mixtral-", "Llama-2", "Llama-4", "MPT", "Nemotron-4")):
            assert usual_vocab(cells["model"]) in (int(cells["vocab"] or 0), None), cells["id"]
    assert told > 1000


@pytest.mark.parametrize(
    "name", ["Foo 7B", "Gemma-3 27B", "Qwen3-32B", "gpt-oss-20b", "GPT-OSS 20B", "GPT-oss 20B", "Llama-3.1-Minitron-4B"]
)
def test_names_that_tell_no_width_of_heads(name):
    assert not whole_heads(canonical(name))
    assert not plain(canonical(name))


@pytest.mark.parametrize(
    ("name", "vocab"),
    [
        ("gpt-oss-20b", None),
        ("DeepSeek-V2", None),
        ("deepseek-v3", 129280),
        ("Qwen3-32B", 151936),
        ("Qwen3.5-397B-A17B", None),
        ("LLaMA-4 Maverick", None),
        ("LLaMA 7B", 32000),
        ("LLaMA 33B", 32000),
        ("GPT-3 175B", 51200),
    ],
)
def test_vocabularies_by_name(name, vocab):
    assert usual_vocab(canonical(name)) == vocab


@pytest.mark.parametrize(
    ("name", "unsaid"),
    [
        ("dgxc-v24.11.1-llama2_70b-h100-bf16-512", {"recompute": "", "overlap_notes": ""}),
        ("dgxc-v24.11.1-gpt3_175b-h100-fp8-512-2", {"recompute": "", "overlap_notes": ""}),
        ("dgxc-v24.11.1-pax5b-h100-bf16-16", {"recompute": "", "overlap_notes": ""}),
        ("dgxc-v25.04.02-llama3_70b-h100-fp8-512-2", {"recompute": "", "overlap_notes": "", "mbs": ""}),
        ("dgxc-v25.04.02-nemotron4_340b-h100-bf16-256", {"vpp": ""}),
        ("zoo-q235-gb200-131072-mxfp8", {"recompute": ""}),
        ("zoo-q235-gb200-4096-bf16", {"recompute": "", "overlap_notes": "dispatcher=HybridEP; A2A_OVERLAP=0"}),
        (
            "dsv3-gb200-ladder-06",
            {
                "recompute": "selective(mlp)",
                "overlap_notes": "dispatcher=DeepEP; cumulative step 6: CUDA Graphs",
                "notes": "ablation ladder",
            },
        ),
    ],
)
def test_rows_as_their_tables_print_them_are_read_with_their_scripts(runs, name, unsaid):
    """Where the shipped row has what a script says filled in, the same comes of the row as printed."""
    shipped = row(runs, name)
    filled, printed = (scenario_from_row(cells)[0] for cells in (shipped, shipped | unsaid))
    assert (printed.plan, printed.model.layers, printed.model.mtp_layers) == (filled.plan, filled.model.layers, filled.model.mtp_layers)
