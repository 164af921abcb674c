"""A user's own schedule: a wrong table is one clear error with its row, a right one simulates like the built-in of its content."""

from __future__ import annotations

import pytest
from small import dense, moe, scenario

from simulator.closed_forms import bound, estimate
from simulator.errors import DeadlockError, PlanError, ProfileError
from simulator.feasibility import check, memory
from simulator.scenario.plan import Plan
from simulator.schedules import Schedule, read_table, schedule
from simulator.simulate import simulate_step

#: 1F1B on two ranks, three micro-batches
GOOD = ("0F0 0F1 0B0 0F2 0B1 0B2", "0F0 0B0 0F1 0B1 0F2 0B2")


def text(*rows: str) -> str:
    return "\n".join(rows)


def only_problem(table: str, pp: int = 2, m: int = 3):
    with pytest.raises(PlanError) as caught:
        schedule("table", pp, 1, m, table)
    (problem,) = caught.value.problems
    return problem


def test_good_table():
    found = schedule("table", 2, 1, 3, text(*GOOD))
    assert found.table == schedule("1f1b", 2, 1, 3).table
    assert str(found) == text(*GOOD) + "\n"


# --- what a row may not do ---


@pytest.mark.parametrize(
    ("row", "rule", "which"),
    [
        ("0F0 0B0 0F1 0B1 0F2 0F3", "no action is lost", "0I2, 0W2"),
        ("0F0 0B0 0F1 0I1 0F2 0B2", "no action is lost", "0W1"),
        ("0F0 0I0 0W0 0F1 0B1 0B2", "no action is lost", "0F2"),
        ("0F0 0B0 0F1 0B1 0F2 0B2 0F1", "no action stands twice", "0F1"),
        ("0F0 0B0 0F1 0B1 0F2 0B2 0W2", "no action stands twice", "0B2 beside 0I2 or 0W2"),
        ("0F0 0I0 0W0 0B0 0F1 0B1 0F2 0B2", "no action stands twice", "0B0 beside 0I0 or 0W0"),
        ("0F0 0B0 0F1 0B1 0F2 0B2 0F3", "no action is invented", "0F3"),
        ("0F0 0B0 0F1 0B1 0F2 0B2 1F0", "no action is invented", "1F0"),
    ],
)
def test_row_that_loses_doubles_or_invents(row, rule, which):
    with pytest.raises(PlanError) as caught:
        schedule("table", 2, 1, 3, text(GOOD[0], row))
    problem = caught.value.problems[0]
    assert problem.rule == rule
    assert problem.numbers == f"schedule table, rank 1: {which}"
    assert problem.remedy == f"correct the row: {row}"


def test_every_wrong_row_is_named_at_once():
    with pytest.raises(PlanError) as caught:
        schedule("table", 2, 1, 3, text("0F0 0F1 0B0 0F2 0I1 0W1", "0F0 0B0 0F1 0B1 0F2 0B2 0F3"))
    assert [p.numbers for p in caught.value.problems] == ["schedule table, rank 0: 0I2, 0W2", "schedule table, rank 1: 0F3"]


def test_row_that_is_far_too_short():
    problem = only_problem(text("0F0", *GOOD[1:]))
    assert (problem.rule, problem.numbers) == ("no action is lost", "schedule table, rank 0: 1 actions for 3 micro-batches")


def test_long_lists_are_cut():
    with pytest.raises(PlanError) as caught:
        schedule("table", 1, 1, 4, "0F0 0F1 0F2 0F3 0F4 0F5 0F6 0F7")
    assert caught.value.problems[0].numbers == "schedule table, rank 0: 0I0, 0W0, 0I1, 0W1, 0I2, 0W2 ..."


def test_table_that_is_too_short_or_too_long():
    missing = only_problem(GOOD[0])
    assert (missing.rule, missing.numbers) == ("one row per rank", "1 rows for pp = 2")
    assert only_problem(text(*GOOD, GOOD[1])).numbers == "3 rows for pp = 2"


