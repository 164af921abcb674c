"""Read what users already measured: nccl-tests (text and JSON), torch.profiler traces, Megatron-LM and torchtitan logs. No torch.

Every reader returns a table with SI units; `read_foreign` finds the format by the content. What does not fit is refused with the
file, the line and what was expected.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from simulator.calibration.machine import CalibrationError
from simulator.scenario.profiles import read_text

#: bytes of an element in nccl-tests' words
_NCCL_BYTES = {"int8": 1, "uint8": 1, "half": 2, "bfloat16": 2, "float": 4, "int32": 4, "uint32": 4, "double": 8, "int64": 8, "uint64": 8}
_NCCL_ROW = "size count type redop root time(us) algbw(GB/s) busbw(GB/s) #wrong"
_MEGATRON = re.compile(r"iteration\s+(\d+)/\s*\d+.*?elapsed time per iteration \(ms\):\s*([^\s|]+)")
_MEGATRON_RATE = re.compile(r"throughput per GPU \(TFLOP/s/GPU\):\s*([^\s|]+)")
_TITAN = re.compile(r"step:\s*(\d+)\s.*?tps:\s*([\d,.a-zA-Z]+)")
_TITAN_MORE = {
    "flop_per_s": (re.compile(r"tflops:\s*([\d,.]+)"), 1e12),
    "mfu": (re.compile(r"mfu:\s*([\d.]+)%"), 0.01),
    "memory_bytes": (re.compile(r"memory:\s*([\d.]+)GiB"), 2.0**30),
}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def _wrong(path: Path, line: int | None, found: str, expected: str) -> CalibrationError:
    where = f"{path}, line {line}" if line else str(path)
    return CalibrationError(f"{where}: {found}; expected {expected}")


def _number(text: Any, path: Path, line: int | None, what: str) -> float:
    """Return a time or rate that is finite and above zero."""
    try:
        value = float(str(text).replace(",", ""))
    except ValueError:
        raise _wrong(path, line, f"{what} is {text!r}", "a number") from None
    if not math.isfinite(value) or value <= 0:
        raise _wrong(path, line, f"{what} is {text}", "a finite number above zero")
    return value


def nccl_text(path: str | Path) -> pd.DataFrame:
    """Return a table of nccl-tests' text output.

    Returns
    -------
    DataFrame
        ``bytes`` (total array), ``dtype``, ``seconds``, ``bus_bytes_per_s``, ``in_place``; two rows per line.
    """
    path, rows = Path(path), []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        cells = line.split()
        if not cells or cells[0].startswith("#") or not cells[0].isdigit():
            continue
        if len(cells) not in (13, 12):  # the column #wrong is N/A or absent for the in-place run of some
            raise _wrong(path, number, f"{len(cells)} columns", f"13: {_NCCL_ROW}, the last four twice")
        for in_place, first in ((False, 5), (True, 9)):
            seconds = _number(cells[first], path, number, "time(us)") * 1e-6
            bus = _number(cells[first + 2], path, number, "busbw(GB/s)") * 1e9
            rows.append({"bytes": int(cells[0]), "dtype": cells[2], "seconds": seconds, "bus_bytes_per_s": bus, "in_place": in_place})
    if not rows:
        raise _wrong(path, None, "no row of figures", f"nccl-tests' lines: {_NCCL_ROW}")
    return pd.DataFrame(rows)


def nccl_json(path: str | Path) -> pd.DataFrame:
    """Return the same table from nccl-tests' ``-J`` output, file version 3."""
    path = Path(path)
    data, rows = _json(path), []
    if not isinstance(data, dict) or not isinstance(data.get("results"), list):
        raise _wrong(path, None, "no list 'results'", "nccl-tests -J output: results[].{size, type, out_of_place{time, bus_bw}}")
    for index, result in enumerate(data["results"]):
        for key, in_place in (("out_of_place", False), ("in_place", True)):
            timed = result.get(key)
            if timed is None:
                continue
            where = f"results[{index}].{key}"
            time = timed.get("time", timed.get("cpu_time"))
            seconds = _number(time, path, None, f"{where}.time") * 1e-6
            bus = _number(timed.get("bus_bw"), path, None, f"{where}.bus_bw") * 1e9
            row = {"bytes": int(result["size"]), "dtype": result.get("type"), "seconds": seconds, "bus_bytes_per_s": bus}
            rows.append(row | {"in_place": in_place})
    if not rows:
        raise _wrong(path, None, "no timed result", "results[].out_of_place or in_place with a time")
    return pd.DataFrame(rows)


def profiler_trace(path: str | Path) -> pd.DataFrame:
    """Return kernels and collectives of a torch.profiler trace (JSON or JSON.gz), summed by name.

    Returns
    -------
    DataFrame
        ``name``, ``category``, ``calls``, ``seconds``, ``bytes`` (of NCCL's message; 0 where the trace does not say it).
    """
    path = Path(path)
    data = _json(path)
    if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
        raise _wrong(path, None, "no list 'traceEvents'", "a Chrome trace as torch.profiler's export_chrome_trace writes it")
    rows = [row for number, event in enumerate(data["traceEvents"], start=1) if (row := _event(path, number, event))]
    if not rows:
        raise _wrong(path, None, "no event with a duration", "events of ph X with name, cat, dur")
    table = pd.DataFrame(rows).groupby(["name", "category"], as_index=False).agg(
        calls=("seconds", "size"), seconds=("seconds", "sum"), bytes=("bytes", "sum")
    )  # fmt: skip
    return table.sort_values("seconds", ascending=False, ignore_index=True)


