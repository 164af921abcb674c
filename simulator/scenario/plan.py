"""How the work is divided: degrees on the axes, schedule, sharding, recompute, precision, overlap."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from simulator.scenario.facts import Frozen
from simulator.scenario.framework import Framework
from simulator.scenario.kernels import Kernels
from simulator.scenario.overlap import Overlap
from simulator.scenario.placement import ORDER, Placement
from simulator.units import Bytes

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "fp4"]
Schedule = Literal[
    "gpipe", "1f1b", "interleaved", "interleaved-overlapped", "interleaved-zb",
    "zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v", "v-half", "v-min", "dualpipe", "dualpipev", "table",
]  # fmt: skip
#: schedules that need several model chunks on a rank, and those that need exactly two
INTERLEAVED, TWO_CHUNKS = ("interleaved", "interleaved-overlapped", "interleaved-zb"), ("zb-v", "v-half", "v-min", "dualpipe", "dualpipev")
Recompute = Literal["none", "selective", "full"]
Dispatcher = Literal["alltoall", "deepep", "hybridep"]
#: parts of a layer whose activations selective recompute may drop, in Megatron's words; mlp_act is moe_act for a dense MLP
Module = Literal["core_attn", "layernorm", "mlp_act", "moe_act", "mla_up_proj", "mlp", "moe", "attn_out", "mlp_gate", "tp_gather"]
#: modules that torchtitan's checkpointing by operation computes again: of each layer's products it keeps the first, third, fifth
#: and seventh (query, value, gate, down), and attention (torchtitan/distributed/activation_checkpoint.py)
EVERY_OTHER_PRODUCT: tuple[Module, ...] = ("layernorm", "tp_gather", "attn_out", "mlp_gate", "mlp_act")

#: bytes of one element; fp8 and fp4 carry one scale per 128 and per 16 elements
ELEMENT_BYTES: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0 + 4 / 128, "fp4": 0.5 + 1 / 16}
#: datatypes narrower than 16 bits, which tensors are cast to for products
NARROW = ("fp8", "fp4")


#: how chunks follow one another: around the ranks again, back from the last rank, or two models in opposite directions
WIRINGS = ("loop", "v", "two-way")
_WIRING = re.compile(r"^[ \t]*wiring:[ \t]*(\S*)[ \t]*$", re.MULTILINE)


def wiring(table: str | None) -> str:
    """Return what the line ``wiring: ...`` of a user's table says; ``loop`` without one."""
    line = _WIRING.search(table or "")
    return line[1] if line else WIRINGS[0]


class Precision(Frozen):
    """Datatype of each class of tensors.

    Parameters
    ----------
    parameters, gradients, master, moments : str
        Model weights, main gradients, master weights (``None`` if the weights are their own) and optimizer moments.
    gemm : str
        Linear layers; attention stays in bf16.
    head : str
        The output projection: in 16 bits, or in 8 where the recipe asks for it (Megatron's ``fp8_output_proj``, with MXFP8 alone).
    activations : str
        What an MLP keeps of its up-projection for the gradient of the activation function (DeepSeek-V3: fp8).
    dispatch, combine : str
        Expert all-to-all to the experts (activations forward, gradients backward) and back from them.
    gradient_reduce : str
        Gradient reduce-scatter or all-reduce.
    gather : str or None
        What tensor-parallel all-gathers carry ahead of linear layers. None: what those multiply when that is narrower than 16 bits,
        as Transformer Engine casts before it gathers (``gather_along_first_dim``, transformer_engine/pytorch/distributed.py), and
        torchao with one scale per tensor (torchao/float8/float8_tensor_parallel.py), else 16 bits. Sums are scattered in 16 bits.
    parameter_gather : str or None
        What ZeRO gathers the parameters of the layers in; None: as they are. In FP8 torchao casts the shards once
        (``enable_fsdp_float8_all_gather``); embedding and head stay in 16 bits.
    layouts : int
        Copies of a weight, an input or a gradient that narrow products read: 2, scaled along rows or laid out by rows and along
        columns; 1 where one scale serves a whole tensor and the matrix units take either layout, as Blackwell's do in FP8
        (``nvte_is_non_tn_fp8_gemm_supported``, NVIDIA/TransformerEngine transformer_engine/common/gemm/cublaslt_gemm.cu;
        pytorch/csrc/quantizer.cpp).
    block : int
        Elements along a row, and down a column, that share a scale of one byte: 32 in MXFP8, 16 in NVFP4. What is gathered by rows then
        serves no product that reads columns. 0: one scale for a tensor, whose gathered rows are laid out anew for the other.
    """

    parameters: Dtype = "bf16"
    gradients: Dtype = "fp32"
    master: Dtype | None = "fp32"
    moments: Dtype = "fp32"
    gemm: Dtype = "bf16"
    head: Dtype = "bf16"
    activations: Dtype = "bf16"
    dispatch: Dtype = "bf16"
    combine: Dtype = "bf16"
    gradient_reduce: Dtype = "fp32"
    gather: Dtype | None = None
    parameter_gather: Dtype | None = None
    layouts: Literal[1, 2] = 2
    block: Literal[0, 16, 32] = 0

    @property
    def casts_weights(self) -> bool:
        """Whether weights arrive in 16 bits and are cast for every pass of a narrow layer."""
        return self.parameter_gather not in NARROW

    @property
    def gathered(self) -> Dtype:
        """The datatype of tensor-parallel all-gathers: `gather`, or by default that of narrow linear layers."""
        return self.gather or (self.gemm if self.gemm in NARROW else "bf16")


