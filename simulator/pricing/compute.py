"""How long a kernel takes: the roofline times the efficiency that its shape allows. Pure functions of numbers."""

from __future__ import annotations

import numpy as np

from simulator.scenario.cluster import Accelerator, InTraining
from simulator.scenario.measured import KernelCost
from simulator.scenario.plan import NARROW
from simulator.units import Number

_WIDER = ("fp4", "fp8", "bf16", "fp16", "fp32")
#: speed of kernels that gather or scatter rows, over that of kernels that stream: 0.50 and 0.51 of the memory bandwidth for
#: permutes forward and backward, 0.67 for others, measured on B200 (MooreThreads/SimuMax @e691807 configs/system/b200_bf16_ceperm.json)
GATHERING = 0.75
#: what an element costs a kernel of PyTorch that computes its place from the sizes of the tensor, in FLOP that the ordinary cores could
#: do meanwhile; measured with PyTorch 2.11 on one H100: clamping one half of the columns of a bf16 matrix, or multiplying a matrix and a
#: row, handles 353 billion elements a second, whatever the matrix, half as many as with rows of their own; in fp32, with twice the
#: bytes, 1.2 times fewer
ADDRESSED_FLOP = 190.0
#: keys per query at which attention is benchmarked: a causal sequence of 8,192
_KEYS = 4096
#: share of the time to move their weights, or the gradients of these, that products of a group take longer by, because each begins with
#: weights that nobody has read, and what each of them costs beside. 0.49 and 3.8 us fit the 60 grouped products of 128 to 9,832 rows
#: that MooreThreads/SimuMax @e691807 configs/system/b200_bf16_ceperm.json has measured on B200, with misses of 14 %; the share alone
#: leaves 19 %. On one H100 0.3 to 0.5 (cuBLAS of CUDA 13.0, four streams, 256 to 2,048 rows) and 3.4 to 3.6 us
COLD_WEIGHTS, EACH_PRODUCT_S = 0.5, 3.8e-6
#: speed of the backward of heads wider than 128, over that of 128: 0.87 to 0.91 for widths of 192 and 128 on an H100 (cuDNN of
#: PyTorch 2.11, measured by this project on 2026-11-26); 0.92, 0.90 and 0.86 over 4,096, 8,192 and 16,384 tokens on GB200 and GB300
#: alike (NVIDIA/cudnn-frontend @60e572b benchmark/sdpa_benchmark_training/results, dsv3 over llama3.1)
_WIDE_BACKWARD = 0.9
#: what the backward of attention keeps up in a long step, over the forward: 0.413 and 0.50 of the peak over 131,072 tokens on B200
#: (MooreThreads/SimuMax @e691807 configs/system/b200_bf16_ceperm.json, 8 and 16 heads), where it also finds scores again and adds gradients
_LONG_BACKWARD = 0.83
#: queries of one head that a multiprocessor takes at a time, and heads times queries at which attention is benchmarked
_QUERIES = 128
_HEADS_QUERIES = 16 * 16384
#: elements in 16 bits
_PER_16_BITS = {"fp4": 4.0, "fp8": 2.0}
#: bytes per element of the result that benchmarks of products write
_BENCHMARKED = 2.0
#: elements whose rows the matrix units load in whole vectors of 16 bytes
_VECTOR = {"fp4": 32, "fp8": 16, "bf16": 8, "fp16": 8, "fp32": 4}
#: speed of a product with rows that are no whole vectors, over that of one whose rows are; published: Netflix, "Scaling LLM
#: Post-Training at Netflix", 2026, saw a third of it in output projections to vocabularies that are not padded. NVIDIA, "Matrix
#: Multiplication Background User's Guide": cuBLAS 11 still uses the matrix units then, but less efficiently
RAGGED = 0.4


def _run_as(accelerator: Accelerator, dtype: str) -> str:
    """Return the datatype that a kernel for `dtype` runs in: the next wider one that the hardware has."""
    return next(d for d in _WIDER[_WIDER.index(dtype) :] if d in accelerator.peak_flop_per_s)


def peak_flop_per_s(accelerator: Accelerator, dtype: str) -> float:
    """Return the dense peak for `dtype`, FLOP/s; a datatype that the hardware lacks runs at the next wider one's."""
    return accelerator.peak_flop_per_s[_run_as(accelerator, dtype)]


