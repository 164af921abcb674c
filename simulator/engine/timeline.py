"""What happened when: the spans of one simulated step, as a table, as exposed and hidden time, as a trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from simulator.files import write_atomically

#: streams of communication, in the order in which an idle compute stream is blamed on them
COMMUNICATION = ("tp", "cp", "ep", "pp", "dp")
#: all streams; the last one to blame is the host, which launches the actions of a pair
STREAMS = ("compute", *COMMUNICATION, "host")
#: streams on which nothing tells when an action begins or ends: messages, data-parallel collectives, the host
ASIDE = ("pp", "dp", "host")


@dataclass(frozen=True)
class Timeline:
    """Spans of one optimizer step, one entry per node of the program.

    Parameters
    ----------
    rank_class, stage : ndarray of int
        Class of ranks that the span belongs to, and its pipeline rank.
    stream, name, action : ndarray of object
        Queue, task, and ``0F3`` (chunk 0, forward, micro-batch 3), empty for the rest of the step.
    start_s, end_s : ndarray of float
        Seconds from the beginning of the step.
    ranks : ndarray of int
        How many ranks each class stands for.
    takes_bytes : mapping of (int, str) to float
        Activations that each (class, action) takes when it begins, or gives back when it ends (negative).
    """

    rank_class: np.ndarray
    stage: np.ndarray
    stream: np.ndarray
    name: np.ndarray
    action: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray
    ranks: np.ndarray
    takes_bytes: Mapping[tuple[int, str], float] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def makespan_s(self) -> float:
        """Seconds from the start of the step to the end of its last span."""
        return float(self.end_s.max(initial=0.0))

    def table(self) -> pd.DataFrame:
        """Return one row per span."""
        columns = ("rank_class", "stage", "stream", "name", "action", "start_s", "end_s")
        return pd.DataFrame({c: getattr(self, c) for c in columns})

    def exposed(self) -> pd.DataFrame:
        """Return how each class of ranks spends the step.

        Returns
        -------
        DataFrame
            One row per class: ``stage``, ``ranks``, ``compute_s``, for each kind of communication ``<stream>_exposed_s``
            (nothing computes meanwhile) and ``<stream>_hidden_s`` (beside compute), ``host_s`` (the host launches a pair while
            nothing else runs; outside pairs the wait for it is in ``compute_s``), ``idle_s``. Compute, exposed, host and idle add
            up to the step.

        Notes
        -----
        When several streams communicate while none computes, the time counts for the first of tp, cp, ep, pp, dp.
        """
        rows = []
        for c in range(len(self.ranks)):
            mine = self.rank_class == c
            rows.append({"rank_class": c, "stage": int(self.stage[mine][0]), "ranks": int(self.ranks[c])} | self._spent(mine))
        return pd.DataFrame(rows)

    def _spent(self, mine: np.ndarray) -> dict[str, float]:
        starts, ends, streams = self.start_s[mine], self.end_s[mine], self.stream[mine]
        borders = np.unique(np.concatenate([[0.0, self.makespan_s], starts, ends]))
        length = np.diff(borders)
        spent: dict[str, float] = {}
        free = np.ones(len(length), dtype=bool)
        computing = np.zeros(len(length), dtype=bool)
        for stream in STREAMS:
            on = streams == stream
            change = np.zeros(len(borders))
            np.add.at(change, np.searchsorted(borders, starts[on]), 1)
            np.add.at(change, np.searchsorted(borders, ends[on]), -1)
            busy = np.cumsum(change)[:-1] > 0
            if stream == "compute":
                computing = busy
                spent["compute_s"] = float(length[busy].sum())
            elif stream == "host":
                spent["host_s"] = float(length[busy & free].sum())
            else:
                spent[f"{stream}_exposed_s"] = float(length[busy & free].sum())
                spent[f"{stream}_hidden_s"] = float(length[busy & computing].sum())
            free &= ~busy
        spent["idle_s"] = float(length[free].sum())
        return spent

    def action_times(self) -> tuple[dict[tuple[int, str], float], dict[tuple[int, str], float]]:
        """Return when each (class, action) begins and ends, messages, data-parallel collectives and the host aside."""
        spans = self.table()
        spans = spans[(spans["action"] != "") & ~spans["stream"].isin(ASIDE)].groupby(["rank_class", "action"])
        return spans["start_s"].min().to_dict(), spans["end_s"].max().to_dict()

    def memory(self) -> pd.DataFrame:
        """Return the activations that each class of ranks holds, from one change to the next.

        Returns
        -------
        DataFrame
            ``rank_class``, ``stage``, ``time_s``, ``activations_bytes`` from that time on. A forward takes what its blocks
            save, a backward gives it back; an input gradient gives back what the weight gradient does not need. What is
            computed again lives within one block and is not drawn; `StepResult.memory` adds it. Experts count as evenly
            loaded, since the heavy rank of a group is another one in each layer; `RanksResult.activations_over_time` follows
            the tokens that a rank receives.
        """
        begin, end = self.action_times()
        changes: dict[int, list[tuple[float, float]]] = {c: [(0.0, 0.0)] for c in range(len(self.ranks))}
        for (c, action), given in self.takes_bytes.items():
            changes[c].append(((begin if given > 0 else end)[c, action], given))
        stage, tables = dict(zip(self.rank_class.tolist(), self.stage.tolist(), strict=True)), []
        for c, moments in changes.items():
            time, given = np.array(sorted(moments)).T  # given back before taken at the same moment
            table = pd.DataFrame({"rank_class": c, "stage": stage[c], "time_s": time, "activations_bytes": np.cumsum(given)})
            tables.append(table.groupby("time_s", sort=True).last().reset_index()[table.columns])
        return pd.concat(tables, ignore_index=True)

    def save_trace(self, path: str | Path) -> Path:
        """Write the spans as a Chrome trace that ui.perfetto.dev opens: a process per class, a thread per stream.

        Parameters
        ----------
        path : str or Path
            Ends in ``.json`` or ``.json.gz``.
        """
        path = Path(path)
        text = json.dumps({"traceEvents": self._events(), "displayTimeUnit": "ms"}, separators=(",", ":"))
        data = text.encode()
        write_atomically(path, lambda file: file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data), "wb")
        return path

    def _events(self) -> list[dict]:
        stage = {int(c): int(s) for c, s in zip(self.rank_class, self.stage, strict=True)}
        events: list[dict] = []
        for c, ranks in enumerate(self.ranks):
            name = f"stage {stage[c]}: class {c}, {ranks} ranks"
            events.append({"ph": "M", "name": "process_name", "pid": c, "args": {"name": name}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": c, "args": {"sort_index": stage[c] * 10_000 + c}})
            used = set(self.stream[self.rank_class == c])
            events += [
                {"ph": "M", "name": "thread_name", "pid": c, "tid": i, "args": {"name": s}} for i, s in enumerate(STREAMS) if s in used
            ]
        columns: Sequence[list] = [x.tolist() for x in (self.rank_class, self.stream, self.name, self.action, self.start_s, self.end_s)]
        for c, stream, name, action, start, end in zip(*columns, strict=True):
            if end > start:
                label = f"{name} {action}".strip()
                begin, until = round(start * 1e9), round(end * 1e9)  # both ends rounded, so that neighbours do not overlap
                events.append(
                    {"ph": "X", "name": label, "cat": stream, "pid": c, "tid": STREAMS.index(stream),
                     "ts": begin / 1e3, "dur": (until - begin) / 1e3, "args": {"action": action}}
                )  # fmt: skip
        return events
