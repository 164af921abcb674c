"""How fast matrix products are beside copies, on this machine's GPU: ``python tools/clock.py``; with PyTorch and CUDA.

A GPU that multiplies all the time would draw more power than it may and lowers its clock; one that also copies lowers it less. First prints
what products reach before the power limit acts, then for each share of the time in products their rate, the power and the clock, as medians
over the second half of some seconds. ``docs/mechanisms.md`` cites it.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable

import pandas as pd
import torch

SIZE = 8192
COPIED = 2**29
SECONDS = 4.0
#: products that end before the power limit acts
SHORT = 20
#: products and copies in a row: both within some milliseconds, over which the power limit averages
PATTERNS = ((10, 0), (10, 2), (10, 6), (10, 14), (10, 36), (5, 60), (0, 40))


def main() -> None:
    """Print the table."""
    print(torch.cuda.get_device_name(), torch.__version__)
    pairs = [[torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in "ab"] for _ in range(3)]  # more than the cache holds
    out, source = torch.empty_like(pairs[0][0]), torch.randn(COPIED // 2, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def multiply(i: int) -> None:
        torch.mm(*pairs[i % len(pairs)], out=out)

    def copy(_: int) -> None:
        target.copy_(source)

    print(f"in the first {SHORT} products after a rest: {rested(multiply):.0f} TFLOP/s")
    lines = [measured(multiply, copy, products, copies) for products, copies in PATTERNS]
    print(pd.DataFrame(lines).to_string(index=False, float_format="%.3g"))


def rested(multiply: Callable[[int], None]) -> float:
    """Return TFLOP/s of the first products after a rest, less the very first, for which the clock rises."""
    multiply(0)
    torch.cuda.synchronize()
    time.sleep(3.0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    multiply(0)
    start.record()
    for i in range(SHORT):
        multiply(i)
    end.record()
    torch.cuda.synchronize()
    return 2 * SIZE**3 * SHORT / start.elapsed_time(end) / 1e9


def measured(multiply: Callable[[int], None], copy: Callable[[int], None], products: int, copies: int) -> dict[str, float]:
    """Return the rates of products and copies that take turns, the share of the time in products, and what the GPU draws meanwhile."""
    for i in range(3):  # libraries choose their kernels
        multiply(i)
        copy(i)
    torch.cuda.synchronize()
    time.sleep(1.0)
    query = ["nvidia-smi", "--query-gpu=power.draw.average,clocks.sm", "--format=csv,noheader,nounits", "-lms", "200"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, text=True) as watch:
        start, multiplied, copied = time.perf_counter(), [], []
        while time.perf_counter() - start < SECONDS:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            marks[0].record()
            for i in range(products):
                multiply(i)
            marks[1].record()
            for i in range(copies):
                copy(i)
            marks[2].record()
            if len(multiplied) % 4 == 0:
                torch.cuda.synchronize()
            multiplied.append((marks[0], marks[1]))
            copied.append((marks[1], marks[2]))
        torch.cuda.synchronize()
        watch.terminate()
        seen = [[float(word) for word in line.split(",")] for line in watch.stdout or ()]
    took, other = (statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairs[len(pairs) // 2 :]) for pairs in (multiplied, copied))
    watts, mhz = (statistics.median(column[len(column) // 2 :]) for column in zip(*seen, strict=True))
    return {
        "share in products": took / (took + other),
        "TFLOP/s": 2 * SIZE**3 * products / took / 1e12 if products else float("nan"),
        "copied, TB/s": 2 * COPIED * copies / other / 1e12 if copies else float("nan"),
        "W": watts,
        "MHz": mhz,
    }


if __name__ == "__main__":
    main()
