"""Why a plan cannot run: every rule by name, with its numbers, and a remedy that holds when it is applied."""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any

import pytest
import small
import yaml

from simulator import feasibility
from simulator.errors import PlanError, Problem
from simulator.feasibility import check, memory, minimum_accelerators, structure
from simulator.placing import fewest_bytes
from simulator.scenario.job import Job
from simulator.scenario.model import Experts, Model
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import ACCELERATORS
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step
from simulator.units import parse_quantity, readable
from simulator.workload.memory import PARTS

GENTLE = {"tp": 2, "pp": 2, "ep": 4}


def question(plan: dict[str, Any], model: Model | None = None, accelerators: int = 32, **job: Any) -> Scenario:
    """Return a question about 32 accelerators in hosts of 4; legal with the plan GENTLE, where dp is 8."""
    return Scenario(model=model or small.moe(), cluster=small.cluster(accelerators), plan=Plan(**plan), job=small.job(**job))


def experts(**changes: Any) -> Model:
    return small.moe(experts=Experts(**({"count": 8, "top_k": 2, "ffn": 256, "shared_ffn": 256} | changes)))


def with_job(s: Scenario, **changes: Any) -> Scenario:
    return s.model_copy(update={"job": small.job(**(s.job.model_dump(exclude={"tokens"}) | changes))})


def rules(s: Scenario) -> list[str]:
    return [problem.rule for problem in check(s)]


