"""`calibrate` and `check`: the two questions that a user asks of a machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from simulator.calibration.cases import collective_sizes, group_sizes, held_out, joint, probes
from simulator.calibration.check import Measured, Proof, compare
from simulator.calibration.machine import CalibrationError, Quiet, check_world, described, memory_bytes, needs_torch
from simulator.calibration.profile import MachineProfile, build, load, save
from simulator.files import write_atomically

Progress = Callable[[str, int, int], None]
#: turns through all cases and repeats of a probe
QUICK, THOROUGH = (2, 4), (5, 6)
#: share of the machine's memory that the ranks touch before they measure
TOUCHED = 0.25


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.json")


def _resumed(path: Path, about: dict[str, Any]) -> dict[str, list[dict]]:
    """Return the finished measurements of an interrupted run on the same machine and code."""
    if not _partial(path).is_file():
        return {}
    try:
        data = json.loads(_partial(path).read_text(encoding="utf-8"))
        same = {k: data["about"].get(k) for k in about if k != "date"} == {k: v for k, v in about.items() if k != "date"}
        return data["done"] if same else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CalibrationError(f"{_partial(path)} is not an interrupted calibration; remove it and run again") from None


def calibrate(
    path: str | Path,
    device: str = "cpu",
    ranks: int | None = None,
    quick: bool = True,
    command: str = "simulator.calibration.calibrate",
    progress: Progress = _silent,
    small: bool = False,
) -> MachineProfile:
    """Measure this machine, fit its costs, write the profile to `path` and the raw table beside it, and return the profile.

    Parameters
    ----------
    path : str or Path
        ``NAME.yaml``.
    device : str
        ``cpu`` or ``cuda``.
    ranks : int, optional
        Processes, each with a core or GPU of its own; all of them by default, at most eight.
    quick : bool
        Two turns through all cases instead of five.
    command : str
        What is written into the profile as the way to repeat it.
    progress : callable, optional
        Called with ``(stage, done, total)``.
    small : bool
        Four probes and three sizes in a single turn: for a first look, not for a proof.

    Raises
    ------
    CalibrationError
        Without torch or devices, and when a measurement cannot be used.

    Notes
    -----
    Finished measurements are kept in ``NAME.partial.json`` after each one; the same command goes on from there.
    """
    needs_torch()
    path, world = Path(path), check_world(device, ranks)
    if path.suffix != ".yaml":
        raise CalibrationError(f"{path}: write a profile to NAME.yaml")
    from simulator.calibration import measure
    from simulator.calibration.launch import run_ranks

    turns, repeats = (1, 3) if small else QUICK if quick else THOROUGH
    about = described(device, world) | {"turns": turns, "repeats": repeats}
    whole = measure.everything(probes(device, small), joint(world, device, small), collective_sizes(small), group_sizes(world), turns)
    done = _resumed(path, about)
    left = [item for item in whole if item.key not in done]
    quiet = Quiet()

    def keep(key: str, rows: list[dict]) -> None:
        done[key] = rows
        write_atomically(_partial(path), lambda file: json.dump({"about": about, "done": done}, file))
        progress("measure", len(done), len(whole))

    if left:
        run_ranks(measure.run, world, left, device, repeats, kind=device, tell=keep, touched=_touched(world, device, small))
    foreign = quiet.foreign()
    rows = pd.DataFrame([row for item in whole for row in done[item.key]])
    profile = build(path.stem, rows, about, command, foreign)
    save(profile, rows, path)
    _partial(path).unlink(missing_ok=True)
    return profile


def _touched(world: int, device: str, small: bool) -> int:
    return 0 if device == "cuda" or small else int(min(TOUCHED * memory_bytes() / world, 4e9))


def check(profile: MachineProfile | str | Path, progress: Progress = _silent, small: bool = False) -> Proof:
    """Run the held-out steps on this machine and return how the profile predicts them.

    Parameters
    ----------
    profile : MachineProfile, str or Path
        Or a shipped name, or a path.
    progress : callable, optional
    small : bool
        Two short steps: for a first look, not for a proof.
    """
    needs_torch()
    profile = profile if isinstance(profile, MachineProfile) else load(profile)
    device, world = profile.about["device"], check_world(profile.about["device"], int(profile.about["ranks"]))
    cases = [case for case in held_out(device, small) if case.plan.world == world]
    if not cases:
        raise CalibrationError(f"no held-out step runs on {world} ranks; calibrate with --ranks {1 if device == 'cuda' else 2}")
    from simulator.calibration import steps
    from simulator.calibration.launch import run_ranks

    quiet = Quiet()
    turns, repeats = (1, 2) if small else (2, 3)
    measured: list[Measured] = run_ranks(
        steps.run, world, cases, device, turns, repeats, kind=device, tell=progress, touched=_touched(world, device, small)
    )[0]
    return compare(measured, profile, quiet.foreign())
