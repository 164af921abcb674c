"""A published measurement of a collective as the simulator sees it: machine, group, bytes and measured seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simulator.network.algorithms import Algorithm
from simulator.scenario.cluster import Cluster, Protocols
from simulator.scenario.model import Experts
from simulator.scenario.profiles import CLUSTERS, FABRICS, HOSTS
from simulator.workload.experts import copies, expected_destinations

#: what a benchmark that calls torch.distributed between two events adds, seconds; assumed. nccl-tests launches from C
TORCH_CALL_S = 20e-6
_DATA = Path(__file__).parent / "data"
#: accelerator -> host profile, scale-up link generation
_HOSTS = {
    "A100": ("dgx-a100-80", "NVLink3"), "H100": ("dgx-h100", "NVLink4"), "H200": ("dgx-h200", "NVLink4"), "H800": ("dgx-h800", "NVLink4"),
    "GB200": ("gb200-nvl72", "NVLink5"), "B200": ("dgx-b200", "NVLink5"), "MI300X": ("mi300x-platform", "xGMI"),
    "V100": ("dgx-a100-80", "NVLink2"),
}  # fmt: skip
#: directed rings of 25 GB/s links through the first n GPUs of a DGX-1V cube mesh; 5 have none by NVLink alone, trees take its place
_CUBE_MESH = {2: 1.0, 3: 2.0, 4: 4.0, 5: 1.6, 6: 2.0, 7: 4.0, 8: 6.0}
_NVLINK2_BYTES_PER_S = 25e9
#: channels of a ring all-reduce on A100, two per NVLink; a filled pipeline costs time per channel, and a cube mesh has two per ring
_CHANNELS = 24
#: network generation -> fabric profile. AWS' plug-in forces the Simple protocol on the first generation, p4d and p4de (aws-ofi-nccl)
_FABRICS = {"EFA": "efa-3200", "InfiniBand": "ib-ndr-rail", "RoCE": "roce-400g"}
#: bytes of one token of width h: FP8 with a 4-byte scale per 128, or BF16
_TOKEN_BYTES = {"fp8": 1 + 4 / 128, "bf16": 2.0}


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    Parameters
    ----------
    source, collective : str
    scale_up, network : str
        Link generations inside the domain and between domains; ``network`` is empty where nothing leaves the domain.
    cluster : Cluster
        With the profile's constants and this row's counts and link rates.
    ranks : int
    size : float
        Bytes of the buffer; of a dispatch or combine those of one copy of all local tokens.
    seconds : float
        As published, or from the published bandwidth.
    algorithm : str or None
        Forced algorithm, where the source forces one.
    out, fan : float
        Of a dispatch, combine or all-to-all: copies of a token over the NIC, and inside the domain.
    call_s : float
        What the benchmark adds to each collective, seconds.
    """

    source: str
    collective: str
    scale_up: str
    network: str
    cluster: Cluster
    ranks: int
    size: float
    seconds: float
    algorithm: Algorithm | None = None
    out: float = 0.0
    fan: float = 0.0
    call_s: float = 0.0


def published_collectives() -> pd.DataFrame:
    """Return every published collective measurement as its source prints it, `collectives.csv`."""
    return pd.read_csv(_DATA / "collectives.csv")


def anchors() -> list[Measured]:
    """Return measurements that constants are fitted to and that nothing is judged on, `collective_anchors.csv`."""
    return [m for _, row in pd.read_csv(_DATA / "collective_anchors.csv").iterrows() if isinstance(m := measured(row), Measured)]


def measured(row: Mapping[str, Any]) -> Measured | str:
    """Return one row as the simulator sees it, or why it cannot be."""
    if not row["gpus"] > 1 or not row["nodes"] > 0:
        return "the source does not say how many ranks"
    name = next((key for key in _HOSTS if str(row["gpu"]).startswith(key)), None)
    if name is None:
        return f"no host profile for {row['gpu']}"
    host_name, scale_up = _HOSTS[name]
    ranks, domain, network, nic = int(row["gpus"]), *_outside(row)
    cluster = _cluster(host_name, scale_up, network, domain, nic, ranks)
    common = (str(row["source"]), str(row["collective"]), scale_up, network if ranks > domain else "", cluster, ranks)
    text = f"{row['fabric']} {row['notes']}"
    if str(row["collective"]).startswith("moe"):
        return _moe(row, common, domain, text)
    if not row["bytes"] > 0:
        return "no size" if np.isnan(row["bytes"]) else "no bytes"
    seconds = _seconds(row, float(row["bytes"]), ranks)
    if seconds is None:
        return "neither time nor bandwidth above its last printed digit"
    if row["collective"] == "alltoall":
        inside = min(ranks, domain)
        return Measured(*common, float(row["bytes"]) / ranks, seconds, None, float(ranks - inside), float(inside - 1))
    forced: Algorithm | None = "ring" if re.search("NVLS_ENABLE=0|NVLS off", text) else None
    call_s = TORCH_CALL_S if "all_reduce_bench.py" in text else 0.0
    return Measured(*common, float(row["bytes"]), seconds, forced, call_s=call_s)


@cache
def priors() -> pd.DataFrame:
    """Return what is known of each link before any row is fitted, by profile, SI units: `link_priors.csv`.

    Kept apart from the profiles, which hold what was fitted to every row, so that a held-out source stays unseen.
    """
    return pd.read_csv(_DATA / "link_priors.csv", index_col="profile")


def _protocols(prior: pd.Series, like: Protocols) -> Protocols:
    return like.model_copy(update={name: prior[f"{name}_s"] for name in ("ll", "ll128", "simple")})


