"""Where the ranks of a plan sit: an order of the axes, the hosts that it fills, or every accelerator by hand."""

from __future__ import annotations

from itertools import permutations

from pydantic import field_validator, model_validator

from simulator.errors import nearest
from simulator.scenario.facts import Frozen
from simulator.units import Count

AXES = ("tp", "cp", "ep", "dp", "pp")
#: Megatron's default, and that of its --use-tp-pp-dp-mapping
ORDER, PIPELINE_INSIDE = "tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"
#: in place of an order: the one that sends fewest bytes across the dearest tier (`simulator.placing`)
FEWEST_BYTES = "fewest-bytes"


class Placement(Frozen):
    """Which accelerator each rank gets.

    Parameters
    ----------
    order : str
        Axes from the one whose ranks are neighbours to the one whose ranks are farthest apart, as Megatron's ``order``: the
        attention mesh takes it without ep, the expert mesh without cp and with etp, edp for tp, dp. ``fewest-bytes`` has order and
        hosts chosen for the bytes of the step (`simulator.placing.fewest_bytes`).
    hosts : tuple of int, optional
        Hosts in the order in which they are filled; those not named are spares. By default 0, 1, 2 ...
    accelerators : tuple of int, optional
        The accelerator of each rank, counted in `order`; instead of `hosts`.
    spare_hosts : int
        Hosts left out at the end of the cluster, to take over from failed ones.
    """

    order: str = ORDER
    hosts: tuple[int, ...] | None = None
    accelerators: tuple[int, ...] | None = None
    spare_hosts: Count = 0

    @field_validator("order")
    @classmethod
    def _names_every_axis(cls, order: str) -> str:
        if order != FEWEST_BYTES and sorted(order.split("-")) != sorted(AXES):
            legal = [FEWEST_BYTES, *("-".join(p) for p in permutations(AXES))]
            raise ValueError(f"{order!r} must name {', '.join(AXES)} once each, or be {FEWEST_BYTES}; {nearest(order, legal)}")
        return order

    @model_validator(mode="after")
    def _each_once(self) -> Placement:
        if self.hosts is not None and self.accelerators is not None:
            raise ValueError("hosts and accelerators both say where ranks sit; give one")
        if self.spare_hosts < 0 or (self.spare_hosts and (self.hosts is not None or self.accelerators is not None)):
            raise ValueError(
                f"spare_hosts = {self.spare_hosts}: 0 or more, and only without a list, which leaves out what it does not name"
            )
        for name, places in (("hosts", self.hosts), ("accelerators", self.accelerators)):
            seen: dict[int, int] = {}
            for i, place in enumerate(places or ()):
                if place < 0:
                    raise ValueError(f"{name}[{i}] = {place}: counted from 0")
                if place in seen:
                    what = "rank" if name == "accelerators" else "block of ranks"
                    raise ValueError(
                        f"{name.removesuffix('s')} {place} is used twice, for {what} {seen[place]} and {what} {i}; give each its own"
                    )
                seen[place] = i
        return self

    @property
    def regular(self) -> bool:
        """Whether ranks fill the accelerators in order, so that groups are equally spaced."""
        return self.hosts is None and self.accelerators is None