@pytest.mark.parametrize("empty", ["", "\n \n", "# only words\n"])
def test_empty_table(empty):
    assert only_problem(empty).numbers == "table is empty"


@pytest.mark.parametrize(
    "word", ["F0", "0X1", "0F", "0F0+", "0B0+0F1", "0F0+0F1", "0F0+0I0", "0F0+0B1+0B2", "-1F0", "0f0", "0F1.5", "None"]
)
def test_word_that_is_none(word):
    problem = only_problem(text(GOOD[0], f"0F0 {word} 0B0"))
    assert (problem.rule, problem.numbers) == ("schedule table", f"table, line 2: {word!r}")
    assert "0F3+1B2" in problem.remedy


# --- what ranks may not wait for ---


@pytest.mark.parametrize(
    ("rows", "waits", "shown"),
    [
        # rank 0 wants a gradient that rank 1 can only give after the next forward
        (("0F0 0B0 0F1 0B1", "0F0 0F1 0B0 0B1"), "rank 0 with 0B0 (entry 1); rank 1 with 0F1 (entry 1)", "rank 1: 0F0 0F1 0B0 0B1"),
        (("0F0 0F1 0B0 0B1", "0B0 0F0 0F1 0B1"), "rank 1 with 0B0 (entry 0)", "rank 1: 0B0 0F0 0F1 0B1"),
        (("0F0 0F1 0B0 0B1", "0F0 0W0 0I0 0F1 0B1"), "rank 1 with 0W0 (entry 1)", "rank 1: 0F0 0W0 0I0 0F1 0B1"),
        (("0F0 0F1 0B0 0B1", "0F0+0B0 0F1 0B1"), "rank 1 with 0F0+0B0 (entry 0)", "rank 1: 0F0+0B0 0F1 0B1"),
        # the two orders of the gradients cross
        (("0F0 0F1 0B0 0B1", "0F0 0F1+0B0 0B1"), None, None),
        (("0F0 0F1+0B0 0B1", "0F0 0F1 0B0 0B1"), "rank 0 with 0F1+0B0 (entry 1)", "rank 0: 0F0 0F1+0B0 0B1"),
    ],
)
def test_circle(rows, waits, shown):
    if waits is None:
        assert schedule("table", 2, 1, 2, text(*rows))
        return
    with pytest.raises(DeadlockError) as caught:
        schedule("table", 2, 1, 2, text(*rows))
    message = str(caught.value)
    assert message.startswith("schedule table deadlocks: ")
    assert waits in message
    assert shown in message.splitlines()


def test_circle_between_chunks():
    """Chunk 1 of rank 0 follows chunk 0 of rank 1, so it cannot come before it on both."""
    with pytest.raises(DeadlockError, match=r"rank 0 with 1F0 \(entry 0\)"):
        schedule("table", 2, 2, 1, text("1F0 0F0 1B0 0B0", "0F0 1F0 1B0 0B0"))


def test_circle_in_two_directions():
    rows = read_table(text("0F0 1F1 1B1 0B0", "0F0 1F1 0B0 1B1"))
    assert Schedule("mine", 2, 2, 2, rows, "two-way").check()
    with pytest.raises(DeadlockError, match="rank 1 with 1B1"):
        Schedule("mine", 2, 2, 2, read_table(text("0F0 1F1 1B1 0B0", "0F0 1B1 1F1 0B0")), "two-way").check()


# --- through a plan ---

