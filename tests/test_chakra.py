"""Chakra traces: every rank's file read back; messages and collectives meet, nothing waits for what comes later."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest
from small import moe, scenario

from simulator.errors import PlanError
from simulator.formats.chakra import COLLECTIVE, COMPUTE, MOST_RANKS, RECEIVE, SEND, messages, save_chakra
from simulator.scenario.plan import Plan
from simulator.simulate import simulate_step

PLANS = {
    "1f1b": Plan(tp=2, pp=2, ep=4),
    "zero 3": Plan(tp=2, pp=2, ep=2, zero=3, dp_replicate=2),
    "interleaved": Plan(pp=4, vpp=2, schedule="interleaved", ep=2),
    "dualpipe": Plan(pp=4, vpp=2, schedule="dualpipe", ep=2),
    "zb-v": Plan(pp=2, vpp=2, schedule="zb-v", tp=2),
}


def read(path):
    """Return the nodes of a file: a varint of the length before each message."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        length = shift = 0
        while True:
            byte = data[place]
            place += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        found.append(messages()["Node" if found else "GlobalMetadata"].FromString(data[place : place + length]))
        place += length
    return found[1:]


def attributes(node):
    return {a.name: getattr(a, a.WhichOneof("value")) for a in node.attr}


@pytest.fixture(scope="module", params=PLANS)
def traced(request, tmp_path_factory):
    question = scenario(moe(), 16, PLANS[request.param], 8, dispatch_s=5e-6)
    folder = tmp_path_factory.mktemp("chakra")
    files = save_chakra(question, folder)
    return question, [read(path) for path in files[:-1]], json.loads(files[-1].read_text())


def test_nothing_waits_for_what_comes_later(traced):
    _, ranks, _ = traced
    for nodes in ranks:
        seen = set()
        for node in nodes:
            assert seen.issuperset([*node.data_deps, *node.ctrl_deps])
            seen.add(node.id)
        assert len(seen) == len(nodes)


def test_every_message_that_is_sent_is_received(traced):
    _, ranks, _ = traced
    ends = {SEND: Counter(), RECEIVE: Counter()}
    for rank, nodes in enumerate(ranks):
        for node in nodes:
            if node.type in ends:
                said = attributes(node)
                assert said["comm_src" if node.type == SEND else "comm_dst"] == rank
                ends[node.type][said["comm_src"], said["comm_dst"], said["comm_tag"], said["comm_size"]] += 1
    assert ends[SEND] == ends[RECEIVE]
    assert set(ends[SEND].values()) == {1}


def test_members_of_a_group_call_the_same_collectives(traced):
    _, ranks, groups = traced
    called = defaultdict(dict)
    for rank, nodes in enumerate(ranks):
        for node in nodes:
            if node.type == COLLECTIVE:
                said = attributes(node)
                called[said["pg_name"]].setdefault(rank, []).append((said["comm_type"], said["comm_size"]))
    assert called
    for name, by_rank in called.items():
        assert sorted(by_rank) == groups[name]
        assert len({tuple(sorted(calls)) for calls in by_rank.values()}) == 1


def test_kernels_take_the_time_that_they_are_priced_at(traced):
    question, ranks, _ = traced
    step = simulate_step(question)
    device = [[node for node in nodes if node.type == COMPUTE and not attributes(node)["is_cpu_op"]] for nodes in ranks]
    written = sum(node.duration_micros for nodes in device for node in nodes) / len(ranks)
    assert written == pytest.approx(sum(step.compute_parts_s.values()) * 1e6, abs=max(map(len, device)))  # each rounded to a microsecond


def test_a_host_that_launches_pairs_is_no_device(traced):
    """On the processor, beside the kernels that it launches: as many nodes as the timeline has, as long; none outside pairs."""
    question, ranks, _ = traced
    spans = simulate_step(question).timeline
    hosts = spans.stream == "host"
    of_class = {c: hosts & (spans.rank_class == c) for c in range(len(spans.ranks))}
    cpu = [[node for node in nodes if attributes(node)["is_cpu_op"]] for nodes in ranks]
    assert hosts.any() == (question.plan.schedule == "dualpipe")
    assert sum(map(len, cpu)) == sum(int(mine.sum()) * spans.ranks[c] for c, mine in of_class.items())
    assert all(node.type == COMPUTE for nodes in cpu for node in nodes)
    lasts = sum(float((spans.end_s - spans.start_s)[mine].sum()) * spans.ranks[c] for c, mine in of_class.items())
    assert sum(node.duration_micros for nodes in cpu for node in nodes) == pytest.approx(lasts * 1e6, abs=sum(map(len, cpu)))


def test_too_many_ranks_are_refused(tmp_path):
    question = scenario(moe(), 2 * MOST_RANKS, Plan(ep=8), 8)
    with pytest.raises(PlanError, match="2048 ranks are more than 1024 files"):
        save_chakra(question, tmp_path)
    assert not list(tmp_path.iterdir())