#: what is asked -> the one problem it has
CASES: dict[str, tuple[Scenario, Problem]] = {
    "dp does not fill the cluster": (
        question({"tp": 2, "pp": 2, "dp_shard": 5}, global_batch=80),
        Problem(
            "degrees multiply to the accelerators",
            "tp 2 * cp 1 * pp 2 * dp 5 = 20, the cluster has 32",
            "use dp_shard: 8, or leave it out",
        ),
    ),
    "degrees do not divide the cluster": (
        question({"tp": 2, "pp": 3}, small.moe(layers=9)),
        Problem(
            "degrees multiply to the accelerators",
            "tp 2 * cp 1 * pp 3 * dp 5 = 30, the cluster has 32",
            "make tp * cp * pp * dp_replicate = 6 a divisor of 32, such as 4 or 8, or use 24 accelerators",
        ),
    ),
    "degrees exceed the cluster": (
        question({"tp": 8, "pp": 8}),
        Problem(
            "degrees multiply to the accelerators",
            "tp 8 * cp 1 * pp 8 * dp 1 = 64, the cluster has 32",
            "make tp * cp * pp * dp_replicate = 64 a divisor of 32, such as 32",
        ),
    ),
    "ep does not divide the ranks of a stage": (
        question({"tp": 2, "pp": 2, "ep": 3}, experts(count=6), global_batch=48),
        Problem(
            "etp * ep divides dp * cp * tp",
            "etp 1 * ep 3 = 3 does not divide dp * cp * tp = 16",
            "use ep of 1, 2, or a multiple of 12 accelerators",
        ),
    ),
    "etp does not divide the ranks of a stage": (
        question({"tp": 2, "pp": 2, "etp": 3}, experts(ffn=192)),
        Problem(
            "etp * ep divides dp * cp * tp",
            "etp 3 * ep 1 = 3 does not divide dp * cp * tp = 16",
            "use etp of 1, 2, or a multiple of 12 accelerators",
        ),
    ),
    "a replica is too small for the experts": (
        question({"tp": 2, "pp": 2, "ep": 8, "dp_replicate": 4}),
        Problem(
            "etp * ep divides one replica",
            "etp * ep = 8 does not divide dp_shard * cp * tp = 4",
            "use dp_replicate of 1, 2 and leave dp_shard out",
        ),
    ),
    "heads": (
        question({"tp": 16, "pp": 2, "ep": 4}),
        Problem("heads divide by tp", "8 heads do not divide by tp = 16", "use tp of 1, 2, 4, 8"),
    ),
    "key-value heads": (
        question({"tp": 6, "pp": 2}, small.dense(heads=12, kv_heads=4, ffn=1536), 24, sequence_length=768, global_batch=24),
        Problem("key-value heads divide by tp, or tp by them", "4 key-value heads and tp = 6", "use tp of 1, 2, 4, 12"),
    ),
    "width of the MLP": (
        question({"tp": 8, "pp": 2}, small.dense(ffn=1028)),
        Problem("MLP width divides by tp", "ffn = 1028 does not divide by tp = 8", "use tp of 1, 2, 4"),
    ),
    "a dense model on expert axes": (
        question({"tp": 2, "pp": 2, "ep": 2}, small.dense()),
        Problem("expert axes need experts", "dense is dense, the plan has ep = 2, etp = 1", "use ep: 1 and etp: 1"),
    ),
    "experts": (
        question({"tp": 2, "pp": 2, "ep": 16}),
        Problem("experts divide by ep", "ep = 16 does not divide 8 experts", "use ep of 1, 2, 4, 8"),
    ),
    "width of an expert": (
        question({"tp": 2, "pp": 2, "etp": 4}, experts(ffn=250)),
        Problem("expert width divides by etp", "etp = 4 does not divide the expert width 250", "use etp of 1, 2"),
    ),
    "whole sequences into experts": (
        question(GENTLE | {"sequence_parallel": False}),
        Problem(
            "experts with tp need sequence parallelism",
            "tp = 2 with sequence_parallel: false would send every token 2 times",
            "use sequence_parallel: true",
        ),
    ),
    "more than all tokens on one rank": (
        question(GENTLE, routing="natural", expert_load=5.0),
        Problem("expert load is at most ep", "expert_load = 5.0, ep = 4", "use expert_load of at most 4"),
    ),
    "slots of experts": (
        question(GENTLE).model_copy(update={"routing": Routing(distribution="zipf", exponent=1.0, redundant_experts=3)}),
        Problem(
            "expert slots divide by ep",
            "8 experts + 3 redundant ones = 11 slots do not divide over ep = 4",
            "use redundant_experts: 4",
        ),
    ),
    "batch": (
        question(GENTLE, global_batch=20),
        Problem(
            "batch divides by dp * micro-batch",
            "global_batch = 20 does not divide by dp 8 * micro_batch 1 = 8",
            "use a global_batch of 16 or 24, or another dp",
        ),
    ),
    "batch smaller than dp": (
        question(GENTLE | {"micro_batch": 2}, global_batch=3),
        Problem(
            "batch divides by dp * micro-batch",
            "global_batch = 3 does not divide by dp 8 * micro_batch 2 = 16",
            "use a global_batch of 16, or another dp",
        ),
    ),
    "batch of an interleaved schedule": (
        question(GENTLE | {"vpp": 2, "schedule": "interleaved"}, global_batch=20),
        Problem(
            "batch divides by dp * micro-batch",
            "global_batch = 20 does not divide by dp 8 * micro_batch 1 = 8",
            "use a global_batch of 16 or 32, or another dp",
        ),
    ),
    "a deadlock": (
        question({"pp": 2, "schedule": "table", "table": "0F0 0B0 0F1 0B1\n0F1 0B1 0F0 0B0"}, global_batch=32),
        Problem(
            "the schedule ends",
            "schedule table deadlocks: rank 0 with 0B0 (entry 1); rank 1 with 0F1 (entry 0); what each waits for must come earlier\n"
            "rank 0: 0F0 0B0 0F1 0B1\nrank 1: 0F1 0B1 0F0 0B0",
            "move what each rank waits for to an earlier place",
        ),
    ),
    "rounds of an interleaved schedule": (
        question({"pp": 4, "ep": 4, "vpp": 2, "schedule": "interleaved"}, global_batch=72),
        Problem(
            "micro-batches divide into rounds",
            "interleaved schedule: 9 micro-batches do not divide into 2 rounds of pp = 4",
            "use a global_batch of 64 or 96, or schedule: 1f1b with vpp: 1",
        ),
    ),
    "sequence": (
        question(GENTLE | {"cp": 2}, sequence_length=500),
        Problem(
            "sequence divides by cp and tp",
            "sequence_length = 500 does not divide into 8 parts (2 cp * tp: balanced ring attention and sequence parallelism)",
            "use a sequence_length of 496 or 504",
        ),
    ),
    "layers": (
        question(GENTLE, small.moe(layers=9)),
        Problem(
            "layers divide by pp * vpp",
            "9 layers do not divide by pp * vpp = 2",
            "use pp * vpp of 1, 3, 9, or layout: balanced",
        ),
    ),
    "more stages than layers": (
        question({"pp": 16}),
        Problem("layers fill pp * vpp", "8 layers cannot fill pp * vpp = 16 stages", "use pp * vpp of at most 8"),
    ),
    "more stages than layers, balanced": (
        question({"pp": 16, "layout": "balanced"}),
        Problem("layers fill pp * vpp", "8 layers cannot fill pp * vpp = 16 stages", "use pp * vpp of at most 8"),
    ),
    "letters of a layout": (
        question(GENTLE | {"layout": "Et*4|t*4x"}),
        Problem("pipeline layout", "layout 'Et*4|t*4x': 'x' is not understood", "use the letters EtmL, e.g. Et*3|t*4|tmL"),
    ),
    "layers of a layout": (
        question(GENTLE | {"layout": "Et*4|t*3mL"}),
        Problem(
            "pipeline layout",
            "layout 'Et*4|t*3mL' has 7 t instead of 8, 1 m instead of 0",
            "write E once, t 8 times, m 0 times (mtp_layers of moe), L once",
        ),
    ),
    "stages of a layout": (
        question(GENTLE | {"layout": "Et*4|t*2|t*2L"}),
        Problem(
            "pipeline layout",
            "layout 'Et*4|t*2|t*2L' has 3 stages for pp * vpp = 2",
            "write 2 stages, or use pp * vpp = 3",
        ),
    ),
    "order of a layout": (
        question(GENTLE | {"layout": "t*4E|t*4L"}),
        Problem("pipeline layout", "layout 't*4E|t*4L' is out of order", "write E first, then t, then m, then L"),
    ),
    "hosts beyond the cluster": (
        question(GENTLE | {"placement": {"hosts": [0, 1, 2, 3, 4, 5, 6, 9]}, "dp_shard": 8}),
        Problem("what a placement names is there", "placement names host 9, the cluster has 0 to 7", "name one of those"),
    ),
    "no host left": (
        question({"placement": {"spare_hosts": 8}}),
        Problem("hosts are left", "spare_hosts = 8, the cluster has 8 hosts", "use spare_hosts of at most 7"),
    ),
    "a placement still to be chosen": (
        question({"tp": 2, "placement": {"order": "fewest-bytes"}}),
        Problem("the placement is decided", "order fewest-bytes asks for the best one", "call simulator.fewest_bytes(scenario) first"),
    ),
    "dp inside cp": (
        question({"cp": 2, "placement": {"order": "tp-ep-dp-cp-pp"}}),
        Problem("dp follows cp", "order tp-ep-dp-cp-pp with cp = 2 and dp = 16", "use tp-cp-ep-dp-pp or tp-cp-ep-pp-dp"),
    ),
    "replicas inside": (
        question({"tp": 2, "dp_replicate": 2, "placement": {"order": "cp-dp-tp-ep-pp"}}),
        Problem("replicas are outermost", "order cp-dp-tp-ep-pp with dp_replicate = 2", "put dp behind tp, cp and ep"),
    ),
    "meshes with stages of their own": (
        question({"tp": 2, "pp": 2, "placement": {"order": "tp-cp-ep-pp-dp"}}),
        Problem(
            "attention and expert mesh have the same stages",
            "order tp-cp-ep-pp-dp puts 2 attention and 1 expert ranks inside pp",
            "use tp-cp-ep-dp-pp, or degrees whose products before pp agree",
        ),
    ),
    "datatype": (
        question(GENTLE | {"precision": {"gemm": "fp4"}}),
        Problem(
            "the accelerator computes in the datatype",
            "precision.gemm = fp4, h100-sxm5-80 has fp32, bf16, fp16, fp8",
            "use fp32 or bf16 or fp16 or fp8",
        ),
    ),
    "datatype of the head": (
        question(GENTLE | {"precision": {"head": "fp4"}}),
        Problem(
            "the accelerator computes in the datatype",
            "precision.head = fp4, h100-sxm5-80 has fp32, bf16, fp16, fp8",
            "use fp32 or bf16 or fp16 or fp8",
        ),
    ),
}

