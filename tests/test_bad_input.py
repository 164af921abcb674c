"""Whatever is written into a scenario, it is a scenario or it is refused with a text; nothing else is ever raised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from simulator.errors import PlanError, Problem, ProfileError, SimulatorError
from simulator.feasibility import check
from simulator.formats.launch import Launch
from simulator.formats.megatron import plan_from_megatron
from simulator.formats.megatron_flags import READ
from simulator.planning.search import search
from simulator.scenario.cluster import Cluster, Tier
from simulator.scenario.job import Job
from simulator.scenario.model import Experts, Model
from simulator.scenario.plan import Plan, Precision
from simulator.scenario.profiles import CLUSTERS, MODELS, read_yaml
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

CONFIG = {
    "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "model_type": "deepseek_v3",
    "layer_types": ["full_attention"] * 4, "sliding_window": None, "max_position_embeddings": 4096, "moe_layer_freq": 1,
    "kv_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "mlp_only_layers": [],
    "tie_word_embeddings": False, "text_config": None, "ffn_config": None,
}  # fmt: skip
JOB = {
    "tokens": 10**9, "global_batch": 64, "sequence_length": 128, "optimizer": "adam", "routing": "natural", "expert_load": 1.2,
}  # fmt: skip
PLAN = Plan(tp=2, pp=2, ep=2, recompute_modules=("core_attn",)).model_dump(mode="json")
#: a table for every way to write a scenario: everything inline, by base and changes, by name
BASES = [
    {"model": CONFIG, "cluster": small.H100.model_dump(mode="json") | {"name": "small", "accelerators": 64}, "plan": PLAN, "job": JOB},
    {
        "model": {"base": "kimi-k2", "vocab": 1000, "experts": {"top_k": 4}},
        "cluster": {
            "base": "h100-rail-10240", "accelerators": 64, "host": {"nic_bytes_per_s": "200 Gb/s"}, "fabric": "roce-400g",
            "slow_hosts": {1: 1.5},
        },
        "plan": PLAN | {"layout": "balanced"},
        "job": JOB,
    },
    {
        "model": MODELS.load("deepseek-v3").model_dump(mode="json"),
        "cluster": "gb200-nvl72-10368",
        "plan": PLAN | {"vpp": 2, "schedule": "interleaved", "layout": "balanced", "pp": 4},
        "job": JOB | {"global_batch": 20736},
    },
]  # fmt: skip
NUMBERS = [0, -1, 1, 2, 3, 7, 64, 1000, 10**6, 10**29, 10**400, -(2**70), 1.5, 3.0, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "", "x", "8", "1e3", "nan", "\0", "a" * 5000, "400 Gb/s", "400 GB/s", "inf GB", "-3 GB", "1e999 GB", "80 GB", "5 us", "kimi-k2",
    "h100-rail-10240", "dgx-h100", "balanced", "Et*4L", "Et*99999999999L", "(t*999|)*999", "interleaved", "gpipe", "full", "fp8", "fp4",
    "sparse", "natural",
]  # fmt: skip
TABLES = [
    {}, {"base": "kimi-k2"}, {"base": None}, {"base": []}, {"base": {"base": "kimi-k2"}}, {1: 2}, {None: 1}, {"a": {"b": 1}},
    {"num_experts": 4}, {"gemm": "fp8"}, {"context": 3},
]  # fmt: skip
LISTS = [[], [1], ["a", 2], [None] * 4, ["sparse"] * 4, [0, 1], ["core_attn", "moe"], (1, 2), {3}, [[]], [{}]]
VALUES = [None, True, False, b"bytes", *NUMBERS, *TEXTS, *TABLES, *LISTS]
KEYS = ["x", "tp", "base", "name", "sources", "hidden", "expert_foo", "num_experts", "layers", "zero", "", 5, None, (1, 2)]


def places(table: Any, at: tuple = ()) -> list[tuple]:
    """Return the path of every entry inside `table`."""
    entries = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [place for key, value in entries for place in ((*at, key), *places(value, (*at, key)))]


def inner(table: Any, place: tuple) -> Any:
    for key in place:
        table = table[key]
    return table


@st.composite
def mutated(draw: st.DrawFn) -> dict:
    """Draw a scenario's table with one to three entries replaced, removed, added, or overwritten by another entry."""
    table = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.sampled_from(["model", "cluster", "plan", "job", None]))
        open_places = [p for p in places(table) if part in (None, p[0])]
        if not open_places:
            continue
        place = draw(st.sampled_from(open_places))
        parent = inner(table, place[:-1])
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "copy"])):
            case "replace":
                parent[place[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "remove":
                del parent[place[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "copy":
                parent[place[-1]] = copy.deepcopy(inner(table, draw(st.sampled_from(places(table)))))
    return table


def sound(problems: list[Problem]) -> bool:
    return all(isinstance(p, Problem) and p.rule and p.numbers and p.remedy for p in problems)


def test_the_tables_that_are_mutated_are_valid():
    for table in BASES:
        Scenario.model_validate(table)


@settings(max_examples=600, deadline=None)
@given(mutated())
def test_any_table_is_a_scenario_or_refused(table):
    try:
        scenario = Scenario.model_validate(table)
    except SimulatorError as error:
        assert str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert sound(check(scenario))


@settings(max_examples=150, deadline=None)
@given(table=mutated())
def test_any_file_is_a_scenario_or_refused(tmp_path_factory, table):
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    try:
        file.write_text(yaml.safe_dump(table), encoding="utf-8")
    except yaml.YAMLError:
        return  # YAML has no tuples
    try:
        scenario = Scenario.load(file)
    except ProfileError as error:
        assert str(error).startswith(str(file))  # noqa: PT017
    else:
        assert sound(check(scenario))


degree = st.sampled_from([1, 1, 1, 2, 3, 4, 8, 16, 64, 1000, 10**6])
plans = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("tp", "cp", "pp", "ep", "etp", "dp_replicate", "dp_shard", "micro_batch"), degree),
        "zero": st.integers(0, 3),
        "schedule": st.sampled_from(["gpipe", "1f1b"]),
        "layout": st.sampled_from(["balanced", "Et*4L", "Et|t|t|tL", "EL|", "||", "(t|)*3", "Et*999L", "Ett|ttmL"]),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "sequence_parallel": st.booleans(),
        "precision": st.fixed_dictionaries({"gemm": st.sampled_from(["fp32", "bf16", "fp8", "fp4"])}),
    },
)
jobs = st.fixed_dictionaries(
    {"tokens": st.just(10**30)},
    optional={
        "global_batch": st.sampled_from([1, 3, 64, 77, 10**5]),
        "sequence_length": st.sampled_from([1, 100, 4096]),
        "expert_load": st.sampled_from([1.0, 1.5, 3.0, 1000.0]),
        "optimizer": st.sampled_from(["adam", "sgd", "muon"]),
    },
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(BASES), plans, jobs, st.booleans())
def test_every_plan_and_job_is_checked_without_an_exception(base, plan, job, interleaved):
    plan = {**base["plan"], "schedule": "1f1b", "vpp": 1, **plan, **({"schedule": "interleaved", "vpp": 2} if interleaved else {})}
    scenario = Scenario.model_validate(base | {"plan": plan, "job": base["job"] | job})
    problems = check(scenario)
    assert sound(problems)
    assert len({p.rule for p in problems}) == len(problems)


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_are_refused_as_a_file(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    with pytest.raises(ProfileError, match=r"any\.yaml"):
        Scenario.load(file)


@settings(max_examples=150, deadline=None)
@given(table=st.dictionaries(st.sampled_from(sorted(CONFIG)), st.sampled_from(VALUES), max_size=4))
def test_any_configuration_is_a_model_or_refused(tmp_path_factory, table):
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_text(json.dumps(CONFIG | table, default=str, skipkeys=True), encoding="utf-8")
    try:
        assert isinstance(MODELS.load(file), Model)
    except ProfileError as error:
        assert str(error)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*READ, "nonsense"]), st.sampled_from(["", "0", "2", "-1", "x", "$TP", "8", "'", "t|t*9L"]))))
