"""Fit every link generation to all published collectives and write the constants into the profiles of hosts and fabrics.

Run as ``python tools/fit_links.py``; ``--check`` only prints them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

from simulator.validation.collective_rows import priors
from simulator.validation.collectives import fitted_constants

PROFILES = Path(__file__).resolve().parents[1] / "hardware_profiles"
#: fabrics that are no row's but of a generation that is
LIKE = {"ib": "ib-ndr-rail", "single-switch": "ib-ndr-rail", "efa": "efa-3200"}
PROTOCOLS = ("ll", "ll128", "simple")


def written(text: str, keys: tuple[str, ...], value: float, unit: str) -> str:
    """Return a profile's text with the quantity at `keys` replaced."""
    head = "".join(rf"{key}:\n(?:  .*\n)*?  " for key in keys[:-1])
    pattern = rf"(?m)(^{head}{keys[-1]}: )\S+( .*)?$"
    changed, times = re.subn(pattern, rf"\g<1>{value:.3g}{unit}", text, count=1)
    if times != 1:
        raise SystemExit(f"no {'.'.join(keys)} to write")
    return changed


def host_text(text: str, prior: pd.Series, fit: dict[str, float]) -> str:
    """Return a host's text with its constants."""
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all"):
        text = written(text, ("bus_bytes_per_s", name), prior[name] * fit["ring_factor"] / 1e9, " GB/s")
    for name in PROTOCOLS:
        text = written(text, ("base_latency_s", name), prior[f"{name}_s"] * fit["start_factor"] * 1e6, " us")
    if prior["reduction_share"] > 0:
        text = written(text, ("reduction_share",), prior["reduction_share"] * fit["reduction_factor"], "")
    return written(text, ("fill_s",), prior["fill_s"] * fit["fill_factor"] * 1e6, " us")


def fabric_text(text: str, prior: pd.Series, fit: dict[str, float]) -> str:
    """Return a fabric's text with its constants."""
    text = written(text, ("efficiency",), prior["efficiency"] * fit["efficiency_factor"], "")
    for name in PROTOCOLS:
        text = written(text, ("hop_latency_s", name), prior[f"{name}_s"] * fit["hop_factor"] * 1e6, " us")
    return written(text, ("fill_s",), prior["fill_s"] * fit["fill_factor"] * 1e6, " us")


def main() -> None:
    """Print the constants; write them unless only checking."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    constants, known = fitted_constants(), priors()
    for name, values in constants.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if check:
        return
    for path in sorted((PROFILES / "hosts").glob("*.yaml")):
        if path.stem in known.index:
            prior = known.loc[path.stem]
            path.write_text(host_text(path.read_text(), prior, constants[prior["link"]]))
    for path in sorted((PROFILES / "fabrics").glob("*.yaml")):
        like = next((LIKE[key] for key in LIKE if path.stem.startswith(key)), "roce-400g")
        text = path.read_text()
        if re.search(r"(?m)^fill_s:", text):
            path.write_text(fabric_text(text, known.loc[like], constants[known.loc[like]["link"]]))


if __name__ == "__main__":
    main()
