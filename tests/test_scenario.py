"""Scenario files: what is written reads back as the same scenario, and what a wrong file says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from simulator.errors import ProfileError
from simulator.scenario.job import Job
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan, Precision
from simulator.scenario.profiles import CLUSTERS, MODELS, read_yaml, save_yaml, write_atomically
from simulator.scenario.scenario import Scenario

MODEL = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "intermediate_size": 256}


def cluster_table() -> dict:
    """64 H100 in 8 hosts as a table that says everything itself: no part of it is a name."""
    cluster = CLUSTERS.load("h100-rail-10240").model_dump(mode="json") | {"name": "small", "accelerators": 64}
    cluster["accelerator"]["hbm_bytes"] = "80 GB"
    return cluster


def without_source(profile: dict, fact: str) -> None:
    for source in profile["sources"]:
        source["facts"] = [f for f in source["facts"] if f != fact]


def table() -> dict:
    """A scenario as it stands in a file, everything inline."""
    return {
        "model": dict(MODEL),
        "cluster": cluster_table(),
        "plan": {"tp": 2, "pp": 2},
        "job": {"tokens": 1_000_000, "global_batch": 64, "sequence_length": 128},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scenario.yaml"


def load(file: Path, data: object) -> Scenario:
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return Scenario.load(file)


def refusal(file: Path, data: object) -> str:
    """Return what the refusal of a file says after the file's name."""
    with pytest.raises(ProfileError) as caught:
        load(file, data)
    text = str(caught.value)
    assert text.startswith(str(file)), text
    return text.removeprefix(str(file)).removeprefix(": ").removeprefix(" ")


# --- round trips ---


def test_an_inline_scenario_reads_as_written(file):
    scenario = load(file, table())
    assert scenario.cluster.accelerator.hbm_bytes == 80e9
    assert scenario.cluster.host.nic_bytes_per_s == 50e9
    assert (scenario.cluster.name, scenario.cluster.hosts, scenario.cluster.host.name) == ("small", 8, "dgx-h100")
    assert (scenario.model.layers, scenario.model.name) == (4, "model")
    assert scenario.plan == Plan(tp=2, pp=2, dp_shard=16)  # 64 accelerators
    assert scenario.job == Job(tokens=1_000_000, global_batch=64, sequence_length=128)


def test_an_inline_scenario_survives_saving(file, tmp_path):
    scenario = load(file, table())
    scenario.save(tmp_path / "again.yaml")
    assert Scenario.load(tmp_path / "again.yaml") == scenario
    written = read_yaml(tmp_path / "again.yaml")
    assert written["model"]["hidden"] == 64
    assert written["cluster"]["accelerator"]["hbm_bytes"] == "80 GB"
    assert written["cluster"]["host"]["nic_bytes_per_s"] == "50 GB/s"


def test_every_field_of_a_plan_and_a_job_survives_saving(file):
    plan = Plan(
        tp=2,
        cp=2,
        pp=2,
        vpp=2,
        ep=4,
        etp=2,
        dp_replicate=2,
        dp_shard=4,
        zero=3,
        micro_batch=2,
        schedule="interleaved",
        layout="Et|t|t|tL",
        recompute="selective",
        recompute_modules=("mlp", "moe_act"),
        sequence_parallel=False,
        dispatcher="deepep",
        precision=Precision(gemm="fp8", master=None, dispatch="fp8"),
        reserve={"context": "1.5 GB", "communicator": "0 GB", "fragmentation": 0},
        overlap=Overlap(grad_reduce=False),
    )
    job = Job(tokens=15.5e12, global_batch=64, sequence_length=128, optimizer="muon", routing="natural", expert_load=1.4)
    scenario = Scenario(model=MODEL, cluster=cluster_table() | {"slow_hosts": {3: 1.25}}, plan=plan, job=job)
    scenario.save(file)
    assert Scenario.load(file) == scenario


@pytest.mark.parametrize("cluster", CLUSTERS.names())
def test_every_shipped_cluster_is_written_by_name(file, cluster):
    scenario = Scenario(model="llama-3-8b", cluster=cluster, job={"tokens": 10**9, "global_batch": 64, "sequence_length": 4096})
    scenario.save(file)
    written = read_yaml(file)
    assert (written["model"], written["cluster"]) == ("llama-3-8b", cluster)
    assert Scenario.load(file) == scenario


