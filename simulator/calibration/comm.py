"""The collectives of a step over `torch.distributed`: gloo between CPU processes, NCCL between GPUs.

Every function is the identity on an axis of one rank. Rows are gathered and scattered along the first dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from simulator.calibration.recorder import Recorder
from simulator.scenario.mesh import members
from simulator.scenario.plan import Plan

#: axes of `simulator.scenario.mesh` along which a step communicates
AXES = ("tp", "ep", "dp", "edp", "pp", "world")


class Ranks:
    """The process groups of one rank under a plan.

    Parameters
    ----------
    plan : Plan
        Its groups are those that the simulator prices.
    rank : int
    device : torch.device
    recorder : Recorder
        Gets the seconds of each collective as ``axis.kind``.

    Notes
    -----
    All ranks of the job must construct this together: creating groups is collective.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device, recorder: Recorder):
        self.plan, self.rank, self.device, self.recorder = plan, rank, device, recorder
        self._of: dict[str, list[int]] = {}
        self._group: dict[str, dist.ProcessGroup | None] = {}
        for axis in AXES:
            numbers = members(plan, axis)
            for number in np.unique(numbers):
                ranks = np.flatnonzero(numbers == number).tolist()
                group = self._new(ranks)
                if rank in ranks:
                    self._of[axis], self._group[axis] = ranks, group
        # one communicator per direction: NCCL runs the messages of a communicator in order, and 1F1B crosses them
        self._group["pp.back"] = None
        numbers = members(plan, "pp")
        for number in np.unique(numbers):
            ranks = np.flatnonzero(numbers == number).tolist()
            group = self._new(ranks)
            if rank in ranks:
                self._group["pp.back"] = group

    @staticmethod
    def _new(ranks: list[int]) -> dist.ProcessGroup | None:
        return dist.new_group(ranks) if len(ranks) > 1 else None

    def close(self) -> None:
        """Give the groups back, all ranks together.

        Idle gloo groups cost: over thirty steps of seven groups each, kernels' time by the clock rose from 1.02 to 1.075 times their
        thread's CPU time; with the groups given back it stays below 1.035.
        """
        for group in self._group.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._group.clear()

    def size(self, axis: str) -> int:
        """Return the ranks along `axis`."""
        return len(self._of[axis])

    def index(self, axis: str) -> int:
        """Return the place of this rank along `axis`."""
        return self._of[axis].index(self.rank)

    def all_gather(self, axis: str, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks, in order."""
        if self.size(axis) == 1:
            return x
        with self.recorder.call(axis, "all_gather", x.dtype, x.nbytes * self.size(axis)):
            out = x.new_empty((x.shape[0] * self.size(axis), *x.shape[1:]))
            dist.all_gather_single(out, x.contiguous(), group=self._group[axis])
        return out

    def reduce_scatter(self, axis: str, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the rows of the sum over all ranks."""
        if self.size(axis) == 1:
            return x
        with self.recorder.call(axis, "reduce_scatter", x.dtype, x.nbytes):
            out = x.new_empty((x.shape[0] // self.size(axis), *x.shape[1:]))
            dist.reduce_scatter_single(out, x.contiguous(), group=self._group[axis])
        return out

    def share_sum(self, axis: str, whole: torch.Tensor) -> torch.Tensor:
        """Sum `whole` over all ranks into this rank's share of it, in its place, and return that; the rest is undefined then."""
        mine = whole.chunk(self.size(axis))[self.index(axis)]
        if self.size(axis) > 1 and whole.is_cuda:
            with self.recorder.call(axis, "reduce_scatter", whole.dtype, whole.nbytes):
                dist.reduce_scatter_single(mine, whole, group=self._group[axis])
        elif self.size(axis) > 1:  # gloo cannot work in place
            mine.copy_(self.reduce_scatter(axis, whole))
        return mine

    def share_out(self, axis: str, whole: torch.Tensor) -> None:
        """Fill `whole` with every rank's share of it, in place."""
        if self.size(axis) > 1:
            with self.recorder.call(axis, "all_gather", whole.dtype, whole.nbytes):
                dist.all_gather_single(whole, whole.chunk(self.size(axis))[self.index(axis)], group=self._group[axis])

    def all_reduce(self, axis: str, x: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Replace `x` by the sum (or the maximum) over all ranks and return it."""
        if self.size(axis) > 1:
            with self.recorder.call(axis, "all_reduce", x.dtype, x.nbytes):
                dist.all_reduce(x, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._group[axis])
        return x

    def all_to_all(self, axis: str, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send ``sent[i]`` rows to rank i and return the ``received[i]`` rows of each, in order."""
        if self.size(axis) == 1:
            return x
        leaving = (sum(sent) - sent[self.index(axis)]) * (x.nbytes // max(len(x), 1))
        with self.recorder.call(axis, "all_to_all", x.dtype, leaving):
            out = x.new_empty((sum(received), *x.shape[1:]))
            dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=self._group[axis])
        return out

    def send(self, x: torch.Tensor, forward: bool) -> dist.Work:
        """Begin to send `x` to the next pipeline rank, or to the previous one; keep `x` until the work is waited for."""
        place = self.index("pp") + (1 if forward else -1)
        work = dist.isend(x, self._of["pp"][place], group=self._group["pp" if forward else "pp.back"])
        assert work is not None
        return work

    def receive(self, like: torch.Tensor, forward: bool) -> torch.Tensor:
        """Return what the previous pipeline rank sent forward, or the next one back, in the shape of `like`."""
        place = self.index("pp") + (-1 if forward else 1)
        with self.recorder.call("pp", "send", like.dtype, like.nbytes):
            dist.recv(like, self._of["pp"][place], group=self._group["pp" if forward else "pp.back"])
        return like
