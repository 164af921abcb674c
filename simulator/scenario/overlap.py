"""What of a training step runs beside compute instead of after it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulator.scenario.facts import Frozen

#: how tensor parallelism runs its collectives
TensorParallel = bool | Literal["pieces", "kept", "torch", "torch_async"]


class Overlap(Frozen):
    """What runs beside compute instead of after it.

    Parameters
    ----------
    grad_reduce : bool
        Reduce a layer's gradients behind the last backward (Megatron ``--overlap-grad-reduce``).
    param_gather : bool
        Gather a layer's parameters ahead of the first forward (Megatron ``--overlap-param-gather``).
    multiprocessors : float
        Share of the multiprocessors that expert communication takes from the compute beside it in a pair; 0 for copy
        engines and RDMA alone. The default is DeepSeek-V3's 20 of 132 (technical report, 2024, section 3.2.2).
    collective_multiprocessors : float
        Share of the multiprocessors that any other collective takes from the compute beside it. The default is 16 of 132, what
        Transformer Engine gives its communication kernels (``num_sm``, transformer_engine/pytorch/module/base.py).
    tp : bool or str
        True gathers a linear layer's input again beside its input gradient, and reduce-scatters that beside its weight gradient:
        what Megatron and Transformer Engine always do; False does the same with nothing beside. ``pieces`` also cuts the
        products that gather before them or reduce-scatter behind them, so that their pieces run beside those of the collective
        (Transformer Engine's userbuffers, Megatron ``--tp-comm-overlap``; `simulator.workload.ops.arriving`). ``kept`` gathers once for
        all products of an input, keeps the gathered rows, and runs nothing beside a collective: a function of autograd behind the norm
        (Aleph-Alpha/scaling, src/scaling/core/nn/norm/rms_norm.py). ``torch`` is PyTorch's own, the same with copies that lay out the
        rows; ``torch_async`` its asynchronous one, whose products run in pieces beside the collectives where the compiler finds a gather
        before them or a reduce-scatter behind one of them (torch/_inductor/fx_passes/micro_pipeline_tp.py).
    prefetch : int
        Blocks whose parameters ZeRO-3 gathers ahead of the one that runs. The default is what FSDP2 does by itself, and so
        torchtitan; more (``set_modules_to_forward_prefetch``) hides longer gathers and holds as many more blocks, 0 hides none.
    by_tensor : bool
        ZeRO gathers and reduces every matrix in a collective of its own, from and to a list of one tensor per rank, which a
        kernel each copies: DeepSpeed until the end of 2021 (its issue 1069; pull requests 1188 and 1453 changed it). False moves
        the parameters of a block in one collective.
    queued : bool
        An expert all-to-all of a pair starts only when the kernels launched before it have ended, of whichever action: Hopper's
        persistent matrix products hold every multiprocessor until they end, and push a collective that comes later behind them
        (NVIDIA-NeMo/Megatron-Bridge scripts/performance/perf_plugins.py, on ``CUDA_DEVICE_MAX_CONNECTIONS``). False on Blackwell, or
        with multiprocessors set aside.
    host_waits : bool
        Whether the host waits for tensor-parallel collectives before it launches what follows, as where these were timed apart from
        the kernels (vTrain's traces); with nothing beside them, so `tp` is False.
    pp : bool
        Send to other stages beside the next action. False starts it only when the message has left, as Megatron does without
        interleaving or with ``--no-overlap-p2p-communication``.
    """

    grad_reduce: bool = True
    param_gather: bool = True
    multiprocessors: float = Field(default=20 / 132, ge=0, lt=1)
    collective_multiprocessors: float = Field(default=16 / 132, ge=0, lt=1)
    tp: TensorParallel = True
    prefetch: int = Field(default=1, ge=0)
    by_tensor: bool = False
    queued: bool = False
    host_waits: bool = False
    pp: bool = True

    @property
    def beside_gradients(self) -> bool:
        """Whether tensor-parallel collectives run beside the gradients of a linear layer."""
        return self.tp in (True, "pieces")

    @model_validator(mode="after")
    def _waits_for_what_runs_alone(self) -> Overlap:
        if self.host_waits and self.tp is not False:
            raise ValueError(f"overlap.host_waits with overlap.tp: {self.tp} runs kernels beside what the host waits for; write tp: false")
        return self