@pytest.mark.parametrize("model", MODELS.names())
def test_every_shipped_model_is_written_by_name_and_whole_when_it_was_changed(file, model):
    job = {"tokens": 10**9, "global_batch": 64, "sequence_length": 4096}
    scenario = Scenario(model=model, cluster=cluster_table(), job=job)
    scenario.save(file)
    assert read_yaml(file)["model"] == model
    assert Scenario.load(file) == scenario

    changed = Scenario(model={"base": model, "vocab": 1000}, cluster=cluster_table(), job=job)
    changed.save(file)
    assert read_yaml(file)["model"]["name"] == f"{model} with vocab"
    assert Scenario.load(file) == changed
    assert changed.model == scenario.model.model_copy(update={"vocab": 1000, "name": f"{model} with vocab"})


def test_a_model_may_be_the_path_of_a_config_json_and_is_read_anew_when_it_changed(file, tmp_path):
    config = tmp_path / "my-model" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(MODEL))
    first = load(file, table() | {"model": str(config)})
    assert (first.model.name, first.model.source, first.model.layers) == ("my-model", str(config), 4)
    config.write_text(json.dumps(MODEL | {"num_hidden_layers": 6}))
    assert load(file, table() | {"model": str(config)}).model.layers == 6


def test_a_plan_may_be_left_out(file):
    data = table()
    del data["plan"]
    assert load(file, data).plan == Plan(dp_shard=64)


def test_changing_the_plan_fills_the_cluster_again(file):
    scenario = load(file, table())
    assert scenario.with_plan(tp=4).plan == Plan(tp=4, pp=2, dp_shard=8)
    assert scenario.with_plan(tp=4).cluster == scenario.cluster
    assert scenario.with_plan(dp_replicate=2).plan == Plan(tp=2, pp=2, dp_replicate=2, dp_shard=8)


@pytest.mark.parametrize("tokens", ["15.5e12", "15500000000000", "1.55e13", "15_500_000_000_000", "'15.5e12'"])
def test_tokens_in_scientific_notation(file, tokens):
    text = yaml.safe_dump(table()).replace("tokens: 1000000", f"tokens: {tokens}")
    assert load(file, text).job.tokens == 15_500_000_000_000


def test_yaml_reads_400e9_as_text_and_a_count_takes_it(file):
    assert yaml.safe_load("400e9") == "400e9"
    text = yaml.safe_dump(table()).replace("tokens: 1000000", "tokens: 400e9")
    assert load(file, text).job.tokens == 400_000_000_000


def test_yaml_anchors_may_be_merged(file):
    text = yaml.safe_dump(table()) + "x: &both {tp: 4, pp: 2}\n"
    with pytest.raises(ProfileError, match="x: unknown key"):
        load(file, text)
    file.write_text("common: &common {tp: 4, pp: 2}\nplan:\n  <<: *common\n  tp: 8\n")
    assert read_yaml(file)["plan"] == {"tp": 8, "pp": 2}


# --- what a wrong file says ---


def test_missing_keys_are_all_named(file):
    assert refusal(file, {"model": dict(MODEL), "job": {"tokens": 1}}) == (
        "cluster: missing; job.global_batch: missing; job.sequence_length: missing"
    )


def test_a_missing_fact_is_named_with_its_place(file):
    data = table()
    del data["cluster"]["host"]["overhead_w"]
    without_source(data["cluster"]["host"], "overhead_w")
    assert refusal(file, data) == "host: overhead_w: missing"