def test_any_megatron_line_is_a_plan_or_refused(flags):
    line = " ".join(f"--{flag} {value}" for flag, value in flags)
    try:
        assert isinstance(plan_from_megatron(line), Launch)
    except PlanError as error:
        assert sound(error.problems)  # noqa: PT017
    except ProfileError as error:
        assert str(error).startswith("Megatron line: ")  # noqa: PT017


# --- from Python: our errors, not pydantic's ---


def test_calling_a_class_names_every_key_in_full():
    with pytest.raises(ProfileError) as caught:
        Scenario(
            model={**CONFIG},
            cluster="h100-rail-10240",
            plan={"tp": 0, "shedule": "1f1b", "precision": {"gemm": "int8"}, "zero": 5},
            job={"tokens": 1, "global_batch": "many"},
        )
    assert str(caught.value) == (
        "plan.tp: must be greater than 0; found 0; plan.zero: must be 0, 1, 2 or 3; found 5; "
        "plan.precision.gemm: must be 'fp32', 'bf16', 'fp16', 'fp8' or 'fp4'; found 'int8'; "
        "plan.shedule: unknown key; did you mean schedule?; "
        "job.global_batch: 'many' is not a count; write a whole number such as 20480 or 15.5e12; job.sequence_length: missing"
    )
    assert not isinstance(caught.value, ValidationError)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Plan(tp=0), "tp: must be greater than 0; found 0"),
        (lambda: Plan(tp=1.5), "tp: must be a whole number; found 1.5"),
        (lambda: Plan(tp="two"), "tp: must be a whole number; found 'two'"),
        (lambda: Plan(sequence_parallel="maybe"), "sequence_parallel: must be true or false; found 'maybe'"),
        (lambda: Plan(precision=8), "precision: must be a table of 'key: value'; found 8"),
        (lambda: Plan(recompute_modules="core_attn"), "recompute_modules: must be a list; found 'core_attn'"),
        (lambda: Plan(schedule="1f1bb"), "schedule: must be 'gpipe', '1f1b', 'interleaved', "),
        (lambda: Plan(reserve={"fragmentation": 1}), "reserve.fragmentation: must be less than 1; found 1"),
        (lambda: Plan(reserve={"fragmentation": float("nan")}), "reserve.fragmentation: must be a finite number; found nan"),
        (lambda: Plan(reserve={"context": 1}), "reserve.context: 1 has no unit; write a number with a unit, such as 80 GB"),
        (lambda: Plan(vpp=2), "schedule = 1f1b with vpp = 2 model chunks per rank; write vpp: 1, or schedule: inter"),
        (lambda: Plan.model_validate([]), "must be a table of 'key: value'; found []"),
        (lambda: Plan.model_validate({"tpp": 2}), "tpp: unknown key; did you mean tp or pp or vpp?"),
        (lambda: Precision(gemm="x" * 200), "gemm: must be 'fp32', 'bf16', 'fp16', 'fp8' or 'fp4'; found '" + "x" * 76 + "..."),
        (lambda: Job(tokens=-5, global_batch=1, sequence_length=1), "tokens: must be greater than 0; found -5"),
        (
            lambda: Job(tokens=10, global_batch=1, sequence_length=1, routing="natural", expert_load=float("inf")),
            "expert_load: must be a finite number; found inf",
        ),
        (lambda: Job(), "tokens: missing; global_batch: missing; sequence_length: missing"),
        (lambda: Experts(count=8, top_k=9, ffn=1), "top_k = 9 exceeds 8 experts"),
        (lambda: Experts(count=8, top_k=1, ffn=1, groups=0), "groups: must be greater than 0; found 0"),
        (lambda: Tier(name="leaf", accelerators=8, latency_s=3), "latency_s: 3 has no unit; write a number with a unit, such as 3.5 us"),
        (
            lambda: CLUSTERS.resolve({"base": "h100-rail-10240", "host": {"nic_bytes_per_s": "400 GB/s"}}),
            "host dgx-h100 with nic_bytes_per_s: nic_bytes_per_s: 400 GB/s = 3200 Gb/s per accelerator is beyond every NIC; "
            "if the NIC is a 400 Gb/s one, write '400 Gb/s'",
        ),
        (lambda: CLUSTERS.resolve({5: 6}), "cluster: keys must be text; found 5"),
        (lambda: MODELS.load("\0"), "unknown model '\\x00'; choose from "),
        (lambda: MODELS.load("m" * 5000), "unknown model 'mmm"),
    ],
)  # fmt: skip
def test_python_users_get_our_errors(make, text):
    with pytest.raises(ProfileError) as caught:
        make()
    assert str(caught.value).startswith(text)


