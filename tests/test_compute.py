"""Oracle: kernel times on round numbers, worked out by hand, and what must hold for all numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.pricing.compute import RAGGED, attention_s, gemm_s, gemm_shape_efficiency, memory_s, peak_flop_per_s, whole_vectors
from simulator.scenario.profiles import ACCELERATORS

#: heads times queries for which the efficiencies of attention hold
BENCHMARKED = 16 * 16384
#: 1 PFLOP/s bf16 of which half is reached, 1 TB/s of which half; 4 processors of 128 x 256 tiles; nothing shorter than 1 us
ROUND = ACCELERATORS.load("h100-sxm5-80").model_copy(
    update={
        "peak_flop_per_s": {"fp32": 1e14, "bf16": 1e15, "fp8": 2e15},
        "gemm_efficiency": {"fp32": 1.0, "bf16": 0.5, "fp8": 0.25},
        "grouped_gemm_efficiency": 0.8,
        "attention_efficiency": {"forward": 0.5, "backward": 0.4},
        "keys_ramp": None,
        "hbm_bytes_per_s": 1e12,
        "hbm_efficiency": 0.5,
        "launch_s": 1e-6,
        "multiprocessors": 4,
        "tile_m": 128,
        "tile_n": 256,
        "k_ramp": 100,
        "last_wave_recovered": 0.5,
        "head_ramp": 32,
        "in_training": {},
    }
)
NO_RAMP = ROUND.model_copy(update={"k_ramp": 0})
H100 = ACCELERATORS.load("h100-sxm5-80")


# --- which peak ---


@pytest.mark.parametrize(("dtype", "peak"), [("fp4", 2e15), ("fp8", 2e15), ("bf16", 1e15), ("fp16", 1e14), ("fp32", 1e14)])
def test_a_missing_datatype_runs_in_the_next_wider_one(dtype, peak):
    assert peak_flop_per_s(ROUND, dtype) == peak


# --- shape ---


@pytest.mark.parametrize(
    ("m", "n", "groups", "share"),
    [
        (256, 512, 1, 1.0),  # 4 tiles on 4 processors
        (128, 512, 1, 0.5 / 0.75),  # 2 tiles: half a wave, of whose idle half a half is won back
        (192, 512, 1, 0.75),  # 1.5 rows of tiles are computed as 2
        (256, 640, 1, 640 / 768 * 1.5 / 1.75),  # 3 columns of tiles for 2.5, and 6 tiles are a wave and a half
        (128, 256 * 5, 1, 1.25 / 1.625),  # 5 tiles: a second wave for one, three processors half idle
        (128, 256, 4, 1.0),  # four small products fill the processors that one does not
        (128, 256, 1, 0.25 / 0.625),
        (1, 256, 4, 1 / 128),  # one row of a tile
        (1, 1, 1, 1 / 128 / 256 * 0.25 / 0.625),
    ],
)
def test_tiles_and_waves(m, n, groups, share):
    assert gemm_shape_efficiency(m, n, 512, groups, NO_RAMP) == pytest.approx(share, rel=1e-14)


@pytest.mark.parametrize(("k", "share"), [(100, 0.5), (300, 0.75), (900, 0.9)])
def test_depth(k, share):
    assert gemm_shape_efficiency(256, 512, k, 1, ROUND) == pytest.approx(share, rel=1e-14)


def test_a_narrower_element_makes_the_pipeline_deeper():
    """The ramp is bytes in flight: 100 elements of 16 bits are 200 of 8 and 400 of 4."""
    shares = [gemm_shape_efficiency(256, 512, 400, 1, ROUND, dtype) for dtype in ("bf16", "fp8", "fp4")]
    assert shares == pytest.approx([0.8, 400 / 600, 0.5], rel=1e-14)


def test_a_product_that_adds_to_its_result_loses_more_depth_where_nothing_hides_it():
    """8 bytes per element for 2: a ramp of 400 for 100, on hardware that holds one tile of sums."""
    one, two = (ROUND.model_copy(update={"result_tiles": tiles}) for tiles in (1, 2))
    assert gemm_shape_efficiency(256, 512, 400, 1, one, written=8.0) == pytest.approx(0.5, rel=1e-14)
    assert gemm_shape_efficiency(256, 512, 400, 1, two, written=8.0) == gemm_shape_efficiency(256, 512, 400, 1, one)


# --- times ---


def test_gemm_bound_by_compute():
    """1e12 FLOP at 1e15 * 0.5 * 0.9 FLOP/s."""
    assert gemm_s(1e12, 1e6, 256, 512, 900, 1, "bf16", 0.0, ROUND) == pytest.approx(1e12 / 4.5e14, rel=1e-14)


def test_gemm_in_low_precision():
    """Twice the peak, at half the efficiency and with twice the ramp: 900 of 1,100 elements of depth."""
    assert gemm_s(1e12, 1e6, 256, 512, 900, 1, "fp8", 0.0, ROUND) == pytest.approx(1e12 / (5e14 * 900 / 1100), rel=1e-14)


def test_gemm_bound_by_memory():
    assert gemm_s(1e9, 1e9, 256, 512, 900, 1, "bf16", 0.0, ROUND) == pytest.approx(1e9 / 5e11, rel=1e-14)


def test_fp32_sums_cost_a100_a_twentieth_of_a_weight_gradient():
    """MooreThreads/SimuMax on A100: 8,192 x 8,192 over 4,096 tokens at 0.714 of peak, forward 0.733 (k = 8,192)."""
    a100 = ACCELERATORS.load("a100-sxm4-80")
    weight = gemm_shape_efficiency(8192, 8192, 4096, 1, a100, written=8.0)
    forward = gemm_shape_efficiency(4096, 8192, 8192, 1, a100)
    assert weight / forward == pytest.approx(0.714 / 0.733, abs=0.05)
    assert weight < forward


def test_grouped_gemm_is_slower_by_its_efficiency_and_by_what_each_product_costs():
    one, grouped = (gemm_s(1e12, 1e6, 256, 512, 900, 4, "bf16", weights, ROUND) for weights in (0.0, 1e-9))
    assert grouped == pytest.approx(one / 0.8 + 4 * 3.8e-6, rel=1e-12)


def test_products_of_a_group_wait_for_half_of_their_weights():
    few, many = (gemm_s(1e12, 1e6, 256, 512, 900, 4, "bf16", weights, ROUND) for weights in (1e6, 1e9 + 1e6))
    assert many - few == pytest.approx(0.5 * 1e9 / 5e11, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "n", "k", "weights", "reached"),
    [
        (1024, 4096, 7168, 4096 * 7168 * 2, 0.457),
        (512, 4096, 7168, 4096 * 7168 * 2, 0.367),
        (256, 4096, 7168, 4096 * 7168 * 2, 0.272),
        (1024, 7168, 2048, 7168 * 2048 * 2, 0.384),
        (512, 7168, 2048, 7168 * 2048 * 2, 0.410),
        (256, 7168, 2048, 7168 * 2048 * 2, 0.306),
    ],
)
def test_grouped_products_of_few_rows_as_measured_on_b200(rows, n, k, weights, reached):
    """MooreThreads/SimuMax @e691807: forward, 32 to 128 experts, share of 2.25 PFLOP/s."""
    bare = ACCELERATORS.load("b200-sxm-180").model_copy(update={"in_training": {}})
    groups = 32 * 1024 // rows
    flop, size = 2.0 * groups * rows * n * k, 2.0 * groups * (rows * (n + k) + n * k)
    seconds = gemm_s(flop, size, rows, n, k, groups, "bf16", groups * weights, bare)
    assert flop / seconds / 2.25e15 == pytest.approx(reached, rel=0.22)


def test_elements_addressed_one_by_one_as_measured_on_h100():
    """PyTorch 2.11: a clamp of half the columns of 65,536 x 5,760 elements takes 535 us."""
    bare = H100.model_copy(update={"in_training": {}})
    assert memory_s(0.0, bare, addressed=65536 * 2880) == pytest.approx(535e-6, rel=0.01)
    assert memory_s(1e9, bare, addressed=1e9) == pytest.approx(memory_s(1e9, bare) + memory_s(0.0, bare, 0.0, addressed=1e9), rel=1e-12)


@pytest.mark.parametrize(
    ("width", "backward", "rate"),
    [
        (128, False, 5e14),
        (128, True, 4e14),
        (64, False, 5e14 * (64 / 96) / (128 / 160)),
        (192, True, 4e14 * 0.9),
        (192, False, 5e14),  # no faster than at 128, for which the efficiency holds
    ],
)
def test_attention(width, backward, rate):
    assert attention_s(1e12, 1e6, width, 4096, BENCHMARKED, backward, ROUND) == pytest.approx(1e12 / rate, rel=1e-14)


def test_attention_of_few_heads_leaves_multiprocessors_idle():
    """MooreThreads/SimuMax on A100, sequences of 4,096: share of the speed of 64 heads with 4, 8, 16, 32 heads, both ways."""
    a100 = ACCELERATORS.load("a100-sxm4-80")
    speed = {h: h / attention_s(h * 1e13, 1e6, 128, 2048, h * 4096, False, a100) for h in (4, 8, 16, 32, 64)}
    share = [speed[h] / speed[64] for h in (4, 8, 16, 32)]
    forward, backward = [0.433, 0.655, 0.835, 0.955], [0.671, 0.756, 0.878, 0.971]
    between = [(there + 3 * back) / 4 for there, back in zip(forward, backward, strict=True)]  # of the time, a quarter is forward
    assert share == pytest.approx(between, abs=0.05)


def test_attention_of_few_keys_and_in_8_bits():
    """cuDNN on GB200, causal: 2048 to 32768 tokens at 0.68 to 1.10 of the speed of 8192 forward, 0.71 to 1.03 both ways."""
    gb200 = ACCELERATORS.load("gb200-186").model_copy(update={"in_training": {"gemm": 1.2}})  # a burst: no power is short
    speed = {s: 1 / attention_s(1e15, 1e6, 128, (s + 1) / 2, BENCHMARKED, True, gb200) for s in (2048, 4096, 8192, 32768)}
    assert [speed[s] / speed[8192] for s in (2048, 4096, 32768)] == pytest.approx([0.754, 0.902, 1.089], abs=1e-3)
    for width, gains in ((64, (1.0, 0.6)), (128, (1.2, 0.94)), (160, (1.38, 1.27))):
        for backward, gain in zip((False, True), gains, strict=True):
            bf16, low = (attention_s(1e15, 1e6, width, 4096, BENCHMARKED, backward, gb200, kernel) for kernel in ("flash", "flash_fp8"))
            assert bf16 / low == pytest.approx(gain)
            shipped = ACCELERATORS.load("gb200-186")  # and no more where power is short
            bf16, low = (attention_s(1e15, 1e6, width, 4096, BENCHMARKED, backward, shipped, kernel) for kernel in ("flash", "flash_fp8"))
            assert bf16 / low == pytest.approx(gain)
    unknown = attention_s(1e12, 1e6, 128, 4096, BENCHMARKED, False, ROUND, "flash_fp8")
    assert attention_s(1e12, 1e6, 128, 64, BENCHMARKED, False, ROUND) == unknown


@pytest.mark.parametrize(("name", "rates"), [("gb200-186", (660, 740, 787)), ("gb300-288", (734, 827, 880))])
def test_backward_of_narrow_heads_in_8_bits(name, rates):
    """cuDNN 9.22, two sequences of 4,096 to 16,384 tokens, 128 heads of 64: TFLOP/s over all causal keys."""
    gpu = ACCELERATORS.load(name).model_copy(update={"in_training": {}})
    for sequence, rate in zip((4096, 8192, 16384), rates, strict=True):
        flop = 2.5 * 4 * 2 * 128 * 64 * sequence**2 / 2
        seconds = attention_s(flop, 1e6, 64, sequence / 2, 128 * 2 * sequence, True, gpu, "flash_fp8")
        assert flop / seconds / 1e12 == pytest.approx(rate, rel=0.03)


def test_attention_keeps_the_matrix_units_no_busier_than_products_do():
    """Attention that would be faster runs at the rate of long products, the backward at 0.83 of it, as SimuMax's table has it on B200."""
    gb200 = ACCELERATORS.load("gb200-186")
    kept, peak = gb200.in_training, gb200.peak_flop_per_s["bf16"]
    forward, backward = (1e15 / peak / float(attention_s(1e15, 1e6, 128, 4096, BENCHMARKED, b, gb200)) for b in (False, True))
    assert forward == pytest.approx(gb200.gemm_efficiency["bf16"] * kept["gemm"], rel=1e-12)
    assert backward == pytest.approx(0.83 * forward, rel=1e-12)
    assert forward < gb200.attention_efficiency["forward"] * kept["attention"]
    assert backward < gb200.attention_efficiency["backward"] * kept["attention"]
    slow = gb200.model_copy(update={"attention_efficiency": {"forward": 0.3, "backward": 0.2}})
    assert 1e15 / peak / float(attention_s(1e15, 1e6, 128, 4096, BENCHMARKED, True, slow)) == pytest.approx(0.2 * kept["attention"])