#: the remedies that are not lists of degrees, batches or lengths, applied
APPLIED = {
    "a placement still to be chosen": lambda s: [fewest_bytes(s)],
    "dp does not fill the cluster": lambda s: [s.with_plan(dp_shard=8), s.with_plan(dp_shard=None)],
    "degrees do not divide the cluster": lambda s: [
        question({"tp": 2, "pp": 3}, s.model, 24),
        *(s.with_plan(tp=t, pp=p, layout="balanced") for t, p in [(2, 2), (2, 4)]),
    ],
    "degrees exceed the cluster": lambda s: [s.with_plan(tp=4)],
    "ep does not divide the ranks of a stage": lambda s: [question(s.plan.model_dump() | {"dp_shard": None}, s.model, 24, global_batch=48)],
    "a dense model on expert axes": lambda s: [s.with_plan(ep=1, etp=1)],
    "whole sequences into experts": lambda s: [s.with_plan(sequence_parallel=True)],
    "more than all tokens on one rank": lambda s: [with_job(s, expert_load=4.0)],
    "rounds of an interleaved schedule": lambda s: [s.with_plan(schedule="1f1b", vpp=1)],
    "a deadlock": lambda s: [s.with_plan(table="0F0 0B0 0F1 0B1\n0F0 0B0 0F1 0B1")],
    "layers": lambda s: [s.with_plan(layout="balanced"), s.with_plan(pp=1)],
    "more stages than layers": lambda s: [s.with_plan(pp=8)],
    "more stages than layers, balanced": lambda s: [s.with_plan(pp=8)],
    "letters of a layout": lambda s: [s.with_plan(layout="Et*4|t*4L")],
    "layers of a layout": lambda s: [s.with_plan(layout="Et*4|t*4L")],
    "stages of a layout": lambda s: [s.with_plan(layout="Et*4|t*4L")],
    "order of a layout": lambda s: [s.with_plan(layout="Et*4|t*4L")],
    "hosts beyond the cluster": lambda s: [s.with_plan(placement={"hosts": [0, 1, 2, 3, 4, 5, 6, 7]})],
    "no host left": lambda s: [s.with_plan(placement={"spare_hosts": 7}), s.with_plan(placement={"spare_hosts": 4})],
    "dp inside cp": lambda s: [s.with_plan(placement={"order": order}) for order in ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")],
    "replicas inside": lambda s: [s.with_plan(placement={"order": "tp-cp-ep-dp-pp"})],
    "meshes with stages of their own": lambda s: [s.with_plan(placement={"order": "tp-cp-ep-dp-pp"}), s.with_plan(etp=2)],
    "slots of experts": lambda s: [s.model_copy(update={"routing": s.routing.model_copy(update={"redundant_experts": 4})})],
    "datatype": lambda s: [s.with_plan(precision={"gemm": dtype}) for dtype in ("fp32", "bf16", "fp16", "fp8")],
    "datatype of the head": lambda s: [s.with_plan(precision={"head": dtype}) for dtype in ("fp32", "bf16", "fp16", "fp8")],
}


def listed(s: Scenario, remedy: str) -> list[Scenario]:
    """Return `s` with each value of ``use KEY of 1, 2`` and ``use a KEY of 1 or 2``."""
    changed = []
    for key, values in re.findall(r"use (?:a )?(\w+) of ((?:\d+(?:, (?=\d)| or (?=\d))?)+)", remedy):
        for value in map(int, re.findall(r"\d+", values)):
            if key in Plan.model_fields:
                changed.append(s.with_plan(**{key: value}))
            elif key in Job.model_fields:
                changed.append(with_job(s, **{key: value}))
    return changed


def test_the_gentle_plan_is_legal():
    assert check(question(GENTLE)) == []


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_says_its_name_the_numbers_and_the_remedy(name):
    asked, problem = CASES[name]
    assert check(asked) == [problem]


def test_a_narrow_head_needs_hardware_for_it_and_16_bits_mean_either_kind():
    asked = question(GENTLE | {"precision": {"head": "fp8"}})
    a100 = ACCELERATORS.load("a100-sxm4-80")
    older = asked.model_copy(update={"cluster": asked.cluster.model_copy(update={"accelerator": a100})})
    assert [p.numbers for p in check(older)] == ["precision.head = fp8, a100-sxm4-80 has fp32, bf16, fp16"]
    halves = a100.model_copy(update={"peak_flop_per_s": {d: a100.peak_flop_per_s[d] for d in ("fp32", "fp16")}})
    oldest = older.model_copy(update={"cluster": older.cluster.model_copy(update={"accelerator": halves})})
    assert check(oldest.with_plan(precision={"gemm": "fp16"})) == []


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_makes_it_legal(name):
    asked, problem = CASES[name]
    mended = listed(asked, problem.remedy) + (APPLIED[name](asked) if name in APPLIED else [])
    assert mended
    for other in mended:
        assert other != asked
        assert check(other) == [], other.plan


def test_every_rule_has_a_case():
    calls = (node for node in ast.walk(ast.parse(inspect.getsource(feasibility))) if isinstance(node, ast.Call))
    written = {call.args[0].value for call in calls if getattr(call.func, "id", "") == "Problem"}
    assert len(written) > 10
    assert written - {"the model fits in memory"} <= {problem.rule for _, problem in CASES.values()}


def test_all_problems_come_at_once():
    asked = question(
        {"tp": 16, "pp": 2, "ep": 16, "etp": 3, "sequence_parallel": False, "precision": {"gemm": "fp4"}, "dp_shard": 5},
        small.moe(layers=9, ffn=1000),
        global_batch=7,
        routing="natural",
        expert_load=17.0,
    )
    assert rules(asked) == [
        "degrees multiply to the accelerators",
        "etp * ep divides dp * cp * tp",
        "heads divide by tp",
        "MLP width divides by tp",
        "experts divide by ep",
        "expert width divides by etp",
        "experts with tp need sequence parallelism",
        "expert load is at most ep",
        "batch divides by dp * micro-batch",
        "layers divide by pp * vpp",
        "the accelerator computes in the datatype",
    ]


def test_a_dp_that_is_only_what_is_left_over_adds_no_problems_of_its_own():
    asked = question({"tp": 2, "pp": 3, "ep": 8}, small.moe(layers=9), global_batch=16)
    assert asked.plan.dp == 5  # 32 accelerators over tp * pp = 6
    assert rules(asked) == ["degrees multiply to the accelerators"]


def test_the_degrees_named_are_the_nearest_even_when_they_are_far():
    (far,) = check(question({"pp": 7}, small.moe(layers=7), 4 * 4093))
    assert (
        far.remedy == f"make tp * cp * pp * dp_replicate = 7 a divisor of 16372, such as 4 or 4093, or use {16372 // 28 * 28} accelerators"
    )


def test_a_batch_of_any_size_is_checked_at_once():
    assert check(question({"tp": 2, "pp": 2, "schedule": "gpipe", "recompute": "full"}, global_batch=8 * 10**5))[0].rule == (
        "the model fits in memory"
    )
    assert rules(question({"pp": 4, "vpp": 2, "schedule": "interleaved"}, global_batch=8 * 10**5 + 8)) == [
        "micro-batches divide into rounds"
    ]


def test_what_cannot_run_is_not_simulated():
    asked, problem = CASES["experts"]
    with pytest.raises(PlanError) as caught:
        simulate_step(asked)
    assert caught.value.problems == [problem]
    assert str(caught.value) == "experts divide by ep: ep = 16 does not divide 8 experts; use ep of 1, 2, 4, 8"


@pytest.mark.parametrize(
    ("degrees", "least"),
    [
        ({"tp": 8, "pp": 16, "ep": 64}, 16 * 64),
        ({"tp": 8, "pp": 16, "ep": 4}, 16 * 8),
        ({"tp": 2, "cp": 4, "pp": 3, "ep": 8, "etp": 2}, 3 * 16),
        ({"tp": 3, "ep": 4}, 12),
        ({"tp": 10**9, "ep": 10**9 + 1}, 10**9 * (10**9 + 1)),
    ],
)
def test_fewest_accelerators(degrees, least):
    assert minimum_accelerators(Plan(**degrees)) == least


# --- memory ---

LLAMA = {
    "model": "llama-3-8b",
    "cluster": "h100-single-host",
    "job": {"tokens": 10**9, "global_batch": 64, "sequence_length": 8192},
    "plan": {"zero": 0},
}
DEEPSEEK = {
    "model": "deepseek-v3",
    "cluster": "deepseek-2048-h800",
    "job": {"tokens": 10**12, "global_batch": 15360, "sequence_length": 4096},
    "plan": {"pp": 8, "ep": 64, "layout": "balanced", "recompute": "selective", "recompute_modules": ["layernorm", "moe_act"]},
}
LLAMA_405 = {
    "model": "llama-3-405b",
    "cluster": {"base": "meta-24k-h100", "accelerators": 1024},
    "job": {"tokens": 10**12, "global_batch": 1024, "sequence_length": 8192},
    "plan": {"tp": 8, "pp": 7},
}
TOO_BIG = [
    LLAMA,
    DEEPSEEK,
    DEEPSEEK | {"plan": DEEPSEEK["plan"] | {"ep": 8}},
    LLAMA_405 | {"plan": {"tp": 8, "pp": 2}},
    LLAMA_405 | {"plan": {"tp": 4, "pp": 2, "vpp": 3, "schedule": "interleaved", "micro_batch": 2, "recompute": "full"}},
]


@pytest.mark.parametrize("data", TOO_BIG, ids=range(len(TOO_BIG)))
def test_a_model_that_does_not_fit_says_by_how_much_and_where(data):
    asked = Scenario.model_validate(data)
    (problem,) = check(asked)
    assert problem.rule == "the model fits in memory"
    need, capacity = memory(asked)["total"], asked.cluster.accelerator.hbm_bytes
    worst = int(need.argmax())
    found = re.fullmatch(r"stage (\d+) needs (.*), (.*) has (.*): (.*) too much \((.*)\)", problem.numbers)
    assert found is not None, problem.numbers
    assert found.groups()[:5] == (
        str(worst),
        readable(need[worst], "bytes"),
        asked.cluster.accelerator.name,
        readable(capacity, "bytes"),
        readable(need[worst] - capacity, "bytes"),
    )
    parts = dict(part.split(" ", 1) for part in found[6].split(", "))
    assert set(parts) == set(PARTS)
    assert sum(parse_quantity(size, "bytes") for size in parts.values()) == pytest.approx(need[worst], rel=1e-2)


@pytest.mark.parametrize("data", TOO_BIG, ids=range(len(TOO_BIG)))
def test_every_memory_remedy_fits_when_it_is_written_into_the_file(data):
    (problem,) = check(Scenario.model_validate(data))
    if not problem.remedy.startswith("fits with "):
        pytest.skip(problem.remedy)
    remedies = problem.remedy.removeprefix("fits with ").split("; or ")
    assert 1 <= len(remedies) <= 4
    for remedy in remedies:
        words, size = re.fullmatch(r"(.*) \((.*)\)", remedy).groups()
        changes = yaml.safe_load("{" + words + "}")
        mended = Scenario.model_validate(data | {"plan": data["plan"] | changes})
        assert check(mended) == [], remedy
        assert readable(memory(mended)["total"].max(), "bytes") == size


def test_the_memory_remedies_are_not_all_skipped():
    texts = [check(Scenario.model_validate(data))[0].remedy for data in TOO_BIG]
    assert sum(text.startswith("fits with ") for text in texts) >= 4


def test_when_nothing_fits_the_nearest_is_named():
    asked = Scenario.model_validate(DEEPSEEK | {"cluster": {"base": "deepseek-2048-h800", "accelerators": 64}, "plan": {"ep": 64}})
    (problem,) = check(asked)
    found = re.fullmatch(r"no single change fits; (.*) comes nearest with (.*): use more accelerators per replica", problem.remedy)
    assert found is not None, problem.remedy
    nearest = asked.with_plan(**yaml.safe_load("{" + found[1] + "}"))
    assert structure(nearest) == []
    assert readable(memory(nearest)["total"].max(), "bytes") == found[2]
    assert asked.cluster.accelerator.hbm_bytes < memory(nearest)["total"].max() < memory(asked)["total"].max()
