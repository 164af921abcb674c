"""Small models and clusters that the tests share: every fact is that of a shipped profile, only the counts are smaller."""

from __future__ import annotations

import itertools
from typing import Any

from simulator.feasibility import structure
from simulator.scenario.cluster import Cluster, Host
from simulator.scenario.job import Job
from simulator.scenario.model import Experts, Model
from simulator.scenario.plan import Overlap, Plan
from simulator.scenario.profiles import CLUSTERS
from simulator.scenario.scenario import Scenario

H100 = CLUSTERS.load("h100-rail-10240")


def cluster(accelerators: int, host: int = 4, slow_hosts: dict[int, float] | None = None) -> Cluster:
    """Return `accelerators` H100 in hosts of `host`."""
    box = Host.model_validate(H100.host.model_dump(mode="json") | {"accelerators": host, "scale_up_domain": host})
    return H100.model_copy(update={"name": "small", "host": box, "accelerators": accelerators, "slow_hosts": slow_hosts or {}})


def dense(layers: int = 8, hidden: int = 256, **changes: Any) -> Model:
    """Return a dense model; wide enough that no kernel is as short as a launch only when `hidden` is large."""
    sizes = {"vocab": 1024, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 4 * hidden, "gated": True}
    return Model(name="dense", source="made up", layers=layers, hidden=hidden, **(sizes | changes))


def moe(layers: int = 8, hidden: int = 256, leading: int = 1, **changes: Any) -> Model:
    """Return a model of 8 experts per layer behind `leading` dense layers, top 2, one shared expert."""
    experts = Experts(count=8, top_k=2, ffn=hidden, shared_ffn=hidden)
    sizes = {"experts": experts, "moe_layers": (False,) * leading + (True,) * (layers - leading)}
    return dense(layers, hidden, **(sizes | changes)).model_copy(update={"name": "moe"})


def job(global_batch: int = 16, sequence_length: int = 512, **changes: Any) -> Job:
    return Job(tokens=10 * global_batch * sequence_length, global_batch=global_batch, sequence_length=sequence_length, **changes)
