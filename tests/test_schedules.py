"""Pipeline orders: as text, as torch has them, without deadlock, and what they keep in flight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import DeadlockError, PlanError
from simulator.schedules import Action, Schedule, schedule

GOLDEN = Path(__file__).parent / "golden"
SHAPES = [("gpipe", 4, 1, 8), ("1f1b", 4, 1, 8), ("interleaved", 4, 2, 8)]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """Draw (name, pp, vpp, micro-batches) for which the schedule exists."""
    name, pp, m = draw(st.sampled_from(("gpipe", "1f1b", "interleaved"))), draw(st.integers(1, 6)), draw(st.integers(1, 24))
    if name != "interleaved":
        return name, pp, 1, m
    rounds = max(1, m // pp)
    return name, pp, draw(st.integers(2, 4)), m // rounds * rounds


def whole(of: Schedule) -> np.ndarray:
    """Return the counts of micro-batches with all their activations; these schedules do not split the backward."""
    assert not of.in_flight[:, :, 1].any()
    return of.in_flight[:, :, 0]


def peaks(held: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the largest weighted count of each rank, activations per chunk as weights."""
    return (held * weight).sum(axis=-1).max(axis=-1)


# --- tables ---


@pytest.mark.parametrize(("name", "pp", "vpp", "m"), SHAPES)
def test_tables_as_text(name, pp, vpp, m):
    chunks = f"x{vpp}" if vpp > 1 else ""
    assert str(schedule(name, pp, vpp, m)) == (GOLDEN / f"{name}_{pp}{chunks}x{m}.txt").read_text()


@given(shapes())
def test_every_micro_batch_goes_forward_and_backward_once_on_every_chunk(shape):
    _, pp, vpp, m = shape
    table = schedule(*shape).table
    assert len(table) == pp
    for row in table:
        assert sorted(row) == sorted(Action(kind, c, i) for kind in "FB" for c in range(vpp) for i in range(m))


# --- torch ---


def torch_rows(name: str, pp: int, m: int, vpp: int | None = None) -> list[list[Action]]:
    """Return torch's table: its stages as our chunks, bubbles and the closing reduction of gradients dropped."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    from torch.distributed.pipelining.schedules import _ComputationType as Kind

    kinds = {Kind.FORWARD: "F", Kind.FULL_BACKWARD: "B"}
    rows = []
    for rank, ops in enumerate(get_schedule_ops(name, pp, m, vpp)):
        kept = [op for op in ops if op is not None and op.computation_type is not Kind.REDUCE_GRAD]
        assert all(op.stage_index % pp == rank for op in kept)
        rows.append([Action(kinds[op.computation_type], op.stage_index // pp, op.microbatch_index) for op in kept])
    return rows


@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 2), (4, 8), (4, 3), (8, 32)])
def test_gpipe_is_torchs(pp, m):
    assert [list(row) for row in schedule("gpipe", pp, 1, m).table] == torch_rows("GPipe", pp, m)


@pytest.mark.parametrize(("pp", "m"), [(2, 2), (4, 8), (4, 4), (8, 32), (5, 7)])
def test_1f1b_is_torchs(pp, m):
    ours, theirs = [list(row) for row in schedule("1f1b", pp, 1, m).table], torch_rows("1F1B", pp, m)
    assert ours[:-1] == theirs[:-1]
    # torch 2.13 numbers the forwards of the last rank from 1 to m; nothing else differs
    assert theirs[-1][0] == Action("F", 0, 1)
    assert [a._replace(micro_batch=a.micro_batch - (a.kind == "F")) for a in theirs[-1]] == ours[-1]


@pytest.mark.parametrize(("pp", "m", "vpp"), [(1, 4, 2), (2, 2, 2), (4, 8, 2), (4, 4, 3), (4, 16, 4), (8, 32, 2), (4, 10, 2), (4, 2, 2)])
def test_interleaved_is_torchs(pp, m, vpp):
    assert [list(row) for row in schedule("interleaved", pp, vpp, m).table] == torch_rows("Interleaved1F1B", pp, m, vpp)


def test_interleaved_refuses_what_torch_refuses():
    with pytest.raises(PlanError, match=r"11 micro-batches do not divide into 2 rounds of pp = 4; use 8 micro-batches"):
        schedule("interleaved", 4, 2, 11)
    with pytest.raises(ValueError, match=r"multiple of the number of rounds \(2\), but got 11"):
        torch_rows("Interleaved1F1B", 4, 11, 2)


# --- order of execution ---


@given(shapes())
def test_every_schedule_runs_each_action_after_what_it_needs(shape):
    _, pp, vpp, m = shape
    order = schedule(*shape).order
    at = {(a.kind, a.chunk * pp + rank, a.micro_batch): n for n, (rank, a) in enumerate(order)}
    assert len(at) == len(order) == 2 * pp * vpp * m
    last = pp * vpp - 1
    for kind, stage, i in at:
        if kind == "F" and stage > 0:
            assert at["F", stage - 1, i] < at["F", stage, i]
        if kind == "B":
            assert at["F", stage, i] < at["B", stage, i]
        if kind == "B" and stage < last:
            assert at["B", stage + 1, i] < at["B", stage, i]
    for rank, row in enumerate(schedule(*shape).table):
        assert [a for r, a in order if r == rank] == list(row)


def rows(*texts: str) -> tuple[tuple[Action, ...], ...]:
    """Read a table as a schedule writes it."""
    return tuple(tuple(Action(a[1], int(a[0]), int(a[2:])) for a in text.split()) for text in texts)


def order_of(table: tuple[tuple[Action, ...], ...]) -> tuple:
    """Put the dry run's question to a table of single chunks."""
    return Schedule("mine", len(table), 1, 2, table).order