def gemm_shape_efficiency(
    m: Number, n: Number, k: Number, groups: Number, accelerator: Accelerator, dtype: str = "bf16", written: Number = _BENCHMARKED
) -> Number:
    """Return the share of a large GEMM's speed that `groups` products (m, k) x (k, n) reach, 0 to 1.

    Parameters
    ----------
    dtype : str
        Datatype that it runs in.
    written : Number
        Bytes that its epilogue moves per element of the result.

    Notes
    -----
    Three losses multiply. Tiles: the output is computed in whole ``tile_m x tile_n`` tiles. Waves: tiles of a kernel go to the
    multiprocessors in whole waves, of whose last one `last_wave_recovered` is won back. Depth: a tile costs
    ``k + k_ramp`` for 16 bits per element; the pipeline that is filled and drained moves bytes, so a narrower element makes it as
    many times as deep. Where a multiprocessor holds one tile of sums, `result_tiles`, nothing hides that all write theirs at once:
    H100's ramp of 2.9 us is what the memory takes for 132 tiles of 16 bits, 3.3 us, and adding to a main gradient moves more.
    """
    tile_m, tile_n = accelerator.tile_m, accelerator.tile_n
    tiles = np.ceil(np.maximum(m, 1) / tile_m) * np.ceil(np.maximum(n, 1) / tile_n)
    waves = np.maximum(groups * tiles / accelerator.multiprocessors, 1e-9)
    spent = np.ceil(waves) - accelerator.last_wave_recovered * (np.ceil(waves) - waves)
    ramp = accelerator.k_ramp * _PER_16_BITS.get(dtype, 1.0)
    if accelerator.result_tiles == 1:
        ramp = ramp * written / _BENCHMARKED
    return m * n / (tiles * tile_m * tile_n) * (waves / spent) * k / (k + ramp)


def whole_vectors(inner: Number, n: Number, dtype: str) -> Number:
    """Return whether the rows of a product's matrices, `inner` and `n` elements long, are whole vectors of 16 bytes."""
    vector = _VECTOR[dtype]
    return (np.mod(inner, vector) == 0) & (np.mod(n, vector) == 0)


def gemm_s(
    flop: Number,
    size: Number,
    m: Number,
    n: Number,
    k: Number,
    groups: Number,
    dtype: str,
    grouped: Number,
    accelerator: Accelerator,
    whole: Number = True,
    batched: bool = False,
    written: Number = _BENCHMARKED,
) -> Number:
    """Return seconds of a GEMM or of a grouped one.

    Parameters
    ----------
    flop, size : Number
        FLOP and bytes of all products.
    m, n, k, groups : Number
        Shape of one product, and how many there are.
    dtype : str
        Datatype of the inputs.
    grouped : Number
        Bytes of the weights or of their gradients where the products have their own and a kernel each, side by side; else 0.
    whole : Number
        Whether rows are `whole_vectors`; if not, it is slower.
    batched : bool
        Whether it is one kernel for many small products: with rows that are no whole vectors, libraries run it on the ordinary
        cores, at the rate of fp32.
    written : Number
        Bytes that the epilogue moves per element of the result.

    Notes
    -----
    ``max(launch, FLOP / (peak * efficiency(dtype) * efficiency(shape)), bytes / (bandwidth * efficiency))``, the
    roofline of Williams, Waterman, Patterson, "Roofline", 2009.
    """
    run_as = _run_as(accelerator, dtype)
    rate = accelerator.peak_flop_per_s[run_as] * accelerator.gemm_efficiency[run_as]
    rate = rate * _in_training(accelerator, "gemm_low" if run_as in NARROW else "gemm")
    if np.any(grouped):
        beside = accelerator.grouped_gemm_efficiency * _in_training(accelerator, "grouped")
        rate = rate * np.where(np.asarray(groups) > 1, beside, 1.0)  # one alone is a plain product
    ordinary = accelerator.peak_flop_per_s["fp32"] * accelerator.gemm_efficiency["fp32"] if batched else RAGGED * rate
    rate = np.where(whole, rate, np.minimum(ordinary, rate))
    share = np.maximum(gemm_shape_efficiency(m, n, k, groups, accelerator, run_as, written), 1e-9)
    cold = COLD_WEIGHTS * _streamed(grouped, accelerator) + EACH_PRODUCT_S * np.asarray(groups) * (np.asarray(grouped) > 0)
    return _launched(np.maximum(flop / (rate * share) + cold, _streamed(size, accelerator)), flop, accelerator)


