"""Megatron-LM launch lines: what each flag becomes, Megatron's defaults, what is warned of and what is refused."""

from __future__ import annotations

import pytest
import yaml

from simulator.errors import PlanError
from simulator.formats.megatron import plan_from_megatron
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan, Precision

#: flags that keep the importer quiet, so that a test sees only the warnings of its own flags
QUIET = "--bf16 --micro-batch-size 1 --moe-token-dispatcher-type alltoall "

DEEPSEEK_V3 = r"""
# 128 hosts
NCCL_DEBUG=VERSION torchrun --nproc_per_node=8 --nnodes 128 --node_rank $RANK --master_addr head /opt/pretrain_gpt.py \
    --distributed-timeout-minutes 60 --use-mcore-models --use-flash-attn --transformer-impl transformer_engine \
    --tensor-model-parallel-size 2 \
    --pipeline-model-parallel-size=8 --expert-model-parallel-size 64 --expert-tensor-parallel-size 1 --context-parallel-size 1 \
    --pipeline-model-parallel-layout "Et*3|(tt|)*29,m|L" --mtp-num-layers 1 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --sequence-parallel \
    --micro-batch-size 1 --global-batch-size 8192 --seq-length 4096 --train-samples 585937500 \
    --recompute-granularity selective --recompute-modules mla_up_proj mlp \
    --num-layers 61 --hidden-size 7168 --multi-latent-attention --num-experts 256 --moe-layer-freq ([0]*3+[1]*58) \
    --moe-router-topk 8 --moe-router-dtype fp32 --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep \
    --lr 3.9e-6 --adam-beta2 0.95 --data-path /data --tokenizer-model x --save /out/ckpt --no-load-optim --log-throughput \
    --bf16 --fp8-format e4m3 --fp8-recipe blockwise --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16 2>&1 | tee --append train.log
"""


def warned(line: str) -> list[str]:
    return list(plan_from_megatron(QUIET + line).warnings)


def problems(line) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan_from_megatron(line)
    return [f"{p.rule}: {p}" for p in caught.value.problems]


def test_a_whole_line():
    run = plan_from_megatron(DEEPSEEK_V3)
    assert run.plan == Plan(
        tp=2,
        pp=8,
        vpp=4,
        ep=64,
        etp=1,
        zero=1,
        micro_batch=1,
        schedule="interleaved",
        layout="Ettt|" + "tt|" * 29 + "m|L",
        recompute="selective",
        recompute_modules=("mla_up_proj", "mlp"),
        sequence_parallel=True,
        dispatcher="deepep",
        precision=Precision(gemm="fp8", moments="bf16"),
        overlap=Overlap(grad_reduce=True, param_gather=True),
    )
    assert run.job == {"global_batch": 8192, "sequence_length": 4096, "tokens": 585_937_500 * 4096, "routing": "natural"}
    assert run.accelerators == 1024
    assert run.warnings == (
        "model dimensions are not taken from the line (--mtp-num-layers, --num-layers, --hidden-size and 4 more); name the model",
    )


def test_the_same_flags_as_a_table_with_or_without_model_args_around_them():
    table = yaml.safe_load("""
        MODEL_ARGS:
          --tensor-model-parallel-size: 2
          --pipeline-model-parallel-size: 8
          --expert-model-parallel-size: 64
          --expert-tensor-parallel-size: 1
          --pipeline-model-parallel-layout: Et*3|(tt|)*29,m|L
          --use-distributed-optimizer: true
          --overlap-grad-reduce: true
          --overlap-param-gather: true
          --sequence-parallel: true
          --micro-batch-size: 1
          --global-batch-size: 8192
          --seq-length: 4096
          --train-samples: 585937500
          --recompute-granularity: selective
          --recompute-modules: mla_up_proj mlp
          --num-experts: 256
          --moe-token-dispatcher-type: flex
          --moe-enable-deepep: true
          --fp16: false
          --bf16: true
          --fp8-format: e4m3
          --exp_avg_dtype: bf16
          --exp-avg-sq-dtype: bf16
          --load: null
          --wandb-exp-name: TP${TP}PP${PP}
        """)
    line = plan_from_megatron(DEEPSEEK_V3)
    for source in (table, table["MODEL_ARGS"]):
        run = plan_from_megatron(source)
        assert (run.plan, run.job, run.accelerators) == (line.plan, line.job, None)
        assert run.warnings == ("model dimensions are not taken from the line (--num-experts); name the model",)


