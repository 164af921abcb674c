"""Oracle: torchao's own benchmark of float8 training, as ratios in which the speed of the machine cancels.

Llama-3 8B on one host of 8 H100, FSDP2, torch.compile, checkpointing by operation, 8,192 tokens per sequence: 6,019 tokens/s per
accelerator in bf16, 7,190 with one scale per tensor and float8 gathers, 6,649 with one scale per row (pytorch/ao pull request 1793,
torchao/float8/README.md; the batch is printed as 2, the peaks of 47.7 GiB are those of 1). None of these rows is fitted.
"""

from __future__ import annotations

import pytest

import simulator as sim
from simulator.validation.published import published_runs, scenario_from_row

BF16, TENSORWISE, ROWWISE = 6019.0, 7190.0, 6649.0


@pytest.fixture(scope="module")
def row() -> dict[str, str]:
    runs = published_runs().set_index("id", drop=False)
    return dict(runs.loc["tt-8b-8-f8"])


def seconds(row: dict[str, str], precision: str, micro_batch: int) -> float:
    scenario, _ = scenario_from_row(row | {"precision": precision, "mbs": str(micro_batch), "gbs": str(8 * micro_batch)})
    return float(sim.estimate(scenario))


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(
    ("precision", "measured"), [("float8 tensorwise (fp8 all-gather)", TENSORWISE / BF16), ("float8 rowwise", ROWWISE / BF16)]
)
def test_speed_up_over_bf16(row, precision, measured, micro_batch):
    assert seconds(row, "bf16", micro_batch) / seconds(row, precision, micro_batch) == pytest.approx(measured, rel=0.04)
