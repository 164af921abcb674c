"""Oracle: the schedules of PyTorch's own pipeline package, action for action.

`torch.distributed.pipelining` writes idle slots as None, appends the data-parallel reduction of gradients (REDUCE_GRAD) and
joins a forward and a backward that overlap into one entry. Without the first two, and with the third taken apart, its tables
must be ours. The grids are what torch 2.13 accepts: interleaved schedules need micro-batches that divide by
``max(1, m // pp)``, DualPipeV two of them per rank; ZBVZeroBubble itself accepts fewer than ``2 pp - 1``, ours does not.

torch 2.13 numbers the forwards of 1F1B's last rank from 1 (F1 ... Fm instead of F0 ... Fm-1): the others are compared, and
its table is one that a dry run must refuse.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from simulator.errors import PlanError
from simulator.schedules import Action, Schedule, actions, schedule

#: their name -> ours, and whether chunk 1 runs back
NAMES = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "interleaved-zb",
    "ZBVZeroBubble": "zb-v",
    "DualPipeV": "dualpipev",
}
KINDS = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
RANKS = (1, 2, 3, 4, 5, 8)


def torch_rows(name: str, pp: int, vpp: int, m: int) -> list[list[Action]]:
    """Return torch's table in our words."""
    rows = []
    for row in get_schedule_ops(name, pp, m, vpp):
        flat = [part for entry in row if entry is not None for part in (entry.sub_actions or (entry,))]
        kept = [a for a in flat if a.computation_type.name != "REDUCE_GRAD"]
        rows.append([Action(KINDS[a.computation_type.name], a.stage_index // pp, a.microbatch_index) for a in kept])
    return rows


def our_rows(name: str, pp: int, vpp: int, m: int) -> list[list[Action]]:
    return [list(actions(row)) for row in schedule(NAMES[name], pp, vpp, m).check().table]


def rounds_divide(pp: int, m: int) -> bool:
    return m % max(1, m // pp) == 0


def grid(name: str) -> list[tuple[int, int, int]]:
    """Return (pp, vpp, micro-batches) that both accept."""
    if name in ("GPipe", "1F1B"):
        return [(pp, 1, m) for pp in RANKS for m in (1, 2, 3, 5, 8, 13) if name == "GPipe" or m >= pp]
    if name in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return [(pp, v, m) for pp in RANKS for v in (2, 3, 4) for m in range(1, 3 * pp + 1) if rounds_divide(pp, m)]
    if name == "ZBVZeroBubble":
        return [(pp, 2, m) for pp in RANKS for m in (2 * pp - 1, 2 * pp, 2 * pp + 1, 3 * pp + 2)]
    return [(pp, 2, m) for pp in RANKS for m in (2 * pp, 2 * pp + 1, 3 * pp, 5 * pp + 3)]


@pytest.mark.parametrize("name", NAMES)
def test_every_table_is_torchs(name):
    cases = grid(name)
    assert len(cases) >= 20
    for pp, vpp, m in cases:
        ours, theirs = our_rows(name, pp, vpp, m), torch_rows(name, pp, vpp, m)
        compared = range(pp - 1) if name == "1F1B" else range(pp)
        for rank in compared:
            assert ours[rank] == theirs[rank], f"{name}, pp {pp}, vpp {vpp}, {m} micro-batches, rank {rank}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pp", [2, 4])
def test_stages_stand_on_the_same_ranks(name, pp):
    """Of every forward: the stage that torch gives the rank is the one that ours holds in that chunk."""
    ours = schedule(NAMES[name], pp, 1 if name in ("GPipe", "1F1B") else 2, 2 * pp)
    for rank, row in enumerate(get_schedule_ops(name, pp, 2 * pp)):
        stages = {a.stage_index for entry in row if entry is not None for a in (entry.sub_actions or (entry,))}
        assert stages == set(ours.held[rank])


@pytest.mark.parametrize(("pp", "m"), [(2, 4), (4, 8), (8, 16)])
def test_dry_run_refuses_torchs_last_rank_of_1f1b(pp, m):
    table = tuple(map(tuple, torch_rows("1F1B", pp, 1, m)))
    assert table[-1][:2] == (Action("F", 0, 1), Action("B", 0, 0))
    with pytest.raises(PlanError) as caught:
        Schedule("torch's", pp, 1, m, table).check()
    lost, invented = caught.value.problems
    assert (lost.rule, lost.numbers) == ("no action is lost", f"schedule torch's, rank {pp - 1}: 0F0")
    assert (invented.rule, invented.numbers) == ("no action is invented", f"schedule torch's, rank {pp - 1}: 0F{m}")


@pytest.mark.parametrize(
    ("name", "vpp"), [("GPipe", 1), ("Interleaved1F1B", 3), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2)]
)
def test_dry_run_accepts_torchs_other_tables(name, vpp):
    for pp in (2, 4):
        table = tuple(map(tuple, torch_rows(name, pp, vpp, 3 * pp)))
        assert Schedule(name, pp, vpp, 3 * pp, table, "v" if name in ("ZBVZeroBubble", "DualPipeV") else "loop").check()
