"""Fit the parameters of every generation of silicon to the published record and write them into the profiles.

From the checkout: ``python tools/refit.py`` prints what it finds, ``--write`` also writes it. The fit is linear about the present
values: run it again until they stay. Afterwards ``make accuracy``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from textwrap import fill

from simulator.fitting import Fitted, Parameter
from simulator.scenario.profiles import ACCELERATORS
from simulator.validation.parameters import SILICON, fitted, predictions
from simulator.validation.published import published_runs
from simulator.validation.row_cluster import MACHINES

PROFILES = Path(__file__).parent.parent / "hardware_profiles"
#: host -> silicon, for hosts whose accelerators have it
HOSTS = {host: SILICON[next(s for s in SILICON if accelerator.startswith(s))] for accelerator, host, _ in MACHINES.values()}
#: a launch that moves no step by this share of itself is not fitted, but stays assumed
FEELS = 0.01


def main() -> None:
    """Fit, print, and write when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the values into hardware_profiles")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    rows = published_runs()
    rows = rows[rows["complete"] == "yes"]
    found = fitted(*predictions(rows, args.processes))
    for silicon, (parameters, result) in found.items():
        print(f"{silicon}: {result.rows} complete rows")
        for i, p in enumerate(parameters):
            print(
                f"  {p.name}: {p.start:.4g} -> {result.values[i]:.3g} {p.unit}, 80 % {result.low[i]:.3g} to {result.high[i]:.3g}, "
                f"sensitivity {result.sensitivity[i]:.2f}"
            )
        if args.write:
            write(silicon, parameters, result)


def write(silicon: str, parameters: list[Parameter], result: Fitted) -> None:
    """Write the parameters of one silicon into the profiles of its accelerators and hosts, with their source."""
    index = {p.name.removeprefix("in_training."): i for i, p in enumerate(parameters)}
    names = [n for n in ACCELERATORS.names() if silicon in (of for start, of in SILICON.items() if n.startswith(start))]
    of = f"{result.rows} complete published rows on {silicon}"
    for name in names:
        path = PROFILES / "accelerators" / f"{name}.yaml"
        text = path.read_text()
        present = re.search(r"in_training:\n((?:  \w+: .*\n)+)", text)
        parts = re.findall(r"  (\w+):", present.group(1)) if present else []
        if not parts:
            continue
        said = "; ".join(
            f"{part} {result.low[index[part]]:.3g} to {result.high[index[part]]:.3g}, {result.sensitivity[index[part]]:.2f}"
            for part in parts
        )
        source = (
            f"{of}, each model on each accelerator counting once (tools/refit.py); 80 % intervals and sensitivities, percent of step "
            f"time per percent: {said}"
        )
        text = text.replace(present.group(0), "in_training:\n" + "".join(f"  {n}: {result.values[index[n]]:.3g}\n" for n in parts))
        path.write_text(sourced(text, "in_training", source))
    i = index.get("dispatch_s")
    if i is None or result.sensitivity[i] < FEELS:
        return
    low, high = 1e6 * result.low[i], 1e6 * result.high[i]
    source = (
        f"{of} (tools/refit.py); 80 % interval {low:.0f} to {high:.0f} us, {result.sensitivity[i]:.2f} percent of step time per percent; "
        "bounds 5 to 200 us"
    )
    for host in (h for h, s in HOSTS.items() if s == silicon):
        path = PROFILES / "hosts" / f"{host}.yaml"
        text = re.sub(r"^dispatch_s: .*$", f"dispatch_s: {1e6 * result.values[i]:.0f} us", path.read_text(), flags=re.MULTILINE)
        path.write_text(sourced(text, "dispatch_s", source))


def sourced(text: str, fact: str, source: str) -> str:
    """Return a profile whose entry of `fact` alone says that it is fitted, and to what."""
    entry = re.compile(rf"  - grade: \w+\n    source:(?:(?!  - grade).)*?    facts: \[{fact}\]\n", re.DOTALL)
    lines = fill(source, width=110, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return entry.sub(f"  - grade: fitted\n    source: >-\n{lines}\n    facts: [{fact}]\n", text)


if __name__ == "__main__":
    main()
