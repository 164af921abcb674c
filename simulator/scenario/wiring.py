"""How the switches of each family of fabrics are wired: the numbers that a fabric's tiers do not say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from simulator.scenario.facts import Frozen
from simulator.units import BytesPerS, Count


class Shape(Frozen):
    """Base of the shapes below."""


class Clos(Shape):
    """A folded Clos: leaves, spines, cores; also with rails, planes, or rails that never meet.

    Parameters
    ----------
    rails : int, optional
        NIC i of a host goes to leaf ``i mod rails`` of its unit; 1 puts a host on one leaf, None gives every NIC its own.
    planes : int
        Ports of one NIC, each on a copy of the whole network of its own.
    cables : int
        Equal cables that one port has to its leaf.
    separate : bool
        No switch joins two rails: what changes rail does so inside a host.
    groups : str
        Which leaves share their spines where there is a third level: those of one ``rail``, or of neighbouring ``units``.
    """

    rails: Count | None = Field(default=1, gt=0)
    planes: Count = Field(default=1, gt=0)
    cables: Count = Field(default=1, gt=0)
    separate: bool = False
    groups: Literal["rail", "unit"] = "unit"


class RailClos(Clos):
    """A rail-optimised Clos: one rail per NIC of a host unless the file says otherwise."""

    rails: Count | None = Field(default=None, gt=0)
    groups: Literal["rail", "unit"] = "rail"


class SeparateRails(RailClos):
    """Rails, or planes of one NIC each, that only the hosts join."""

    separate: bool = True


class Dragonfly(Shape):
    """Groups of routers, all joined inside a group and all groups joined; with `spines`, a two-level tree inside (dragonfly+).

    Parameters
    ----------
    endpoints : int
        Accelerators on one router (on one leaf).
    routers : int
        Routers of a group (its leaves).
    spines : int, optional
        Spines of a group; without them its routers are joined directly.
    global_links : int
        Links to other groups of one router (of one spine).
    """

    endpoints: Count = Field(gt=0)
    routers: Count = Field(gt=0)
    spines: Count | None = Field(default=None, gt=0)
    global_links: Count = Field(gt=0)


class Torus(Shape):
    """Accelerators joined to their neighbours in three dimensions, cubes joined by optical switches.

    Parameters
    ----------
    x, y, z : int
        Accelerators along each dimension.
    cube : int
        Edge of the electrically wired cube; links between cubes pass an optical switch.
    link_bytes_per_s : float
        One link, one direction.
    """

    x: Count = Field(gt=0)
    y: Count = Field(gt=0)
    z: Count = Field(gt=0)
    cube: Count = Field(gt=0)
    link_bytes_per_s: BytesPerS


class SlimFly(Shape):
    """McKay-Miller-Siran graph of diameter two: 2 q^2 routers.

    Parameters
    ----------
    q : int
        A prime power that is 4 w + d with d of -1, 0 or 1.
    endpoints : int
        Accelerators on one router.
    """

    q: Count = Field(gt=1)
    endpoints: Count = Field(gt=0)


class Own(Shape):
    """The user's own graph.

    Parameters
    ----------
    file : str
        YAML or GraphML (`simulator.network.own`).
    """

    file: str = Field(min_length=1)


#: family -> what its topology section holds
SHAPES: dict[str, type[Shape]] = {
    "single-switch": Clos,
    "clos": Clos,
    "rail-optimised": RailClos,
    "rail-only": SeparateRails,
    "multi-plane": SeparateRails,
    "dual-plane": RailClos,
    "dragonfly": Dragonfly,
    "dragonfly+": Dragonfly,
    "torus": Torus,
    "slim-fly": SlimFly,
    "own": Own,
}