def test_shell_arrays_and_windows_line_ends():
    script = (
        "ARGS=(\r\n  --tensor-model-parallel-size 4 \\\r\n  --bf16)\r\nMORE+=(--pipeline-model-parallel-size=2)\r\npython t.py ${ARGS[@]}"
    )
    plan = plan_from_megatron(script).plan
    assert (plan.tp, plan.pp) == (4, 2)


def test_defaults_are_those_of_megatron_not_of_plan():
    plan = plan_from_megatron(QUIET + "--seq-length 4096").plan
    assert plan == Plan(zero=0, sequence_parallel=False, overlap=Overlap(grad_reduce=False, param_gather=False))


@pytest.mark.parametrize(
    ("line", "etp"),
    [
        ("--tensor-model-parallel-size 4 --num-experts 8", 4),  # Megatron slices experts over tp unless told otherwise
        ("--tensor-model-parallel-size 4 --num-experts 8 --expert-tensor-parallel-size 1", 1),
        ("--tensor-model-parallel-size 4 --expert-model-parallel-size 8", 4),
        ("--tensor-model-parallel-size 4", 1),
        ("--tensor-model-parallel-size 4 --num-experts 0", 1),
    ],
)
def test_expert_tensor_parallel_size(line, etp):
    assert plan_from_megatron(QUIET + line).plan.etp == etp


@pytest.mark.parametrize(
    ("line", "zero", "replicas"),
    [
        ("", 0, 1),
        ("--use-distributed-optimizer", 1, 1),
        ("--use-distributed-optimizer --num-distributed-optimizer-instances 4", 1, 4),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy no_shard", 0, 1),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim", 1, 1),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", 2, 1),
        ("--use-custom-fsdp --use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params", 3, 1),
        ("--use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params", 1, 1),  # without FSDP it says nothing
        ("--use-torch-fsdp2", 3, 1),
        ("--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward", 2, 1),
    ],
)
def test_sharding(line, zero, replicas):
    plan = plan_from_megatron(QUIET + line).plan
    assert (plan.zero, plan.dp_replicate, plan.dp_shard) == (zero, replicas, None)


@pytest.mark.parametrize(
    ("line", "overlap"),
    [
        ("--overlap-grad-reduce", Overlap(grad_reduce=True, param_gather=False)),
        ("--overlap-grad-reduce --overlap-param-gather", Overlap(grad_reduce=True, param_gather=True)),
        ("--sequence-parallel --tp-comm-overlap", Overlap(grad_reduce=False, param_gather=False, tp="pieces")),
    ],
)
def test_overlap(line, overlap):
    assert plan_from_megatron(QUIET + line).plan.overlap == overlap


@pytest.mark.parametrize(
    ("line", "vpp", "layout"),
    [
        ("--pipeline-model-parallel-size 8", 1, None),
        ("--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 4", 4, None),
        ("--pipeline-model-parallel-size 8 --num-virtual-stages-per-pipeline-rank 1", 1, None),
        ("--pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 3 --num-layers 96", 4, None),
        ("--pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 12 --num-layers 96", 1, None),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et*2|tL'", 1, "Ett|tL"),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|(tt|)*2mL", 2, "Et|tt|tt|mL"),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'E|(t|)*3,m|m||L'", 4, "E|t|t|t|m|m||L"),  # an empty stage
        ("--pipeline-model-parallel-size 4 --num-layers 10 --decoder-first-pipeline-num-layers 1", 1, "Et|ttt|ttt|tttL"),
        ("--pipeline-model-parallel-size 4 --num-layers 11 --decoder-last-pipeline-num-layers 2", 1, "Ettt|ttt|ttt|ttL"),
        (
            "--pipeline-model-parallel-size 3 --num-layers 10 --num-virtual-stages-per-pipeline-rank 2 "
            "--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 4 --mtp-num-layers 1",
            2,
            "Et|tt|tt|t|tt|ttmL",
        ),
        ("--pipeline-model-parallel-size 2 --num-layers 7 --account-for-embedding-in-pipeline-split", 1, "Ettt|ttttL"),
        (
            "--pipeline-model-parallel-size 2 --num-layers 6 --num-layers-per-virtual-pipeline-stage 2 "
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            2,
            "Et|tt|tt|tL",
        ),
    ],
)
def test_pipeline(line, vpp, layout):
    plan = plan_from_megatron(QUIET + line).plan
    assert (plan.vpp, plan.layout) == (vpp, layout)
    assert plan.schedule == ("interleaved" if vpp > 1 else "1f1b")


