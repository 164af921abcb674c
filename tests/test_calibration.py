"""Fits, profiles, proofs and resumption, against costs that the test makes up: no clock is read here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from simulator.calibration import calibrate as calibration
from simulator.calibration import check, fit, machine, profile
from simulator.calibration.cases import COLLECTIVES, SCANS, Row, collective_sizes, counts, held_out, joint, launches, ops_of, probes, tiny
from simulator.errors import ProfileError
from simulator.network.collectives import measured_s as talk_s
from simulator.pricing.compute import measured_s
from simulator.pricing.operations import op_s
from simulator.scenario.measured import CollectiveCost, KernelCost
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

ABOUT = {"date": "2026-11-25", "commit": "made up", "torch": "none", "device": "cpu", "ranks": 2, "cpu": {"model": "made up"}}
#: true costs: seconds per call, FLOP and byte
CALL, FLOP, BYTE = 2e-5, 1 / 2e11, 1 / 5e9
LATENCY, WIRE = 3e-4, 1 / 1e9
ATTENTION = 1 / 5e10

DATA = Path(__file__).parent / "data"


def made_up(noise: float = 0.0, seed: int = 0, turns: int = 1) -> pd.DataFrame:
    """Return the raw table that a machine of the true costs would give, its times off by `noise` and now and then far too long."""
    draw = np.random.default_rng(seed)

    def row(part: str, case: str, name: str, calls: float, flop: float, size: float, seconds: float, turn: int) -> Row:
        seconds *= float(np.exp(noise * draw.standard_normal())) * (3.0 if noise and draw.random() < 0.1 else 1.0)
        return Row(part, case, name, 2, calls, flop, size, seconds, spread=0.0, cpu_s=seconds, repeats=7, turn=turn)

    rows = []
    for turn in range(turns):
        for case in probes():
            table = counts(ops_of(case))
            for name, (n, flop, size) in table.items():
                rows += [row("kernel", case.name, name, n, flop, size, n * CALL + flop * FLOP + size * BYTE, turn)]
            total = sum(c for c, _, _ in table.values())
            rows.append(row("kernel", case.name, "between", total, 0, 0, 1e-12 * total, turn))
            rows.append(row("kernel", case.name, "step", total, 0, 0, 1.0, turn))
        for kind, dtype in COLLECTIVES:
            for size in collective_sizes():
                rows += [row("collective", str(size), f"{kind}.{dtype}", 1, 0, size, LATENCY + size * WIRE, turn)]
        for length in SCANS["cpu"].lengths:
            for way in ("forward", "backward"):
                rows.append(row("attention", str((length + 1) / 2), f"attention.{way}", 8, 1e9, 1e6, 1e9 * ATTENTION, turn))
        for name, flop in (("product.bf16", 2e9), ("product.fp32", 1e9), ("grouped.bf16", 1.5e9), ("launch", 0), ("copy", 0)):
            rows.append(row("single", "x", name, 1, flop, 1e8, 0.01, turn))
    return pd.DataFrame([asdict(r) for r in rows])


@pytest.fixture(scope="module")
def exact() -> profile.MachineProfile:
    return profile.build("made-up", made_up(), ABOUT, "a test", 0.0)


# --- the fit ---


def test_a_linear_fit_finds_the_truth():
    size = np.geomspace(1e4, 1e8, 12)
    found = fit.linear("x", {"latency_s": np.ones_like(size), "bytes_per_s": size}, 1e-4 + size / 2e9)
    assert found.values == pytest.approx({"latency_s": 1e-4, "bytes_per_s": 2e9}, rel=1e-4)
    assert found.residual < 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_a_disturbed_fit_stays_near_and_its_interval_says_how_near(seed: int):
    """8 % noise and every seventh time trebled: an unweighted fit is off by multiples, this one by less than it says."""
    draw = np.random.default_rng(seed)
    size = np.geomspace(1e4, 1e8, 42)
    seconds = (1e-4 + size / 2e9) * np.exp(0.08 * draw.standard_normal(42)) * np.where(np.arange(42) % 7 == 3, 3.0, 1.0)
    found = fit.linear("x", {"latency_s": np.ones_like(size), "bytes_per_s": size}, seconds)
    for key, truth in (("latency_s", 1e-4), ("bytes_per_s", 2e9)):
        assert found.values[key] == pytest.approx(truth, rel=0.15)
        assert found.low[key] < truth < found.high[key]


def test_a_term_that_explains_nothing_is_left_out():
    size = np.geomspace(1e6, 1e9, 8)
    found = fit.linear("x", {"launch_s": np.ones_like(size), "bytes_per_s": size}, size / 1e9)
    assert set(found.values) == {"bytes_per_s"}


def test_a_knee_is_found_where_there_is_one():
    rows = made_up()
    talk = rows["part"] == "collective"
    size = rows.loc[talk, "bytes"]
    knee = float(collective_sizes()[3])
    rows.loc[talk, "seconds"] = 1e-4 + np.minimum(size, knee) / 4e9 + np.maximum(size - knee, 0) / 1e9
    found = fit.fit_collectives(rows)["all_gather.bf16.2"]
    assert found.values == pytest.approx({"latency_s": 1e-4, "bytes_per_s": 4e9, "beyond_bytes_per_s": 1e9, "knee_bytes": knee}, rel=0.01)
    assert found.collective().knee_bytes == knee


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_time_that_is_no_time_is_refused(bad: float):
    rows = made_up()
    rows.loc[3, "seconds"] = bad
    with pytest.raises(machine.CalibrationError, match="row 3 .* finite and above zero"):
        profile.build("x", rows, ABOUT, "a test", 0.0)


def beside(rows: pd.DataFrame, kept: float, skew: float, slower: float) -> pd.DataFrame:
    """Return `rows` with what probes of two ranks add: kernels at `kept` of their speed, waiting, collectives `slower` times as long."""
    found = []
    for case in joint(2):
        spent = 0.0
        for name, (n, flop, size) in counts(ops_of(case)).items():
            alone = flop * ATTENTION if name.startswith("attention") else n * CALL + flop * FLOP + size * BYTE
            found.append(Row("together", case.name, name, 2, n, flop, size, alone / kept, 0.0, alone, 3, 0))
            spent += alone / kept
        found.append(Row("together", case.name, "wait", 2, 9, 0, 0, skew * spent, 0.0, 0.0, 3, 0))
        talk = [(f"{k}.{dtype}", size) for k, dtype in COLLECTIVES[:-1] for size in (2**19, case.model.hidden * 2**12)]
        found += [Row("together", case.name, n, 2, 4, 0, b, slower * (LATENCY + b * WIRE), 0.0, 0.0, 3, 0) for n, b in talk]
    return pd.concat([rows, pd.DataFrame([asdict(row) for row in found])], ignore_index=True)


def test_what_ranks_lose_together_is_found():
    """Kernels at 0.8 of their speed, 5 % of skew, collectives three times as slow as by themselves: all three come out."""
    found = profile.build("x", beside(made_up(), 0.8, 0.05, 3.0), ABOUT, "a test", 0.0)
    shares = found.cluster.accelerator.in_training
    assert shares == pytest.approx(dict.fromkeys(("gemm", "grouped", "attention", "memory", "optimizer"), 0.8 / 1.05), rel=0.02)
    assert found.residuals()["skew"] == pytest.approx(0.0, abs=1e-9)
    talk = found.cluster.host.collectives["all_gather.bf16.2"]
    assert float(talk_s(2e6, talk)) == pytest.approx(3 * (LATENCY + 2e6 * WIRE), rel=0.02)
    assert found.cluster.host.collectives["send.bf16.2"].latency_s == pytest.approx(LATENCY, rel=0.02)  # only by itself
    case = next(c for c in held_out() if c.name.startswith("DP2"))
    op = next(op for op in ops_of(case) if op.kind == "gemm")
    truth = (float(op.groups) * CALL + op.flop * FLOP + op.bytes * BYTE) * 1.05 / 0.8
    assert float(op_s(op, case.model, case.plan, found.cluster)) == pytest.approx(truth, rel=0.02)


# --- the profile is an ordinary cluster ---


def test_every_kernel_of_a_held_out_step_costs_what_it_truly_does(exact: profile.MachineProfile):
    for case in held_out():
        alone = case.model
        for op in ops_of(case):
            if op.flop or op.bytes:
                truth = float(op.groups) * CALL + op.flop * FLOP + op.bytes * BYTE
                if op.kind == "attention":
                    truth = op.flop * ATTENTION
                assert float(op_s(op, alone, case.plan, exact.cluster)) == pytest.approx(truth, rel=0.02), op


def test_a_predicted_step_is_the_sum_of_true_costs(exact: profile.MachineProfile):
    """EP 2 without imbalance: nothing overlaps, so kernels and exposed communication add up to the step."""
    case = next(c for c in held_out() if c.name.startswith("EP2"))
    result = simulate_step(Scenario(model=case.model, cluster=exact.cluster, plan=case.plan, job=case.job))
    parts = check.predicted_parts(result)
    assert sum(parts.values()) == pytest.approx(result.step_time_s, rel=1e-9)
    assert parts["ep"] > 0
    assert parts["dp"] > 0


def test_measured_costs_by_hand():
    cost = KernelCost(launch_s="1 us", flop_per_s="1 TFLOP/s", bytes_per_s="1 GB/s")
    assert float(measured_s(1e6, 1e3, 3, cost)) == pytest.approx(3e-6 + 1e-6 + 1e-6)
    assert float(measured_s(0, 0, 3, cost)) == 0.0
    assert float(measured_s(1e6, 1e3, 3, cost, kept=0.5)) == pytest.approx(2 * 5e-6)
    curve = KernelCost(launch_s="0 s", keys=(10, 1000), flop_per_s_at_keys=("1 GFLOP/s", "2 GFLOP/s"))
    assert [float(measured_s(1e9, 1, 1, curve, k)) for k in (1, 10, 100, 1000, 9999)] == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    bent = CollectiveCost(latency_s="1 ms", bytes_per_s="1 GB/s", knee_bytes="1 MB", beyond_bytes_per_s="0.5 GB/s")
    assert [float(talk_s(size, bent)) for size in (0, 1e6, 2e6)] == pytest.approx([1e-3, 2e-3, 4e-3])
    with pytest.raises(ProfileError, match="go together"):
        CollectiveCost(latency_s="1 ms", bytes_per_s="1 GB/s", knee_bytes="1 MB")
    with pytest.raises(ProfileError, match="must ascend"):
        KernelCost(launch_s="0 s", keys=(10, 5), flop_per_s_at_keys=("1 GFLOP/s", "2 GFLOP/s"))


def test_a_profile_is_written_whole_and_read_back(exact: profile.MachineProfile, tmp_path: Path):
    rows = made_up()
    profile.save(exact, rows, tmp_path / "made-up.yaml")
    assert profile.load(tmp_path / "made-up.yaml") == exact
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "made-up.csv"), rows, check_dtype=False)
    grades = {row["grade"] for row in exact.cluster.provenance()}
    assert grades == {"measured", "fitted", "assumed"}
    with pytest.raises(machine.CalibrationError, match="no measured profile 'nowhere'"):
        profile.load("nowhere")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(machine.CalibrationError, match="no table 'cluster'"):
        profile.load(tmp_path / "other.yaml")


def test_shipped_profiles_load_and_simulate():
    assert list(profile.folder().glob("*.yaml"))
    for path in profile.folder().glob("*.yaml"):
        shipped = profile.load(path.stem)
        case = next(c for c in held_out(shipped.about["device"]) if c.plan.world == shipped.cluster.accelerators)
        result = simulate_step(Scenario(model=case.model, cluster=shipped.cluster, plan=case.plan, job=case.job))
        assert result.step_time_s > 0
        assert path.with_suffix(".csv").is_file()
        again = profile.build(path.stem, pd.read_csv(path.with_suffix(".csv")), shipped.about, shipped.command, shipped.foreign_share)
        assert again.cluster.accelerator.kernels.keys() == shipped.cluster.accelerator.kernels.keys()


def test_a_collective_whose_time_does_not_grow_moves_at_the_fastest_rate_seen():
    rows = made_up(0.0, 0, turns=1)
    rows = rows[rows["part"] != "together"]
    flat = rows.assign(seconds=rows["seconds"].where(rows["part"] != "collective", 1e-3))
    fits = fit.fit_collectives(flat)
    assert fits
    for found in fits.values():
        cost = found.collective()
        assert cost.latency_s == pytest.approx(1e-3, rel=1e-6)
        assert cost.bytes_per_s == pytest.approx(flat.loc[flat["part"] == "collective", "bytes"].max() / 1e-3)


def test_an_h100_runs_as_its_profile_says():
    """Steps that the profile was not fitted to, measured by ``--check`` right after it. In the shortest the GPU waits for its host,
    whose launches the profile holds as one mean: it comes out 4.5 % too slow."""
    shipped, seen = profile.load("h100"), pd.read_csv(DATA / "h100_steps.csv", index_col="case")
    cases = held_out("cuda")
    assert [case.name for case in cases] == seen.index.tolist()
    blank = ((1,),)
    found = [check.predict(check.Measured(case, (1.0,), {}, (1.0,), blank), shipped) for case in cases]
    error = pd.Series([step.step_time_s for step in found], seen.index) / seen["measured_s"] - 1
    assert error.abs().mean() < 0.025  # 2.2 %
    assert error.drop("h2560-s3072").abs().max() < 0.04
    assert error.abs().max() < 0.05
    memory = pd.Series([step.peak_memory_bytes for step in found], seen.index) / seen["peak_bytes"] - 1
    assert memory.abs().max() < 0.02


def test_two_disturbed_measurements_predict_alike():
    """Two turns with 5 % noise and outliers, twice: the fits' predictions differ by less than 5 %."""
    first, second = (profile.build("x", made_up(0.05, seed, turns=2), ABOUT, "a test", 0.0) for seed in (1, 2))
    for case in held_out():
        one, two = (
            simulate_step(Scenario(model=case.model, cluster=p.cluster, plan=case.plan, job=case.job)).step_time_s for p in (first, second)
        )
        assert one == pytest.approx(two, rel=0.05)


