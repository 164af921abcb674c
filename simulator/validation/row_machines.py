"""How sources write the names of accelerators, and the shipped profile that each stands for."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_A100 = ("a100-sxm4-80", "dgx-a100-80", "ib-hdr-rail")
_H100 = ("h100-sxm5-80", "dgx-h100", "ib-ndr-rail")
_MI355X = ("mi355x", "mi355x-platform", "roce-400g")
#: printed name -> accelerator, host and fabric of the vendor's reference design
MACHINES = {
    "A100-SXM-80GB": _A100,
    "A100 (Ampere, 80GB)": _A100,
    "A100-SXM (memory size not stated)": _A100,
    "A100-SXM-80GB (paper) / 40GB in llm-analysis README": _A100,
    "A100-SXM-40GB": ("a100-sxm4-40", "dgx-a100-80", "ib-hdr-rail"),
    "A800-SXM-80GB": _A100,
    "V100-SXM-32GB": _A100,
    "L40S": _A100,
    "H100-SXM-80GB": _H100,
    "H100-SXM-80GB (GCP A3)": _H100,
    "H100 (Grand Teton, 96GB HBM2e 2.4TB/s, 500W cap)": _H100,
    "H100 (95GB HBM2e low-TDP)": _H100,
    "H20-SXM-96GB": _H100,
    "H200-SXM-141GB": ("h200-sxm-141", "dgx-h200", "ib-ndr-rail"),
    "H800-SXM-80GB": ("h800-sxm5-80", "dgx-h800", "ib-ndr-rail-deepseek"),
    "B200": ("b200-sxm-180", "dgx-b200", "ib-ndr-rail"),
    "B300": ("b300-sxm-288", "dgx-b300", "ib-xdr-rail"),
    "GB200/GB300 class": ("gb200-186", "gb200-nvl72", "ib-ndr-nvl72"),
    "GB200": ("gb200-186", "gb200-nvl72", "ib-ndr-nvl72"),
    "GB300": ("gb300-288", "gb300-nvl72", "ib-xdr-rail"),
    "MI300X": ("mi300x", "mi300x-platform", "roce-400g"),
    "MI325X": ("mi325x", "mi300x-platform", "roce-400g"),
    "MI350X": _MI355X,
    "MI355X": _MI355X,
}
MACHINES |= {machine[0]: machine for machine in MACHINES.values()}  # a user writes the profile's own name
#: other spellings -> printed name; the first match in a name counts
_SPELLINGS = {
    r"PCI|\bNVL\b|GH200": "",  # other memories and clocks
    r"GB200": "GB200",
    r"GB300": "GB300",
    r"\bB300(?!\d|A)": "B300",
    r"\bB200(?!\d|A)": "B200",
    r"\bH800(?!\d)": "H800-SXM-80GB",
    r"\bH200(?!\d)": "H200-SXM-141GB",
    r"\bH100(?!\d)": "H100-SXM-80GB",
    r"\bH20\b": "H20-SXM-96GB",
    r"\bA800(?!\d)": "A800-SXM-80GB",
    r"\bA100(?!\d).*40 ?GB?\b": "A100-SXM-40GB",
    r"\bA100(?!\d)": "A100-SXM-80GB",
    r"\bV100(?!.*16 ?G)": "V100-SXM-32GB",
    r"\bL40S": "L40S",
    r"MI355X": "MI355X",
    r"MI350X": "MI350X",
    r"MI325X": "MI325X",
    r"MI300X": "MI300X",
}
UNSURE = {
    "A100-SXM (memory size not stated)": "memory size not printed: 80 GB",
    "A100-SXM-80GB (paper) / 40GB in llm-analysis README": "memory size printed as 80 and as 40 GB: 80 GB",
}


class Variant(NamedTuple):
    """Facts of a printed accelerator that differ from its profile.

    Parameters
    ----------
    changes : dict
        Fields of the accelerator.
    grade, source : str
    suffix : str
        Behind the profile's name.
    said : tuple of str
        What else had to be assumed.
    links : float
        Share of the profile's scale-up bandwidth.
    """

    changes: dict[str, Any]
    grade: str
    source: str
    suffix: str
    said: tuple[str, ...] = ()
    links: float = 1.0


_HBM2E = {"hbm_bytes_per_s": 2.4e12, "tdp_w": 500.0}
#: what is assumed of accelerators whose own kernels no row or benchmark here has timed
_SHARES_OF = "shares of the peaks not known: those of {}"
VARIANTS = {
    "H100 (Grand Teton, 96GB HBM2e 2.4TB/s, 500W cap)": Variant({"hbm_bytes": 96e9, **_HBM2E}, "published", "the row", "96 GB HBM2e"),
    "H100 (95GB HBM2e low-TDP)": Variant(
        {"hbm_bytes": 95e9, **_HBM2E},
        "assumed",
        "the row",
        "95 GB HBM2e",
        ("HBM2e bandwidth and power cap not printed: 2.4 TB/s and 500 W, as the other HBM2e H100",),
    ),
    "A800-SXM-80GB": Variant({}, "datasheet", "NVIDIA A800 datasheet: an A100 with 400 of its 600 GB/s of NVLink", "A800", links=2 / 3),
    "H20-SXM-96GB": Variant(
        {
            "peak_flop_per_s": {"fp32": 44e12, "bf16": 148e12, "fp16": 148e12, "fp8": 296e12},
            "hbm_bytes": 97871 * 2.0**20,
            "hbm_bytes_per_s": 4.0e12,
            "multiprocessors": 78,
            "tdp_w": 500.0,
        },
        "datasheet",
        "NVIDIA H20 datasheet",
        "H20",
        (_SHARES_OF.format("H100"),),
    ),
    "V100-SXM-32GB": Variant(
        {
            "peak_flop_per_s": {"fp32": 15.7e12, "fp16": 125e12},
            "gemm_efficiency": {"fp32": 0.8, "fp16": 0.875},
            "hbm_bytes": 32510 * 2.0**20,
            "hbm_bytes_per_s": 0.9e12,
            "multiprocessors": 80,
            "tdp_w": 300.0,
        },
        "datasheet",
        "NVIDIA V100 datasheet: six NVLinks of 50 GB/s both ways, A100 has twelve",
        "V100",
        (_SHARES_OF.format("A100"),),
        links=0.5,
    ),
    "L40S": Variant(
        {
            "peak_flop_per_s": {"fp32": 91.6e12, "bf16": 362e12, "fp16": 362e12, "fp8": 733e12},
            "gemm_efficiency": {"fp32": 0.8, "bf16": 0.875, "fp16": 0.875, "fp8": 0.875},
            "hbm_bytes": 48e9,
            "hbm_bytes_per_s": 0.864e12,
            "multiprocessors": 142,
            "tdp_w": 350.0,
        },
        "datasheet",
        "NVIDIA L40S datasheet: PCIe 4.0 x16, 32 GB/s each way, A100's NVLink has 300",
        "L40S",
        (_SHARES_OF.format("A100"),),
        links=32 / 300,
    ),
    "MI350X": Variant(
        {"peak_flop_per_s": {"fp32": 144.2e12, "bf16": 2306.9e12, "fp16": 2306.9e12, "fp8": 4614e12, "fp4": 9228e12}, "tdp_w": 1000.0},
        "datasheet",
        "AMD Instinct MI350X data sheet: an MI355X of 1,000 W, at 2,200 instead of 2,400 MHz",
        "MI350X",
    ),
}


def known_machine(printed: str) -> str:
    """Return the key of `MACHINES` that a printed name stands for, empty when no profile describes it."""
    if printed in MACHINES:
        return printed
    return next((name for pattern, name in _SPELLINGS.items() if re.search(pattern, printed, re.IGNORECASE)), "")
