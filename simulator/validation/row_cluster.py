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
from simulator.validation.row_machines import MACHINES, UNSURE, VARIANTS, known_machine

T = TypeVar("T", bound=Facts)

_NOT_INFINIBAND = r"RoCE|ROCE|RDMA per GPU|Ethernet|Omni-Path|EFA"
#: share of the line rate that NCCL reached through an Omni-Path adapter of Jean Zay: 40.55 Gbit/s of bus bandwidth between four hosts of
#: eight A100, which come in through one of their four adapters of 100 Gbit/s and leave through another, as the log shows
#: (bigscience-workshop/bigscience @358e3c8 experiments/bandwidth/all_reduce_bench-a100-n4.txt)
OMNI_PATH_EFFICIENCY = 40.55 / 100
#: at which a message between stages leaves in rows that are no measurements (`TRACED`): their source moves twice the tensor at a quarter
#: of 800 Gibit/s (VIA-Research/vTrain @f8dda84 src/predictor.py, ``_compute_p2p_latency`` and what calls it; src/config.py), and pipelines
#: of two and four stages differ by that: 2.5 ms per message of 8 sequences of 1,024 x 2,048, where NVLink takes 0.12
TRACED_SEND_BYTES_PER_S = 800 * 2**30 / 8 / 4 / 2
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
    written, count = row.text("gpu"), row.need("gpus")
    printed = known_machine(written)
    if not printed:
        raise ProfileError(f"no accelerator profile: {written or 'not printed'}")
    if printed != written:
        row.assume(f"accelerator printed as {written}: {printed}")
    accelerator_name, host_name, fabric_name = MACHINES[printed]
    accelerator = _accelerator(row, printed, ACCELERATORS.load(accelerator_name))
    host = _host(row, _cut(printed, HOSTS.load(host_name)), count)
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
        facts = tuple(f for f in old.facts if f.split(".")[0] not in changes)
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
    if printed in UNSURE:
        row.assume(UNSURE[printed])
    variant = VARIANTS.get(printed)
    if variant is None or not variant.changes:
        return profile
    for text in variant.said:
        row.assume(text)
    changes = dict(variant.changes)
    if "peak_flop_per_s" not in changes:
        row.assume(f"clock under {changes['tdp_w']:g} W: products slow with the cube root of the power")
        changes["peak_flop_per_s"] = capped(profile, changes["tdp_w"])
    source = f"{row.text('source')}: {printed}" if variant.source == "the row" else variant.source
    return adapted(profile, changes, variant.grade, source, variant.suffix)


def _cut(printed: str, profile: Host) -> Host:
    """Return the host of a variant with fewer or slower scale-up links than its profile's."""
    variant = VARIANTS.get(printed)
    if variant is None or variant.links == 1:
        return profile
    changes = {
        "scale_up_bytes_per_s": profile.scale_up_bytes_per_s * variant.links,
        "bus_bytes_per_s": {name: rate * variant.links for name, rate in profile.bus_bytes_per_s.items()},
    }
    return adapted(profile, changes, variant.grade, variant.source, f"as of {variant.suffix}")


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
    if row.has(TRACED, "source"):
        row.assume("messages between stages at the rate of the source's formula (src/predictor.py)")
        rates = profile.bus_bytes_per_s | {"send": TRACED_SEND_BYTES_PER_S}
        profile = adapted(profile, {"bus_bytes_per_s": rates}, "published", "VIA-Research/vTrain @f8dda84 src/predictor.py", "of vTrain")
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
    if row.has("Omni-Path", "inter_node"):
        row.assume(f"NCCL reaches {OMNI_PATH_EFFICIENCY:.0%} of Omni-Path's line rate: measured on that machine by its users")
        source = "bigscience-workshop/bigscience @358e3c8 experiments/bandwidth/all_reduce_bench-a100-n4.txt"
        return adapted(FABRICS.load(name), {"efficiency": OMNI_PATH_EFFICIENCY}, "published", source, "over Omni-Path")
    return FABRICS.load(name)