def test_a_hosts_launches_are_measured_and_make_a_short_step_longer():
    """A made-up host of 0.5 ms a launch: the profile holds it, and a step of little work takes its launches' time."""
    rows = pd.concat([made_up(), pd.DataFrame([asdict(Row("single", "tiny", "dispatch", 2, 500, 0, 0, 500 * 5e-4, 0, 0, 7, 0))])])
    found = profile.build("x", rows.reset_index(drop=True), ABOUT, "a test", 0.0)
    assert found.cluster.host.dispatch_s == pytest.approx(5e-4)
    assert {row["grade"] for row in found.cluster.host.provenance() if row["fact"] == "dispatch_s"} == {"measured"}
    case = tiny()
    one = found.cluster.model_copy(update={"accelerators": 1})
    without = one.model_copy(update={"host": one.host.model_copy(update={"dispatch_s": None})})
    slow, fast = (simulate_step(Scenario(model=case.model, cluster=c, plan=case.plan, job=case.job)).step_time_s for c in (one, without))
    assert slow > launches(case) * 5e-4 > fast


def test_two_profiles_are_compared(exact: profile.MachineProfile, tmp_path: Path, monkeypatch, capsys):
    from simulator.cli import main

    slower = made_up()
    slower["seconds"] *= 1.1
    slower["cpu_s"] *= 1.1
    other = profile.build("slower", slower, ABOUT, "a test", 0.0)
    table = check.agreement(exact, other)
    assert table["difference"].to_numpy() == pytest.approx(0.1, abs=0.01)
    assert len(table) == len(held_out())
    for made in (exact, other):
        profile.save(made, made_up(), tmp_path / f"{made.name}.yaml")
    words = ["--check", str(tmp_path / "made-up.yaml"), "--against", str(tmp_path / "slower.yaml")]
    monkeypatch.setattr("sys.argv", ["myriad", "calibrate", *words])
    with pytest.raises(SystemExit):
        main()
    assert f"differ by {table['difference'].max():.1%} at most" in capsys.readouterr().out
    with pytest.raises(machine.CalibrationError, match="compare profiles of the same"):
        check.agreement(exact, profile.load("h100"))


