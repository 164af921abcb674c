"""What users already measured is read with its units, and what does not fit is refused with file, line and expectation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from simulator.calibration.importers import megatron_log, nccl_json, nccl_text, profiler_trace, read_foreign, torchtitan_log
from simulator.calibration.machine import CalibrationError
from simulator.errors import ProfileError

NCCL = """# nccl-tests version 2.19.6
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
    33554432       8388608     float     sum      -1    151.2  221.92  388.36       0    150.4  223.10  390.43       0
   536870912     134217728     float     sum      -1   2118.5  253.42  443.48     N/A   2110.1  254.43  445.25     N/A
# Avg bus bandwidth    : 416.88
"""
MEGATRON = """ [2026-11-20 10:00:00] iteration       10/     500 | consumed samples: 2560 | elapsed time per iteration (ms): 5120.4 | \
throughput per GPU (TFLOP/s/GPU): 412.3 | learning rate: 1.0E-05 | global batch size: 256 |
 starting
 [2026-11-20 10:00:05] iteration       11/     500 | consumed samples: 2816 | elapsed time per iteration (ms): 5098.0 | lr: 1 |
"""
TITAN = """[rank0]:[titan] 2026-11-20 10:00:00,000 - root - INFO - \x1b[31mstep: 10  \x1b[32mloss:  9.1  \x1b[33mmemory: 47.52GiB(60.00%)  \
\x1b[34mtps: 7,340  \x1b[36mtflops: 425.05  \x1b[35mmfu: 42.98%\x1b[39m
"""


def written(folder: Path, text: str, name: str = "log.txt") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_nccl_tests_text(tmp_path: Path):
    table = read_foreign(written(tmp_path, NCCL))
    assert len(table) == 4
    assert table["bytes"].tolist() == [33554432, 33554432, 536870912, 536870912]
    assert table["seconds"].tolist() == pytest.approx([151.2e-6, 150.4e-6, 2118.5e-6, 2110.1e-6])
    assert table["bus_bytes_per_s"].max() == pytest.approx(445.25e9)
    assert table["in_place"].tolist() == [False, True, False, True]


def test_nccl_tests_json(tmp_path: Path):
    timed = {"time": 151.2, "alg_bw": 221.9, "bus_bw": 388.4, "nwrong": 0}
    results = [{"size": 33554432, "type": "float", "out_of_place": None, "in_place": timed}]
    table = read_foreign(written(tmp_path, json.dumps({"version": 3, "results": results}), "out.json"))
    assert table.to_dict("records") == [
        {
            "bytes": 33554432,
            "dtype": "float",
            "seconds": pytest.approx(151.2e-6),
            "bus_bytes_per_s": pytest.approx(388.4e9),
            "in_place": True,
        }
    ]


def test_profiler_trace(tmp_path: Path):
    nccl = {"Collective name": "allreduce", "In msg nelems": 1024, "Out msg nelems": 1024, "dtype": "BFloat16"}
    events = [
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel", "ts": 0, "dur": 20, "args": nccl},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 0, "dur": 100, "args": {}},
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 200, "dur": 50},
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    table = read_foreign(path).set_index("name")
    assert table.loc["gemm", ["calls", "seconds"]].tolist() == [2, pytest.approx(150e-6)]
    assert table.loc["allreduce"].to_dict() == {"category": "collective", "calls": 1, "seconds": pytest.approx(20e-6), "bytes": 2048.0}


def test_a_real_trace_of_gloo(tmp_path: Path):
    torch = pytest.importorskip("torch")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        torch.ones(64, 64) @ torch.ones(64, 64)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    table = read_foreign(tmp_path / "trace.json")
    assert "aten::mm" in table["name"].tolist()
    assert (table["seconds"] >= 0).all()


def test_megatron_log(tmp_path: Path):
    table = read_foreign(written(tmp_path, MEGATRON))
    assert table["step"].tolist() == [10, 11]
    assert table["step_time_s"].tolist() == pytest.approx([5.1204, 5.098])
    assert table["flop_per_s"].iloc[0] == pytest.approx(412.3e12)
    assert table["flop_per_s"].isna().tolist() == [False, True]


def test_torchtitan_log(tmp_path: Path):
    row = read_foreign(written(tmp_path, TITAN)).iloc[0].to_dict()
    wanted = {"step": 10, "tokens_per_s": 7340, "flop_per_s": 425.05e12, "mfu": 0.4298, "memory_bytes": 47.52 * 2**30}
    assert row == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (nccl_text, NCCL.replace("388.36       0    150.4", "388.36"), r"line 5: 11 columns; expected 13: size count"),
        (nccl_text, NCCL.replace(" 151.2", "   nan"), r"line 5: time\(us\) is nan; expected a finite number above zero"),
        (nccl_text, NCCL.replace(" 151.2", "     0"), r"line 5: time\(us\) is 0; expected a finite number above zero"),
        (nccl_text, "# nothing\n", "no row of figures"),
        (megatron_log, MEGATRON.replace("5120.4", "fast"), r"line 1: elapsed time per iteration \(ms\) is 'fast'; expected a number"),
        (megatron_log, "elapsed time per iteration: 5\n", r"line 1: .*; expected 'iteration N/ M"),
        (megatron_log, TITAN, "no iteration"),
        (torchtitan_log, "tps: 5\n", r"line 1: 'tps: 5'; expected 'step: N"),
        (torchtitan_log, MEGATRON, "no step"),
        (read_foreign, "hello\nworld\n", r"line 1: 'hello'; expected nccl-tests text, a Megatron-LM log"),
    ],
)
def test_text_that_does_not_fit(tmp_path: Path, reader, text: str, message: str):
    path = written(tmp_path, text)
    with pytest.raises(CalibrationError, match=message) as told:
        reader(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (read_foreign, '{"a": 1}', "neither 'traceEvents' nor 'results'"),
        (read_foreign, '{"results": [\n{]}', "line 2: .*expected JSON"),
        (nccl_json, "[]", "no list 'results'"),
        (nccl_json, '{"results": [{"size": 8, "out_of_place": {"time": 0, "bus_bw": 1}}]}', r"results\[0\].out_of_place.time is 0"),
        (nccl_json, '{"results": [{"size": 8, "out_of_place": null}]}', "no timed result"),
        (profiler_trace, "{}", "no list 'traceEvents'"),
        (profiler_trace, '{"traceEvents": [3]}', "no event with a duration"),
        (profiler_trace, '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "gemm", "dur": NaN}]}', "event 1, 'gemm', has dur = nan"),
        (profiler_trace, '{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "gemm"}]}', "event 1, 'gemm', has dur = None"),
    ],
)
def test_json_that_does_not_fit(tmp_path: Path, reader, text: str, message: str):
    with pytest.raises(CalibrationError, match=message):
        reader(written(tmp_path, text, "x.json"))


def test_no_file_or_a_broken_one(tmp_path: Path):
    with pytest.raises(ProfileError, match="cannot be read"):
        read_foreign(tmp_path / "none.txt")
    (tmp_path / "x.json.gz").write_bytes(b"not gzip")
    with pytest.raises(CalibrationError, match="readable JSON"):
        read_foreign(tmp_path / "x.json.gz")
