"""A measured profile: an ordinary cluster whose costs were fitted on a machine, and what that rests on. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from simulator.calibration.cases import joint
from simulator.calibration.fit import Fit, attention_curve, clock, fit_collectives, fit_kernels, fit_together
from simulator.calibration.machine import CalibrationError, memory_bytes
from simulator.files import write_atomically
from simulator.scenario.cluster import Cluster
from simulator.scenario.facts import Frozen
from simulator.scenario.profiles import parts, profile_root, read_yaml, save_yaml, validated
from simulator.units import format_quantity


class FittedCost(Frozen):
    """How well one cost is known; see `simulator.calibration.fit.Fit`."""

    name: str
    rows: int
    residual: float
    low: dict[str, float]
    high: dict[str, float]


class MachineProfile(Frozen):
    """What ``myriad calibrate`` writes.

    Parameters
    ----------
    name, command : str
    about : dict
        Date, commit, torch, driver, processor, clocks, ranks.
    foreign_share : float or None
        Share of the cores that other processes took during the measurement; None where the system does not tell.
    cluster : Cluster
        As the simulator takes it.
    fits : tuple of FittedCost
        Intervals and residuals of the costs in it.
    """

    name: str
    command: str
    about: dict[str, Any]
    foreign_share: float | None
    cluster: Cluster
    fits: tuple[FittedCost, ...]

    def residuals(self) -> dict[str, float]:
        """Return the relative residual of every fitted cost."""
        return {fit.name: fit.residual for fit in self.fits}


def folder() -> Path:
    """Return where the shipped measurements stand."""
    return profile_root() / "measurements"


def load(name: str | Path) -> MachineProfile:
    """Return the profile of a shipped name or at a path.

    Raises
    ------
    CalibrationError
        When there is none.
    """
    shipped = folder() / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder().glob("*.yaml"))) or "none"
        raise CalibrationError(f"no measured profile {str(name)!r}; shipped: {known}; or give the path that myriad calibrate wrote")
    data = read_yaml(path)
    if not isinstance(data.get("cluster"), dict):
        raise CalibrationError(f"{path} is not a measured profile: it has no table 'cluster'; write one with myriad calibrate")
    return validated(MachineProfile, data | {"cluster": validated(Cluster, parts(data["cluster"]), str(path))}, str(path))


def save(profile: MachineProfile, rows: pd.DataFrame, path: Path) -> None:
    """Write the raw table and then the profile, each in one move: a profile never stands without what it rests on."""
    write_atomically(path.with_suffix(".csv"), lambda file: rows.to_csv(file, index=False))
    save_yaml(profile.model_dump(mode="json"), path)


def _best(rows: pd.DataFrame, name: str, of: str, time: str = "seconds") -> float:
    table = rows[(rows["part"] == "single") & (rows["name"] == name)]
    if table.empty:
        raise CalibrationError(f"the measurements have no {name!r}: the run was not finished; run the same command again to resume it")
    return float((table[of] / table[time]).max())


def build(name: str, rows: pd.DataFrame, about: dict[str, Any], command: str, foreign: float | None) -> MachineProfile:
    """Return the profile that `rows` give.

    Notes
    -----
    Kernels and collectives that were measured carry fitted costs. The general fields beside them (peak, efficiencies, bus
    bandwidths) hold what the machine reached at best, for figures such as MFU and for groups that were not measured. The accelerator's
    ``in_training`` is what kernels keep of their speed beside communication, less the skew: a step waits for the slower rank.
    """
    world, device = int(about["ranks"]), about["device"]
    kernels, talk = fit_kernels(rows, device), fit_collectives(rows)
    costs = {k: fit.kernel() for k, fit in kernels.items()} | attention_curve(rows, device)
    ranks = joint(world, device)
    keys = {case.name: (case.job.sequence_length + 1) / 2 for case in ranks}
    alike = {case.name for case in ranks if case.plan.tp == 1 and case.plan.ep == 1}
    kept, skew = fit_together(rows, costs, keys, alike)
    source = f"{command}, torch {about['torch']}, commit {about['commit']}"
    lost = 1.0 + (skew.values["share"] if skew else 0.0)
    shares = {part: fit.values["share"] / lost for part, fit in kept.items()}
    tables = (
        _accelerator(name, rows, about, source, costs, device) | {"in_training": shares},
        _host(name, world, source, talk, _dispatch(rows)),
        _fabric(name, world),
    )
    measured = {"grade": "measured", "source": source, "date": about["date"]}
    cluster = {
        "name": name, "accelerator": tables[0], "host": tables[1], "fabric": tables[2], "accelerators": world,
        "price_usd_per_accelerator_hour": "0 $/h",
        "sources": [
            measured | {"facts": ["accelerators"]},
            {"grade": "assumed", "source": "one's own machine", "date": about["date"], "facts": ["price_usd_per_accelerator_hour"]},
        ],
    }  # fmt: skip
    all_fits = (*kernels.values(), *talk.values(), *kept.values(), *((skew,) if skew else ()))
    fits = [FittedCost(name=f.name, rows=f.rows, residual=f.residual, low=f.low, high=f.high) for f in all_fits]
    return MachineProfile(
        name=name, command=command, about=about, foreign_share=foreign, cluster=validated(Cluster, parts(cluster), name), fits=tuple(fits)
    )


def _accelerator(name: str, rows: pd.DataFrame, about: dict, source: str, costs: dict, device: str) -> dict[str, Any]:
    time = clock(rows, device)
    peaks = {d: _best(rows, f"product.{d}", "flop", time) for d in ("bf16", "fp32")}
    curves = {way: max(costs[f"attention.{way}"].flop_per_s_at_keys) / peaks["bf16"] for way in ("forward", "backward")}
    gpu = about.get("gpu", {})
    memory = gpu.get("memory_bytes") or memory_bytes() / about["ranks"]
    fitted = ["kernels", *(["in_training"] if (rows["part"] == "together").any() else [])]
    launch = rows[(rows["part"] == "single") & (rows["name"] == "launch")]["seconds"].median()
    return {
        "name": f"{name}-accelerator",
        "vendor": str(gpu.get("name") or about["cpu"].get("model") or "CPU"),
        "hbm_bytes": format_quantity(memory, "bytes"),
        "hbm_bytes_per_s": format_quantity(_best(rows, "copy", "bytes", time), "bytes_per_s"),
        "peak_flop_per_s": {d: format_quantity(v, "flop_per_s") for d, v in peaks.items()},
        "gemm_efficiency": dict.fromkeys(peaks, 1.0),
        "grouped_gemm_efficiency": min(1.0, _best(rows, "grouped.bf16", "flop", time) / peaks["bf16"]),
        "attention_efficiency": {way: min(1.0, value) for way, value in curves.items()},
        "hbm_efficiency": 1.0,
        "launch_s": format_quantity(float(launch), "s"),
        "multiprocessors": gpu.get("multiprocessors", 1),
        "tile_m": 1, "tile_n": 1, "k_ramp": 0, "last_wave_recovered": 0.0, "head_ramp": 0, "tdp_w": "0 W",
        "kernels": {k: cost.model_dump(mode="json") for k, cost in costs.items()},
        "sources": [
            {"grade": "measured", "source": source, "date": about["date"], "facts": [
                "hbm_bytes", "hbm_bytes_per_s", "peak_flop_per_s", "gemm_efficiency", "grouped_gemm_efficiency", "attention_efficiency",
                "hbm_efficiency", "launch_s", "multiprocessors",
            ]},
            {"grade": "fitted", "source": f"to the raw table beside this file, {source}", "date": about["date"], "facts": fitted},
            {"grade": "assumed", "source": "not used where a kernel has a fitted cost", "facts": [
                "tile_m", "tile_n", "k_ramp", "last_wave_recovered", "head_ramp",
            ]},
            {"grade": "assumed", "source": "power was not measured", "facts": ["tdp_w"]},
        ],
    }  # fmt: skip


def _dispatch(rows: pd.DataFrame) -> float | None:
    """Return the host's time for one launch, seconds; None where it was not measured, as on a CPU."""
    waits = rows[(rows["part"] == "single") & (rows["name"] == "dispatch")]
    return float((waits["seconds"] / waits["calls"]).median()) if len(waits) else None


