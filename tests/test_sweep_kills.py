"""kill -9 of the driver or of a Dask worker in the middle of a sweep, at random moments: nothing lost, nothing computed twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from small import moe, scenario

from simulator.errors import ProfileError
from simulator.planning.sweep import grid, sweep
from simulator.scenario.plan import Plan

BASE = scenario(moe(16), 32, Plan(tp=2, pp=2, ep=2), 16)
VARY = {
    "plan.pp": [2, 4, 8], "plan.tp": [1, 2], "plan.micro_batch": [1, 2], "plan.zero": [0, 1, 2], "plan.recompute": ["none", "full", "odd"],
}  # fmt: skip

CLUSTER = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        print(cluster.scheduler_address.removeprefix("tcp://"), flush=True)
        sys.stdin.read()
"""
DRIVER = """
import json, sys
from simulator.planning.sweep import sweep

tables, file, address = json.load(open(sys.argv[1])), sys.argv[2], sys.argv[3]
sweep(tables, file, executor=f"dask://{address}", progress=lambda done, total: print(done, flush=True))
"""


def environment() -> dict[str, str]:
    """Return an environment in which other processes find what this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@contextmanager
def dask_cluster(folder: Path):
    """Yield the address of a Dask scheduler on loopback with two workers, each a process that its nanny starts again."""
    (folder / "cluster.py").write_text(CLUSTER)
    command = [sys.executable, str(folder / "cluster.py")]
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        try:
            process.communicate(timeout=20)  # an end of its input is its sign to close
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def worker_pids(address: str) -> list[int]:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def stored(file: Path) -> int:
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file)) as database:
        try:
            return database.execute("select count(*) from answers").fetchone()[0]
        except sqlite3.OperationalError:  # killed before the tables were there
            return 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(tmp_path, kills):
    tables = grid(BASE, VARY)
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    (tmp_path / "driver.py").write_text(DRIVER)
    file, chance = tmp_path / "answers.sqlite", random.Random(7)
    with dask_cluster(tmp_path) as address:
        command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "tables.json"), str(file), address]
        killed, starts, driver, limit = [], [], None, time.monotonic() + 60 + 30 * kills
        while len(killed) < kills:
            assert time.monotonic() < limit, f"only {len(killed)} of {kills} kills in time; killed {killed}"
            if driver is None:
                before = stored(file)
                if before == len(tables):  # all done before enough was killed: lose everything and begin again
                    for part in tmp_path.glob("answers.sqlite*"):
                        part.unlink()
                    before = 0
                driver = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                first = driver.stdout.readline()
                if not first:  # its scheduler had no worker just then: both were being started again
                    driver.communicate()
                    driver = None
                    continue
                starts.append((before, int(first)))
            time.sleep(chance.uniform(0, 0.6))
            if driver.poll() is not None:
                driver.communicate()
                driver = None
                continue
            victim = chance.choice(["driver", "worker"])
            pids = worker_pids(address) if victim == "worker" else []
            os.kill(chance.choice(pids) if pids else driver.pid, signal.SIGKILL)
            killed.append("worker" if pids else "driver")
            if not pids:
                driver.communicate()
                driver = None
        if driver is not None:
            driver.communicate(timeout=120)
        last = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
        assert last.returncode == 0, last.stderr
    assert all(known >= before for before, known in starts)  # what a driver stored, the next one does not ask for
    undisturbed = sweep(tables, executor="serial")
    assert sweep(tables, file, executor="dask://127.0.0.1:1").equals(undisturbed)  # the cluster is gone: nothing is missing
    assert set(undisturbed["status"]) == {"answered", "invalid"}
    assert set(killed) == {"driver", "worker"} or kills < 10


def test_a_scheduler_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("simulator.executors.PATIENCE_S", 0.3)
    sweep(grid(BASE, {"plan.pp": [2]}), tmp_path / "answers.sqlite", executor="serial")
    before = (tmp_path / "answers.sqlite").read_bytes()
    with pytest.raises(ProfileError, match=r"no Dask scheduler answers at 127\.0\.0\.1:1 within 0\.3 s"):
        sweep(grid(BASE, {"plan.pp": [2, 4]}), tmp_path / "answers.sqlite", executor="dask://127.0.0.1:1")
    assert (tmp_path / "answers.sqlite").read_bytes() == before
