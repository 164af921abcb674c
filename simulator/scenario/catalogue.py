"""What ships, as tables: models and clusters."""

from __future__ import annotations

import pandas as pd

from simulator.scenario.profiles import CLUSTERS, MODELS


def models() -> pd.DataFrame:
    """Return one row per shipped model, with its dimensions."""
    rows = []
    for name in MODELS.names():
        m = MODELS.load(name)
        e = m.experts
        rows.append(
            {
                "model": name, "arch": m.arch, "layers": m.layers, "hidden": m.hidden, "heads": m.heads, "kv_heads": m.kv_heads,
                "experts": e.count if e else 0, "top_k": e.top_k if e else 0, "expert_ffn": e.ffn if e else 0, "ffn": m.ffn,
                "vocab": m.vocab, "source": m.source,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def clusters() -> pd.DataFrame:
    """Return one row per shipped cluster: accelerators, fabric, price."""
    rows = []
    for name in CLUSTERS.names():
        c = CLUSTERS.load(name)
        rows.append(
            {
                "cluster": name, "accelerators": c.accelerators, "accelerator": c.accelerator.name, "hosts": c.hosts,
                "scale_up_domain": c.host.scale_up_domain, "nic_bytes_per_s": c.host.nic_bytes_per_s, "fabric": c.fabric.name,
                "price_usd_per_accelerator_hour": c.price_usd_per_accelerator_hour,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
