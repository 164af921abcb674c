"""Transfers of a running simulation against the solver that knows them all beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.shared_links import SharedLinks
from simulator.errors import NetworkError
from simulator.network.flows import fair_rates, flow_times


def replay(capacity, paths, sizes, starts, latency=0.0) -> tuple[list[float], SharedLinks]:
    env = simpy.Environment()
    shared = SharedLinks(env, capacity, fair_rates)
    finish = [np.nan] * len(paths)

    def transfer(i):
        yield env.timeout(starts[i])
        yield shared.send(paths[i], sizes[i], latency)
        finish[i] = env.now

    for i in range(len(paths)):
        env.process(transfer(i))
    env.run()
    return finish, shared


@settings(max_examples=50)
@given(st.data())
def test_equal_to_the_solver(data):
    links = data.draw(st.integers(1, 5))
    capacity = data.draw(st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=links, max_size=links))
    paths = data.draw(st.lists(st.lists(st.integers(0, links - 1), min_size=1, max_size=3, unique=True), min_size=1, max_size=8))
    sizes = data.draw(st.lists(st.sampled_from([1.0, 3.0, 7.5]), min_size=len(paths), max_size=len(paths)))
    starts = data.draw(st.lists(st.sampled_from([0.0, 0.25, 4.0]), min_size=len(paths), max_size=len(paths)))
    finish, shared = replay(capacity, paths, sizes, starts, 0.5)
    indptr = np.cumsum([0] + [len(p) for p in paths])
    known = flow_times(indptr, np.concatenate(paths), capacity, sizes, starts, 0.5, compiled=False)
    assert finish == pytest.approx(known.finish_s, rel=1e-9)
    assert shared.link_bytes == pytest.approx(known.link_bytes)


def test_one_solution_for_transfers_of_one_instant():
    calls = []
    env = simpy.Environment()
    shared = SharedLinks(env, [10.0], lambda *case: calls.append(len(case[0])) or fair_rates(*case))
    done = [shared.send([0], 10.0) for _ in range(100)]
    env.run()
    assert env.now == pytest.approx(100.0)
    assert all(event.processed for event in done)
    assert calls == [101]  # all begin together and end together


def test_nothing_to_send_or_no_link_on_the_way():
    finish, _ = replay([1.0], [[0], []], [0.0, 5.0], [1.0, 2.0], 0.5)
    assert finish == [1.5, 2.5]


@pytest.mark.parametrize(
    ("path", "size", "message"), [([2], 1.0, "link 2 has no rate"), ([1], 1.0, "link 1 has no rate"), ([0], -1.0, "transfer of -1 bytes")]
)
def test_bad_transfers(path, size, message):
    with pytest.raises(NetworkError, match=message):
        SharedLinks(simpy.Environment(), [1.0, 0.0], fair_rates).send(path, size)
