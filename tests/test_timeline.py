"""The timeline: what is exposed and what hidden, and the trace file."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict

import numpy as np
import pytest
from small import dense, moe, scenario

from simulator.engine.timeline import STREAMS, Timeline
from simulator.files import write_atomically
from simulator.scenario.plan import Plan
from simulator.simulate import simulate_step

SPANS = [  # class, stage, stream, start, end
    (0, 0, "compute", 0.0, 2.0),
    (0, 0, "tp", 2.0, 3.0),
    (0, 0, "ep", 2.5, 4.5),
    (0, 0, "compute", 4.0, 6.0),
    (0, 0, "dp", 5.0, 9.0),
    (0, 0, "pp", 6.0, 6.0),
    (1, 1, "compute", 1.0, 10.0),
    (1, 1, "pp", 0.25, 1.0),
    (1, 1, "dp", 2.0, 2.5),
    (1, 1, "dp", 2.5, 3.0),
]


@pytest.fixture
def handmade() -> Timeline:
    rank_class, stage, stream, start, end = map(np.array, zip(*SPANS, strict=True))
    name = np.array([f"work {i}" for i in range(len(SPANS))], dtype=object)
    action = np.array(["0F0"] * 9 + [""], dtype=object)
    return Timeline(rank_class, stage, stream.astype(object), name, action, start, end, np.array([3, 1]))


@pytest.fixture(scope="module")
def simulated() -> Timeline:
    plan = Plan(tp=2, cp=2, pp=2, vpp=2, ep=2, schedule="interleaved", zero=3)
    return simulate_step(scenario(moe(4), 16, plan, 4)).timeline


# --- exposed and hidden ---


def test_exposed_and_hidden_seconds(handmade):
    first, second = handmade.exposed().to_dict("records")
    assert first == {
        "rank_class": 0, "stage": 0, "ranks": 3, "compute_s": 4.0,
        "tp_exposed_s": 1.0, "tp_hidden_s": 0.0,
        "cp_exposed_s": 0.0, "cp_hidden_s": 0.0,
        "ep_exposed_s": 1.0, "ep_hidden_s": 0.5,  # 2.5 to 3 counts for tp, 3 to 4 for ep, 4 to 4.5 is hidden
        "pp_exposed_s": 0.0, "pp_hidden_s": 0.0,
        "dp_exposed_s": 3.0, "dp_hidden_s": 1.0,
        "host_s": 0.0,
        "idle_s": 1.0,  # 9 to 10, while the other class computes
    }  # fmt: skip
    assert {k: v for k, v in second.items() if v} == {
        "rank_class": 1, "stage": 1, "ranks": 1, "compute_s": 9.0, "pp_exposed_s": 0.75, "dp_hidden_s": 1.0, "idle_s": 0.25,
    }  # fmt: skip


def test_a_host_that_launches_is_blamed_last_and_is_no_communication():
    """It launches for 6 s: 1 s beside compute, 2 s beside an all-to-all, 3 s while nothing else runs."""
    zeros, texts = np.zeros(3, dtype=int), np.array(["a", "0F0", "0F0"], object)
    streams = np.array(["host", "compute", "ep"], object)
    t = Timeline(zeros, zeros, streams, texts, texts, np.array([0.0, 0.0, 4.0]), np.array([6.0, 1.0, 6.0]), np.array([1]))
    spent = t.exposed().iloc[0]
    assert {k: v for k, v in spent.items() if v} == {"ranks": 1, "compute_s": 1.0, "ep_exposed_s": 2.0, "host_s": 3.0}


def test_streams_beside_each_other_are_hidden_only_by_compute():
    zeros, texts = np.zeros(2, dtype=int), np.array(["a", "b"], object)
    t = Timeline(zeros, zeros, np.array(["tp", "dp"], object), texts, texts, np.zeros(2), np.array([1.0, 3.0]), np.array([1]))
    spent = t.exposed().iloc[0]
    assert (spent["tp_exposed_s"], spent["dp_exposed_s"]) == (1.0, 2.0)
    assert (spent["tp_hidden_s"], spent["dp_hidden_s"], spent["compute_s"], spent["idle_s"]) == (0.0, 0.0, 0.0, 0.0)


def test_table_and_makespan(handmade):
    table = handmade.table()
    assert (len(handmade), len(table), handmade.makespan_s) == (10, 10, 10.0)
    assert list(table.columns) == ["rank_class", "stage", "stream", "name", "action", "start_s", "end_s"]
    assert table.iloc[2].to_dict() == {
        "rank_class": 0, "stage": 0, "stream": "ep", "name": "work 2", "action": "0F0", "start_s": 2.5, "end_s": 4.5,
    }  # fmt: skip


# --- trace ---


def events_of(path) -> tuple[list[dict], list[dict]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = json.loads(data)["traceEvents"]
    return [e for e in events if e["ph"] == "M"], [e for e in events if e["ph"] == "X"]


def test_trace_of_a_handmade_timeline(handmade, tmp_path):
    meta, spans = events_of(handmade.save_trace(tmp_path / "trace.json"))
    assert len(spans) == 9  # a span of no seconds is not drawn
    assert spans[2] == {
        "ph": "X", "name": "work 2 0F0", "cat": "ep", "pid": 0, "tid": STREAMS.index("ep"),
        "ts": 2_500_000.0, "dur": 2_000_000.0, "args": {"action": "0F0"},
    }  # fmt: skip
    processes = {e["pid"]: e["args"]["name"] for e in meta if e["name"] == "process_name"}
    assert processes == {0: "stage 0: class 0, 3 ranks", 1: "stage 1: class 1, 1 ranks"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in meta if e["name"] == "thread_name"}
    assert set(threads.values()) == {"compute", "tp", "ep", "pp", "dp"}
    assert all(threads[e["pid"], e["tid"]] == e["cat"] for e in spans)


def test_a_simulated_trace_has_one_thread_per_stream_and_no_overlap(simulated, tmp_path):
    meta, spans = events_of(simulated.save_trace(tmp_path / "trace.json"))
    threads = [(e["pid"], e["tid"], e["args"]["name"]) for e in meta if e["name"] == "thread_name"]
    assert len({thread[:2] for thread in threads}) == len({(pid, name) for pid, _, name in threads}) == len(threads)
    assert {name for _, _, name in threads} == set(STREAMS) - {"host"}  # which has a thread in pairs alone
    assert len(spans) == int((simulated.end_s > simulated.start_s).sum())
    on: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for e in spans:
        assert (e["pid"], e["tid"], e["cat"]) in threads
        start, length = round(e["ts"] * 1000), round(e["dur"] * 1000)  # nanoseconds, as viewers count
        on[e["pid"], e["tid"]].append((start, start + length))
    for taken in on.values():
        taken.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(taken, taken[1:], strict=False))
    assert max(end for taken in on.values() for _, end in taken) == round(simulated.makespan_s * 1e9)


def test_the_zipped_trace_is_the_same_and_reproducible(simulated, tmp_path):
    plain, zipped, again = (simulated.save_trace(tmp_path / name) for name in ("a.json", "a.json.gz", "b.json.gz"))
    assert gzip.decompress(zipped.read_bytes()) == plain.read_bytes()
    assert zipped.read_bytes() == again.read_bytes()
    assert len(zipped.read_bytes()) < len(plain.read_bytes()) / 5


def test_the_trace_makes_its_folder_and_leaves_nothing_else(handmade, tmp_path):
    path = handmade.save_trace(str(tmp_path / "new" / "trace.json"))
    assert [p.name for p in path.parent.iterdir()] == ["trace.json"]


def test_a_failed_write_keeps_the_old_file(handmade, tmp_path):
    path = handmade.save_trace(tmp_path / "trace.json")
    before = path.read_bytes()

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail, "wb")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_single_accelerator_only_computes(tmp_path):
    t = simulate_step(scenario(dense(2), 1, Plan(), 2, host=1)).timeline
    assert set(t.stream) == {"compute"}
    assert t.exposed().iloc[0][["compute_s", "idle_s"]].tolist() == pytest.approx([t.makespan_s, 0.0], rel=1e-12, abs=1e-15)