def test_gathering_rows_is_slower_than_streaming():
    assert memory_s(1e9, ROUND, gathers=True) == pytest.approx(1e-6 + 2e-3 / 0.75, rel=1e-14)


def test_attention_bound_by_memory():
    assert attention_s(1e9, 1e9, 128, 4096, BENCHMARKED, False, ROUND) == pytest.approx(1e9 / 5e11, rel=1e-14)


def test_memory():
    """Kernels follow each other: each starts, then streams its bytes."""
    assert memory_s(1e9, ROUND) == pytest.approx(1e-6 + 2e-3, rel=1e-14)
    assert memory_s(1e9, ROUND, launches=7) == pytest.approx(7e-6 + 2e-3, rel=1e-14)


def test_no_kernel_is_shorter_than_a_launch_and_no_work_takes_no_time():
    assert memory_s(1.0, ROUND) == pytest.approx(1e-6, rel=1e-5)
    assert gemm_s(1.0, 1.0, 1, 1, 1, 1, "bf16", 0.0, ROUND) == pytest.approx(1e-6)
    assert attention_s(1.0, 1.0, 128, 4096, BENCHMARKED, False, ROUND) == 1e-6
    assert (
        memory_s(0.0, ROUND)
        == gemm_s(0.0, 0.0, 0, 512, 512, 1, "bf16", 0.0, ROUND)
        == attention_s(0.0, 0.0, 128, 4096, BENCHMARKED, True, ROUND)
        == 0.0
    )