@pytest.mark.parametrize(
    ("line", "recompute", "modules"),
    [
        ("", "none", ("core_attn",)),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "full", ("core_attn",)),
        ("--recompute-granularity selective", "selective", ("core_attn",)),
        ("--recompute-activations", "selective", ("core_attn",)),
        ("--recompute-granularity selective --recompute-modules moe_act layernorm mlp", "selective", ("moe_act", "layernorm", "mlp")),
    ],
)
def test_recompute(line, recompute, modules):
    run = plan_from_megatron(QUIET + line)
    assert (run.plan.recompute, run.plan.recompute_modules, run.warnings) == (recompute, modules, ())


@pytest.mark.parametrize(
    ("line", "precision"),
    [
        ("--bf16", Precision()),
        ("--bf16 --fp8-format hybrid", Precision(gemm="fp8")),
        ("--bf16 --fp8-format=e4m3", Precision(gemm="fp8")),
        ("--bf16 --fp4-format e2m1", Precision(gemm="fp4")),
        ("--bf16 --grad-reduce-in-bf16", Precision(gradients="bf16", gradient_reduce="bf16")),
        ("--bf16 --main-grads-dtype bf16", Precision(gradients="bf16", gradient_reduce="bf16")),
        ("--bf16 --main-params-dtype fp16 --exp-avg-dtype fp8 --exp-avg-sq-dtype fp8", Precision(master="fp16", moments="fp8")),
        (
            "--fp16",
            Precision(parameters="fp16", gradients="fp16", gradient_reduce="fp16", gemm="fp16", dispatch="fp16", combine="fp16"),
        ),
        ("--fp16 --accumulate-allreduce-grads-in-fp32", Precision(parameters="fp16", gemm="fp16", dispatch="fp16", combine="fp16")),
    ],
)
def test_precision(line, precision):
    run = plan_from_megatron(f"--micro-batch-size 1 {line}")
    assert run.plan.precision == precision
    assert run.warnings == ()


@pytest.mark.parametrize(
    ("line", "dispatcher", "warnings"),
    [
        ("--moe-token-dispatcher-type alltoall", "alltoall", ()),
        ("--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep", "deepep", ()),
        ("--moe-token-dispatcher-type flex --moe-enable-deepep", "deepep", ()),
        ("--moe-token-dispatcher-type flex", "deepep", ()),  # deepep is the default backend
        ("--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep", "hybridep", ()),
        (
            "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
            "deepep",
            ("--moe-flex-dispatcher-backend ncclep: priced as deepep",),
        ),
        ("--moe-token-dispatcher-type allgather", "alltoall", ("--moe-token-dispatcher-type allgather: priced as alltoall",)),
        ("", "alltoall", ("--moe-token-dispatcher-type is missing, which means allgather: priced as alltoall",)),
    ],
)
def test_dispatcher(line, dispatcher, warnings):
    run = plan_from_megatron(f"--bf16 --micro-batch-size 1 --expert-model-parallel-size 8 {line}")
    assert run.plan.dispatcher == dispatcher
    assert run.warnings == warnings


