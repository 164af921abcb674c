"""The command line: each verb says what its function returns, and bad input ends in one message and exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml
from command_line import data

import simulator as sim
from simulator import plots
from simulator.cli import app
from simulator.planning.explain import constraint_costs
from simulator.planning.space import Space
from simulator.results.outcome import sources
from simulator.scenario.profiles import CLUSTERS
from simulator.validation import collectives, memory, published, report

ROOT = Path(__file__).parents[1]
STABLE = [
    "step_time_s", "tokens_per_s_per_accelerator", "mfu_6n", "mfu_causal", "mfu_noncausal", "peak_memory_bytes",
    "memory_bytes_per_stage", "training_days", "cost_usd", "problems",
]  # fmt: skip
QUESTION = {
    "model": "llama-3-8b",
    "cluster": "h100-single-host",
    "job": {"tokens": 10**9, "global_batch": 32, "sequence_length": 4096},
    "plan": {"tp": 2, "pp": 2, "zero": 1, "recompute": "selective"},
}
LINE = """
torchrun --nproc-per-node 8 --nnodes 2 pretrain_gpt.py --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 \\
    --micro-batch-size 1 --global-batch-size 16 --seq-length 2048 --bf16 --use-distributed-optimizer --sequence-parallel
"""
FILES = [
    "breakdown.csv", "breakdown.png", "memory.csv", "memory.png", "scenario.yaml", "sources.csv", "summary.json", "timeline.png",
    "trace.json.gz",
]  # fmt: skip


def started(*words: object) -> subprocess.Popen:
    """Start a process of the package under test, wheel or checkout."""
    command = [sys.executable, "-c", "from simulator.cli import main; main()", *map(str, words)]
    paths = os.environ | {"PYTHONPATH": str(Path(sim.__file__).parents[1])}
    # a shell that starts something in the background lets it ignore Ctrl-C, and so all that it starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=paths)
    finally:
        signal.signal(signal.SIGINT, before)


# --- each verb is its function ---


def test_simulate_equals_simulate_step(myriad, file):
    scenario = sim.Scenario.load(file)
    step = sim.simulate_step(scenario)
    found = data(myriad("simulate", file, "--json"))
    assert [key for key in STABLE if key not in found] == []
    assert found["problems"] == []
    assert found["files"] == []
    assert {key: found[key] for key in step.summary()} == step.summary()
    for key in set(STABLE) - {"memory_bytes_per_stage", "problems"}:
        assert found[key] == getattr(step, key)
    assert found["memory_bytes_per_stage"] == step.memory()["total_bytes"].tolist()
    assert (found["bound_s"], found["estimate_s"]) == (sim.bound(scenario), sim.estimate(scenario))
    assert pd.DataFrame(found["breakdown"])["seconds"].sum() == pytest.approx(step.step_time_s)


def test_simulate_ranks_that_vary(myriad, file, tmp_path):
    words = ["--ranks", "all", "--vary", "jitter=0.05", "--seeds", "3"]
    found = data(myriad("simulate", file, "--json", *words, "--out", tmp_path / "out"))
    assert found["distribution"]["seeds"] == 3
    assert found["distribution"]["min_s"] < found["distribution"]["max_s"]
    assert {"ranks.csv", "critical_path.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    said = myriad("simulate", file, *words).out
    assert "Step time over seeds" in said
    assert "Slowest ranks" in said
    refused = myriad("simulate", file, "--vary", "jitter=0.05")
    assert refused.code == 2
    assert "write ranks='all'" in refused.err


def test_simulate_all_ranks_equals_classes(myriad, file):
    classes, everyone = (data(myriad("simulate", file, "--json", "--ranks", ranks)) for ranks in ("classes", "all"))
    assert everyone["step_time_s"] == pytest.approx(classes["step_time_s"], rel=1e-9)


def test_plan_equals_search(myriad, file):
    found = data(myriad("plan", file, "--top", 3, "--json"))
    searched = sim.search(sim.Scenario.load(file), top=3)
    assert [key for key in STABLE if key not in found] == []
    assert found["step_time_s"] == searched.best.step_time_s == found["plans"][0]["step_time_s"]
    pd.testing.assert_frame_equal(pd.DataFrame(found["plans"]), searched.table)
    assert found["searched"] == {
        "legal": searched.legal,
        "fitting": searched.fitting,
        "estimated": searched.estimated,
        "simulated": len(searched.results),
    }


def test_plan_says_why_and_what_the_constraints_cost(myriad, file, tmp_path):
    words = ("plan", file, "--top", 2, "--allow", "pp=2", "--explain")
    found = data(myriad(*words, "--json"))
    searched = sim.search(sim.Scenario.load(file), top=2, space=Space(pp=(2,)))
    first, second = (result.step_time_s for result in searched.results)
    assert sum(row["seconds"] for row in found["why"]) == pytest.approx(second - first, abs=1e-9)
    pd.testing.assert_frame_equal(pd.DataFrame(found["constraint_costs"]), constraint_costs(searched))
    said = myriad(*words, "--out", tmp_path / "out")
    assert f"The second takes {second - first:.3f} s longer" in said.out
    assert "What each constraint costs" in said.out
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def few_rows(monkeypatch) -> pd.DataFrame:
    """Every ninetieth complete row instead of all the published ones."""
    rows = published.published_runs()
    rows = rows[rows["complete"] == "yes"].iloc[::90]
    monkeypatch.setattr(report, "published_runs", lambda: rows)
    peaks = memory.published_memory().iloc[::60]
    monkeypatch.setattr(report, "validate_memory", lambda some, tell=None: memory.validate_memory(peaks if some is None else some, tell))
    monkeypatch.setattr(report, "validate_collectives", partial(collectives.validate_collectives, False))  # without the refits
    return rows


def test_validate_equals_its_function(myriad, few_rows, tmp_path):
    found = data(myriad("validate", "--json", "--processes", 1, "--out", tmp_path))
    expected = report.confront()
    assert found["summary"] == json.loads(json.dumps(expected.json()["summary"]))
    assert [row["id"] for row in found["rows"]] == few_rows["id"].tolist()
    for row in found["rows"]:
        assert row["relative_error"] == pytest.approx(row["predicted_s"] / row["measured_s"] - 1)
        low, high = row["interval_80_s"]
        assert 0 < low < high
        assert isinstance(row["assumptions"], list)
    assert pd.read_csv(tmp_path / "validation.csv")["id"].tolist() == few_rows["id"].tolist()
    assert {f.name for f in tmp_path.iterdir()} == {"validation.csv", "accuracy.png", "residuals.png"}


def test_validate_prints_the_page_that_it_writes(myriad, few_rows, tmp_path):
    page = tmp_path / "accuracy.md"
    said = myriad("validate", "--processes", 1, "--worst", 2, "--docs", page)
    assert said.code == 0
    text = page.read_text(encoding="utf-8")
    shown = " ".join(said.out.split())
    for title in re.findall(r"^## (.*)$", text, re.MULTILINE):
        assert title in shown
    for figure in re.findall(r"([+-]?\d+\.\d) %", text):  # a narrow column breaks before the sign
        assert figure in shown
    assert text.count("| ") > 100
    pictures = re.findall(r"^!\[[^]]+\]\((.*)\)$", text, re.MULTILINE)
    assert {f.name for f in tmp_path.iterdir()} == {"accuracy.md", *pictures}
    assert len(pictures) == 2


def test_validate_scores_a_users_rows(myriad, tmp_path):
    runs = published.published_runs().set_index("id", drop=False)
    rows = runs.loc[["dgxc-v24.11.1-gpt3_175b-h100-bf16-1024", "korth-22b-full"]].copy()
    rows.loc["korth-22b-full", "tp"] = "eight"
    file = tmp_path / "mine.csv"
    rows.drop(columns="file").to_csv(file, index=False)
    said = myriad("validate", "--data", file, "--json")
    found = json.loads(said.out)
    assert said.code == 0
    assert [row["id"] for row in found["rows"]] == ["dgxc-v24.11.1-gpt3_175b-h100-bf16-1024"]
    assert [(p["where"], p["what"]) for p in found["problems"]] == [
        ("mine.csv, line 3 (korth-22b-full), column tp", "'eight' is not a number")
    ]
    assert "write a whole number" in found["problems"][0]["remedy"]
    assert "column tp" in " ".join(said.err.split())


def test_models_and_clusters_equal_their_functions(myriad):
    pd.testing.assert_frame_equal(pd.DataFrame(data(myriad("models", "--json"))), sim.models())
    pd.testing.assert_frame_equal(pd.DataFrame(data(myriad("clusters", "--json"))), sim.clusters(), check_dtype=False)
    for verb, names in {"models": sim.models()["model"], "clusters": sim.clusters()["cluster"]}.items():
        said = myriad(verb)
        assert said.code == 0
        assert all(name in said.out for name in names)


def test_models_counts_one_model(myriad, tmp_path):
    found = data(myriad("models", "kimi-k2", "--json"))
    assert found["experts"]["count"] == 384
    assert found["parameters"] == pytest.approx(1026.408e9, abs=1e6)
    config = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "intermediate_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = myriad("models", tmp_path / "config.json")
    assert said.code == 0
    assert f"  parameters: {data(myriad('models', tmp_path / 'config.json', '--json'))['parameters'] / 1e9:.3f} G" in said.out


def test_sources_equals_facts(myriad, file):
    rows = data(myriad("sources", file, "--json"))
    assert pd.DataFrame(rows)["fact"].tolist() == sources(sim.Scenario.load(file))["fact"].tolist()
    rows = data(myriad("sources", "h100-rail-10240", "--json"))
    assert len(rows) == len(CLUSTERS.load("h100-rail-10240").provenance())
    assert {"profile", "fact", "value", "grade", "source", "date"} == set(rows[0])
    said = myriad("sources", file)
    assert re.search(r"^\d+ facts: .*\d+ assumed$", said.out, re.MULTILINE)


def test_what_people_read(myriad, file):
    said = myriad("simulate", file)
    step = sim.simulate_step(sim.Scenario.load(file))
    assert (said.code, said.err) == (0, "")
    assert f"step {step.step_time_s:.3f} s" in said.out
    assert "by 6N (of the dense bf16 peak)" in said.out
    assert "Where the step goes" in said.out
    assert "Not modelled: failures" in said.out
    assert re.search(r"Rests on \d+ facts: ", said.out)
    assert "2.95 $/h" in said.out
    assert re.search(r", 20\d\d-\d\d\)", said.out), "a price has a date"


def test_a_name_with_brackets_is_no_markup(myriad, file):
    said = myriad("simulate", file, "--set", "model.name=my [bold]model[/] [7b]")
    assert said.out.startswith("my [bold]model[/] [7b] on 8 ")


def test_no_file_at_all(myriad):
    sets = [
        "model=llama-3-8b",
        "cluster=h100-single-host",
        "job.tokens=1e9",
        "job.global_batch=32",
        "job.sequence_length=4096",
        "plan.tp=2",
    ]
    found = data(myriad("simulate", "--json", *(word for entry in sets for word in ("--set", entry))))
    assert found["step_time_s"] > 0


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["simulate", "--help"]])
def test_help(myriad, words):
    assert myriad(*words).code == 0


def test_an_empty_command_shows_the_help(myriad):
    said = myriad()
    assert (said.code, said.err) == (2, "")
    assert "simulate" in said.out


def test_the_commands_of_the_readme_are_understood():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.split("#")[0].replace("[config.json]", "") for line in text.splitlines() if line.startswith("myriad ")]
    verbs = {name.name or name.callback.__name__ for name in app.registered_commands}
    assert {shlex.split(line)[1] for line in lines} == verbs
    for example in re.findall(r"examples/[\w.-]+\.yaml", text):
        assert (ROOT / example).is_file()


# --- --set ---


def test_set_changes_nested_keys_of_a_named_cluster(myriad, file):
    base = data(myriad("simulate", file, "--json"))
    sets = ["cluster.host.nic_bytes_per_s=200 Gb/s", "cluster.price_usd_per_accelerator_hour=5.90 $/h", "plan.tp=4", "plan.pp=1"]
    found = data(myriad("simulate", file, "--json", *(word for entry in sets for word in ("--set", entry))))
    price = CLUSTERS.load("h100-single-host").price_usd_per_accelerator_hour
    assert found["cost_usd"] / found["accelerator_hours"] == pytest.approx(5.90)
    assert base["cost_usd"] / base["accelerator_hours"] == pytest.approx(price)
    assert len(found["memory_bytes_per_stage"]) == 1


def test_set_a_count_of_a_named_cluster_and_a_whole_other_one(myriad, file):
    sets = ["--set", "cluster=superpod-1024-h100", "--set", "cluster.accelerators=512", "--set", "job.global_batch=1024"]
    half = data(myriad("simulate", file, "--json", *sets))
    scenario = sim.Scenario.model_validate(
        QUESTION | {"cluster": {"base": "superpod-1024-h100", "accelerators": 512}, "job": QUESTION["job"] | {"global_batch": 1024}}
    )
    assert half["step_time_s"] == sim.simulate_step(scenario).step_time_s
    rows = data(myriad("sources", file, "--json"))
    assert [r["value"] for r in rows if r["fact"] == "accelerators" and r["profile"] == "h100-single-host"] == [8]


def test_set_fills_a_table_that_the_file_leaves_empty(myriad, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(QUESTION | {"plan": None}))
    assert data(myriad("simulate", tmp_path / "a.yaml", "--json", "--set", "plan.tp=2", "--set", "plan.zero=3"))["problems"] == []


# --- a Megatron-LM line ---


def test_a_megatron_line_has_the_last_word_but_for_set(myriad, file, tmp_path):
    (tmp_path / "launch.sh").write_text(LINE)
    reserve = {"context": "3 GB", "communicator": "0 GB", "fragmentation": 0}
    file.write_text(yaml.safe_dump(QUESTION | {"plan": QUESTION["plan"] | {"reserve": reserve, "dp_shard": 2, "layout": "balanced"}}))
    said = myriad("simulate", file, "--megatron", tmp_path / "launch.sh", "--set", "plan.zero=3", "--json", "--out", tmp_path / "out")
    assert data(said)["problems"] == []
    saved = sim.Scenario.load(tmp_path / "out" / "scenario.yaml")
    plan = saved.plan
    assert (plan.tp, plan.pp, plan.dp_shard, plan.recompute, plan.layout) == (4, 2, 1, "none", None)
    assert plan.zero == 3
    assert (plan.reserve.context, plan.reserve.fragmentation) == (3e9, 0)  # of which the line says nothing
    assert (saved.job.tokens, saved.job.global_batch, saved.job.sequence_length) == (10**9, 16, 2048)
    assert "the line starts 16 processes, the cluster has 8 accelerators" in said.err


@pytest.mark.parametrize(
    ("change", "code_rules"),
    [
        (("-parallel-size 4", "-parallel-size 3"), ["degrees multiply to the accelerators", "heads divide by tp"]),
        (("-parallel-size 2", "-parallel-size 64"), ["degrees multiply to the accelerators", "layers fill pp * vpp"]),
        (
            ("--bf16", "--num-layers 32 --num-layers-per-virtual-pipeline-stage 2 --num-virtual-stages-per-pipeline-rank 2"),
            ["--num-layers-per-virtual-pipeline-stage"],
        ),
        (("--bf16", "--micro-batch-size x --global-batch-size $BATCH"), ["--global-batch-size", "--micro-batch-size"]),
        (("--bf16", "--pipeline-model-parallel-layout t*99999999999|L"), ["--pipeline-model-parallel-layout"]),
        ((LINE, "python train.py --lr 3"), ["Megatron line"]),
    ],
)
def test_megatron_lines_that_cannot_be(myriad, file, tmp_path, change, code_rules):
    (tmp_path / "launch.sh").write_text(LINE.replace(*change))
    said = myriad("simulate", file, "--megatron", tmp_path / "launch.sh", "--json")
    rules = [problem["rule"] for problem in json.loads(said.out)["problems"]]
    assert said.code == 2
    assert sorted(rule for rule in rules if rule in code_rules) == sorted(code_rules)


# --- --out ---


def test_out_holds_everything_and_it_loads_again(myriad, file, tmp_path):
    folder = tmp_path / "new" / "out"
    found = data(myriad("simulate", file, "--json", "--out", folder))
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert sorted(found["files"]) == [str(folder / name) for name in FILES]
    again = sim.Scenario.load(folder / "scenario.yaml")
    assert again == sim.Scenario.load(file)
    step = sim.simulate_step(again)
    assert step.step_time_s == found["step_time_s"]
    assert json.loads((folder / "summary.json").read_text()) == step.summary()

    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert max(event["ts"] + event["dur"] for event in spans) == pytest.approx(step.step_time_s * 1e6, rel=1e-6)
    threads = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert {"compute", "tp", "pp"} <= threads <= {"compute", "tp", "cp", "ep", "pp", "dp"}

    for name, table in {"breakdown": step.breakdown(), "memory": step.memory()}.items():
        pd.testing.assert_frame_equal(pd.read_csv(folder / f"{name}.csv"), table, check_dtype=False)
    assert len(pd.read_csv(folder / "sources.csv")) == len(step.sources())
    for name in ("timeline", "memory", "breakdown"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_a_search_holds_the_plans_too(myriad, file, tmp_path):
    said = myriad("plan", file, "--top", 2, "--out", tmp_path / "out")
    assert said.code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*FILES, "plans.csv"])
    plans = pd.read_csv(tmp_path / "out" / "plans.csv")
    best = sim.simulate_step(sim.Scenario.load(tmp_path / "out" / "scenario.yaml"))
    assert plans["step_time_s"].tolist() == sorted(plans["step_time_s"])
    assert plans["step_time_s"].iloc[0] == pytest.approx(best.step_time_s, rel=1e-12)
    assert "plans.csv" in said.out
    assert "ui.perfetto.dev" in said.out


def test_out_is_written_whole_or_not_at_all(myriad, file, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert myriad("simulate", file, "--out", folder).code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device", "breakdown.png")

    monkeypatch.setattr(plots, "plot_breakdown", full)
    said = myriad("simulate", file, "--out", folder, "--set", "plan.zero=3")
    assert (said.code, said.out) == (2, "")
    assert said.err == "file: breakdown.png: No space left on device\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_out_that_cannot_be_is_refused_before_the_work(myriad, file, tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.simulate.simulate_step", lambda *_, **__: pytest.fail("it was simulated first"))
    (tmp_path / "there").write_text("kept")
    for folder in (tmp_path / "there", tmp_path / "there" / "below"):
        said = myriad("simulate", file, "--out", folder)
        assert said.code == 2
        assert said.err == f"input: --out {folder}: {tmp_path / 'there'} is not a folder that can be written; choose another\n"
    assert (tmp_path / "there").read_text() == "kept"


# --- bad input: one message, exit code 2, no traceback, nothing written; with --json the problems ---

BAD = {
    "no such command": (["simulat"], "No such command 'simulat'. Did you mean 'simulate'?"),
    "no such option": (["simulate", "--jsn"], "No such option: --jsn"),
    "top 0": (["plan", "FILE", "--top", "0"], "Invalid value for '--top': must be greater than or equal to 1"),
    "top of words": (["plan", "FILE", "--top", "ten"], "Invalid value for '--top': "),
    "ranks": (["simulate", "FILE", "--ranks", "some"], "Invalid value for '--ranks': 'some' is not one of 'classes', 'all'."),
    "nothing": (["simulate"], "scenario: model: missing; cluster: missing; job: missing"),
    "no file": (["simulate", "none.yaml"], "none.yaml cannot be read: No such file or directory"),
    "a folder": (["simulate", "."], ". cannot be read: Is a directory"),
    "a zero byte": (["simulate", "a\0b"], "embedded null byte"),
    "an empty file": (["plan", "empty.yaml"], "empty.yaml is empty"),
    "a binary file": (["plan", "binary.yaml"], "binary.yaml is not a text file; expected YAML or JSON in UTF-8"),
    "a list": (["plan", "list.yaml"], "list.yaml must hold 'key: value' lines; found list"),
    "no model": (["models", "llama-3"], "unknown model 'llama-3'; did you mean llama-3-8b or llama-3-70b or llama-3-405b?"),
    "no cluster": (["sources", "h100-rail"], "unknown cluster 'h100-rail'; did you mean h100-rail-10240"),
    "set without a value": (["simulate", "FILE", "--set", "plan.pp"], "--set 'plan.pp': write KEY=VALUE, e.g. --set plan.pp=8"),
    "set without a key": (["simulate", "FILE", "--set", "=8"], "--set '=8': write KEY=VALUE"),
    "set with half a key": (["simulate", "FILE", "--set", "plan.=8"], "--set 'plan.=8': write KEY=VALUE"),
    "set below a number": (["simulate", "FILE", "--set", "job.tokens.x=8"], "--set 'job.tokens.x=8': tokens is 1000000000, not a table"),
    "set a table to a number": (["simulate", "FILE", "--set", "plan=3"], "plan: must be a table of 'key: value'; found 3"),
    "unknown key": (["simulate", "FILE", "--set", "plan.microbatch=3"], "plan.microbatch: unknown key; did you mean micro_batch"),
    "zero 5": (["simulate", "FILE", "--set", "plan.zero=5"], "plan.zero: must be 0, 1, 2 or 3; found 5"),
    "schedule": (["simulate", "FILE", "--set", "plan.schedule=1f1bb"], "must be 'gpipe', '1f1b', 'interleaved', "),
    "no unit": (
        ["simulate", "FILE", "--set", "cluster.host.nic_bytes_per_s=400"],
        "nic_bytes_per_s: 400 has no unit; write a number with a unit, such as 3.35 TB/s or 400 Gb/s",
    ),
    "bytes for bits": (
        ["simulate", "FILE", "--set", "cluster.host.nic_bytes_per_s=400 GB/s"],
        "400 GB/s = 3200 Gb/s per accelerator is beyond every NIC; if the NIC is a 400 Gb/s one, write '400 Gb/s'",
    ),
    "nan": (["simulate", "FILE", "--set", "job.expert_load=.nan"], "job.expert_load: must be "),
    "infinite": (["simulate", "FILE", "--set", "job.tokens=.inf"], "job.tokens: inf is not a whole number"),
    "negative": (["simulate", "FILE", "--set", "job.tokens=-5"], "job.tokens: must be greater than 0; found -5"),
    "hosts": (["simulate", "FILE", "--set", "cluster.accelerators=12"], "accelerators = 12 is not a multiple of the host's 8; use 8"),
    "no launch file": (["simulate", "FILE", "--megatron", "none.sh"], "none.sh cannot be read: No such file or directory"),
    "tp": (["simulate", "FILE", "--set", "plan.tp=3"], "heads divide by tp: 32 heads do not divide by tp = 3"),
    "too big": (["simulate", "FILE", "--set", "plan.tp=1", "--set", "plan.zero=0", "--set", "plan.pp=1"], "fits in memory: stage 0 needs "),
    "no plan is legal": (
        ["plan", "FILE", "--set", "cluster=superpod-1024-h100", "--set", "job.global_batch=7"],
        "some plan is legal: 'batch divides by dp * micro-batch' fails for 1024 accelerators, 32 heads, 32 layers and global_batch 7",
    ),
    "no plan fits": (["plan", "FILE", "--set", "model=llama-3-405b"], "some plan fits in memory: the smallest plan needs "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(myriad, file, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    (tmp_path / "list.yaml").write_text("- 1\n")
    before = {path.name for path in tmp_path.iterdir()}
    words, text = BAD[name]
    words = [str(file) if word == "FILE" else word for word in words]

    plain = myriad(*words)
    assert (plain.code, plain.out) == (2, "")
    assert text in plain.err
    assert "Traceback" not in plain.err

    asked = myriad(*words, "--json", *(["--out", "out"] if words[0] in ("plan", "simulate") else []))
    assert asked.code == 2
    problems = json.loads(asked.out)["problems"]
    assert problems
    assert all(set(problem) == {"rule", "numbers", "remedy"} for problem in problems)
    assert any(text in f"{problem['rule']}: {problem['numbers']}" for problem in problems)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_all_problems_of_a_plan_at_once(myriad, file):
    said = myriad("simulate", file, "--json", "--set", "plan.tp=3", "--set", "plan.ep=2", "--set", "plan.precision.gemm=fp4")
    found = json.loads(said.out)
    expected = sim.check(
        sim.Scenario.model_validate(QUESTION | {"plan": QUESTION["plan"] | {"tp": 3, "ep": 2, "precision": {"gemm": "fp4"}}})
    )
    assert found == {"problems": [{"rule": p.rule, "numbers": p.numbers, "remedy": p.remedy} for p in expected]}
    assert len(expected) == 6
    for problem in expected:
        assert problem.remedy in said.err


# --- the process around it ---


def test_ctrl_c_ends_quietly_and_leaves_nothing(tmp_path):
    question = tmp_path / "question.yaml"
    os.mkfifo(question)
    with started("plan", question, "--out", tmp_path / "out") as process:
        question.write_text((ROOT / "examples/kimi-k2-10240-h100.yaml").read_text())  # waits until the command reads it
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["clusters"], ["sources", "h100-rail-10240"], ["sources", "h100-rail-10240", "--json"]])
def test_a_reader_that_goes_away_is_no_error_to_talk_about(words):
    with started(*words) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.wait(timeout=30) != 2
    assert err == ""


@pytest.mark.parametrize("to", ["megatron", "torchtitan", "deepspeed"])
def test_what_does_not_fit_is_not_exported(myriad, file, to):
    done = myriad("export", file, "--set", "model=kimi-k2", "--set", "plan.layout=balanced", "--to", to)
    assert done.code == 2
    assert "the model fits in memory" in done.err
    assert not done.out


def test_compare_names_the_scenario_that_cannot_run(myriad, file, tmp_path):
    other = tmp_path / "huge.yaml"
    other.write_text(yaml.safe_dump(QUESTION | {"model": "kimi-k2", "plan": {"pp": 8, "layout": "balanced"}}), encoding="utf-8")
    done = myriad("compare", file, other)
    assert done.code == 2
    assert f"{other}: the model fits in memory" in done.err
    assert f"{file}: " not in done.err


@pytest.mark.parametrize("words", [("fewest", "--days", 0), ("budget", "--usd", 0), ("cheapest", "--budget", -1)])
def test_limits_are_above_zero(myriad, file, words):
    verb, option, value = words
    done = myriad(verb, file, option, value)
    assert done.code == 2
    assert f"{value} is not above 0" in done.err


def test_a_table_without_a_usable_row_is_an_error(myriad, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("id,model\nmine,x\n", encoding="utf-8")
    done = myriad("validate", "--data", path)
    assert done.code == 2
    assert "column" in done.err
    assert "docs/validation.md lists the columns" in " ".join(done.err.split())