@pytest.mark.parametrize(
    ("place", "key", "text"),
    [
        ([], "jobs", "jobs: unknown key; did you mean job?"),
        (["plan"], "vp", "plan.vp: unknown key; did you mean vpp or tp or pp?"),
        (["plan"], "microbatch", "plan.microbatch: unknown key; did you mean micro_batch or dispatcher?"),
        (["job"], "global_bach", "job.global_bach: unknown key; did you mean global_batch?"),
        (["cluster", "fabric"], "efficency", "fabric: efficency: unknown key; did you mean efficiency?"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(file, place, key, text):
    data = table()
    inner = data
    for step in place:
        inner = inner[step]
    inner[key] = 2
    assert refusal(file, data) == text


def test_unknown_keys_deep_inside_are_named_in_full(file):
    data = table()
    data["plan"] |= {"precision": {"gem": "fp8"}, "overlap": {"grad": True}}
    assert refusal(file, data) == (
        "plan.precision.gem: unknown key; did you mean gemm?; plan.overlap.grad: unknown key; did you mean grad_reduce?"
    )


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (
            ["cluster", "accelerator", "hbm_bytes"],
            80_000_000_000,
            "accelerator: hbm_bytes: 80000000000 has no unit; write a number with a unit, such as 80 GB",
        ),
        (
            ["cluster", "host", "nic_bytes_per_s"],
            "400e9",
            "host: nic_bytes_per_s: '400e9' has no unit; write a number with a unit, such as 3.35 TB/s or 400 Gb/s",
        ),
        (
            ["cluster", "host", "nic_bytes_per_s"],
            "400 GB",
            "host: nic_bytes_per_s: '400 GB': 'GB' is a unit of bytes, not of bytes_per_s; "
            "write a number with a unit, such as 3.35 TB/s or 400 Gb/s",
        ),
        (
            ["cluster", "price_usd_per_accelerator_hour"],
            2.5,
            "cluster: price_usd_per_accelerator_hour: 2.5 has no unit; write a number with a unit, such as 2.95 $/h",
        ),
        (
            ["plan", "reserve"],
            {"context": 1},
            "plan.reserve.context: 1 has no unit; write a number with a unit, such as 80 GB",
        ),
    ],
)
def test_a_bare_number_or_a_wrong_dimension_is_refused_with_the_form_expected(file, place, value, text):
    data = table()
    inner = data
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    assert refusal(file, data).startswith(text)


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [
        ("plan", {"tp": 0}, "plan.tp: must be greater than 0; found 0"),
        ("plan", {"tp": "two"}, "plan.tp: must be a whole number; found 'two'"),
        ("plan", {"zero": 4}, "plan.zero: must be 0, 1, 2 or 3; found 4"),
        (
            "plan",
            {"vpp": 2},
            "plan: schedule = 1f1b with vpp = 2 model chunks per rank; write vpp: 1, or schedule: interleaved",
        ),
        (
            "plan",
            {"schedule": "interleaved"},
            "plan: schedule = interleaved with vpp = 1 model chunks per rank; write vpp: 2 or more",
        ),
        (
            "job",
            {"tokens": 100, "global_batch": 64, "sequence_length": 128},
            "job: tokens = 100 is less than one step of 64 x 128 = 8192; give more tokens or a smaller global_batch",
        ),
        ("job", {"tokens": "some", "global_batch": True, "sequence_length": 1.5}, None),
        ("model", "llama-3-8", "unknown model 'llama-3-8'; did you mean llama-3-8b or llama-3-70b or llama-3-405b?"),
        ("model", "no/such/config.json", "unknown model 'no/such/config.json'; no such file"),
        ("model", 7, "model: give a name, a path or a table; found 7"),
        ("cluster", "h100-rail-1024", "unknown cluster 'h100-rail-1024'; did you mean h100-rail-10240 or "),
        ("cluster", {"base": "nowhere"}, "unknown cluster 'nowhere'; choose from "),
    ],
)
def test_values_that_cannot_be(file, part, value, text):
    found = refusal(file, table() | {part: value})
    if text is None:
        text = (
            "job.tokens: 'some' is not a count; write a whole number such as 20480 or 15.5e12; "
            "job.global_batch: True is not a count; job.sequence_length: 1.5 is not a whole number"
        )
    assert found.startswith(text)


def test_clusters_that_contradict_themselves(file):
    data = table()
    data["cluster"]["accelerators"] = 60
    assert refusal(file, data) == "cluster: accelerators = 60 is not a multiple of the host's 8; use 56"
    del data["cluster"]["fabric"]["tiers"][1:]
    for source in data["cluster"]["fabric"]["sources"]:
        source["facts"] = [f for f in source["facts"] if "spine" not in f and "core" not in f]
    data["cluster"]["accelerators"] = 2048
    assert refusal(file, data).endswith("accelerators = 2048 exceeds the 256 that fabric ib-ndr-rail reaches; add a tier or use 256")
    data["cluster"] |= {"accelerators": 64, "slow_hosts": {8: 1.2}}
    assert refusal(file, data).endswith("slow_hosts names host 8; this cluster has hosts 0 to 7")
    data["cluster"]["slow_hosts"] = {7: 0.5}
    assert refusal(file, data).endswith("slow_hosts[7] = 0.5: a slow host takes 1 or more times as long; write 1.1 for 10 % slower")


