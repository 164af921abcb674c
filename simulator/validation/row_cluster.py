"""The cluster of a published row: shipped profiles, adapted to what the row prints about the machine."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from simulator.errors import ProfileError
from simulator.scenario.cluster import Accelerator, Cluster, Fabric, Host
from simulator.scenario.facts import Facts, Source
from simulator.scenario.profiles import ACCELERATORS, FABRICS, HOSTS
from simulator.validation.row import Row
from simulator.validation.row_kernels import TRACED

T = TypeVar("T", bound=Facts)

_A100 = ("a100-sxm4-80", "dgx-a100-80", "ib-hdr-rail")
_H100 = ("h100-sxm5-80", "dgx-h100", "ib-ndr-rail")
#: printed name -> accelerator, host and fabric of the vendor's reference design
MACHINES = {
    "A100-SXM-80GB": _A100,
    "A100 (Ampere, 80GB)": _A100,
    "A100-SXM (memory size not stated)": _A100,
    "A100-SXM-80GB (paper) / 40GB in llm-analysis README": _A100,
    "A100-SXM-40GB": ("a100-sxm4-40", "dgx-a100-80", "ib-hdr-rail"),
    "H100-SXM-80GB": _H100,
    "H100-SXM-80GB (GCP A3)": _H100,
    "H100 (Grand Teton, 96GB HBM2e 2.4TB/s, 500W cap)": _H100,
    "H100 (95GB HBM2e low-TDP)": _H100,
    "H200-SXM-141GB": ("h200-sxm-141", "dgx-h200", "ib-ndr-rail"),
    "H800-SXM-80GB": ("h800-sxm5-80", "dgx-h800", "ib-ndr-rail-deepseek"),
    "B200": ("b200-sxm-180", "dgx-b200", "ib-ndr-rail"),
    "B300": ("b300-sxm-288", "dgx-b300", "ib-xdr-rail"),
    "GB200/GB300 class": ("gb200-186", "gb200-nvl72", "ib-ndr-nvl72"),
    "GB200": ("gb200-186", "gb200-nvl72", "ib-ndr-nvl72"),
    "GB300": ("gb300-288", "gb300-nvl72", "ib-xdr-rail"),
    "MI300X": ("mi300x", "mi300x-platform", "roce-400g"),
    "MI325X": ("mi325x", "mi300x-platform", "roce-400g"),
    "MI355X": ("mi355x", "mi355x-platform", "roce-400g"),
}
MACHINES |= {machine[0]: machine for machine in MACHINES.values()}  # a user writes the profile's own name
#: printed name -> facts that differ from the profile, their grade and what else had to be assumed
_VARIANTS: dict[str, tuple[dict[str, float], str, tuple[str, ...]]] = {
    "H100 (Grand Teton, 96GB HBM2e 2.4TB/s, 500W cap)": (
        {"hbm_bytes": 96e9, "hbm_bytes_per_s": 2.4e12, "tdp_w": 500.0},
        "published",
        (),
    ),
    "H100 (95GB HBM2e low-TDP)": (
        {"hbm_bytes": 95e9, "hbm_bytes_per_s": 2.4e12, "tdp_w": 500.0},
        "assumed",
        ("HBM2e bandwidth and power cap not printed: 2.4 TB/s and 500 W, as the other HBM2e H100",),
    ),
}
_UNSURE = {
    "A100-SXM (memory size not stated)": "memory size not printed: 80 GB",
    "A100-SXM-80GB (paper) / 40GB in llm-analysis README": "memory size printed as 80 and as 40 GB: 80 GB",
}
_NOT_INFINIBAND = r"RoCE|ROCE|RDMA per GPU|Ethernet|Omni-Path|EFA"
_RATE = r"(?<![x\d.])(\d+(?:\.\d+)?)\s*"  # not the 200 of "8x200"
#: how a source writes its NICs -> what the numbers mean; first match wins; the case tells bits from bytes
_NICS: list[tuple[str, str]] = [
    (rf"Compute: (\d+)x .*?{_RATE}Gb/s", "count x rate"),
    (rf"{_RATE}(?:Gbps|Gb/s)[\w ]* per (?:\d+-GPU )?node", "host"),
    (rf"{_RATE}(?:Gbps|Gb/s)[\w ]* per GPU", "accelerator"),
    (r"(\d+)x\s*(\d+)\s*GB/s", "count x rate, bytes"),
    (r"(\d+)x\s*(\d+)\s*(?:Gbps|Gb/s|Gb|G)\b", "count x rate"),
    (rf"(\d+)x .*?{_RATE}Gb/s", "count x rate"),
]


def cluster_of(row: Row) -> Cluster:
    """Return the cluster of a published row.

    Parameters
    ----------
    row : Row
        Its assumptions are added to the row.

    Raises
    ------
    ProfileError
        When no profile describes the accelerator, or the count is not printed.
    """
    printed, count = row.text("gpu"), row.need("gpus")
    if printed not in MACHINES:
        raise ProfileError(f"no accelerator profile: {printed or 'not printed'}")
    accelerator_name, host_name, fabric_name = MACHINES[printed]
    accelerator = _accelerator(row, printed, ACCELERATORS.load(accelerator_name))
    host = _host(row, HOSTS.load(host_name), count)
    fabric = _fabric(row, fabric_name, host, count)
    counted = Source(grade="published", source=row.text("provenance") or row.text("source") or "the row", facts=("accelerators",))
    priced = Source(
        grade="assumed",
        source="not used here: validation compares times",
        facts=("price_usd_per_accelerator_hour",),
        date=str(row.whole("year") or "not dated"),
    )
    return Cluster(
        name=f"{count} x {accelerator.name}",
        sources=(counted, priced),
        accelerator=accelerator,
        host=host,
        fabric=fabric,
        accelerators=count,
        price_usd_per_accelerator_hour="0 $/h",
    )


def adapted(profile: T, changes: dict[str, Any], grade: str, source: str, suffix: str) -> T:
    """Return a profile with `changes`, each under its new source instead of the profile's own."""
    kept = []
    for old in profile.sources:
        facts = tuple(f for f in old.facts if f not in changes)
        if facts:
            kept.append(old.model_copy(update={"facts": facts}))
    new = Source(grade=grade, source=source, facts=tuple(changes))
    return profile.model_copy(update={**changes, "name": f"{profile.name} {suffix}", "sources": (*kept, new)})


