"""How the forward and the backward of a pair take turns on a rank."""

from __future__ import annotations

from collections.abc import Iterable

from simulator.scenario.plan import wiring

#: stream of the expert all-to-all
EXCHANGE = "ep"


def by_segments(name: str, table: str | None) -> bool:
    """Return whether the actions of a pair take turns by segments, the forward first, else as `turn_ends` says.

    DualPipe's do, and those of tables whose chunks meet on a rank as its do: so its published phases come out.
    """
    return name in ("dualpipe", "dualpipev") or wiring(table) != "loop"


def turn_ends(streams: Iterable[str], forward: bool, before: int, every: bool) -> tuple[bool, bool]:
    """Return whether the other action of a pair has its turn before a segment on these streams, and whether after it.

    Parameters
    ----------
    forward : bool
        Whether the segment is of the forward.
    before : int
        All-to-alls of its block before it.
    every : bool
        Whether turns end after every segment.

    Notes
    -----
    Else the backward begins, and a turn ends after every all-to-all and before a dispatch: combine (backward), attention (forward),
    experts (backward), dispatch (forward), dispatch (backward), experts and combine (forward), attention (backward).

    References
    ----------
    NVIDIA/Megatron-LM megatron/core/models/common/model_chunk_schedule_plan.py, ``TransformerLayerSchedulePlan.run``.
    """
    exchange = EXCHANGE in streams
    if every:
        return False, True
    return exchange and before == (0 if forward else 1), exchange