BUILT_IN = [
    ("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("zb-1p", 1), ("zb-2p", 1),
    ("interleaved", 2), ("interleaved-zb", 2), ("interleaved-overlapped", 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "vpp"), BUILT_IN)
def test_users_table_is_the_built_in_of_its_content(name, vpp):
    """Step, timeline, memory and both closed forms, on uneven stages with experts."""
    plan = Plan(pp=4, vpp=vpp, ep=2, schedule=name, layout="balanced")
    built_in = scenario(moe(9), 8, plan, micro_batches=8)
    mine = built_in.with_plan(schedule="table", table=str(schedule(name, 4, vpp, 8)))
    ours, theirs = simulate_step(mine), simulate_step(built_in)
    assert ours.step_time_s == theirs.step_time_s
    assert ours.timeline.exposed().equals(theirs.timeline.exposed())
    assert (memory(mine)["total"] == memory(built_in)["total"]).all()
    assert (bound(mine), estimate(mine)) == (bound(built_in), estimate(built_in))


def test_another_order_is_another_step():
    """GPipe written as a table where 1F1B was asked for: the same makespan, but more activations."""
    plan = Plan(pp=4, schedule="1f1b")
    one = scenario(dense(), 4, plan, micro_batches=8)
    mine = one.with_plan(schedule="table", table=str(schedule("gpipe", 4, 1, 8)))
    assert memory(mine)["activations"][0] == pytest.approx(2 * memory(one)["activations"][0], rel=0.2)


def test_plan_with_a_wrong_table_is_one_problem():
    rows = str(schedule("1f1b", 4, 1, 8)).splitlines()
    plan = Plan(pp=4, schedule="table", table=text(rows[0], rows[1], rows[2], rows[3].replace("0B7", "0B6")))
    found = check(scenario(dense(), 4, plan, micro_batches=8))
    assert [p.rule for p in found] == ["no action is lost", "no action stands twice"]
    assert all("rank 3" in p.numbers for p in found)
    with pytest.raises(PlanError, match="rank 3: 0I7, 0W7"):
        simulate_step(scenario(dense(), 4, plan, micro_batches=8))


def test_plan_with_a_circular_table_is_one_problem():
    plan = Plan(pp=2, schedule="table", table=text("0F0 0B0 0F1 0B1", "0F0 0F1 0B0 0B1"))
    (found,) = check(scenario(dense(), 2, plan, micro_batches=2, host=2))
    assert found.rule == "the schedule ends"
    assert "rank 0 with 0B0 (entry 1)" in found.numbers


def test_table_for_another_number_of_micro_batches():
    plan = Plan(pp=2, schedule="table", table=text(*GOOD))
    found = check(scenario(dense(), 2, plan, micro_batches=4, host=2))
    assert [p.numbers for p in found] == [f"schedule table, rank {rank}: 6 actions for 4 micro-batches" for rank in (0, 1)]


@pytest.mark.parametrize("changes", [{"schedule": "table"}, {"schedule": "1f1b", "table": text(*GOOD)}])
def test_table_and_its_name_go_together(changes):
    with pytest.raises(ProfileError, match="give both or neither"):
        Plan(pp=2, **changes)


def test_more_stages_than_layers_is_one_problem():
    found = check(scenario(dense(layers=2), 4, Plan(pp=4, schedule="zb-h1", layout="balanced"), micro_batches=8))
    assert [p.rule for p in found] == ["layers fill pp * vpp"]


@pytest.mark.parametrize(("name", "wiring"), [("zb-v", "v"), ("dualpipev", "v"), ("dualpipe", "two-way"), ("interleaved", "loop")])
def test_a_users_table_in_any_wiring_is_the_schedule_it_was_copied_from(name, wiring):
    built = schedule(name, 4, 2, 8)
    text = f"wiring: {wiring}\n{built}"
    assert schedule("table", 4, 2, 8, text).paths == built.paths
    plan = Plan(pp=4, vpp=2, schedule=name)
    s = scenario(dense(8, 1024), 8, plan, 8)
    mine = s.with_plan(schedule="table", table=text)
    assert mine.plan.stages == plan.stages
    assert simulate_step(mine).step_time_s == simulate_step(s).step_time_s


def test_a_wiring_that_is_none_is_refused():
    s = scenario(dense(8, 1024), 8, Plan(pp=4), 8)
    with pytest.raises(ProfileError, match="wiring 'w'; write wiring: loop, v or two-way"):
        s.with_plan(vpp=2, schedule="table", table="wiring: w\n0F0 0B0")
    with pytest.raises(ProfileError, match="wiring v with vpp = 1 model chunks per rank; write vpp: 2"):
        s.with_plan(schedule="table", table="wiring: v\n0F0 0B0")
