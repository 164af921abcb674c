"""The collectives of a step over `torch.distributed`: gloo between CPU processes, NCCL between GPUs.

Every function is the identity on an axis of one rank. Rows are gathered and scattered along the first dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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

    Attributes
    ----------
    settles : bool
        Whether a collective returns only when gloo's own thread has let go of its tensors. Who drops them last frees them, and the
        profiler does not see what that thread frees: unsettled, the same step seemed to peak anywhere in 9 %.
    """

    def __init__(self, plan: Plan, rank: int, device: torch.device, recorder: Recorder):
        self.plan, self.rank, self.device, self.recorder = plan, rank, device, recorder
        self.settles = False
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

    @contextmanager
    def _call(self, axis: str, kind: str, size: int, *tensors: torch.Tensor) -> Iterator[None]:
        """Record a collective over `tensors`, the first of which has its datatype, and settle it."""
        with self.recorder.call(axis, kind, tensors[0].dtype, size), self._settled(*tensors):
            yield

    @contextmanager
    def _settled(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Wait until nobody else holds `tensors` any more."""
        held = [x._use_count() for x in tensors]
        yield
        while self.settles and any(x._use_count() > before for x, before in zip(tensors, held, strict=True)):
            time.sleep(0)

    def all_gather(self, axis: str, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks, in order."""
        if self.size(axis) == 1:
            return x
        x, out = x.contiguous(), x.new_empty((x.shape[0] * self.size(axis), *x.shape[1:]))
        with self._call(axis, "all_gather", out.nbytes, x, out):
            dist.all_gather_single(out, x, group=self._group[axis])
        return out

    def reduce_scatter(self, axis: str, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the rows of the sum over all ranks."""
        if self.size(axis) == 1:
            return x
        x, out = x.contiguous(), x.new_empty((x.shape[0] // self.size(axis), *x.shape[1:]))
        with self._call(axis, "reduce_scatter", x.nbytes, x, out):
            if x.is_cuda:
                dist.reduce_scatter_single(out, x, group=self._group[axis])
            else:  # what gloo does, but the copy is ours: gloo's thread would free it, unseen by the profiler
                whole = x.clone()
                with self._settled(whole):
                    dist.all_reduce(whole, group=self._group[axis])
                out.copy_(whole.chunk(self.size(axis))[self.index(axis)])
        return out

    def share_sum(self, axis: str, whole: torch.Tensor) -> torch.Tensor:
        """Sum `whole` over all ranks into this rank's share of it, in its place, and return that; the rest is undefined then."""
        mine = whole.chunk(self.size(axis))[self.index(axis)]
        if self.size(axis) > 1:
            with self._call(axis, "reduce_scatter", whole.nbytes, whole, mine):
                if whole.is_cuda:
                    dist.reduce_scatter_single(mine, whole, group=self._group[axis])
                else:  # gloo's reduce-scatter is an all-reduce of a copy: without the copy it works in place
                    dist.all_reduce(whole, group=self._group[axis])
        return mine

    def share_out(self, axis: str, whole: torch.Tensor) -> None:
        """Fill `whole` with every rank's share of it, in place."""
        if self.size(axis) > 1:
            mine = whole.chunk(self.size(axis))[self.index(axis)]
            with self._call(axis, "all_gather", whole.nbytes, whole, mine):
                dist.all_gather_single(whole, mine, group=self._group[axis])

    def all_reduce(self, axis: str, x: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Replace `x` by the sum (or the maximum) over all ranks and return it."""
        if self.size(axis) > 1:
            with self._call(axis, "all_reduce", x.nbytes, x):
                dist.all_reduce(x, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._group[axis])
        return x

    def all_to_all(self, axis: str, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Send ``sent[i]`` rows to rank i and return the ``received[i]`` rows of each, in order."""
        if self.size(axis) == 1:
            return x
        leaving = (sum(sent) - sent[self.index(axis)]) * (x.nbytes // max(len(x), 1))
        x, out = x.contiguous(), x.new_empty((sum(received), *x.shape[1:]))
        with self._call(axis, "all_to_all", leaving, x, out):
            dist.all_to_all_single(out, x, list(received), list(sent), group=self._group[axis])
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
        with self._call("pp", "send", like.nbytes, like):
            dist.recv(like, self._of["pp"][place], group=self._group["pp" if forward else "pp.back"])
        return like
