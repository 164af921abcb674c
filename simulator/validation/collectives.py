"""Predicted against measured collectives, every link generation fitted without the source that it is judged on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from simulator.network import collectives as priced
from simulator.scenario.cluster import Cluster, Protocols
from simulator.scenario.mesh import Group
from simulator.validation.collective_rows import Measured, anchors, measured, published_collectives

MIB = 2**20
#: below this many rows a group shows its rows and no percentile
ENOUGH_ROWS = 20


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant of a link generation: where it starts without data, how far from there data may pull it, its bounds.

    Parameters
    ----------
    prior : float
        Value without data.
    spread : float
        Standard deviation of its natural logarithm before any data.
    """

    prior: float
    spread: float
    least: float
    most: float


#: scale-up links; factors multiply the link's priors
SCALE_UP = {
    "ring_factor": Constant(1.0, 0.10, 0.7, 1.4),
    "reduction_factor": Constant(1.0, 0.10, 0.7, 1.4),
    "start_factor": Constant(1.0, 0.5, 0.5, 4.0),
    "fill_factor": Constant(1.0, 0.5, 0.1, 10.0),
}
#: networks between domains
NETWORK = {
    "efficiency_factor": Constant(1.0, 0.05, 0.5, 1.2),
    "hop_factor": Constant(1.0, 0.5, 0.3, 5.0),
    "fill_factor": Constant(1.0, 0.5, 0.1, 10.0),
}
Constants = Mapping[str, Mapping[str, float]]
_NUMBERS = ("nodes", "gpus", "bytes", "algbw_GBps", "busbw_GBps")
_TO_ALL = ("moe_dispatch", "moe_combine", "alltoall")
_RINGS = {"all_reduce": priced.all_reduce_s, "all_gather": priced.all_gather_s, "reduce_scatter": priced.reduce_scatter_s}


def with_constants(cluster: Cluster, scale_up: Mapping[str, float], network: Mapping[str, float]) -> Cluster:
    """Return `cluster` with the constants of its link generations."""
    host, fabric = cluster.host, cluster.fabric

    def scaled(latency: Protocols, factor: float) -> Protocols:
        return latency.model_copy(update={name: getattr(latency, name) * factor for name in ("ll", "ll128", "simple")})

    host = host.model_copy(
        update={
            "bus_bytes_per_s": {c: rate * scale_up["ring_factor"] for c, rate in host.bus_bytes_per_s.items()},
            "reduction_share": (host.reduction_share or 0.0) * scale_up["reduction_factor"],
            "base_latency_s": scaled(host.base_latency_s, scale_up["start_factor"]),
            "fill_s": host.fill_s * scale_up["fill_factor"],
        }
    )
    if network:
        hops = scaled(fabric.hop_latency_s, network["hop_factor"])
        update = {
            "efficiency": min(fabric.efficiency * network["efficiency_factor"], 1.0),
            "hop_latency_s": hops,
            "fill_s": fabric.fill_s * network["fill_factor"],
        }
        fabric = fabric.model_copy(update=update)
    return cluster.model_copy(update={"host": host, "fabric": fabric})


def predicted_s(rows: Sequence[Measured], constants: Constants) -> np.ndarray:
    """Return the simulator's seconds for measurements; sweeps over sizes are priced as columns."""
    seconds = np.empty(len(rows))
    alike: dict[tuple, list[int]] = {}
    for at, row in enumerate(rows):
        alike.setdefault((id(row.cluster), row.scale_up, row.network, row.collective, row.ranks, row.algorithm), []).append(at)
    for (_, scale_up, network, collective, ranks, algorithm), where in alike.items():
        cluster = with_constants(rows[where[0]].cluster, constants[scale_up], constants[network] if network else {})
        size, out, fan = (np.array([getattr(rows[at], name) for at in where]) for name in ("size", "out", "fan"))
        if collective in _TO_ALL:
            seconds[where] = priced.expert_all_to_all_s(size, Group(ranks, 1), cluster, out, fan)
        else:
            seconds[where] = _RINGS[collective](size, Group(ranks, 1), cluster, algorithm)
    return seconds + [row.call_s for row in rows]


def fit_links(rows: Iterable[Measured], known: Constants | None = None, without: str = "") -> dict[str, dict[str, float]]:
    """Return the constants of every link generation, fitted to `rows`.

    Parameters
    ----------
    rows : iterable of Measured
    known : mapping, optional
        Constants fitted to all `rows`; taken over where leaving out a source changes nothing.
    without : str
        Source that is left out.

    Notes
    -----
    Least squares of the logarithm of predicted over measured time, a soft-L1 loss beyond 15 %, plus each constant's distance
    from its prior; scale-up links first, from rows that stay in a domain, then the networks with these held. Rows of one
    machine, group and collective weigh together as much as five rows, so that long sweeps do not outvote the rest.
    """
    rows = list(rows)
    constants: dict[str, dict[str, float]] = {}
    for kind, table in (("scale_up", SCALE_UP), ("network", NETWORK)):
        for name in sorted({getattr(r, kind) for r in rows} - {""}):
            mine = [r for r in rows if getattr(r, kind) == name and bool(r.network) == (kind == "network")]
            below = {r.scale_up for r in mine}
            if known and not any(r.source == without and (r in mine or (not r.network and r.scale_up in below)) for r in rows):
                constants[name] = dict(known[name])
            else:
                constants[name] = _fit(name, table, [r for r in mine if r.source != without], constants)
    return constants