def test_a_deadlock_names_the_ranks_and_what_they_wait_for():
    # rank 1 wants micro-batch 1 first, which rank 0 sends only after it has micro-batch 0 back
    table = rows("0F0 0B0 0F1 0B1", "0F1 0B1 0F0 0B0", "0F0 0F1 0B0 0B1")
    with pytest.raises(
        DeadlockError,
        match=r"^schedule mine deadlocks: rank 0 with 0B0 .+; rank 1 with 0F1 .+; rank 2 with 0F0 .+; what",
    ):
        order_of(table)


def test_a_deadlock_leaves_out_ranks_that_are_done():
    table = rows("0F0", "0B0 0F0")  # a backward before its own forward
    with pytest.raises(DeadlockError, match=r"^schedule mine deadlocks: rank 1 with 0B0 .entry 0.; what"):
        order_of(table)


def test_a_legal_table_that_is_nobodys_schedule_runs():
    assert order_of(rows("0F0 0F1 0B1 0B0", "0F0 0F1 0B1 0B0"))[-1] == (0, Action("B", 0, 0))


def test_torchs_last_rank_would_deadlock():  # its backward of micro-batch 0 has no forward
    table = tuple(map(tuple, torch_rows("1F1B", 4, 8)))
    with pytest.raises(DeadlockError, match="rank 3 with 0B0"):
        order_of(table)


# --- in flight ---


@pytest.mark.parametrize(("pp", "m"), [(1, 1), (4, 2), (4, 8), (8, 100)])
def test_gpipe_holds_all_micro_batches(pp, m):
    assert whole(schedule("gpipe", pp, 1, m)).max(axis=1).tolist() == [[m]] * pp


@pytest.mark.parametrize(("pp", "m"), [(1, 1), (4, 2), (4, 8), (8, 100)])
def test_1f1b_holds_as_many_as_ranks_follow(pp, m):
    assert peaks(whole(schedule("1f1b", pp, 1, m)), np.ones(1)).tolist() == [min(pp - rank, m) for rank in range(pp)]


@pytest.mark.parametrize(("pp", "vpp", "m"), [(4, 2, 8), (4, 3, 4), (8, 4, 64), (2, 2, 2)])
def test_interleaved_holds_one_more_than_its_warm_up(pp, vpp, m):
    ahead = [min((vpp - 1) * pp + 2 * (pp - 1 - rank), m * vpp) for rank in range(pp)]
    assert peaks(whole(schedule("interleaved", pp, vpp, m)), np.ones(vpp)).tolist() == [min(a + 1, m * vpp) for a in ahead]


@given(shapes(), st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_peaks_are_those_of_the_whole_table_whatever_a_chunk_weighs(shape, weights):
    _, _, vpp, _ = shape
    weight, expected = np.array(weights[:vpp], dtype=float), []
    for row in schedule(*shape).table:
        held, peak = np.zeros(vpp), 0.0
        for action in row:
            held[action.chunk] += 1 if action.kind == "F" else -1
            peak = max(peak, float(held @ weight))
        assert not held.any()
        expected.append(peak)
    assert peaks(whole(schedule(*shape)), weight).tolist() == expected