@pytest.mark.parametrize("fact", ["accelerators", "price_usd_per_accelerator_hour"])
def test_a_number_without_a_source_is_refused(file, fact):
    data = table()
    without_source(data["cluster"], fact)
    assert refusal(file, data) == f"cluster: no source for {fact}; list them under sources[].facts"


# --- files that are no scenarios ---


def test_a_duplicate_key_is_refused_with_its_line(file):
    text = refusal(file, "model: llama-3-8b\nplan:\n  tp: 2\n  pp: 2\n  tp: 4\n")
    assert text.startswith("is not YAML: key tp is given twice")
    assert "line 3, column 3" in text


@pytest.mark.parametrize("content", ["", "   \n\n"])
def test_an_empty_file(file, content):
    assert refusal(file, content) == "is empty"


def test_a_file_of_comments(file):
    assert refusal(file, "# nothing yet\n") == "must hold 'key: value' lines; found NoneType"


@pytest.mark.parametrize(("content", "kind"), [("- 1\n- 2\n", "list"), ("llama-3-8b\n", "str"), ("42\n", "int")])
def test_a_file_that_is_no_mapping(file, content, kind):
    assert refusal(file, content) == f"must hold 'key: value' lines; found {kind}"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", b"\x80\x04\x95"])
def test_a_binary_file(file, content):
    file.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        Scenario.load(file)
    assert str(caught.value) == f"{file} is not a text file; expected YAML or JSON in UTF-8"


def test_a_file_of_zero_bytes_is_not_yaml(file):
    file.write_bytes(b"a\x00\x00")
    with pytest.raises(ProfileError, match=r"scenario\.yaml is not YAML: .*special characters"):
        Scenario.load(file)


def test_a_directory(tmp_path):
    with pytest.raises(ProfileError) as caught:
        Scenario.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} cannot be read: Is a directory"
    with pytest.raises(ProfileError) as caught:
        MODELS.load(tmp_path)
    assert str(caught.value) == f"unknown model '{tmp_path}'; no such file"


def test_no_file(tmp_path):
    with pytest.raises(ProfileError) as caught:
        Scenario.load(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path}/none.yaml cannot be read: No such file or directory"


def test_broken_yaml(file):
    assert refusal(file, "model: [llama\n").startswith("is not YAML: ")


def test_broken_json(file, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 64,')
    assert refusal(file, table() | {"model": str(config)}).startswith(f"{config} is not JSON: ")
    config.write_text("[]")
    assert refusal(file, table() | {"model": str(config)}) == f"{config} must hold a JSON object; found list"


# --- writing ---


@pytest.mark.parametrize("before", [None, "old content"])
def test_a_writer_that_fails_leaves_nothing_half_written(tmp_path, before):
    target = tmp_path / "result.yaml"
    if before:
        target.write_text(before)

    def write(file):
        file.write("half of ")
        file.flush()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, write)
    assert [p.name for p in tmp_path.iterdir()] == (["result.yaml"] if before else [])
    if before:
        assert target.read_text() == before


def test_a_writer_that_succeeds_replaces_the_file_and_makes_its_folder(tmp_path):
    target = tmp_path / "new" / "result.yaml"
    write_atomically(target, lambda file: file.write("one"))
    write_atomically(target, lambda file: file.write(b"two"), mode="wb")
    assert target.read_bytes() == b"two"
    assert [p.name for p in target.parent.iterdir()] == ["result.yaml"]


def test_what_yaml_cannot_say_is_not_half_written(tmp_path):
    with pytest.raises(yaml.YAMLError):
        save_yaml({"a": 1, "b": object()}, tmp_path / "x.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_in_tokens_is_refused():
    with pytest.raises(ProfileError, match=r"global_batch counts sequences: for 16777216 tokens write 4096"):
        Job(tokens="15e12", global_batch=16777216, sequence_length=4096)
