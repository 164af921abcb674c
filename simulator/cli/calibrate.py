"""The verb calibrate: measure this machine, or prove a profile of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from simulator.cli.question import AsJson
from simulator.cli.terminal import print_json, progress, records, say, show

if TYPE_CHECKING:
    from simulator.calibration.check import Proof
    from simulator.calibration.profile import MachineProfile


def calibrate(
    check: Annotated[
        str | None, typer.Option(help="Prove this profile (a path or a shipped name) on steps that it was not fitted to.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="With --check: do not measure, but say how far this other profile predicts the same steps.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Where the profile goes; the raw table stands beside it.")] = Path("machine.yaml"),
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What to measure.")] = "cpu",
    ranks: Annotated[int | None, typer.Option(help="Processes, one per core or GPU; all of them by default, at most eight.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two turns instead of five: two minutes on two cores.")] = False,
    read: Annotated[
        Path | None, typer.Option("--import", help="Show what a foreign file measured: nccl-tests, torch.profiler, a log.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a real PyTorch MoE step on this machine and write a hardware profile, or prove one."""
    if read:
        from simulator.calibration.importers import read_foreign

        table = read_foreign(read)
        print_json(records(table)) if as_json else show(table)
        return
    if against:
        _report_agreement(check, against, as_json)
        return
    from simulator.calibration.calibrate import calibrate as measure
    from simulator.calibration.calibrate import check as prove

    with progress() as tell:
        if check:
            proof = prove(check, progress=tell)
        else:
            profile = measure(to, device, ranks, quick, command=" ".join(["myriad", *sys.argv[1:]]), progress=tell)
    if check:
        _report_proof(proof, as_json)
    else:
        _report_profile(profile, to, as_json)


def _report_agreement(check: str | None, against: str, as_json: bool) -> None:
    from simulator.calibration.check import agreement
    from simulator.calibration.machine import CalibrationError
    from simulator.calibration.profile import load

    if check is None:
        raise CalibrationError("--against compares with another profile: myriad calibrate --check PROFILE --against OTHER")
    table = agreement(load(check), load(against))
    largest = float(table["difference"].abs().max())
    if as_json:
        print_json({"largest_difference": largest, "rows": records(table)})
        return
    text = {"one_s": "{:.3f}", "other_s": "{:.3f}", "difference": "{:+.1%}"}
    show(table.assign(**{name: table[name].map(form.format) for name, form in text.items()}), f"{escape(check)} and {escape(against)}")
    say(f"Their predictions differ by {largest:.1%} at most.")


def _report_profile(profile: MachineProfile, path: Path, as_json: bool) -> None:
    if as_json:
        print_json({"profile": str(path), "about": profile.about, "foreign_share": profile.foreign_share, "residuals": profile.residuals()})
        return
    import pandas as pd

    rows = [{"cost": fit.name, "rows": fit.rows, "residual": f"{fit.residual:.1%}"} for fit in profile.fits]
    show(pd.DataFrame(rows), f"Fitted costs of {escape(profile.name)}")
    busy = "" if profile.foreign_share is None else f"; other processes took {profile.foreign_share:.0%} of the cores"
    say(f"Wrote {escape(str(path))} and {escape(path.with_suffix('.csv').name)} beside it{busy}.")
    say(f"Prove it: myriad calibrate --check {escape(str(path))}")


def _report_proof(proof: Proof, as_json: bool) -> None:
    if as_json:
        print_json(proof.summary() | {"rows": records(proof.steps), "parts": records(proof.parts), "tokens_per_expert": proof.counts})
        return
    text = {"measured_s": "{:.3f}", "predicted_s": "{:.3f}", "low_s": "{:.3f}", "high_s": "{:.3f}", "noise": "{:.1%}", "error": "{:+.1%}",
            "memory_error": "{:+.1%}", "expert_load": "{:.2f}"}  # fmt: skip
    steps, parts = proof.steps.drop(columns=["model", "plan"]), proof.parts
    for name in ("measured_memory_bytes", "predicted_memory_bytes"):
        steps[name.replace("bytes", "MB")] = steps.pop(name).map(lambda v: f"{v / 1e6:.0f}")
    for table in (steps, parts):
        for name in table.columns.intersection(list(text)):
            table[name] = table[name].map(lambda v, t=text[name]: "" if v is None or v != v else t.format(v))
    show(steps, "Steps that were not used in the fit")
    show(parts, "By kind of operation, mean over ranks")
    say(
        f"{len(steps)} steps: mean error {proof.mean_error:.1%}, largest {proof.worst_error:.1%}; {proof.pairs} pairs differ by more than "
        f"twice the noise, {len(proof.wrong_order)} in the wrong order."
    )
    for line in (*proof.noisy, *proof.problems):
        say(f"- {escape(line)}")
    say(f"[bold]{proof.verdict}[/]")