@pytest.mark.parametrize(
    ("line", "job"),
    [
        ("--global-batch-size 8 --seq-length 16", {"global_batch": 8, "sequence_length": 16}),
        ("--global-batch-size 8 --seq-length 16 --train-iters 100", {"global_batch": 8, "sequence_length": 16, "tokens": 12800}),
        ("--seq-length 16 --train-samples 100", {"sequence_length": 16, "tokens": 1600}),
        ("--train-iters 100", {}),
        ("--optimizer dist_muon", {"optimizer": "muon"}),
        ("--optimizer adam", {"optimizer": "adam"}),
        ("--num-experts 8", {"routing": "natural"}),
        ("--num-experts 8 --moe-router-force-load-balancing", {"routing": "balanced"}),
    ],
)
def test_job(line, job):
    assert plan_from_megatron(QUIET + line).job == job


@pytest.mark.parametrize(
    ("line", "accelerators"),
    [
        ("torchrun --nproc_per_node 8 --nnodes=16 t.py", 128),
        ("torchrun --nproc-per-node 4 t.py", 4),
        ("torchrun --nproc_per_node 8 --nnodes 1:4 t.py", None),
        ("torchrun --nproc_per_node 8 --nnodes $NNODES t.py", None),
        ("python t.py", None),
    ],
)
def test_processes_of_the_launcher(line, accelerators):
    assert plan_from_megatron(f"{line} {QUIET}").accelerators == accelerators


def test_the_last_of_repeated_flags_wins_as_in_argparse():
    assert plan_from_megatron(QUIET + "--tensor-model-parallel-size 2 --tensor-model-parallel-size 4").plan.tp == 4


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("--frobnicate 3", "--frobnicate is unknown and was not read"),
        (
            "--tensor-model-paralel-size 8",
            "--tensor-model-paralel-size is unknown and was not read; did you mean --tensor-model-parallel-size?",
        ),
        (
            "--overlap-moe-expert-parallel-comm",
            "--overlap-moe-expert-parallel-comm without virtual stages: expert all-to-all is priced in line with compute",
        ),
        (
            "--fp8-output-proj",
            "--fp8-output-proj is not modelled: the output projection is priced in bf16; set precision.head: fp8 in the plan",
        ),
        ("--fp8-param-gather", "--fp8-param-gather is not modelled: parameters are kept and gathered in bf16"),
        ("--cuda-graph-impl local", "--cuda-graph-impl is not modelled: every kernel pays its launch"),
        ("--rampup-batch-size 16 16 1000", "--rampup-batch-size is not modelled: every step has the full global batch"),
        ("--optimizer lion", "--optimizer lion is not modelled: the job keeps its own"),
        (
            "--exp-avg-dtype bf16",
            "--exp-avg-dtype differs from --exp-avg-sq-dtype: both are priced as --exp-avg-sq-dtype",
        ),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 4",
            "--recompute-method block --recompute-num-layers 4: priced as full recompute of every layer, one by one",
        ),
        (
            "--recompute-granularity selective --recompute-modules mlp shared_experts",
            "--recompute-modules shared_experts is not modelled: its activations are kept",
        ),
        (
            "--num-layers 4 --hidden-size 8",
            "model dimensions are not taken from the line (--num-layers, --hidden-size); name the model",
        ),
    ],
)
def test_warnings(line, warning):
    assert warned(line) == [warning]


def test_quiet_flags_are_quiet():
    assert warned("--cuda-graph-impl none --cp-comm-type p2p --seed 1 --lr 1e-4 --log-interval 1 --wandb-project x --save /a b") == []


