"""Plan -> Megatron-LM flags -> plan: the identity for what Megatron-LM can say, and a refusal that names what it cannot."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import cluster, dense, job, moe

from simulator.errors import PlanError
from simulator.formats.launch import SOFTWARE
from simulator.formats.megatron import plan_from_megatron
from simulator.formats.megatron_write import megatron_command, megatron_flags
from simulator.scenario.overlap import Overlap
from simulator.scenario.placement import ORDER, PIPELINE_INSIDE, Placement
from simulator.scenario.plan import Plan, Precision
from simulator.scenario.profiles import MODELS
from simulator.scenario.scenario import Scenario

MODULES = ("core_attn", "layernorm", "moe_act", "mla_up_proj", "mlp", "moe")
LAYERS = 24


@st.composite
def sayable(draw: st.DrawFn) -> Plan:
    """Draw a plan that Megatron-LM can say."""

    def one(*choices):
        return draw(st.sampled_from(choices))

    pp = one(1, 2, 4, 8)
    vpp = one(1, 2, 3) if pp > 1 else 1
    half = one("bf16", "bf16", "fp16")
    gradients = one("fp32", half)
    recompute = one("none", "selective", "full")
    modules = tuple(draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))) if recompute == "selective" else ("core_attn",)
    precision = Precision(
        parameters=half, dispatch=half, combine=half, gradients=gradients, gradient_reduce=gradients, gemm=one(half, "fp8", "fp4"),
        master=one("fp32", "fp16"), moments=one("fp32", "bf16", "fp16", "fp8"),
    )  # fmt: skip
    split = one(True, False)
    return Plan(
        tp=one(1, 2, 4, 8), cp=one(1, 2, 4), pp=pp, vpp=vpp, ep=one(1, 2, 8), etp=one(1, 2), dp_replicate=one(1, 2), dp_shard=one(1, 4, 16),
        zero=one(0, 1, 2, 3), micro_batch=one(1, 2, 4), schedule=one("interleaved", "interleaved-overlapped") if vpp > 1 else "1f1b",
        layout=one(None, "balanced", letters(pp * vpp)), recompute=recompute, recompute_modules=modules, precision=precision,
        sequence_parallel=split, dispatcher=one("alltoall", "deepep", "hybridep"),
        overlap=Overlap(
            grad_reduce=one(True, False), param_gather=one(True, False), pp=one(True, False), tp=one(True, *["pieces"] * split)
        ),
        placement=Placement(order=one(ORDER, PIPELINE_INSIDE)),
    )  # fmt: skip


def letters(stages: int) -> str:
    more = LAYERS % stages
    rows = ["t" * (LAYERS // stages + (stage < more)) for stage in range(stages)]
    return "|".join(["E" + rows[0], *rows[1:]]) + "L"


def question(plan: Plan, model=None) -> Scenario:
    return Scenario(model=model or moe(LAYERS), cluster=cluster(16), plan=plan, job=job(64))


@settings(max_examples=1000)
@given(sayable())
def test_there_and_back_is_the_same_plan(plan):
    scenario = question(plan)
    flags = megatron_flags(scenario)
    assert f"--expert-tensor-parallel-size {plan.etp}" in flags
    launch = plan_from_megatron(" ".join(flags))
    back = launch.plan.model_copy(update={"dp_shard": plan.dp_shard})
    layout = plan.layout if plan.layout != "balanced" else back.layout
    assert back == plan.model_copy(update={"layout": layout} | {name: getattr(back, name) for name in SOFTWARE})
    assert launch.job == {
        "global_batch": 64, "sequence_length": 512, "tokens": scenario.job.tokens, "optimizer": "adam", "routing": "balanced"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "term"),
    [
        ({"schedule": "zb-v", "vpp": 2}, "schedule: zb-v"),
        ({"schedule": "dualpipe", "vpp": 2}, "schedule: dualpipe"),
        ({"schedule": "gpipe"}, "schedule: gpipe"),
        ({"schedule": "interleaved", "vpp": 2, "pp": 1}, "vpp: 2 on one pipeline rank"),
        ({"recompute": "selective", "recompute_modules": ["mlp_act"]}, "recompute_modules: mlp_act"),
        ({"precision": {"activations": "fp8"}}, "precision.activations: fp8"),
        ({"precision": {"dispatch": "fp8"}}, "precision.dispatch: fp8"),
        ({"precision": {"gemm": "fp8", "head": "fp8"}}, "precision.head: fp8"),
        ({"precision": {"gradients": "fp32", "gradient_reduce": "bf16"}}, "precision.gradient_reduce: bf16"),
        ({"precision": {"master": None}}, "precision.master: null"),
        ({"overlap": {"tp": False}}, "overlap.tp: False"),
        ({"overlap": {"multiprocessors": 0.3}}, "overlap.multiprocessors: 0.3"),
        ({"context_parallel": "all_to_all"}, "context_parallel: all_to_all"),
        ({"context_parallel": "all_gather"}, "context_parallel: all_gather"),
        ({"placement": {"order": "pp-dp-ep-cp-tp"}}, "placement.order: pp-dp-ep-cp-tp"),
    ],
)
def test_what_megatron_cannot_say_is_named(change, term):
    plan = Plan.model_validate({"pp": 2, "dp_shard": 8} | change)
    with pytest.raises(PlanError) as caught:
        megatron_flags(question(plan))
    assert [p.numbers for p in caught.value.problems] == [f"Megatron-LM cannot say {term}"]
    assert all(p.remedy for p in caught.value.problems)


def test_the_remedy_of_a_narrow_head_can_be_said():
    plan = Plan.model_validate({"pp": 2, "dp_shard": 8, "precision": {"gemm": "fp8", "head": "fp8"}})
    with pytest.raises(PlanError, match="use head: bf16; .* --fp8-output-proj"):
        megatron_flags(question(plan))
    mended = plan.model_copy(update={"precision": plan.precision.model_copy(update={"head": "bf16"})})
    assert "--fp8-format hybrid" in megatron_flags(question(mended))


def test_the_whole_line_starts_every_host_and_says_the_model():
    scenario = Scenario(
        model="deepseek-v3",
        cluster="h100-rail-10240",
        job={"tokens": 10**12, "global_batch": 10240, "sequence_length": 4096},
        plan={"tp": 2, "pp": 16, "ep": 64, "layout": "balanced", "dispatcher": "deepep"},
    )
    line = megatron_command(scenario)
    launch = plan_from_megatron(line)
    assert launch.accelerators == 10240
    assert launch.plan.layout.count("t") == 61
    assert launch.plan.layout.count("m") == 1
    words = shlex.split(line.replace("\\\n", " "))
    said = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    assert said["--moe-layer-freq"] == "([0]*3+[1]*58)"
    assert said["--num-experts"] == "256"
    assert said["--moe-shared-expert-intermediate-size"] == "2048"
    assert said["--q-lora-rank"] == "1536"
    assert not [w for w in launch.warnings if "unknown" in w]


@pytest.mark.parametrize("name", [name for name in MODELS.names() if name != "gpt-oss-120b"])
def test_shipped_models_are_said(name):
    flags = megatron_flags(question(Plan(dp_shard=16), MODELS.load(name)))
    assert not [w for w in plan_from_megatron(" ".join(flags)).warnings if "unknown" in w]


def test_a_model_with_details_that_are_not_written_is_refused():
    scenario = question(Plan(dp_shard=16), MODELS.load("gpt-oss-120b"))
    with pytest.raises(PlanError, match=r"model\.sinks; take the model's flags from its recipe"):
        megatron_flags(scenario)
    assert megatron_flags(scenario, dimensions=False)


def test_a_dense_model_has_no_router():
    flags = megatron_flags(question(Plan(dp_shard=16), dense()))
    assert not [f for f in flags if "router" in f or "num-experts" in f]