class Reserve(Frozen):
    """Memory that no tensor of the model explains: four figures for all software (`RESERVE_SOURCES`); better, measure your own.

    Parameters
    ----------
    context : float
        Driver context, loaded kernels and libraries, bytes, outside the allocator.
    communicator : float
        Buffers that the communication library keeps for every group of ranks, bytes, outside the allocator.
    workspace : float
        Scratch space of the matrix libraries, bytes, inside the allocator.
    fragmentation : float
        Share of the allocator's memory lost between blocks.
    """

    context: Bytes = "1 GB"
    communicator: Bytes = "0.5 GB"
    workspace: Bytes = "0.1 GB"
    fragmentation: float = Field(default=0.05, ge=0, lt=1)


#: field of `Reserve` -> grade of its default, its bounds and where it comes from
RESERVE_SOURCES: dict[str, tuple[str, str]] = {
    "context": ("assumed", "0.5 to 1.5 GB: driver context, kernels and libraries that a PyTorch process loads on A100 and H100"),
    "communicator": ("assumed", "0.2 to 0.6 GB: channels and buffers that NCCL keeps for a group of ranks"),
    "workspace": ("assumed", "0.06 to 0.13 GB: 32 MiB each for cuBLAS, cuBLASLt and Transformer Engine"),
    "fragmentation": ("published", "0.03 to 0.08: reserved over allocated bytes of 31 SimuMax B200 runs are 1.03 to 1.09, 1.05 on average"),
}


class _Degrees:
    """Products of degrees, the same for one `Plan` and for columns of plans."""

    @property
    def dp(self):
        """Data-parallel degree: replicas times shards."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self):
        """Ranks in the plan."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def edp(self):
        """Data-parallel degree of the experts: dp * cp * tp / (etp * ep)."""
        return self.dp * self.cp * self.tp // (self.etp * self.ep)

    @property
    def shard(self):
        """Ranks that share one copy of the sharded dense state: dp_shard * cp."""
        return self.dp_shard * self.cp

    @property
    def copies(self):
        """Copies of the model that one pipeline holds: DualPipe's two directions each have their own."""
        return 2 if self.two_way else 1

    @property
    def two_way(self) -> bool:
        """Whether micro-batches enter at both ends, through two copies of the model."""
        return self.schedule == "dualpipe" or wiring(self.table) == "two-way"

    @property
    def expert_shard(self):
        """Ranks that share one copy of the sharded expert state: edp / dp_replicate, at least 1."""
        return self.dp_shard * self.cp * self.tp // (self.etp * self.ep)

    @property
    def minimum_world(self):
        """Fewest ranks that hold the plan: pp times what both meshes need, tp * cp and etp * ep (their least common multiple)."""
        return self.pp * np.lcm(self.tp * self.cp, self.etp * self.ep)

    @property
    def recomputed(self) -> frozenset[str]:
        """The modules whose activations are dropped and computed again."""
        return frozenset(self.recompute_modules) if self.recompute == "selective" else frozenset()


