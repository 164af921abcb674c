"""Sweeps: rows and their order, what is kept and what is refused, equal answers on every executor."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
from small import job, moe, scenario
from workers import die

from simulator.closed_forms import estimate
from simulator.errors import ProfileError, SimulatorError
from simulator.executors import finished, opened
from simulator.files import save_table
from simulator.lower_bound import bound
from simulator.planning.results import Answers, canonical, key_of, made_by
from simulator.planning.sweep import grid, stored_scenario, stored_sweep, sweep
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

BASE = scenario(moe(), 16, Plan(tp=2, pp=2, ep=2), 8)
TABLES = grid(BASE, {"plan.pp": [1, 2, 3], "plan.micro_batch": [1, 2]})


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return sweep(TABLES, executor="serial")


def test_a_row_is_what_the_scenario_alone_gives(rows):
    assert rows["plan.pp"].tolist() == [1, 1, 2, 2, 3, 3]
    assert rows["status"].tolist() == ["answered"] * 4 + ["infeasible"] * 2
    for table, row in zip(TABLES[:4], rows.to_dict("records"), strict=False):
        summary = simulate_step(Scenario.model_validate(table)).summary()
        figures = {name: value for name, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        assert {name: row[name] for name in figures} == figures
    assert rows["step_time_s"].isna().tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("level", "of"), [("estimate", estimate), ("bound", bound)])
def test_closed_forms(level, of):
    found = sweep(TABLES[:4], level=level, executor="serial")
    assert found["step_time_s"].tolist() == [of(Scenario.model_validate(table)) for table in TABLES[:4]]
    simulated = sweep(TABLES[:4], executor="serial")
    assert set(found.columns) == set(simulated.columns)  # the same figures whatever the level
    scale = found["step_time_s"] / simulated["step_time_s"]
    np.testing.assert_allclose(found["cost_usd"], simulated["cost_usd"] * scale)
    np.testing.assert_allclose(found["mfu_causal"], simulated["mfu_causal"] / scale)
    assert found["peak_memory_bytes"].tolist() == simulated["peak_memory_bytes"].tolist()


def test_a_grid_fills_the_cluster_again_unless_told_otherwise():
    tables = grid(BASE, {"plan.tp": [1, 4], "cluster.accelerators": [16, 32]})
    assert [Scenario.model_validate(t).plan.world for t in tables] == [16, 32, 16, 32]
    assert {t["plan"]["dp_shard"] for t in grid(BASE, {"plan.dp_shard": [4], "plan.tp": [1, 2]})} == {4}
    assert BASE.described()["plan"]["dp_shard"] == 4  # the base is as before


def test_what_is_no_scenario_is_a_row_that_says_why():
    tables = [TABLES[0], TABLES[0] | {"model": "kimi-k3"}, {"plan": {"pp": "many"}}, grid(BASE, {"plan.color": ["red"]})[0]]
    found = sweep(tables, executor="serial")
    assert found["status"].tolist() == ["answered", "invalid", "invalid", "invalid"]
    assert "did you mean kimi-k2" in found["problem"][1]
    assert "plan.color: unknown key" in found["problem"][3]


def test_a_bug_is_a_row(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("simulator.planning.sweep.simulate_step", broken)
    found = sweep(TABLES[:1], executor="serial")
    assert found.loc[0, ["status", "problem"]].tolist() == ["failed", "ZeroDivisionError: division by zero"]


def test_equal_scenarios_are_answered_once_and_are_rows_each():
    told = []
    found = sweep([TABLES[0], Scenario.model_validate(TABLES[0]), TABLES[1]], executor="serial", progress=lambda *n: told.append(n))
    assert told[-1] == (2, 2)
    assert found["key"].tolist()[0] == found["key"].tolist()[1] != found["key"].tolist()[2]


@pytest.mark.parametrize("engine", ["process:2", "a process pool", "threads"])
def test_executors_agree(rows, engine):
    if engine.startswith("process:"):
        assert sweep(TABLES, executor=engine).equals(rows)
        return
    pool = ThreadPoolExecutor(3) if engine == "threads" else ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    with pool:
        assert sweep(TABLES, executor=pool).equals(rows)


def test_what_is_stored_is_not_computed_again(tmp_path, rows, monkeypatch):
    file, told = tmp_path / "answers.sqlite", []
    sweep(TABLES[2:4], file, executor="serial")
    monkeypatch.setattr("simulator.planning.sweep.simulate_step", lambda s: told.append(s) or simulate_step(s))
    assert sweep(TABLES, file, executor="serial").equals(rows)
    asked = [Scenario.model_validate(t) for t in (*TABLES[:2], *TABLES[4:])]
    assert told == asked
    assert sweep(TABLES, file, executor="dask://nobody:1").equals(rows)  # nothing is missing: nobody is asked


def test_stored_rows_and_scenarios_come_back(tmp_path, rows):
    file = tmp_path / "answers.sqlite"
    sweep(TABLES, file, executor="serial")
    stored = stored_sweep(file)
    assert stored[rows.columns].equals(rows.sort_values("key", ignore_index=True))
    again = stored_scenario(file, rows["key"][2])
    assert simulate_step(again).step_time_s == rows["step_time_s"][2]
    with pytest.raises(ProfileError, match="no answer with the key"):
        stored_scenario(file, "0" * 32)


def test_the_key_is_the_content():
    other = BASE.model_copy(update={"job": job(BASE.job.global_batch, expert_load=1.5)})
    texts = [canonical({"scenario": s.model_dump(mode="json")}) for s in (BASE, BASE.model_copy(), other)]
    assert key_of(texts[0]) == key_of(texts[1]) != key_of(texts[2])


# --- what is refused ---


def test_another_versions_file_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / "answers.sqlite"
    sweep(TABLES[:1], file, executor="serial")
    with sqlite3.connect(file) as database:
        database.execute("update meta set value = '0.0.1+abc'")
    database.close()
    before = file.read_bytes()
    with pytest.raises(ProfileError, match=r"answered by Myriad 0\.0\.1\+abc, this is .*choose another file"):
        sweep(TABLES, file, executor="serial")
    assert file.read_bytes() == before
    assert len(stored_sweep(file)) == 1


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be taken for one" * 20, None])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path, content):
    file = tmp_path / "answers.sqlite"
    if content is None:
        with sqlite3.connect(file) as database:
            database.execute("create table recipes (name text)")
        database.close()
        content = file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(ProfileError, match="is not a file of sweep answers|database of something else"):
        sweep(TABLES[:1], file, executor="serial")
    assert file.read_bytes() == content


def test_an_empty_file_of_a_driver_that_died_early_is_taken(tmp_path, rows):
    file = tmp_path / "answers.sqlite"
    file.touch()
    assert sweep(TABLES, file, executor="serial").equals(rows)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match="there is no folder"):
        sweep(TABLES[:1], tmp_path / "nowhere" / "answers.sqlite")


@pytest.mark.parametrize("engine", ["", "slurm", "process:0", "process:many", "dask://", "ray://head:1"])
def test_unknown_engines(engine):
    with pytest.raises(ProfileError, match="is not known; write serial, process"):
        sweep(TABLES[:1], executor=engine)


def test_a_level_that_is_none():
    with pytest.raises(ProfileError, match="choose simulate, estimate, bound"):
        sweep(TABLES[:1], level="guess")


@pytest.mark.parametrize(("vary", "text"), [({"plan.pp": []}, "one value or more"), ({"plan.pp": "48"}, "one value or more")])
def test_values_that_are_no_list(vary, text):
    with pytest.raises(ProfileError, match=text):
        grid(BASE, vary)


@pytest.mark.parametrize("key", ["", "plan.", ".pp", "job.tokens.count"])
def test_keys_that_lead_nowhere(key):
    with pytest.raises(ProfileError, match="is no key of a scenario|not a table"):
        grid(BASE, {key: [1]})


def test_two_writers_of_one_key_keep_the_first(tmp_path):
    with Answers(tmp_path / "a.sqlite") as one, Answers(tmp_path / "a.sqlite") as two:
        one.add("k", "q", {"n": 1})
        two.add("k", "q", {"n": 2})
        assert one.known() == two.known() == {"k": {"n": 1}}


def test_made_by_does_not_change_by_itself():
    assert made_by() == made_by()
    assert "+" in made_by()


# --- workers that die ---


def test_a_task_that_kills_its_worker_is_told_and_the_others_are_done():
    tasks = {name: name for name in ("a", "b", "poison", "c", "d", "e")}
    found = dict(finished(die, tasks, "process:2"))
    assert {k: v for k, v in found.items() if k != "poison"} == {k: k.upper() for k in tasks if k != "poison"}
    assert isinstance(found["poison"], Exception)


class Broken(Executor):
    """Loses every task but the first."""

    def __init__(self):
        self.lock, self.calls = threading.Lock(), 0

    def submit(self, function, /, *args, **kwargs):
        future: Future = Future()
        with self.lock:
            self.calls += 1
            if self.calls == 1:
                future.set_result(function(*args, **kwargs))
            else:
                future.set_exception(RuntimeError("the machine is gone"))
        return future


def test_lost_scenarios_end_the_sweep_with_their_number_and_the_rest_kept(tmp_path):
    with pytest.raises(SimulatorError, match=r"3 of 4 scenarios took their worker along .*the machine is gone.*the other 1 are kept"):
        sweep(TABLES[:4], tmp_path / "answers.sqlite", executor=Broken())
    assert len(stored_sweep(tmp_path / "answers.sqlite")) == 1


def test_a_named_pool_closes():
    with opened("process:1") as (pool, workers):
        assert workers == 1
        assert pool.submit(abs, -1).result() == 1
    with pytest.raises(RuntimeError):
        pool.submit(abs, -1)


# --- tables ---


@pytest.mark.parametrize(("ending", "read"), [(".csv", pd.read_csv), (".parquet", pd.read_parquet)])
def test_tables_come_back(tmp_path, rows, ending, read):
    save_table(rows, tmp_path / f"rows{ending}")
    again = read(tmp_path / f"rows{ending}")
    assert again["step_time_s"].equals(rows["step_time_s"])
    assert again["key"].tolist() == rows["key"].tolist()
    with pytest.raises(ProfileError, match=r"write \.parquet or \.csv"):
        save_table(rows, tmp_path / "rows.xlsx")