def _host(name: str, world: int, source: str, talk: dict[str, Fit], dispatch_s: float | None) -> dict[str, Any]:
    rates = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"):
        found = [fit.values["bytes_per_s"] for key, fit in talk.items() if key.startswith(f"{kind}.") and "bytes_per_s" in fit.values]
        rates[kind] = max(found, default=1e9)
    latency = min((fit.values["latency_s"] for fit in talk.values()), default=0.0)
    protocols = {p: format_quantity(latency, "s") for p in ("ll", "ll128", "simple")}
    zero = dict.fromkeys(protocols, "0 s")
    grade = "measured" if talk else "assumed"
    return {
        "name": f"{name}-host", "accelerators": world, "scale_up_domain": world,
        "scale_up_bytes_per_s": format_quantity(max(rates.values()), "bytes_per_s"),
        "bus_bytes_per_s": {k: format_quantity(v, "bytes_per_s") for k, v in rates.items()},
        "nic_bytes_per_s": "1 GB/s", "base_latency_s": protocols, "hop_latency_s": zero,
        "protocol_share": dict.fromkeys(protocols, 1.0), "tree_share": 1.0, "overhead_w": "0 W",
        "dispatch_s": None if dispatch_s is None else format_quantity(dispatch_s, "s"),
        "collectives": {k: fit.collective().model_dump(mode="json") for k, fit in talk.items()},
        "sources": [
            {"grade": grade, "source": source, "facts": [
                "accelerators", "scale_up_domain", "scale_up_bytes_per_s", "bus_bytes_per_s", "base_latency_s",
            ]},
            *([] if dispatch_s is None else [{"grade": "measured", "source": source, "facts": ["dispatch_s"]}]),
            *([{"grade": "fitted", "source": f"to the raw table beside this file, {source}", "facts": ["collectives"]}] if talk else []),
            {"grade": "assumed", "source": "one machine: no network is crossed, power was not measured", "facts": [
                "nic_bytes_per_s", "hop_latency_s", "protocol_share", "tree_share", "overhead_w",
            ]},
        ],
    }  # fmt: skip


def _fabric(name: str, world: int) -> dict[str, Any]:
    zero = dict.fromkeys(("ll", "ll128", "simple"), "0 s")
    return {
        "name": f"{name}-fabric", "family": "clos", "efficiency": 1.0, "hop_latency_s": zero,
        "tiers": [{"name": "machine", "accelerators": world, "latency_s": "0 s"}],
        "sources": [
            {"grade": "assumed", "source": "one machine: no network is crossed", "facts": ["efficiency", "hop_latency_s", "tiers"]},
        ],
    }  # fmt: skip