def attention_s(
    flop: Number,
    size: Number,
    width: Number,
    keys: Number,
    heads_queries: Number,
    backward: bool,
    accelerator: Accelerator,
    generation: str = "flash",
) -> Number:
    """Return seconds of fused attention.

    Parameters
    ----------
    width : Number
        Mean of the key and value widths of a head.
    keys : Number
        Mean number of keys that a query sees.
    heads_queries : Number
        Heads times queries of one kernel.
    generation : str
        ``flash`` for the hardware's fastest kernels in bf16, ``flash_fp8`` in 8 bits, or an older generation of ``older_attention``.

    Notes
    -----
    The efficiency holds for width 128 and 4,096 keys; others run at ``d / (d + head_ramp)`` relative to that, wider ones no
    faster, at ``keys / (keys + keys_ramp)``, and at ``n / (n + tiles_ramp)`` for n tiles of 128 queries per multiprocessor. The matrix
    units do no more in attention than in products, and less backward: both draw the power that sets the clock of a long step
    (`_sustained`). In 8 bits it gains what it does in benchmarks, also on that.
    """
    ramp, short = accelerator.head_ramp, accelerator.keys_ramp or 0
    narrow = np.where(width > 128, _WIDE_BACKWARD if backward else 1.0, width / (width + ramp) * (128 + ramp) / 128)
    narrow = narrow * keys / (keys + short) * (_KEYS + short) / _KEYS
    idle = (accelerator.tiles_ramp or 0) * accelerator.multiprocessors * _QUERIES
    narrow = narrow * heads_queries / (heads_queries + idle) * (_HEADS_QUERIES + idle) / _HEADS_QUERIES
    share = accelerator.attention_efficiency["backward" if backward else "forward"] * accelerator.older_attention.get(generation, 1.0)
    share = share * narrow * _in_training(accelerator, "attention")
    share = np.minimum(share, _sustained(accelerator, backward))
    if generation == "flash_fp8":
        way = "backward" if backward else "forward"
        wide, ordinary, slim = (accelerator.fp8_attention.get(name, 1.0) for name in (f"wide_{way}", way, f"narrow_{way}"))
        share = share * np.where(width > 128, wide, np.where(width > 64, ordinary, slim))
    seconds = np.maximum(flop / (peak_flop_per_s(accelerator, "bf16") * share), _streamed(size, accelerator))
    return _launched(seconds, flop, accelerator)


def _sustained(accelerator: Accelerator, backward: bool) -> float:
    """Return the share of the bf16 peak that the matrix units keep up in a step: that of large products, `_LONG_BACKWARD` of it backward.

    Published, on B200 at 1000 W (MooreThreads/SimuMax @e691807 configs/system/b200_bf16_ceperm.json): 0.45 to 0.51 in large products, 0.495
    in the forward of attention over 131,072 tokens, where short runs of both reach 0.65 and more.
    """
    products = accelerator.gemm_efficiency[_run_as(accelerator, "bf16")] * _in_training(accelerator, "gemm")
    return products * _LONG_BACKWARD if backward else products


def memory_s(size: Number, accelerator: Accelerator, launches: Number = 1.0, gathers: bool = False, addressed: Number = 0.0) -> Number:
    """Return seconds of `launches` kernels that are bound by device memory: `size` bytes at the sustained bandwidth.

    Parameters
    ----------
    gathers : bool
        Whether they gather or scatter rows (`GATHERING`).
    addressed : Number
        Elements of those kernels that compute every place, which takes longer than their bytes (`ADDRESSED_FLOP`).

    Notes
    -----
    ``launches * launch + bytes / bandwidth``: each starts when the one before it has drained, so that nothing streams meanwhile.
    """
    computed = addressed * ADDRESSED_FLOP / accelerator.peak_flop_per_s["fp32"]
    seconds = launches * accelerator.launch_s + _streamed(size, accelerator) / (GATHERING if gathers else 1.0) + computed
    return np.where(np.asarray(size + addressed) > 0, seconds, 0.0)


def host_wait_s(launches: Number, meanwhile_s: Number, dispatch_s: float | None) -> Number:
    """Return how long a device that has worked for `meanwhile_s` still waits for the host to launch the last kernel."""
    return 0.0 if dispatch_s is None else np.maximum(launches * dispatch_s - meanwhile_s, 0.0)


def measured_s(flop: Number, size: Number, calls: Number, cost: KernelCost, keys: Number = 0.0, kept: float = 1.0) -> Number:
    """Return seconds of a kernel whose cost was measured on this machine; no work takes no time.

    Parameters
    ----------
    kept : float
        Share of the measured speed that a step of several ranks keeps.
    keys : Number
        Attention: mean number of keys that a query sees.
    """
    seconds = calls * cost.launch_s
    if cost.keys:
        spent = 1.0 / np.asarray(cost.flop_per_s_at_keys)
        seconds = seconds + flop * np.interp(np.log(np.maximum(keys, 1.0)), np.log(cost.keys), spent)
    elif cost.flop_per_s:
        seconds = seconds + flop / cost.flop_per_s
    if cost.bytes_per_s:
        seconds = seconds + size / cost.bytes_per_s
    return np.where(np.asarray(flop + size) > 0, seconds / kept, 0.0)


def _streamed(size: Number, accelerator: Accelerator) -> Number:
    return size / (accelerator.hbm_bytes_per_s * accelerator.hbm_efficiency * _in_training(accelerator, "memory"))


def _in_training(accelerator: Accelerator, part: InTraining) -> Number:
    return accelerator.in_training.get(part, 1.0)


def _launched(seconds: Number, work: Number, accelerator: Accelerator) -> Number:
    """No kernel is shorter than a launch; no work takes no time."""
    return np.where(np.asarray(work) > 0, np.maximum(seconds, accelerator.launch_s), 0.0)