_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op", "user_annotation")
_ELEMENT = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Byte": 1, "Char": 1, "Int": 4, "Long": 8}


def _event(path: Path, number: int, event: Any) -> dict[str, Any] | None:
    if not isinstance(event, dict) or event.get("ph") != "X" or event.get("cat") not in _CATEGORIES:
        return None
    duration = event.get("dur")
    # zero is a duration: older traces count whole microseconds
    if not isinstance(duration, int | float) or not math.isfinite(duration) or duration < 0:
        found = f"event {number}, {str(event.get('name', ''))[:60]!r}, has dur = {duration!r}"
        raise _wrong(path, None, found, "a duration in microseconds, zero or more")
    said = event.get("args") or {}
    name = said.get("Collective name") or event.get("name", "")
    elements = max(said.get("In msg nelems", 0) or 0, said.get("Out msg nelems", 0) or 0)
    return {
        "name": str(name),
        "category": "collective" if "Collective name" in said or str(name).startswith(("gloo:", "nccl:")) else event["cat"],
        "seconds": duration * 1e-6,
        "bytes": float(elements) * _ELEMENT.get(str(said.get("dtype", "")), 0),
    }


def megatron_log(path: str | Path) -> pd.DataFrame:
    """Return the iterations in a Megatron-LM log: ``step``, ``step_time_s``, ``flop_per_s`` (per GPU, Megatron's formula)."""
    path, rows = Path(path), []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if "elapsed time per iteration" not in line:
            continue
        match = _MEGATRON.search(line)
        if not match:
            raise _wrong(path, number, f"{line.strip()[:60]!r}", "'iteration N/ M | ... elapsed time per iteration (ms): T'")
        rate = _MEGATRON_RATE.search(line)
        seconds = _number(match[2], path, number, "elapsed time per iteration (ms)") / 1e3
        flop = _number(rate[1], path, number, "throughput per GPU (TFLOP/s/GPU)") * 1e12 if rate else None
        rows.append({"step": int(match[1]), "step_time_s": seconds, "flop_per_s": flop})
    if not rows:
        raise _wrong(path, None, "no iteration", "lines with 'elapsed time per iteration (ms): T'")
    return pd.DataFrame(rows)


def torchtitan_log(path: str | Path) -> pd.DataFrame:
    """Return the steps in a torchtitan log: ``step``, ``tokens_per_s`` (per GPU), ``flop_per_s``, ``mfu``, ``memory_bytes``."""
    path, rows = Path(path), []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        line = _ESCAPES.sub("", line)
        if "tps:" not in line:
            continue
        match = _TITAN.search(line)
        if not match:
            raise _wrong(path, number, f"{line.strip()[:60]!r}", "'step: N ... tps: 1,234 tflops: T mfu: P%'")
        row: dict[str, Any] = {"step": int(match[1]), "tokens_per_s": _number(match[2], path, number, "tps")}
        for name, (pattern, unit) in _TITAN_MORE.items():
            found = pattern.search(line)
            row[name] = _number(found[1], path, number, name) * unit if found else None
        rows.append(row)
    if not rows:
        raise _wrong(path, None, "no step", "lines with 'step: N ... tps: T'")
    return pd.DataFrame(rows)


def _json(path: Path) -> Any:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return json.load(file)
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise _wrong(path, error.lineno, error.msg, "JSON") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _wrong(path, None, str(error), "a readable JSON file, gzip if it ends in .gz") from None


def read_foreign(path: str | Path) -> pd.DataFrame:
    """Return the table in a foreign file, whatever of the known formats it is in.

    Raises
    ------
    CalibrationError
        When it is in none of them.
    """
    path = Path(path)
    if path.suffix in (".json", ".gz"):
        data = _json(path)
        keys = data.keys() if isinstance(data, dict) else ()
        if "traceEvents" in keys:
            return profiler_trace(path)
        if "results" in keys:
            return nccl_json(path)
        raise _wrong(path, 1, "neither 'traceEvents' nor 'results'", "a torch.profiler trace or nccl-tests -J output")
    text = read_text(path)
    for mark, reader in _marks():
        if mark.search(text):
            return reader(path)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    expected = "nccl-tests text, a Megatron-LM log ('elapsed time per iteration (ms):') or a torchtitan log ('tps:')"
    raise _wrong(path, 1, f"{first[:60]!r}", expected)


def _marks() -> Iterator[tuple[re.Pattern, Any]]:
    yield re.compile(r"elapsed time per iteration"), megatron_log
    yield re.compile(r"tps:"), torchtitan_log
    yield re.compile(r"busbw|out-of-place|nccl-tests"), nccl_text