def test_missing_precision_and_micro_batch_are_warned_of():
    assert plan_from_megatron("--tensor-model-parallel-size 2").warnings == (
        "--micro-batch-size is missing; priced as 1",
        "neither --bf16 nor --fp16, which means fp32: priced as bf16",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "--tensor-model-parallel-size eight",
            "--tensor-model-parallel-size: --tensor-model-parallel-size eight is not a whole number from 1 up; "
            "write, for example, --tensor-model-parallel-size 1",
        ),
        (
            "--seq-length 4096.0",
            "--seq-length: --seq-length 4096.0 is not a whole number from 1 up; write, for example, --seq-length 1",
        ),
        (
            "--context-parallel-size 0",
            "--context-parallel-size: --context-parallel-size 0 is not a whole number from 1 up; "
            "write, for example, --context-parallel-size 1",
        ),
        (
            "--expert-model-parallel-size -1",
            "--expert-model-parallel-size: --expert-model-parallel-size -1 is not a whole number from 1 up; "
            "write, for example, --expert-model-parallel-size 1",
        ),
        (
            "--tensor-model-parallel-size ${TP}",
            "--tensor-model-parallel-size: --tensor-model-parallel-size ${TP} is a shell variable; "
            "write its value; variables are not expanded here",
        ),
        ("--global-batch-size --bf16", "--global-batch-size: --global-batch-size has no value; write --global-batch-size VALUE"),
        (
            "--recompute-granularity fulll",
            "--recompute-granularity: --recompute-granularity fulll is not a choice; did you mean full?",
        ),
        (
            "--recompute-granularity selective --recompute-modules core_atn",
            "--recompute-modules: --recompute-modules core_atn is not a choice; did you mean core_attn or moe_act?",
        ),
        (
            "--moe-token-dispatcher-type ring",
            "--moe-token-dispatcher-type: --moe-token-dispatcher-type ring is not a choice; "
            "choose from allgather, alltoall, alltoall_seq, flex",
        ),
        ("--fp8-format e5m2", "--fp8-format: --fp8-format e5m2 is not a choice; did you mean e4m3?"),
        (
            "--num-virtual-stages-per-pipeline-rank 2",
            "--num-virtual-stages-per-pipeline-rank: 2 virtual stages with --pipeline-model-parallel-size 1; "
            "use 2 or more, or drop the virtual stages",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2 --num-virtual-stages-per-pipeline-rank 2",
            "--num-layers-per-virtual-pipeline-stage: --num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank "
            "are given together; keep one of them",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
            "--num-layers-per-virtual-pipeline-stage: --num-layers-per-virtual-pipeline-stage 2 without --num-layers; "
            "add --num-layers, or use --num-virtual-stages-per-pipeline-rank",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2 --num-layers 61",
            "--num-layers-per-virtual-pipeline-stage: --num-layers-per-virtual-pipeline-stage 2: 61 layers do not divide into 4 ranks of "
            "whole chunks of 2; use --num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout",
        ),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Etx|tL'",
            "--pipeline-model-parallel-layout: --pipeline-model-parallel-layout Etx|tL has x; "
            "use E, t, m, L, |, ( ) and *n, e.g. 'Et*3|(tt|)*29,m|L'",
        ),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et|t|tL'",
            "--pipeline-model-parallel-layout: --pipeline-model-parallel-layout Et|t|tL has 3 stages for 2 pipeline ranks; "
            "give a multiple of 2 stages",
        ),
        (
            "--pipeline-model-parallel-size 4 --num-layers 12 --decoder-first-pipeline-num-layers 1",
            "--decoder-first-pipeline-num-layers: 12 layers with 1 layers first, even last: 11 left for 3 ranks of 1 chunks; "
            "change them so that it divides, or use --pipeline-model-parallel-layout",
        ),
        (
            "--pipeline-model-parallel-size 4 --decoder-last-pipeline-num-layers 1",
            "--decoder-last-pipeline-num-layers: --decoder-last-pipeline-num-layers without --num-layers; add --num-layers",
        ),
    ],
)
def test_refusals_name_flag_value_and_remedy(line, problem):
    assert problems(QUIET + line) == [problem]


def test_all_problems_are_reported_at_once():
    found = problems(QUIET + "--tensor-model-parallel-size x --context-parallel-size y --num-experts z")
    assert [p.split(":")[0] for p in found] == ["--tensor-model-parallel-size", "--num-experts", "--context-parallel-size"]


@pytest.mark.parametrize("source", ["", "python train.py", {}, {"num_hidden_layers": 3}])
def test_a_source_without_flags_is_refused(source):
    assert problems(source) == ["Megatron line: no Megatron-LM flag found; paste the command with --tensor-model-parallel-size ..."]


def test_an_open_quote_is_refused():
    assert problems("--bf16 --save 'x") == ['Megatron line: "--bf16 --save \'x" cannot be split: No closing quotation; close the quote']


def test_a_table_whose_model_args_are_not_a_table_is_refused():
    assert problems({"MODEL_ARGS": "--bf16"}) == ["MODEL_ARGS: MODEL_ARGS is '--bf16'; write one '--flag: value' per line"]