def capped(profile: Accelerator, power_w: float) -> dict[str, float]:
    """Return the peaks of an accelerator whose products draw all the power it may have, when it may have `power_w`, FLOP/s.

    Notes
    -----
    The power of switching transistors is ``C V^2 f``, and the voltage goes with the frequency: ``f ~ P^(1/3)``.
    """
    return {dtype: peak * (power_w / profile.tdp_w) ** (1 / 3) for dtype, peak in profile.peak_flop_per_s.items()}


def _accelerator(row: Row, printed: str, profile: Accelerator) -> Accelerator:
    if row.has(TRACED, "source"):
        row.assume("collectives as fast as in their benchmark, which they come from (trace/a100)")
        profile = profile.model_copy(update={"in_training": {k: v for k, v in profile.in_training.items() if k != "collectives"}})
    if printed in _UNSURE:
        row.assume(_UNSURE[printed])
    if printed not in _VARIANTS:
        return profile
    changes, grade, said = _VARIANTS[printed]
    for text in said:
        row.assume(text)
    row.assume(f"clock under {changes['tdp_w']:g} W: products slow with the cube root of the power")
    changes = changes | {"peak_flop_per_s": capped(profile, changes["tdp_w"])}
    return adapted(profile, changes, grade, f"{row.text('source')}: {printed}", f"{changes['hbm_bytes'] / 1e9:.0f} GB HBM2e")


def _host(row: Row, profile: Host, count: int) -> Host:
    changes: dict[str, Any] = {}
    per_host = row.whole("gpus_per_node") or profile.accelerators
    if per_host != profile.accelerators:
        changes["accelerators"] = per_host
        if profile.scale_up_domain == profile.accelerators:
            changes["scale_up_domain"] = per_host
    printed = re.search(r"\d+ domains x (\d+) GPUs", row.text("intra_node"))
    if printed:
        changes["scale_up_domain"] = int(printed.group(1))
    elif profile.scale_up_domain == 72 and count <= 72 and count % per_host == 0:
        # one domain holds the whole job, so that nothing straddles
        profile = adapted(profile, {"scale_up_domain": count}, "assumed", "the job fits into one NVLink domain", "one domain")
    elif profile.scale_up_domain == 72 and count % 64 == 0:
        # Expert groups of 64 would straddle domains of 72; NVIDIA's launch scripts use 64 ranks of each
        row.assume("NVLink domain: 64 of its 72 GPUs used")
        profile = adapted(profile, {"scale_up_domain": 64}, "assumed", "64 of 72, so that no expert group straddles domains", "64 of 72")
    nic = _nic_bytes_per_s(row.text("inter_node"), per_host)
    outside = count > changes.get("scale_up_domain", profile.scale_up_domain)
    if outside and not nic:
        row.assume("inter-node fabric not printed: vendor reference design")
    if outside and nic and abs(nic / profile.nic_bytes_per_s - 1) > 0.01:
        changes["nic_bytes_per_s"] = nic
    if not changes:
        return profile
    said = "; ".join(text for text in (row.text("intra_node"), row.text("inter_node")) if text)
    return adapted(profile, changes, "published", f"{row.text('source')}: {said}", "as published")


def _nic_bytes_per_s(text: str, per_host: int) -> float | None:
    """Return the scale-out bandwidth of one accelerator that a cell prints, None when it prints none."""
    for pattern, meaning in _NICS:
        found = re.search(pattern, text)
        if found:
            numbers = [float(n) for n in found.groups()]
            per_s = numbers[0] if len(numbers) == 1 else numbers[0] * numbers[1]
            scale = 1e9 if "bytes" in meaning else 1e9 / 8
            return per_s * scale / (1 if meaning == "accelerator" else per_host)
    return None


def _fabric(row: Row, name: str, host: Host, count: int) -> Fabric:
    text = row.text("inter_node")
    if count > host.scale_up_domain and re.search(_NOT_INFINIBAND, text) and not re.search("InfiniBand|\\bIB\\b", text):
        if name == "ib-ndr-rail":
            name = "roce-meta-24k" if "3-layer CLOS" in text else "roce-400g"
        else:
            row.assume(f"network is not InfiniBand: latencies and efficiency of {name}")
    return FABRICS.load(name)