# --- the proof ---


def as_predicted(made: profile.MachineProfile, off: float = 1.0, noise: float = 0.01) -> list[check.Measured]:
    """Return the held-out steps as the profile predicts them, `off` times as long."""
    found = []
    for case in held_out():
        e = case.model.experts
        table = tuple((case.job.tokens_per_step * e.top_k // e.count,) * e.count for moe in case.model.moe_layers if moe)
        blank = check.Measured(case, (1.0,), {}, (1.0,), table)
        result = check.predict(blank, made)
        seconds = tuple(off * result.step_time_s * (1 + noise * x) for x in (-1, -0.5, 0, 0.5, 1))
        found.append(check.Measured(case, seconds, check.predicted_parts(result), (result.peak_memory_bytes,), table))
    return found


def test_exact_predictions_are_proved(exact: profile.MachineProfile):
    proof = check.compare(as_predicted(exact), exact, 0.0)
    assert proof.mean_error < 1e-12
    assert proof.parts["error"].dropna().abs().max() < 1e-9
    assert (proof.steps["low_s"] < proof.steps["measured_s"]).all()
    assert (proof.steps["high_s"] > proof.steps["measured_s"]).all()
    assert proof.pairs > 20
    assert not proof.wrong_order
    short = [m.case.name for m in as_predicted(exact) if m.step_s < check.LEAST_S["cpu"]]
    assert proof.verdict == ("proved" if len(proof.steps) - len(short) >= check.STEPS else "not proved")
    json.dumps(proof.summary())


def test_wrong_predictions_are_not_proved(exact: profile.MachineProfile):
    proof = check.compare(as_predicted(exact, off=1.3), exact, 0.0)
    assert proof.verdict == "not proved"
    assert proof.mean_error == pytest.approx(1 - 1 / 1.3)
    assert any("mean error 23.1%" in problem for problem in proof.problems)


def test_order_is_judged_only_beyond_the_noise(exact: profile.MachineProfile):
    steps = as_predicted(exact, noise=0.02)
    one = steps[0]
    faster = check.Measured(one.case, tuple(s / 50 for s in one.seconds), one.parts_s, one.peak_bytes, one.counts)
    proof = check.compare([faster, *steps[1:]], exact, 0.0)
    assert {pair[0] for pair in proof.wrong_order} == {one.case.name}
    blurred = [check.Measured(m.case, (m.step_s * 0.01, m.step_s, m.step_s * 1.99), m.parts_s, m.peak_bytes, m.counts) for m in steps]
    assert check.compare(blurred, exact, 0.0).pairs < proof.pairs


@pytest.mark.parametrize(("foreign", "noise"), [(0.5, 0.01), (0.0, 0.5), (None, 0.5)])
def test_a_noisy_machine_proves_nothing(exact: profile.MachineProfile, foreign: float | None, noise: float):
    proof = check.compare(as_predicted(exact, noise=noise), exact, foreign)
    assert proof.verdict == "too noisy to judge"
    assert proof.noisy


def test_imbalance_comes_from_the_table_of_tokens():
    case = next(c for c in held_out() if c.plan.ep == 2 and c.model.experts.count == 4)
    counts_ = ((30, 30, 20, 20), (10, 30, 30, 30))
    measured = check.Measured(case, (1.0,), {}, (1.0,), counts_)
    assert measured.load() == pytest.approx((1.2 + 1.2) / 2)
    assert measured.routing().counts == counts_
    with pytest.raises(machine.CalibrationError, match="runs on 2 ranks, the profile .* on 4"):
        check.predict(measured, profile.build("x", made_up(), ABOUT | {"ranks": 4}, "a test", 0.0))


def test_a_call_costs_what_its_last_rank_spends():
    """By hand: the first of two ranks arrives 3 s early once, the second 1 s; small exchanges count with the large one."""
    pytest.importorskip("torch")
    from simulator.calibration.recorder import Call
    from simulator.calibration.together import split, waited

    one = [Call("all_gather.bf16", 100, 5.0, "dp"), Call("all_to_all.int64", 16, 1.0, "ep"), Call("all_to_all.bf16", 1000, 4.0, "ep")]
    two = [Call("all_gather.bf16", 100, 2.0, "dp"), Call("all_to_all.int64", 16, 2.0, "ep"), Call("all_to_all.bf16", 1200, 4.0, "ep")]
    assert split([one, two]) == {("all_gather.bf16", 100): [2.0], ("all_to_all.bf16", 1100): [5.0]}
    assert waited([one, two]) == pytest.approx({"dp": 1.5, "ep": 0.5})
    tensor = [[Call("all_gather.bf16", 100, 5.0, "tp")], [Call("all_gather.bf16", 100, 2.0, "tp")]]
    assert split(tensor) == {("all_gather.bf16", 100): [3.5]}  # its waiting is its own
    assert waited(tensor) == {"tp": 0.0}


def test_a_collective_inside_a_kernel_is_not_the_kernels_on_cuda_either(monkeypatch: pytest.MonkeyPatch):
    """Events that tick once each time they are recorded: the kernel spans three ticks of 1 ms, one of them its collective's."""
    torch = pytest.importorskip("torch")
    from simulator.calibration.recorder import Call, Recorder

    ticks = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            self.at = next(ticks)

        def elapsed_time(self, other):
            return float(other.at - self.at)

    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    recorder = Recorder(torch.device("cuda", 0))
    recorder.on = True
    with recorder.region("loss.forward"), recorder.call("tp", "all_reduce", torch.float32, 64):
        pass
    assert not waited  # nothing waits for the device while the step runs
    assert recorder.calls() == [Call("all_reduce.fp32", 64, 1e-3, "tp")]
    assert {name: spent.wall_s for name, spent in recorder.take().items()} == pytest.approx({"loss.forward": 2e-3, "tp.all_reduce": 1e-3})
    assert len(waited) == 2
    assert not recorder.take()
    assert not recorder.calls()


def test_a_recorded_gpu_is_kept_busy_while_its_host_is_near(monkeypatch: pytest.MonkeyPatch):
    """A device that has done everything but the last eight regions gets work before the next one; inside a region it never does."""
    torch = pytest.importorskip("torch")
    from simulator.calibration.recorder import BEHIND, Recorder

    done, slept = set(), []

    class Event:
        number = 0

        def __init__(self, enable_timing: bool):
            self.name, Event.number = Event.number, Event.number + 1

        def record(self):
            pass

        def query(self):
            return self.name in done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    recorder = Recorder(torch.device("cuda", 0))
    recorder.on = recorder.ahead = True
    for number in range(BEHIND + 4):
        with recorder.region("gemm.forward"):
            pass
        assert len(slept) == 1, number  # at first there is nothing to be behind of
    done.add(2 * 4 + 1)  # the last event of the region that is eight back
    with recorder.region("loss.forward"), recorder.call("tp", "all_reduce", torch.float32, 64):
        pass
    assert len(slept) == 2
    with recorder.region("gemm.forward"):
        pass
    assert len(slept) == 2  # what was done before the host got ahead says nothing


def test_the_time_between_kernels_may_be_nothing():
    """It is the difference of two runs on a GPU; a kernel's time still has to be one."""
    rows = made_up()
    nothing = rows["name"] == "between"
    assert nothing.any()
    fits = fit.fit_kernels(rows.assign(seconds=rows["seconds"].mask(nothing, -1e-6), cpu_s=rows["cpu_s"].mask(nothing, -1e-6)), "cpu")
    assert all(found.values["launch_s"] >= 0 for found in fits.values())
    with pytest.raises(machine.CalibrationError, match="finite and above zero"):
        fit.fit_kernels(rows.assign(seconds=rows["seconds"].mask(rows["name"] == "gemm.forward", -1e-6)), "cpu")


def test_every_probe_has_a_name_of_its_own():
    """Measurements are kept by name: of two probes of one name only the second would be fitted."""
    for device in ("cpu", "cuda"):
        names = [case.name for case in (*probes(device), *joint(2, device), *held_out(device))]
        assert len(set(names)) == len(names)


def test_probes_of_several_ranks_are_not_the_steps_that_prove():
    shapes = {(c.model.hidden, c.job.sequence_length) for c in held_out()}
    assert not shapes & {(c.model.hidden, c.job.sequence_length) for c in joint(2)}
    assert {c.plan.world for c in joint(2)} == {2}
    assert not joint(1)


# --- interrupted, and bad input ---


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace the ranks by rows that are made up; `die_after` items the run is killed. Returns the keys that each run was asked for."""
    pytest.importorskip("torch")
    asked: list[list[str]] = []
    table = made_up()

    def run_ranks(function, world, left, device, repeats, kind, tell, touched):
        asked.append([item.key for item in left])
        for number, item in enumerate(left):
            if len(asked) == 1 and number == 5:
                raise KeyboardInterrupt
            if item.joint:
                rows = table[(table["part"] == "together") & (table["case"] == item.joint.name)]
            elif item.probe:
                rows = table[(table["part"] == "kernel") & (table["case"] == item.probe.name)]
            elif item.collective:
                kind_, dtype, size, _ = item.collective
                rows = table[(table["name"] == f"{kind_}.{dtype}") & (table["case"] == str(size))]
            else:
                rows = table[table["part"].isin(["single", "attention"])] if item.key.startswith("single") else table[:0]
            tell(item.key, rows.to_dict("records"))

    monkeypatch.setattr("simulator.calibration.launch.run_ranks", run_ranks)
    monkeypatch.setattr("simulator.calibration.machine.devices", lambda kind: 2)
    monkeypatch.setattr("simulator.calibration.machine.commit", lambda: "made up")
    return asked


def test_a_killed_run_resumes_and_loses_nothing(fake: list[list[str]], tmp_path: Path):
    path = tmp_path / "m.yaml"
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(path)
    assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.partial.json"]
    told: list[tuple] = []
    whole = calibration.calibrate(path, progress=lambda *what: told.append(what))
    assert fake[1] == fake[0][5:]
    assert told[-1] == ("measure", len(fake[0]), len(fake[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.csv", "m.yaml"]
    assert profile.load(path) == whole


def test_another_commit_does_not_resume(fake: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(tmp_path / "m.yaml")
    monkeypatch.setattr("simulator.calibration.machine.commit", lambda: "another")
    calibration.calibrate(tmp_path / "m.yaml")
    assert fake[1] == fake[0]


def test_a_strange_partial_file_is_refused(fake: list[list[str]], tmp_path: Path):
    (tmp_path / "m.partial.json").write_text("[1]")
    with pytest.raises(machine.CalibrationError, match="not an interrupted calibration"):
        calibration.calibrate(tmp_path / "m.yaml")


def test_more_processes_than_cores_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "devices", lambda kind: 2)
    with pytest.raises(machine.CalibrationError, match=r"3 processes on 2 cores.*--ranks 2"):
        machine.check_world("cpu", 3)
    assert (machine.check_world("cpu", None), machine.check_world("cpu", 1)) == (2, 1)
    monkeypatch.setattr(machine, "devices", lambda kind: 0)
    with pytest.raises(machine.CalibrationError, match="no GPU here"):
        machine.check_world("cuda", None)


def test_without_torch_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(machine.CalibrationError, match=r"pip install 'myriad-simulator\[calibrate\]'"):
        calibration.calibrate(tmp_path / "m.yaml")


def test_the_profile_must_be_yaml(tmp_path: Path):
    pytest.importorskip("torch")
    with pytest.raises(machine.CalibrationError, match=r"NAME\.yaml"):
        calibration.calibrate(tmp_path / "m.txt")


def test_foreign_time_by_hand():
    """Of 2 cores over 10 s, 12 s were busy; that this process used less than all of them shows as foreign."""
    texts = iter(["cpu 100 0 0 100 0 0 0 0 0 0\n", "cpu 1300 0 0 900 0 0 0 0 0 0\n"])
    quiet = machine.Quiet(lambda: next(texts))
    assert quiet.foreign() == pytest.approx(12 / 20, abs=0.02)

    def none() -> str:
        raise FileNotFoundError

    assert machine.Quiet(none).foreign() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "999", "--to", "m.yaml"], "999 processes on"),
        (["--to", "m.txt"], "write a profile to NAME.yaml"),
        (["--check", "nowhere"], "no measured profile 'nowhere'"),
        (["--import", "log.txt"], "log.txt, line 1: 'hello'"),
    ],
)
def test_the_command_refuses_in_one_message(words: list[str], message: str, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("torch")
    from simulator.cli import main

    monkeypatch.chdir(tmp_path)
    Path("log.txt").write_text("hello\n")
    monkeypatch.setattr("sys.argv", ["myriad", "calibrate", *words, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert message in told.err
    assert message in json.loads(told.out)["problems"][0]["numbers"]
    assert "Traceback" not in told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt"]


def test_the_command_shows_a_proof(exact: profile.MachineProfile, monkeypatch, capsys):
    from simulator.cli import main

    proof = check.compare(as_predicted(exact, off=1.3), exact, 0.0)
    monkeypatch.setattr(calibration, "check", lambda *args, **more: proof)
    monkeypatch.setattr("sys.argv", ["myriad", "calibrate", "--check", "x"])
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    assert "mean error 23.1%" in text
    assert "not proved" in text
    monkeypatch.setattr("sys.argv", ["myriad", "calibrate", "--check", "x", "--json"])
    with pytest.raises(SystemExit):
        main()
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "not proved"
    assert len(told["rows"]) == len(proof.steps)
    assert told["tokens_per_expert"].keys() == proof.counts.keys()
