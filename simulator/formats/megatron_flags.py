"""Megatron-LM's flags by what they mean here: read, model dimensions, not modelled, harmless. Names without dashes in front."""

from __future__ import annotations


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


#: flags that say something about the plan or the job
READ = _names(
    """
    tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size
    expert-tensor-parallel-size sequence-parallel num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
    pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split num-distributed-optimizer-instances
    micro-batch-size global-batch-size seq-length train-iters train-samples optimizer num-experts num-layers mtp-num-layers
    recompute-activations recompute-granularity recompute-method recompute-num-layers recompute-modules
    use-distributed-optimizer use-megatron-fsdp use-custom-fsdp data-parallel-sharding-strategy use-torch-fsdp2
    torch-fsdp2-no-reshard-after-forward overlap-grad-reduce overlap-param-gather bf16 fp16 fp8-format fp4-format
    grad-reduce-in-bf16 accumulate-allreduce-grads-in-fp32 main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype
    moe-token-dispatcher-type moe-flex-dispatcher-backend moe-enable-deepep moe-router-force-load-balancing
    overlap-moe-expert-parallel-comm no-overlap-p2p-communication use-tp-pp-dp-mapping tp-comm-overlap
    """
)
#: dimensions of the model, which a name or a config.json gives instead; --num-layers is read for the pipeline only
MODEL = _names(
    """
    num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention num-query-groups kv-channels num-experts
    moe-layer-freq moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-router-topk moe-router-num-groups
    moe-router-group-topk multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
    mtp-num-layers swiglu untie-embeddings-and-output-weights make-vocab-size-divisible-by vocab-size padded-vocab-size
    window-size window-attn-skip-freq
    """
)
#: flags that change a step in a way that no field of Plan says, and what is priced instead
NOT_MODELLED = {
    "delay-wgrad-compute": "weight gradients are priced right after input gradients",
    "moe-shared-expert-overlap": "shared experts are priced in line with the all-to-all",
    "moe-expert-capacity-factor": "no token is dropped",
    "moe-pad-expert-input-to-capacity": "experts are not padded",
    "disable-tp-comm-overlap-ag": "all tensor-parallel collectives are priced in pieces",
    "disable-tp-comm-overlap-rs": "all tensor-parallel collectives are priced in pieces",
    "tp-comm-overlap-rs-dgrad": "input gradients are reduce-scattered beside weight gradients",
    "disable-tp-comm-bulk-dgrad": "inputs are gathered again beside input gradients",
    "disable-tp-comm-bulk-wgrad": "input gradients are reduce-scattered beside weight gradients",
    "overlap-param-gather-with-optimizer-step": "the first gather is priced after the optimizer",
    "microbatch-group-size-per-virtual-pipeline-stage": "micro-batches are interleaved in groups of pp",
    "cp-comm-type": "context parallelism is priced as Plan describes it",
    "hierarchical-context-parallel-sizes": "context parallelism is priced as Plan describes it",
    "distribute-saved-activations": "saved activations are kept whole on every tensor-parallel rank",
    "fp8-param-gather": "parameters are kept and gathered in bf16",
    "fp4-param-gather": "parameters are kept and gathered in bf16",
    "fp8-output-proj": "the output projection is priced in bf16; set precision.head: fp8 in the plan",
    "fp32-residual-connection": "residuals are kept in bf16",
    "optimizer-cpu-offload": "optimizer state stays on the accelerator",
    "cpu-offloading": "activations stay on the accelerator",
    "fine-grained-activation-offloading": "activations stay on the accelerator",
    "cuda-graph-impl": "every kernel pays its launch",
    "enable-cuda-graph": "every kernel pays its launch",
    "external-cuda-graph": "every kernel pays its launch",
    "rampup-batch-size": "every step has the full global batch",
    "use-sharp": "collectives are not offloaded to switches",
    "heterogeneous-layers-config-path": "all layers follow the model file",
}
#: flags of the launcher and flags without effect on a step: whole names, then how families of them begin
HARMLESS = _names(
    """
    use-mcore-models use-flash-attn transformer-impl disable-bias-linear add-qkv-bias position-embedding-type normalization
    norm-epsilon qk-layernorm qk-clip init-method-std seed finetune save load split mock-data clip-grad weight-decay hidden-dropout
    attention-dropout attention-backend max-position-embeddings mscale mscale-all-dim num-workers vocab-file merge-file
    moe-grouped-gemm moe-permute-fusion moe-aux-loss-coeff moe-z-loss-coeff moe-per-layer-logging moe-token-drop-policy
    moe-apply-probs-on-input moe-hybridep-num-sms moe-deepep-num-sms mtp-loss-scaling-factor bias-swiglu-fusion
    cross-entropy-loss-fusion cross-entropy-fusion-impl fp8-recipe fp8-margin fp8-amax-history-len fp8-amax-compute-algo
    fp4-recipe use-precision-aware-optimizer reuse-grad-buf-for-mxfp8-param-ag attention-softmax-in-fp32 apply-query-key-layer-scaling
    apply-layernorm-1p use-rotary-position-embeddings manual-gc manual-gc-interval exit-interval exit-duration-in-mins
    calculate-per-token-loss deterministic-mode skip-train test-mode te-rng-tracker local-rank use-cpu-initialization
    gradient-accumulation-fusion ddp-bucket-size ddp-num-buckets ddp-average-in-collective cuda-graph-scope
    cuda-graph-warmup-steps enable-experimental high-priority-stream-groups nccl-communicator-config-path
    nproc-per-node nnodes node-rank master-addr master-port standalone max-restarts tee role monitor-interval
    local-addr nodes ntasks-per-node gpus-per-node sft qk-l2-norm timing-log-level timing-log-option
    tp-comm-bootstrap-backend tp-comm-overlap-cfg
    """
)
HARMLESS_STARTS = _names(
    """
    adam- sgd- muon- lr min-lr decoupled- data- train-data valid-data test-data eval- log- logging- tensorboard- wandb- one-logger
    ckpt- dist-ckpt- save- load- async-save auto-detect- non-persistent- use-dist-ckpt use-persistent-ckpt tokenizer- tiktoken-
    rotary- rope- use-rope no-load- no-save- no-check- no-create- no-mmap no-bias- no-masked- no-rope- no-persist- no-ckpt-
    no-gradient- no-align- no-initialization no-position- no-scatter- no-async- no-weight- no-data- profile use-pytorch-profiler
    record-memory memory-snapshot distributed-timeout distributed-backend moe-router-load- moe-router-score- moe-router-enable-
    moe-router-bias- moe-router-dtype moe-router-pre- moe-router-topk-scaling moe-router-fusion moe-router-padding moe-input-jitter
    loss-scale initial-loss- min-loss- hysteresis override-opt use-checkpoint- start-weight- end-weight- weight-decay- rdzv-
    rerun- error-injection inprocess- check-weight- dataloader num-dataset- reset- eod- create-attention- log-dir container- mpi
    """
)