def test_a_published_gemm():
    """H100, bf16, 8192^3: 0.76 of 989 TFLOP/s less the losses of the shape, between the 717 and 786 TFLOP/s that were measured, or near."""
    n = 8192
    benchmarked = H100.model_copy(update={"in_training": {}})  # nothing else draws power or fills the caches
    seconds = gemm_s(2 * n**3, 6 * n**2, n, n, n, 1, "bf16", 0.0, benchmarked)
    assert 2 * n**3 / seconds / 1e12 == pytest.approx(717, rel=0.05)


def layer_ms(name: str, dtype: str) -> float:
    """Return milliseconds of the twelve products of a layer, cast before: Transformer Engine @8f2e635, docs/examples/gemm_profiling."""
    bare = ACCELERATORS.load(name).model_copy(update={"in_training": {}})
    rows, narrow, wide = 15872, 4096, 16384
    took = 0.0
    for k, n in ((narrow, 3 * narrow), (narrow, narrow), (narrow, wide), (wide, narrow)):
        for shape in ((rows, n, k), (rows, k, n), (k, n, rows)):
            took += float(gemm_s(2.0 * rows * n * k, 0.0, *shape, 1, dtype, 0.0, bare))
    return took * 1e3


@pytest.mark.parametrize(("dtype", "ms"), [("bf16", (13.102,)), ("fp8", (6.812, 7.161)), ("fp4", (3.764,))])
def test_a_published_layer_in_narrow_datatypes(dtype, ms):
    assert layer_ms("b300-sxm-288", dtype) == pytest.approx(sum(ms) / len(ms), rel=0.03)