class Plan(Frozen, _Degrees):
    """How one training step is divided over ranks.

    Attention lives on a mesh tp x cp x dp x pp, experts on etp x ep x edp x pp over the same ranks.

    Parameters
    ----------
    tp, cp, pp, ep, etp : int
        Tensor, context, pipeline, expert and expert-tensor parallel degrees.
    vpp : int
        Model chunks per pipeline rank.
    dp_replicate, dp_shard : int
        Data-parallel degree is their product; state is sharded over `dp_shard`. None fills the cluster.
    zero : int
        0: nothing sharded; 1: optimizer state; 2: and gradients; 3: and parameters.
    micro_batch : int
        Sequences per micro-batch.
    schedule : str
        ``gpipe``, ``1f1b``; with vpp > 1 ``interleaved``, ``interleaved-overlapped`` (forward and backward in pairs) and
        ``interleaved-zb``; zero-bubble ``zb-h1``, ``zb-h2``, ``zb-1p``, ``zb-2p``; with vpp = 2 ``zb-v``, ``v-half`` and
        ``v-min`` (about half and a third of the activations of 1F1B), ``dualpipe`` and ``dualpipev``; or ``table``.
    table : str or None
        The user's own schedule: a line per rank, entries such as ``0F3``, ``1B2`` or the pair ``0F3+1B2``. A line ``wiring: v``
        (chunk 1 runs back from the last rank) or ``wiring: two-way`` (chunk 1 is a second copy of the model, entered at the last
        rank by the second half of the micro-batches) may stand before them.
    layout : str or None
        None divides the layers evenly; ``balanced`` evens out their FLOP; else stages in Megatron's letters, ``|``
        between: E embedding, t layer, m MTP layer, L head, e.g. ``Et*3|t*4|t*4|tmL`` or ``Et*3|(t*4|)*2tmL``.
    recompute : str
        ``none``, ``selective`` (the `recompute_modules`) or ``full``.
    recompute_modules : tuple of str
        In Megatron's words; and ``attn_out`` and ``mlp_gate``, the output projection of attention and the gate's (of `kernels` that
        keep the gate apart), ``tp_gather``, the gathered rows of tensor parallelism.
    recompute_share : float
        Share of the layers that full recompute covers; every layer counts as their average.
    sequence_parallel : bool
        Split norms and residuals over tp, as Megatron does.
    dispatcher : str
        ``alltoall`` sends one copy per expert; ``deepep`` sends one per host that a token visits and fans out inside; ``hybridep``
        does the same, and its host waits for what arrived before it launches more.
    pxn : bool
        All-to-all crosses to the rail of its target over the scale-up links of the source's host (NCCL's PXN).
    placement : Placement
        Which accelerator each rank gets; in Megatron's default order unless said otherwise.
    context_parallel : str
        How context parallelism moves the sequence: ``ring`` passes keys and values on beside attention, ``all_gather`` gathers them
        before it and again before its backward, after which their gradients are reduced (Llama 3), ``all_to_all`` trades sequence
        for heads before it and heads for sequence after it (Ulysses), and keeps the output of both sides.
    kernels : Kernels
        Which generation of kernels the training stack runs.
    framework : Framework
        What the training framework keeps in memory.
    """

    tp: int = Field(default=1, gt=0)
    cp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    vpp: int = Field(default=1, gt=0)
    ep: int = Field(default=1, gt=0)
    etp: int = Field(default=1, gt=0)
    dp_replicate: int = Field(default=1, gt=0)
    dp_shard: int | None = Field(default=None, gt=0)
    zero: Literal[0, 1, 2, 3] = 1
    micro_batch: int = Field(default=1, gt=0)
    schedule: Schedule = "1f1b"
    table: str | None = None
    layout: str | None = None
    recompute: Recompute = "none"
    recompute_modules: tuple[Module, ...] = ("core_attn",)
    recompute_share: float = Field(default=1.0, gt=0, le=1)
    sequence_parallel: bool = True
    dispatcher: Dispatcher = "alltoall"
    context_parallel: Literal["ring", "all_gather", "all_to_all"] = "ring"
    precision: Precision = Precision()
    reserve: Reserve = Reserve()
    overlap: Overlap = Overlap()
    pxn: bool = True
    placement: Placement = Placement()
    kernels: Kernels = Kernels()
    framework: Framework = Framework()

    @model_validator(mode="after")
    def _schedule_and_chunks(self) -> Plan:
        if self.schedule in TWO_CHUNKS:
            legal, needs = self.vpp == 2, "vpp: 2"
        elif self.schedule in INTERLEAVED:
            legal, needs = self.vpp > 1, "vpp: 2 or more"
        else:
            legal, needs = self.vpp == 1 or self.schedule == "table", "vpp: 1, or schedule: interleaved"
        if not legal:
            raise ValueError(f"schedule = {self.schedule} with vpp = {self.vpp} model chunks per rank; write {needs}")
        if (self.schedule == "table") != (self.table is not None):
            raise ValueError("schedule: table and the table's text go together; give both or neither")
        if wiring(self.table) not in WIRINGS:
            raise ValueError(f"table: wiring {wiring(self.table)!r}; write wiring: {', '.join(WIRINGS[:-1])} or {WIRINGS[-1]}")
        if wiring(self.table) != "loop" and self.vpp != 2:
            raise ValueError(f"table: wiring {wiring(self.table)} with vpp = {self.vpp} model chunks per rank; write vpp: 2")
        return self

    @model_validator(mode="after")
    def _pieces_of_sequence_parallel_rows(self) -> Plan:
        if not isinstance(self.overlap.tp, bool) and not self.sequence_parallel:
            raise ValueError(
                f"overlap.tp: {self.overlap.tp} with sequence_parallel: false has no rows to gather; write sequence_parallel: true"
            )
        return self

    @property
    def fans_out(self) -> bool:
        """Whether the dispatcher sends one copy of a token to each scale-up domain that it visits, to be copied on inside."""
        return self.dispatcher != "alltoall"

    @property
    def stages(self) -> int:
        """Stages that one copy of the model is divided into; DualPipe's two chunks are two copies."""
        return self.pp if self.two_way else self.pp * self.vpp

    def with_rank_axis(self) -> Plan:
        """Return the plan itself: one number broadcasts over ranks as it is."""
        return self

    def on(self, accelerators: int) -> Plan:
        """Return this plan with `dp_shard` filled so that it covers `accelerators`, if it was left out."""
        if self.dp_shard is not None:
            return self
        return self.model_copy(update={"dp_shard": max(1, accelerators // (self.tp * self.cp * self.pp * self.dp_replicate))})

    def __str__(self) -> str:
        axes = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")
        parts = [f"{a}{getattr(self, a)}" for a in axes if getattr(self, a) > 1 or a in ("tp", "pp", "dp")]
        parts += [f"zero{self.zero}", f"mbs{self.micro_batch}"]
        parts += [] if self.schedule in ("1f1b", "interleaved") else [self.schedule]  # vpp tells these two apart
        parts += [] if self.placement.order == ORDER else [self.placement.order]
        return " ".join(parts + ([] if self.recompute == "none" else [self.recompute]))


@dataclass(frozen=True)
class PlanColumns(_Degrees):
    """Many plans at once: the degrees and sizes are arrays, what remains is one category for all of them.

    Every physics function takes it in place of a `Plan` and returns one number per plan.
    """

    tp: np.ndarray
    cp: np.ndarray
    pp: np.ndarray
    vpp: np.ndarray
    ep: np.ndarray
    etp: np.ndarray
    dp_replicate: np.ndarray
    dp_shard: np.ndarray
    micro_batch: np.ndarray
    like: Plan

    def __getattr__(self, name: str) -> Any:
        return getattr(self.like, name)

    def __len__(self) -> int:
        return len(self.tp)

    def take(self, index: np.ndarray) -> PlanColumns:
        """Return the plans at `index`."""
        return PlanColumns(**{name: getattr(self, name)[index] for name in COLUMNS}, like=self.like)

    def with_rank_axis(self) -> PlanColumns:
        """Return the plans with a trailing axis, along which ranks of each may be laid."""
        return PlanColumns(**{name: getattr(self, name)[..., None] for name in COLUMNS}, like=self.like)

    def row(self, index: int) -> Plan:
        """Return one of the plans."""
        return self.like.model_copy(update={name: int(getattr(self, name)[index]) for name in COLUMNS})


#: the columns of `PlanColumns`
COLUMNS = tuple(f.name for f in fields(PlanColumns) if f.name != "like")


def single(values: Any) -> int:
    """Return the one value of a scalar or of a column in which all plans agree."""
    return int(np.asarray(values).flat[0])
