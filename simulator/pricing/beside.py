"""How much communication slows the kernels beside it: it takes multiprocessors, and bandwidth of the device memory.

The factor of a pattern (a pass of a block, or a pair of forward and backward) is found before the step runs; nothing is
resolved while it runs. What stands at the ends of a step only (ZeRO-1's gathers and reductions) slows nothing here, nor do
messages between stages, which are copies by the network card.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from simulator.pricing.operations import device_bytes
from simulator.scenario.cluster import Accelerator, Cluster
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.units import Number
from simulator.workload.ops import COMPUTE, Op

#: most that communication gets of the memory bandwidth: two users who both want all of it have half each
FAIR_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Beside:
    """Kernels, and the communication that runs beside them.

    Parameters
    ----------
    products_s, memory_s : Number
        Seconds of kernels that multiprocessors bound (matrix products, attention) and that memory bounds.
    displaced_s : Number
        Seconds of products whose blocks a collective displaces (`simulator.scenario.cluster.Accelerator.displaced_product`). Those of
        experts run side by side on several streams, whose blocks fill each other's gaps.
    talks : dict of str to (Number, Number, Number)
        For each stream: seconds, seconds times its share of the multiprocessors, bytes that it moves in device memory.
    """

    products_s: Number = 0.0
    memory_s: Number = 0.0
    displaced_s: Number = 0.0
    talks: dict[str, tuple[Number, Number, Number]] = field(default_factory=dict)

    @classmethod
    def of(cls, ops: Iterable[tuple[Op, Number]], model: Model, plan: Plan, cluster: Cluster) -> Beside:
        """Return kernels and collectives, given with their seconds, as they run beside each other."""
        products = memory = displaced = 0.0
        talks: dict[str, tuple[Number, Number, Number]] = {}
        for op, seconds in ops:
            if op.kind == "memory":
                memory = memory + seconds
            elif op.kind == "gemm" and cluster.accelerator.displaced_product:
                displaced = displaced + seconds
            elif op.kind in COMPUTE:
                products = products + seconds
            else:
                share = plan.overlap.multiprocessors if op.kind == "all_to_all" else plan.overlap.collective_multiprocessors
                if op.apart or (op.ahead and cluster.accelerator.displaced_product):  # the latter is in the product's own price
                    share = 0.0
                moved = np.where(np.asarray(seconds) > 0, device_bytes(op, model, plan, cluster), 0.0)
                talks[op.stream] = _add(talks.get(op.stream, (0.0, 0.0, 0.0)), (seconds, share * seconds, moved))
        return cls(products, memory, displaced, talks)

    def __add__(self, other: Beside) -> Beside:
        talks = dict(self.talks)
        for stream, one in other.talks.items():
            talks[stream] = _add(talks.get(stream, (0.0, 0.0, 0.0)), one)
        return Beside(self.products_s + other.products_s, self.memory_s + other.memory_s, self.displaced_s + other.displaced_s, talks)

    def slowdown(self, accelerator: Accelerator) -> Number:
        """Return how many times as long the kernels take.

        Notes
        -----
        A stream that talks for C of K seconds of kernels meets products of P and memory-bound kernels of M seconds for ``C P / K``
        and ``C M / K``. Products then lack its share s of the multiprocessors, the others its share b = bytes / C / bandwidth of
        the memory, and catch up later: ``K + sum over streams of min(C / K, 1 / (1 - s)) s P + min(C / K, 1 / (1 - b)) b M``; no
        kernel is slower than all of the time beside the stream. What memory loses, ``C b``, is the stream's bytes however fast
        it talks, so a faster link slows nothing. Products whose blocks are displaced lose more than s beside what sums gradients or
        gathers parameters, however few are: not beside Transformer Engine's own kernels, whose multiprocessors are tuned with them.
        """
        alone = np.maximum(self.products_s + self.memory_s + self.displaced_s, 1e-12)
        slow: Number = 1.0
        for stream, (seconds, taken, moved) in self.talks.items():
            length = np.maximum(seconds, 1e-12)
            share = taken / length
            bandwidth = np.minimum(moved / length / (accelerator.hbm_bytes_per_s * accelerator.hbm_efficiency), FAIR_SHARE)
            waves = np.maximum(share, 1.0 - (accelerator.displaced_product or 1.0)) if stream == "dp" else share
            for kernels, lost in ((self.products_s, share), (self.memory_s, bandwidth), (self.displaced_s, waves)):
                slow = slow + np.minimum(seconds / alone, 1 / (1 - lost)) * lost * kernels / alone
        return slow


def _add(one: tuple[Number, Number, Number], other: tuple[Number, Number, Number]) -> tuple[Number, Number, Number]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]