def test_published_products_in_eight_bits_on_hopper():
    """H200 NVL, a card of less power: 31.968 ms in bf16, 16.785 in FP8."""
    name = "h200-sxm-141"
    assert layer_ms(name, "bf16") / layer_ms(name, "fp8") == pytest.approx(31.968 / 16.785, rel=2e-3)


# --- for all numbers ---

SIZES = st.integers(1, 20000)
WORK = st.floats(1, 1e15)


@given(m=SIZES, n=SIZES, k=SIZES, groups=st.integers(1, 64))
def test_a_share_is_a_share(m, n, k, groups):
    assert 0 < gemm_shape_efficiency(m, n, k, groups, H100) <= 1


@given(m=SIZES, more=st.integers(0, 5000), n=SIZES, k=SIZES, groups=st.integers(1, 8), grouped=st.booleans())
def test_more_rows_never_take_less_time(m, more, n, k, groups, grouped):
    def seconds(rows):
        return float(
            gemm_s(2.0 * groups * rows * n * k, 2.0 * groups * (rows * k + k * n + rows * n), rows, n, k, groups, "bf16", grouped, H100)
        )

    assert seconds(m) <= seconds(m + more) * (1 + 1e-12)


@given(flop=WORK, size=WORK, more=st.floats(1, 10), m=SIZES, n=SIZES, k=SIZES)
def test_more_flop_or_bytes_never_take_less_time(flop, size, more, m, n, k):
    base = gemm_s(flop, size, m, n, k, 1, "bf16", False, H100)
    assert gemm_s(flop * more, size, m, n, k, 1, "bf16", False, H100) >= base
    assert gemm_s(flop, size * more, m, n, k, 1, "bf16", False, H100) >= base
    assert attention_s(flop * more, size * more, 128, 4096, BENCHMARKED, False, H100) >= attention_s(
        flop, size, 128, 4096, BENCHMARKED, False, H100
    )
    assert memory_s(size * more, H100) >= memory_s(size, H100)


