"""The event engine on programs made by hand: order, needs, meetings, deadlock, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine.events import run
from simulator.errors import DeadlockError


def times(queues, needs, meet, seconds, **more):
    start, end = run(queues, needs, meet, np.asarray(seconds, dtype=float), **more)
    return start.tolist(), end.tolist()


NOTHING = ((), (), ())


def test_a_stream_takes_its_nodes_in_order():
    start, end = times({(0, "compute"): [0, 1, 2]}, NOTHING, [-1] * 3, [1.0, 2.0, 4.0])
    assert (start, end) == ([0.0, 1.0, 3.0], [1.0, 3.0, 7.0])


def test_streams_run_beside_each_other():
    queues = {(0, "compute"): [0, 1], (0, "dp"): [2], (1, "compute"): [3]}
    start, end = times(queues, [()] * 4, [-1] * 4, [1.0, 1.0, 5.0, 3.0])
    assert (start, end) == ([0.0, 1.0, 0.0, 0.0], [1.0, 2.0, 5.0, 3.0])


def test_a_node_starts_when_the_last_of_its_needs_has_ended():
    queues = {(0, "compute"): [0], (0, "tp"): [1], (0, "pp"): [2, 3]}
    start, end = times(queues, [(), (), (0, 1), ()], [-1] * 4, [2.0, 3.0, 1.0, 1.0])
    assert start == [0.0, 0.0, 3.0, 4.0]  # the stream waits with its first node, the next one behind it
    assert end == [2.0, 3.0, 4.0, 5.0]


def test_a_need_that_has_long_ended_does_not_wait():
    start, _ = times({(0, "compute"): [0], (0, "pp"): [1, 2]}, [(), (), (0,)], [-1] * 3, [1.0, 10.0, 1.0])
    assert start == [0.0, 0.0, 10.0]


def test_a_meeting_starts_with_the_last_and_lasts_as_long_as_the_longest():
    queues = {(0, "compute"): [0], (0, "ep"): [1], (1, "compute"): [2], (1, "ep"): [3, 4], (2, "ep"): [5]}
    needs = [(), (0,), (), (2,), (), ()]
    start, end = times(queues, needs, [-1, 7, -1, 7, -1, 7], [2.0, 1.0, 5.0, 3.0, 1.0, 0.5])
    assert [start[n] for n in (1, 3, 5)] == [5.0] * 3
    assert [end[n] for n in (1, 3, 5)] == [8.0] * 3
    assert (start[4], end[4]) == (8.0, 9.0)


def test_meetings_of_zero_seconds_still_wait_for_each_other():
    queues = {(0, "compute"): [0, 1], (1, "compute"): [2, 3]}
    start, end = times(queues, [()] * 4, [-1, 0, -1, 0], [1.0, 0.0, 4.0, 0.0])
    assert (start[1], end[1], start[3], end[3]) == (4.0,) * 4


def test_nodes_of_zero_seconds_take_no_time_and_release_what_needs_them():
    queues = {(0, "compute"): [0, 1, 2], (0, "dp"): [3]}
    start, end = times(queues, [(), (), (3,), (1,)], [-1] * 4, [0.0, 2.0, 0.0, 0.0])
    assert (start, end) == ([0.0, 0.0, 2.0, 2.0], [0.0, 2.0, 2.0, 2.0])


def test_no_nodes_no_time():
    start, end = times({}, (), (), [])
    assert (start, end) == ([], [])


# --- deadlock ---


def test_a_circle_of_needs_is_a_deadlock_that_names_what_waits():
    queues = {(0, "compute"): [0, 1], (1, "compute"): [2, 3]}
    names = ["a", "b", "c", "d"]
    with pytest.raises(DeadlockError, match=r"^the step never ends: b; c wait for each other$"):
        times(queues, [(), (3,), (1,), ()], [-1] * 4, [1.0] * 4, describe=names.__getitem__)


def test_collectives_in_different_order_are_a_deadlock():
    queues = {(0, "dp"): [0, 1], (1, "dp"): [2, 3]}
    with pytest.raises(DeadlockError, match="0; 2 wait"):
        times(queues, [()] * 4, [10, 11, 11, 10], [1.0] * 4)


def test_a_need_behind_itself_in_the_stream_is_a_deadlock():
    with pytest.raises(DeadlockError, match="never ends: 0 wait"):
        times({(0, "compute"): [0, 1]}, [(1,), ()], [-1, -1], [1.0, 1.0])


# --- any program ---


@st.composite
def programs(draw: st.DrawFn):
    """Draw a program that cannot deadlock: needs point to smaller numbers, streams and meetings keep the order of numbers."""
    count = draw(st.integers(1, 30))
    queue = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    needs = [tuple(draw(st.lists(st.integers(0, n - 1), max_size=3, unique=True))) if n else () for n in range(count)]
    seconds = draw(st.lists(st.sampled_from((0.0, 0.25, 1.0, 3.5)), min_size=count, max_size=count))
    queues: dict[tuple[int, str], list[int]] = {}
    for node, number in enumerate(queue):
        queues.setdefault((number // 2, "compute" if number % 2 else "dp"), []).append(node)
    return queues, needs, seconds


def by_recurrence(queues, needs, seconds):
    before = {b: a for nodes in queues.values() for a, b in zip(nodes, nodes[1:], strict=False)}
    start, end = [], []
    for node, length in enumerate(seconds):
        start.append(max([end[n] for n in needs[node]] + [end[before[node]] if node in before else 0.0]))
        end.append(start[node] + length)
    return start, end


@given(programs())
def test_the_engine_is_the_recurrence(program):
    queues, needs, seconds = program
    assert times(queues, needs, [-1] * len(seconds), seconds) == by_recurrence(*program)


@given(programs())
def test_the_same_program_twice_gives_the_same_times(program):
    queues, needs, seconds = program
    meet = [-1] * len(seconds)
    assert times(queues, needs, meet, seconds) == times(dict(reversed(queues.items())), needs, meet, seconds)


@given(programs(), st.data())
def test_a_shorter_node_never_ends_the_program_later(program, data):
    queues, needs, seconds = program
    node = data.draw(st.integers(0, len(seconds) - 1))
    shorter = [s / 2 if n == node else s for n, s in enumerate(seconds)]
    meet = [-1] * len(seconds)
    _, slow = times(queues, needs, meet, seconds)
    _, fast = times(queues, needs, meet, shorter)
    assert all(f <= s for f, s in zip(fast, slow, strict=True))