@cache
def _cluster(host_name: str, scale_up: str, network: str, domain: int, nic: float, ranks: int) -> Cluster:
    """Return the machine of a row with its links' priors.

    NVLink 2 is 25 GB/s links straight between GPUs, at the share of a link that a transfer between two GPUs keeps.
    """
    host, prior = HOSTS.load(host_name), priors().loc[host_name]
    update: dict[str, Any] = {
        "scale_up_domain": domain,
        "accelerators": min(host.accelerators, domain),
        "bus_bytes_per_s": {c: prior[c] for c in host.bus_bytes_per_s},
        "reduction_share": 0.0 if np.isnan(prior["reduction_share"]) else prior["reduction_share"],
        "base_latency_s": _protocols(prior, host.base_latency_s),
        "fill_s": prior["fill_s"],
    }
    if nic:
        update["nic_bytes_per_s"] = nic
    if scale_up == "NVLink2":
        rate = _CUBE_MESH[ranks] * _NVLINK2_BYTES_PER_S
        sent = rate * prior["send"] / host.scale_up_bytes_per_s
        update |= {"scale_up_bytes_per_s": rate, "bus_bytes_per_s": dict.fromkeys(host.bus_bytes_per_s, sent)}
        update["fill_s"] = prior["fill_s"] * 2 * _CUBE_MESH[ranks] / _CHANNELS
    if network == "EFA" and scale_up == "NVLink3":
        update["protocol_share"] = {"simple": host.protocol_share["simple"]}
    net, fabric = priors().loc[_FABRICS[network]], FABRICS.load(_FABRICS[network])
    hops = _protocols(net, fabric.hop_latency_s)
    fabric = fabric.model_copy(update={"efficiency": net["efficiency"], "hop_latency_s": hops, "fill_s": net["fill_s"]})
    base = CLUSTERS.load("h100-rail-10240")
    return base.model_copy(update={"host": host.model_copy(update=update), "fabric": fabric, "accelerators": max(ranks, domain)})


def _outside(row: Mapping[str, Any]) -> tuple[int, str, float]:
    """Return the size of the scale-up domain, the network's generation and the NIC rate per accelerator (0: the profile's)."""
    fabric, ranks, nodes = str(row["fabric"]), int(row["gpus"]), int(row["nodes"])
    per_host = max(ranks // nodes, 1)
    rate = re.search(r"EFA (\d+) Gbps per node|(\d+)x(\d+)G EFA", fabric)
    nic = (float(rate[1]) if rate and rate[1] else float(rate[2]) * float(rate[3]) if rate else 0.0) * 1e9 / 8 / 8
    network = "EFA" if "EFA" in fabric else "RoCE" if re.search("RoCE|GCP|Thor", fabric) else "InfiniBand"
    if "pure RDMA" in fabric and str(row["collective"]).startswith("moe") and nodes > 1:
        return 1, network, nic  # on one host the kernels use NVLink: their 98 and 127 GB/s are beyond a 50 GB/s NIC
    if str(row["gpu"]).startswith("GB200"):
        apart = re.search("2 NVL72 domains|RDMA only between 2 domains", fabric)
        return (ranks // 2 if apart else per_host if "MNNVL off" in fabric else min(ranks, 72)), network, nic
    return (8 if str(row["gpu"]).startswith("MI300X") else per_host), network, nic


def _seconds(row: Mapping[str, Any], size: float, ranks: int) -> float | None:
    time = re.search(r"time ([\d.]+) us", str(row["notes"]))
    if time:
        return float(time[1]) * 1e-6
    factor = (2 if row["collective"] == "all_reduce" else 1) * (ranks - 1) / ranks
    return factor * size / (row["busbw_GBps"] * 1e9) if row["busbw_GBps"] > 0.5 else None


def _moe(row: Mapping[str, Any], common: tuple, domain: int, text: str) -> Measured:
    """Return a dispatch or combine of DeepSeek-V3's shape.

    Notes
    -----
    DeepEP and its kin count as bytes what a rank sends to distinct domains, its own among them (inside one domain: to distinct
    ranks); its low-latency kernels one copy per expert. Their benchmark picks up to 4 of as many groups as there are domains;
    the Megatron report has the model's 4 of 8 groups, and says times.
    """
    ranks, source = common[5], common[0]
    domains = max(ranks // domain, 1)
    fp8 = row["collective"] == "moe_dispatch" and "BF16 dispatch" not in text.split("FP8 dispatch /")[0] and "Megatron" not in source
    tokens = 128 if "low-latency" in source else 8192 if "8K tokens" in text else 4096
    size = tokens * 7168 * _TOKEN_BYTES["fp8" if fp8 else "bf16"]
    per_expert = "NCCL all-to-all" in text or "low-latency" in source
    limited = domains > 4 and not per_expert and "V2" not in source
    groups, top = (8, 4) if "Megatron" in source else (domains, 4) if limited else (1, 1)
    experts = Experts(count=256, top_k=8, ffn=2048, groups=groups, top_groups=top)
    inside = min(ranks, domain)
    out, fan = copies(experts, not per_expert, ranks, inside, domains)
    latency = re.search(r"latency (\d+) us", text)
    counted = 8.0 if per_expert else float(expected_destinations(experts, domains if domains > 1 else ranks))
    seconds = float(latency[1]) * 1e-6 if latency else counted * size / (row["busbw_GBps"] * 1e9)
    if "HybridEP" in text:
        host = common[4].host
        rates = host.bus_bytes_per_s | {"all_to_all": host.bus_bytes_per_s["send"]}
        common = (*common[:4], common[4].model_copy(update={"host": host.model_copy(update={"bus_bytes_per_s": rates})}), ranks)
    return Measured(*common, size, seconds, None, float(out), float(fan))