@given(flop=WORK, size=WORK, more=st.floats(1, 10), m=SIZES, n=SIZES, k=SIZES)
def test_faster_hardware_is_never_slower(flop, size, more, m, n, k):
    peaks = {dtype: peak * more for dtype, peak in H100.peak_flop_per_s.items()}
    for better in (
        H100.model_copy(update={"peak_flop_per_s": peaks}),
        H100.model_copy(update={"hbm_bytes_per_s": more * H100.hbm_bytes_per_s}),
    ):
        assert gemm_s(flop, size, m, n, k, 1, "fp8", True, better) <= gemm_s(flop, size, m, n, k, 1, "fp8", True, H100)
        assert attention_s(flop, size, 96, 4096, BENCHMARKED, True, better) <= attention_s(flop, size, 96, 4096, BENCHMARKED, True, H100)
        assert memory_s(size, better) <= memory_s(size, H100)


@given(rows=st.lists(st.tuples(WORK, WORK, SIZES, SIZES, SIZES, st.integers(1, 8)), min_size=1, max_size=6))
def test_columns_are_priced_as_rows(rows):
    columns = [np.array(c, dtype=float) for c in zip(*rows, strict=True)]
    together = gemm_s(*columns, "bf16", True, H100)
    assert together.tolist() == [float(gemm_s(*row, "bf16", True, H100)) for row in rows]
    flop, size, width = columns[:3]
    assert attention_s(flop, size, width, 4096, BENCHMARKED, True, H100).tolist() == [
        float(attention_s(f, b, w, 4096, BENCHMARKED, True, H100)) for f, b, w, *_ in rows
    ]
    assert memory_s(size, H100).tolist() == [float(memory_s(b, H100)) for b in size]


def test_rows_that_are_no_whole_vectors_are_slow():
    """Vectors are 16 bytes: 8 elements of bf16, 16 of fp8. A single product still uses the matrix units, a batch of them does not."""
    assert [bool(whole_vectors(width, 4096, "bf16")) for width in (104, 108)] == [True, False]
    assert [bool(whole_vectors(width, 64, "fp8")) for width in (96, 104)] == [True, False]
    shape = 1e12, 1e6, 256, 512, 900, 1, "bf16", False, ROUND
    assert gemm_s(*shape, whole=False) == pytest.approx(gemm_s(*shape) / RAGGED, rel=1e-14)
    fp32 = ROUND.peak_flop_per_s["fp32"] * ROUND.gemm_efficiency["fp32"]
    assert gemm_s(*shape, whole=False, batched=True) == pytest.approx(1e12 / (fp32 * 900 / 1000), rel=1e-14)