def test_400_gigabit_and_400_gigabyte_are_not_the_same():
    bits = CLUSTERS.resolve({"base": "h100-rail-10240", "host": {"nic_bytes_per_s": "400 Gb/s"}})
    assert isinstance(bits, Cluster)
    assert bits.host.nic_bytes_per_s == 50e9


def test_changing_the_plan_of_a_scenario():
    scenario = Scenario(model=small.moe(), cluster=small.cluster(32), plan={"tp": 2}, job=small.job())
    for changes, text in [({"tpp": 2}, "tpp: unknown key; did you mean tp"), ({"zero": 5}, "zero: must be 0, 1, 2 or 3; found 5")]:
        with pytest.raises(ProfileError) as caught:
            scenario.with_plan(**changes)
        assert str(caught.value).startswith(text)


def test_words_that_no_function_knows():
    scenario = Scenario(model=small.moe(), cluster=small.cluster(32), plan={"tp": 2}, job=small.job())
    with pytest.raises(ProfileError, match="ranks = 'al'; choose 'classes' or 'all'"):
        simulate_step(scenario, ranks="al")
    with pytest.raises(ProfileError, match="top = 0; simulate at least 1 plan"):
        search(scenario, top=0)


# --- files ---


def test_paths_in_a_file_are_looked_for_beside_it_first(tmp_path, monkeypatch):
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    scenarios, elsewhere = tmp_path / "scenarios", tmp_path / "elsewhere"
    config = {k: v for k, v in CONFIG.items() if v is not None}
    write(scenarios / "mine" / "config.json", json.dumps(config))
    write(elsewhere / "mine" / "config.json", json.dumps(config | {"vocab_size": 200}))
    write(elsewhere / "only-here.json", json.dumps(config | {"vocab_size": 300}))
    host = CLUSTERS.load("h100-rail-10240").host.model_dump(mode="json") | {"name": "my-host"}
    write(scenarios / "parts" / "host.yaml", yaml.safe_dump(host))
    job = "job: {tokens: 1e9, global_batch: 64, sequence_length: 128}\n"
    write(scenarios / "a.yaml", "model: mine/config.json\ncluster: {base: h100-rail-10240, host: ./parts/host.yaml}\n" + job)
    write(scenarios / "b.yaml", "model: {base: ./only-here.json, vocab: 400}\ncluster: h100-single-host\n" + job)
    write(scenarios / "c.yaml", "model: only-here.json\ncluster: h100-single-host\n" + job)
    monkeypatch.chdir(elsewhere)
    for file in (scenarios / "a.yaml", Path("../scenarios/a.yaml")):
        found = Scenario.load(file)
        assert (found.model.name, found.model.vocab, found.cluster.host.name) == ("mine", 100, "my-host")
    assert Scenario.load(scenarios / "b.yaml").model.vocab == 400
    assert Scenario.load(scenarios / "c.yaml").model.vocab == 300
    assert Scenario(model="mine/config.json", cluster="h100-single-host", job=JOB).model.vocab == 200  # no file: the working directory
    monkeypatch.chdir(scenarios / "mine")
    assert MODELS.load("config.json").name == "mine"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfmodel: llama-3-8b\n")
    assert read_yaml(tmp_path / "a.yaml") == {"model": "llama-3-8b"}
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({k: v for k, v in CONFIG.items() if v is not None}).encode())
    assert MODELS.load(tmp_path / "config.json").vocab == 100


@pytest.mark.parametrize("text", ["[" * 5000, "1" * 5000, "{", '{"a": 1', "nul"])
def test_json_that_cannot_be_read(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ProfileError, match=r"config\.json (is not JSON|must hold a JSON object)"):
        MODELS.load(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "1" * 5000, "a: [", "a: !!python/object:os.system {}", "? [1]\n: 2", "a: 2001-99-99"])
def test_yaml_that_cannot_be_read(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ProfileError, match=r"a\.yaml is not YAML: "):
        read_yaml(tmp_path / "a.yaml")
