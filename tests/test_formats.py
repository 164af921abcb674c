"""torchtitan and DeepSpeed configurations: what each key becomes, there and back, and what is refused."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import cluster, job, moe

from simulator.errors import PlanError, ProfileError
from simulator.formats.deepspeed import deepspeed_config, deepspeed_text, plan_from_deepspeed
from simulator.formats.launch import SOFTWARE
from simulator.formats.torchtitan import plan_from_torchtitan, torchtitan_config, torchtitan_text
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan, Precision
from simulator.scenario.scenario import Scenario

TITAN = """
[training]
local_batch_size = 16
global_batch_size = 512
seq_len = 4096
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
pipeline_parallel_degree = 4
pipeline_parallel_schedule = "Interleaved1F1B"
pipeline_parallel_layers_per_stage = 4
pipeline_parallel_microbatch_size = 2
expert_parallel_degree = 8
expert_parallel_comm_backend = "deepep"
[activation_checkpoint]
mode = "full"
"""


def question(plan: Plan, batch: int = 64) -> Scenario:
    return Scenario(model=moe(30), cluster=cluster(plan.on(16).world), plan=plan, job=job(batch))


def same(plan: Plan, other: Plan) -> bool:
    return plan == other.model_copy(update={name: getattr(plan, name) for name in SOFTWARE})


def test_a_torchtitan_file(tmp_path):
    (tmp_path / "run.toml").write_text(TITAN)
    launch = plan_from_torchtitan(tmp_path / "run.toml", layers=30)
    plan = launch.plan
    assert (plan.tp, plan.pp, plan.vpp, plan.ep, plan.dp_shard, plan.micro_batch) == (2, 4, 2, 8, None, 2)
    assert (plan.schedule, plan.recompute, plan.dispatcher, plan.zero) == ("interleaved", "full", "deepep", 2)
    assert launch.job == {"global_batch": 512, "sequence_length": 4096}


def test_later_names_of_torchtitan():
    training = {"num_tokens_per_microbatch_per_dp_rank": 8192, "num_tokens_per_train_step": 2**20, "max_context_length": 4096}
    launch = plan_from_torchtitan({"training": training, "parallelism": {"data_parallel_shard_degree": 8}})
    assert launch.plan.micro_batch == 2
    assert launch.job == {"global_batch": 256, "sequence_length": 4096}
    assert launch.plan.zero == 3


def test_a_deepspeed_file(tmp_path):
    config = {
        "train_batch_size": 256, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "gradient_accumulation_steps": "auto",
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(config))
    launch = plan_from_deepspeed(tmp_path / "ds.json")
    assert (launch.plan.zero, launch.plan.tp, launch.plan.micro_batch, launch.job) == (3, 2, 2, {"global_batch": 256})
    assert launch.plan.overlap.param_gather  # DeepSpeed's default for stage 3
    assert launch.warnings == ("zero_optimization.offload_optimizer is not modelled: optimizer state stays on the accelerator",)


@given(st.data())
def test_torchtitan_there_and_back(data):
    def one(*choices):
        return data.draw(st.sampled_from(choices))

    schedule = one("1f1b", "gpipe", "interleaved", "interleaved-zb", "zb-v", "dualpipev")
    vpp = 2 if schedule not in ("1f1b", "gpipe") else 1
    pp = one(2, 4) if schedule != "1f1b" else one(1, 2, 4)
    shard = one(1, 2, 8)
    cp = one(1, 2) if shard > 1 else 1
    plan = Plan(
        tp=one(1, 2), cp=cp, pp=pp, vpp=vpp, ep=one(1, 2), dp_replicate=one(1, 2), dp_shard=shard, zero=0 if shard * cp == 1 else one(2, 3),
        micro_batch=one(1, 2), schedule=schedule, recompute=one("none", "full"), dispatcher=one("alltoall", "deepep", "hybridep"),
        overlap=Overlap(tp=one("torch", "torch_async")), precision=Precision(gemm=one("bf16", "fp8"), gradient_reduce=one("fp32", "bf16")),
    )  # fmt: skip
    config = torchtitan_config(question(plan))
    assert same(plan, plan_from_torchtitan(config, layers=30).plan)


@given(st.data())
def test_deepspeed_there_and_back(data):
    def one(*choices):
        return data.draw(st.sampled_from(choices))

    half, overlapped, cp = one("bf16", "fp16"), one(True, False), one(1, 2)
    plan = Plan(
        tp=one(1, 2), cp=cp, ep=one(1, 2), etp=one(1, 2), dp_shard=one(2, 8), zero=one(0, 1, 2, 3), micro_batch=one(1, 2),
        dp_replicate=one(1, 2), context_parallel="all_to_all" if cp > 1 else "ring", sequence_parallel=False,
        overlap=Overlap(grad_reduce=overlapped, param_gather=overlapped),
        precision=Precision(parameters=half, gradients=one("fp32", half), gradient_reduce=half, gemm=half, dispatch=half, combine=half),
    )  # fmt: skip
    back = plan_from_deepspeed(deepspeed_config(question(plan))).plan
    replicas = plan.dp_replicate
    assert same(plan, back.model_copy(update={"dp_replicate": replicas, "dp_shard": plan.dp_shard if replicas == 1 else back.dp_shard}))


def test_files_come_back(tmp_path):
    titan = Plan(pp=2, dp_shard=8, zero=2, overlap=Overlap(tp="torch"))
    assert tomllib.loads(torchtitan_text(question(titan))) == torchtitan_config(question(titan))
    half = Precision(gradient_reduce="bf16")
    speed = Plan(dp_shard=16, zero=2, sequence_parallel=False, precision=half, overlap=Overlap(grad_reduce=True, param_gather=True))
    (tmp_path / "ds.json").write_text(deepspeed_text(question(speed)))
    assert same(speed, plan_from_deepspeed(tmp_path / "ds.json").plan.on(16))


@pytest.mark.filterwarnings("default")
def test_torchtitan_loads_what_is_written(tmp_path):
    """Its own parser: `pip install torchtitan==0.2.2`; 0.3 configures in Python and reads no TOML."""
    manager = pytest.importorskip("torchtitan.config.job_config") and pytest.importorskip("torchtitan.config.manager")
    plan = Plan(tp=2, pp=2, vpp=2, ep=4, dp_shard=8, zero=2, schedule="interleaved", micro_batch=2, overlap=Overlap(tp="torch"))
    (tmp_path / "run.toml").write_text(torchtitan_text(question(plan)))
    loaded = manager.ConfigManager().parse_args(["--job.config_file", str(tmp_path / "run.toml")])
    for section, table in torchtitan_config(question(plan)).items():
        assert {key: getattr(getattr(loaded, section), key) for key in table} == table


@pytest.mark.filterwarnings("default")
def test_deepspeed_loads_what_is_written(tmp_path, monkeypatch):
    """Its own parser (seen with 0.19.8), which asks the communicator for its size: it is told that of the plan."""
    config = pytest.importorskip("deepspeed.runtime.config")
    monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(config.dist, "get_world_size", lambda: 16)
    overlap = Overlap(grad_reduce=True, param_gather=True)
    plan = Plan(dp_shard=16, zero=3, sequence_parallel=False, micro_batch=2, precision=Precision(gradient_reduce="bf16"), overlap=overlap)
    (tmp_path / "ds.json").write_text(deepspeed_text(question(plan)))
    loaded = config.DeepSpeedConfig(str(tmp_path / "ds.json"))
    batch = (loaded.train_batch_size, loaded.train_micro_batch_size_per_gpu, loaded.gradient_accumulation_steps)
    assert batch == (64, 2, 2)
    assert (int(loaded.zero_config.stage), loaded.zero_config.overlap_comm) == (3, True)
    assert loaded.bfloat16_config.enabled


@pytest.mark.parametrize(
    ("write", "change", "term"),
    [
        (torchtitan_config, {"schedule": "dualpipe", "vpp": 2, "pp": 2, "zero": 2}, "torchtitan cannot say schedule: dualpipe"),
        (torchtitan_config, {"layout": "balanced", "zero": 3}, "torchtitan cannot say layout: balanced"),
        (torchtitan_config, {"recompute": "selective", "zero": 3}, "torchtitan cannot say recompute_modules"),
        (torchtitan_config, {"zero": 1, "overlap": {"tp": "torch"}}, "torchtitan cannot say zero: 1"),
        (torchtitan_config, {"zero": 3}, "torchtitan cannot say overlap.tp: True"),
        (deepspeed_config, {"pp": 2, "sequence_parallel": False}, "DeepSpeed cannot say pp: 2"),
        (deepspeed_config, {"sequence_parallel": True}, "DeepSpeed cannot say sequence_parallel: True"),
        (deepspeed_config, {"dispatcher": "deepep"}, "DeepSpeed cannot say dispatcher: deepep"),
    ],
)
def test_what_cannot_be_said_is_named(write, change, term):
    with pytest.raises(PlanError) as caught:
        write(question(Plan.model_validate({"dp_shard": 8} | change)))
    assert term in [p.numbers for p in caught.value.problems]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model": {}}, r"no \[training\] and no \[parallelism\] section"),
        ({"parallelism": {"tensor_parallel_degree": "two"}}, "tensor_parallel_degree = 'two' is not a whole number from 1 up"),
        ({"parallelism": {"pipeline_parallel_schedule": "1F2B", "pipeline_parallel_degree": 2}}, "1F2B is not a choice; did you mean 1F1B"),
        ({"parallelism": {"fsdp_reshard_after_forward": "sometimes"}}, "'sometimes' is not a choice"),
        ({"training": {"num_tokens_per_train_step": 5000, "seq_len": 4096}}, "no whole number of sequences of 4096"),
    ],
)
def test_torchtitan_refuses(config, text):
    with pytest.raises(PlanError, match=text):
        plan_from_torchtitan(config)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage = 5; write 0, 1, 2 or 3"),
        ({"train_micro_batch_size_per_gpu": -1}, "is not a whole number from 0 up"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp7"}}, "write fp32, bf16 or fp16"),
    ],
)
def test_deepspeed_refuses(config, text):
    with pytest.raises(PlanError, match=text):
        plan_from_deepspeed(config)


@pytest.mark.parametrize(
    ("read", "content", "text"), [(plan_from_torchtitan, "[a", "is not TOML"), (plan_from_deepspeed, "[1]", "JSON object")]
)
def test_files_in_the_wrong_format(tmp_path, read, content, text):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ProfileError, match=text):
        read(tmp_path / "file")