def _fit(name: str, table: Mapping[str, Constant], rows: list[Measured], others: Constants) -> dict[str, float]:
    keys = list(table)
    prior = np.log([table[k].prior for k in keys])
    spread = np.array([table[k].spread for k in keys])
    seconds = np.array([r.seconds for r in rows])
    sweep = [(r.source, r.collective, r.ranks, r.cluster.host.name) for r in rows]
    weight = np.array([np.sqrt(min(1.0, 5 / sweep.count(s))) for s in sweep])

    def residuals(x: np.ndarray) -> np.ndarray:
        trial = {**others, name: dict(zip(keys, np.exp(prior + x * spread), strict=True))}
        miss = np.log(predicted_s(rows, trial) / seconds) / 0.15
        return np.concatenate([weight * np.sign(miss) * np.sqrt(2 * (np.sqrt(1 + miss**2) - 1)), x])

    best = np.zeros(len(keys))
    if rows:
        low, high = ((np.log([getattr(table[k], end) for k in keys]) - prior) / spread for end in ("least", "most"))
        best = least_squares(residuals, best, bounds=(low, high), diff_step=1e-3, max_nfev=30).x
    return dict(zip(keys, np.exp(prior + best * spread).tolist(), strict=True))


@cache
def fitted_constants() -> dict[str, dict[str, float]]:
    """Return the constants of every link generation fitted to every published row; the profiles hold what follows from them."""
    rows = [m for _, row in published_collectives().iterrows() if isinstance(m := measured(row), Measured)]
    return fit_links(rows + anchors())


def validate_collectives(held_out: bool = True, own: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return measured and predicted seconds of every published collective, or of a user's own.

    Parameters
    ----------
    held_out : bool
        Fit every link generation without the source that is judged; False fits to all sources once.
    own : DataFrame, optional
        A user's rows in the columns of `published_collectives`; no constant was fitted to them.

    Returns
    -------
    DataFrame
        The published columns, ``measured_s``, ``predicted_s``, ``relative_error`` and ``skipped``, the reason why a row could not be
        predicted.
    """
    table = published_collectives() if own is None else own.copy()
    if own is not None:
        table[list(_NUMBERS)] = table[list(_NUMBERS)].apply(pd.to_numeric)
    seen = [measured(row) for _, row in table.iterrows()]
    known = [m for m in seen if isinstance(m, Measured)]
    rows, every = known + anchors(), fitted_constants()
    predicted: dict[int, float] = {}
    for source in sorted({m.source for m in known}):
        constants = fit_links(rows, every, source) if held_out and own is None else every
        mine = [m for m in known if m.source == source]
        predicted |= {id(m): p for m, p in zip(mine, predicted_s(mine, constants), strict=True)}
    table["measured_s"] = [m.seconds if isinstance(m, Measured) else np.nan for m in seen]
    table["predicted_s"] = [predicted.get(id(m), np.nan) for m in seen]
    table["relative_error"] = table["predicted_s"] / table["measured_s"] - 1
    table["skipped"] = ["" if isinstance(m, Measured) else m for m in seen]
    return table


def summarise_collectives(table: pd.DataFrame) -> pd.DataFrame:
    """Return errors per collective and source, and their macro average per collective.

    Returns
    -------
    DataFrame
        Payloads of 1 MiB and more (those without a printed size among them): ``rows``, ``median_error``, ``within_25`` (both blank for
        groups under 20 rows); smaller ones: ``small_rows``, ``small_within_2x``.
    """
    known = table[table["relative_error"].notna()]
    lines = []
    for (collective, source), part in known.groupby(["collective", "source"], sort=True):
        enough = (~(part["bytes"] < MIB)).sum() >= ENOUGH_ROWS
        lines.append({"collective": collective, "source": source} | _line(part, enough))
    found = pd.DataFrame(lines)
    for collective, part in known.groupby("collective", sort=True):
        sources = [_line(p, True) for _, p in part.groupby("source")]
        line = {"collective": collective, "source": "macro average over sources"}
        line |= {key: np.nanmean([s[key] for s in sources]) for key in ("median_error", "within_25")}
        line |= {key: sum(s[key] for s in sources) for key in ("rows", "small_rows")}
        found.loc[len(found)] = pd.Series(line)
    return found


def _line(part: pd.DataFrame, enough: bool) -> dict[str, float]:
    small = part["bytes"] < MIB
    large, little = part.loc[~small, "relative_error"].abs(), part.loc[small, "relative_error"]
    return {
        "rows": len(large),
        "median_error": large.median() if enough and len(large) else np.nan,
        "within_25": (large <= 0.25).mean() if enough and len(large) else np.nan,
        "small_rows": len(little),
        "small_within_2x": little.between(-0.5, 1.0).mean() if len(little) else np.nan,
    }
