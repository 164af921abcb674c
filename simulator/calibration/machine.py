"""Which machine this is, and whether it is quiet enough to measure on. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simulator.errors import SimulatorError

#: a machine on which other processes take more than this share of the cores is too noisy to judge
FOREIGN = 0.05


class CalibrationError(SimulatorError):
    """A measurement that cannot be taken or used; the text says why and what to do."""


def needs_torch() -> None:
    """Refuse to go on without torch, and say what to install."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise CalibrationError(
            "calibration runs a PyTorch step, and torch is not installed: pip install 'myriad-simulator[calibrate]'"
        ) from None


def devices(kind: str) -> int:
    """Return how many devices of `kind` there are: cores that this process may use, or GPUs."""
    if kind == "cuda":
        import torch

        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_world(kind: str, world: int | None) -> int:
    """Return the number of ranks: what was asked for, or the devices present, at most eight.

    Raises
    ------
    CalibrationError
        When there are fewer devices than that, or none.
    """
    there = devices(kind)
    if there == 0:
        raise CalibrationError(
            "--device cuda: torch sees no GPU here (torch.cuda.device_count() = 0); use --device cpu, or install a CUDA build of torch"
        )
    if world is not None and not 1 <= world <= there:
        what = "cores" if kind == "cpu" else "GPUs"
        raise CalibrationError(f"{world} processes on {there} {what}: every rank needs one of its own; use --ranks {there} or fewer")
    return world or min(there, 8)


def memory_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu() -> dict[str, str]:
    found = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
        table = {key.strip(): value.strip() for key, _, value in lines}
        flags = set(table.get("flags", "").split())
        wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        found = {"model": table.get("model name", ""), "mhz": table.get("cpu MHz", ""), "isa": " ".join(f for f in wanted if f in flags)}
    return found


def commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` if files differ from it; ``unknown`` outside one."""
    git, here = shutil.which("git"), Path(__file__).parent
    if not git:
        return "unknown"
    run = lambda *args: subprocess.run([git, "-C", str(here), *args], capture_output=True, text=True, check=False).stdout.strip()  # noqa: E731, S603
    return (run("rev-parse", "--short", "HEAD") + ("-dirty" if run("status", "--porcelain", "-uno") else "")) or "unknown"


def described(kind: str, world: int) -> dict[str, Any]:
    """Return what a measurement must say about where it was taken."""
    import torch

    about: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": kind,
        "ranks": world,
        "cpu": _cpu(),
    }
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        about["gpu"] = {
            "name": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "cuda": torch.version.cuda,
        }
        about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return about


class Quiet:
    """How much of the cores other processes took between two moments.

    Notes
    -----
    From ``/proc/stat``: all time that is not idle, less what this process and its ended children computed. Elsewhere unknown
    (None): then only the spread of repeats can tell noise.
    """

    def __init__(self, read: Callable[[], str] | None = None):
        self._read = read or Path("/proc/stat").read_text
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float] | None:
        try:
            ticks = [float(x) for x in self._read().splitlines()[0].split()[1:9]]
        except OSError:
            return None
        own = os.times()
        second = os.sysconf("SC_CLK_TCK")
        busy = (sum(ticks) - ticks[3] - ticks[4]) / second
        return sum(ticks) / second, busy, own.user + own.system + own.children_user + own.children_system

    def foreign(self) -> float | None:
        """Return the share of the machine's core time that was not ours since the start; children count once they have ended."""
        begin, end = self._begin, self._now()
        if begin is None or end is None or end[0] == begin[0]:
            return None
        return max(0.0, (end[1] - begin[1]) - (end[2] - begin[2])) / (end[0] - begin[0])
