"""Which kernels a training stack runs: attention, norms, pointwise operations, and what is captured in CUDA graphs."""

from __future__ import annotations

from typing import Literal

from simulator.scenario.facts import Frozen

#: ``flash`` is the fastest fused attention for the hardware; ``flash_fp8`` the same in 8 bits; the others are what older stacks run
Attention = Literal["flash", "flash_fp8", "flash2", "flash1", "unfused", "eager"]
Fusion = Literal["fused", "eager"]
Norm = Literal["fused", "eager", "eager_fp32"]
#: how the experts of a rank are multiplied
Grouping = Literal["grouped", "fused", "sequential"]
#: how a weight gradient is added to what earlier micro-batches left
Accumulation = Literal["fused", "separate", "none"]
#: how the gate and the up-projection of an MLP are multiplied
Gate = Literal["fused", "separate"]
#: what launches the kernels of the backward
Backward = Literal["functions", "engine"]
#: parts of a layer, in the words of Megatron's ``cuda_graph_scope``; ``full`` is the whole iteration
Graph = Literal["attn", "moe_router", "moe_preprocess", "moe", "mlp", "full"]

#: beginnings of the names of the operations that each scope captures (megatron/core/transformer/transformer_layer.py,
#: ``_get_submodules_under_cudagraphs``)
_SCOPES: dict[str, tuple[str, ...]] = {
    "attn": ("attn",),
    "moe_router": ("router", "shared.", "moe.norm"),
    "moe_preprocess": ("moe.permute", "moe.dispatch"),
    "moe": ("router", "moe.", "shared."),
    "mlp": ("mlp.",),
    "full": ("",),
}


class Kernels(Frozen):
    """The kernels of a training stack.

    Parameters
    ----------
    attention : str
        ``flash``: the fastest fused kernel (FlashAttention-3, cuDNN). ``flash_fp8``: the same with products in 8 bits.
        ``flash2``, ``flash1``: those generations.
        ``unfused``: scores in memory, with one kernel for scale, mask and softmax (Megatron-LM up to 2022).
        ``eager``: scores in memory, a kernel for each of scale, mask, fp32 softmax (plain PyTorch).
    norm, pointwise : str
        ``eager`` runs RMSNorm, or rotary embedding, activation and loss, as the separate PyTorch operations that
        they are written in, each of which reads and writes device memory. A norm that is ``eager_fp32`` casts the row before
        all else and so keeps its fp32 copy in place of the row (torchtitan/models/norms.py @0c355e6, as Llama's own).
    router : str
        ``fused``: a kernel each for scores with top-k and for the balancing loss (Transformer Engine 2.6, Megatron's
        ``moe_router_fusion``); ``eager``: the separate PyTorch operations that Megatron writes them in.
    dropout : bool
        Whether attention weights and residual branches are dropped out.
    experts : str
        ``grouped``: a product per expert, a kernel for each activation and cast. ``fused``: one product over all experts, as
        efficient as a dense one, whose epilogue activates and casts (the CuTeDSL kernels of cuDNN, Transformer Engine pull
        request 2769); it takes the experts' loads from device memory, so a whole step can be a CUDA graph.
        ``sequential``: a dense product for each expert, one after the other (Megatron's ``SequentialMLP``).
    accumulation : str
        ``fused``: the product itself adds a weight gradient to the main gradients (Megatron since 2022, Transformer Engine).
        ``separate``: it writes the gradient, which a kernel of its own then adds to them. ``none``: it writes the gradient, and there is
        nothing to add it to: every micro-batch is a first one, as in a trace.
    gate : str
        ``fused``: gate and up-projection of a dense MLP are one linear layer. ``separate``: two, each with its own tensor-parallel
        collectives (Aleph-Alpha/scaling, src/scaling/core/nn/mlp.py), or with one for both in PyTorch's own tensor parallelism.
    backward : str
        ``functions``: autograd functions in Python, as Transformer Engine's, whose kernels cost the host as much as forward ones.
        ``engine``: PyTorch's own gradients, which its engine launches from C++.
    latent_rotary : str
        Rotary embedding of latent attention: ``fused``, a kernel that turns a part of every query and one that puts keys together;
        ``eager``, as PyTorch's operations, which also join the parts of queries and keys and copy the values (Megatron before mid-2025,
        whose configuration refused to fuse them: NVIDIA/Megatron-LM issue 1411).
    glue : bool
        Whether kernels of their own copy queries out of a joint projection, join its gradients, sum up those of one input and find
        those of routing probabilities (Megatron); not in the steps of `simulator.calibration`, whose measured kernels hold that.
    graphs : tuple of str
        Parts of a layer whose kernels are captured in CUDA graphs, so that the host does not launch them one by one.
    """

    attention: Attention = "flash"
    norm: Norm = "fused"
    pointwise: Fusion = "fused"
    router: Fusion = "eager"
    dropout: bool = False
    experts: Grouping = "grouped"
    accumulation: Accumulation = "fused"
    gate: Gate = "fused"
    backward: Backward = "functions"
    latent_rotary: Fusion = "fused"
    glue: bool = True
    graphs: tuple[Graph, ...] = ()

    @property
    def joins_queries(self) -> bool:
        """Whether a row of the projection holds queries beside their key and value, as in stacks that also join gate and up-projection."""
        return self.gate == "fused"

    def captured(self, name: str) -> bool:
        """Return whether the operation `name` of a layer is in a CUDA graph."""
        return any(name.startswith(_SCOPES[scope]) for scope in self.graphs)
