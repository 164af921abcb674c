"""What makes published rows comparable: software release, model, configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simulator.validation.row import Row
from simulator.validation.row_names import canonical

#: how sources name the software that a row ran on; the first match in the cells of `_WHERE` is the release
_RELEASES = (
    r"\((\d\d\.\d\d(?:\.\d\d)?) container\)",  # Megatron-Bridge
    r"README[\w.]*@(v\d\d\.\d\d(?:\.\d+)?)",  # dgxc-benchmarking
    r"(NeMo ?\d\d\.\d\d[\w.]*)",  # NeMo tables and reproductions
    r"ngc(\d\d\.\d\d)",  # MLPerf submissions
    r"benchmarks/([\w.-]+)_torchtitan\.md|benchmarks/(llama3-8b_h200[\w-]*)\.md|docs/(performance)\.md@1d5815c4b",
)
_WHERE = ("provenance", "notes")
#: frameworks that share a collection's tags with others
_FRAMEWORK = r"dgxc-benchmarking/(maxtext|paxml)/"
#: sources that time two frameworks beside each other: pattern of `notes`
_COMPARED = r"^(ZeRO-3|PTD|MegaScale|Megatron-LM);"
#: how a source that measured again in a newer container tells its rows apart: pattern of `precision`
_AGAIN = r"mp_mode=(\w+)"  # MosaicML
#: columns that say what ran and how, without the words about its options
CONFIGURATION = (
    "model", "layers", "hidden", "ffn_hidden", "heads", "kv_heads", "seq_len", "gpu", "gpus", "tp", "pp", "vpp", "cp", "ep", "etp",
    "dp", "zero_stage", "mbs", "gbs", "precision", "recompute", "pp_schedule",
)  # fmt: skip


def release_of(row: Mapping[str, Any]) -> str:
    """Return the software that a row ran on: its source and, where it says so, the container, tag or year.

    Notes
    -----
    NVIDIA's tables name a container or tag per release and keep the older ones. A paper, and any source that names no version,
    is one release per year that it prints. What a source itself calls a regression stands apart: it anchors nothing.
    """
    if Row(row).has("known regression", "missing_fields", "notes"):
        return f"{_release(row)} (known regression)"
    return _release(row)


def _release(row: Mapping[str, Any]) -> str:
    cells = Row(row)
    if cells.text("release"):
        return f"{cells.text('source')} {cells.text('release')}"
    framework = re.search(_FRAMEWORK, cells.text("provenance"))
    for column in _WHERE:
        for pattern in _RELEASES:
            found = re.search(pattern, cells.text(column))
            if found:
                version = next(text for text in found.groups() if text)
                return f"{cells.text('source')} {version}" + (f" {framework.group(1)}" if framework else "")
    told = (re.search(_COMPARED, cells.text("notes")), re.search(_AGAIN, cells.text("precision")))
    return " ".join(filter(None, [cells.text("source"), cells.text("year"), *(found.group(1) for found in told if found)]))


def family_of(name: str) -> str:
    """Return a model's name without what makes it a proxy: ``Grok-1 314B PROXY (2 layers)`` is ``Grok-1 314B``.

    Notes
    -----
    Leaving a model out leaves its truncations out, too: they share every layer.
    """
    name = re.sub(r" (?:PROXY|truncated to) .*| \(paper re-implementation\)", "", canonical(name))
    return re.sub(r"^GPT-3 ", "GPT ", name)


def layout_of(row: Mapping[str, Any]) -> str:
    """Return how a row divides the work: what a sweep of layouts varies."""
    cells = Row(row)
    degrees = " ".join(f"{name}{cells.text(name)}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "mbs") if cells.text(name))
    sequence = re.search(r"sequence_parallel=(\w+)", cells.text("overlap_notes"))
    words = [f"zero{cells.text('zero_stage')}", cells.text("recompute"), f"sp {sequence.group(1)}" if sequence else ""]
    return " ".join([degrees, *filter(None, words)])


def sweep_of(row: Mapping[str, Any]) -> str:
    """Return what the layouts of one sweep have in common: release, model, accelerators, batch, sequence, precision, kernel."""
    cells = Row(row)
    kernel = re.search(r"kernel=([^;]+)", cells.text("overlap_notes"))
    common = [cells.text(c) for c in ("model", "layers", "gpu", "gpus", "gbs", "seq_len", "precision")]
    return "|".join([release_of(row), *common, kernel.group(1).strip() if kernel else ""])


def configuration_of(row: Mapping[str, Any], *more: str) -> str:
    """Return a key that repeated measurements of one configuration share."""
    cells = Row(row)
    return "|".join(cells.text(column) for column in (*CONFIGURATION, *more))
