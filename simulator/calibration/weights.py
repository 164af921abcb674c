"""The parameters of one rank: what it holds of every matrix, in flat buffers that are reduced, updated and gathered whole."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from simulator.calibration import kernels
from simulator.calibration.comm import Ranks

#: over which ranks a parameter is replicated: data parallel; data and tensor parallel; the experts' data parallel
Kind = Literal["dense", "replicated", "expert"]


@dataclass(frozen=True)
class Part:
    """A slice of a full matrix: `index` of `parts` equal pieces along `dim`."""

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    index: int = 0
    parts: int = 1

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice."""
        return full.chunk(self.parts, dim=self.dim)[self.index]

    @property
    def local(self) -> tuple[int, ...]:
        """Shape of the slice."""
        return tuple(n // self.parts if d == self.dim else n for d, n in enumerate(self.shape))

    def initial(self, seed: int, device: torch.device) -> torch.Tensor:
        """Return the slice of the full matrix, whose values depend on name, seed and kind of device: the same under every plan."""
        if len(self.shape) == 1:
            return torch.ones(self.local, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()) + seed)
        return self.cut(torch.randn(self.shape, generator=generator, device=device).mul_(0.7).mul_(self.shape[-1] ** -0.5))


@dataclass
class Weight:
    """One matrix of this rank: the parts that it consists of, stacked, and the places of its value and main gradient."""

    parts: tuple[Part, ...]
    kind: Kind
    value: torch.Tensor = field(init=False)
    main: torch.Tensor = field(init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stacked parts."""
        rows = sum(part.local[0] for part in self.parts)
        return (rows, *self.parts[0].local[1:])

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


class Bucket:
    """The parameters of one block and kind, as one flat buffer of values, one of fp32 gradients and a shard of optimizer state.

    Notes
    -----
    ZeRO-1 (Rajbhandari et al., 2020): gradients are reduce-scattered over the ranks that hold the same parameters, each
    updates its shard of the fp32 master weights, and the rounded values are gathered.
    """

    def __init__(self, weights: Sequence[Weight], axis: str, ranks: Ranks, dtype: torch.dtype, device: torch.device, seed: int):
        self.weights, self.axis, self.ranks = tuple(weights), axis, ranks
        shards = ranks.size(axis)
        size = sum(w.numel for w in weights)
        self.size = -(-size // shards) * shards
        self.values = torch.zeros(self.size, dtype=dtype, device=device)
        self.gradients = torch.zeros(self.size, dtype=torch.float32, device=device)
        begin = 0
        for w in weights:
            w.value, w.main = (flat[begin : begin + w.numel].view(w.shape) for flat in (self.values, self.gradients))
            w.value.copy_(torch.cat([part.initial(seed, device) for part in w.parts]))
            begin += w.numel
        shard = self.size // shards
        self.mine = self.values[ranks.index(axis) * shard : (ranks.index(axis) + 1) * shard]
        self.master = self.mine.float() if dtype != torch.float32 else self.mine
        self.first, self.second = (torch.zeros(shard, dtype=torch.float32, device=device) for _ in range(2))
        self.reduced: torch.Tensor | None = None

    def reduce(self) -> None:
        """Sum the gradients over the ranks that hold the same parameters; this rank keeps its shard."""
        self.reduced = self.ranks.share_sum(self.axis, self.gradients)

    def update(self, step: int, lr: float, scale: float) -> None:
        """Update the shard from the reduced gradients times `scale`, and clear the gradients."""
        assert self.reduced is not None
        if scale != 1.0:
            self.reduced.mul_(scale)
        kernels.adamw(self.master, self.first, self.second, self.reduced, self.mine, step, lr)
        self.reduced = None
        self.gradients.zero_()

    def gather(self) -> None:
        """Gather the updated parameters."""
        self.ranks.share_out(self.axis, self.values)
