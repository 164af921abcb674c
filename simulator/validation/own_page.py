"""What a user's own measurements get: their rows one by one, and docs/validation.md, which says how to write them."""

from __future__ import annotations

import pandas as pd

from simulator.validation.regimes import errors
from simulator.validation.report import Report
from simulator.validation.schema import SCHEMAS
from simulator.validation.section import Section, markdown_table, percent


def own_peaks(report: Report) -> Section:
    """Return a user's memory rows, one by one."""
    lines = [
        {
            "row": m["id"],
            "measured": f"{m['measured_bytes'] / 2**30:.1f} GiB" if m["measured_bytes"] == m["measured_bytes"] else "–",
            "predicted": f"{m['predicted_bytes'] / 2**30:.1f} GiB" if m["predicted_bytes"] == m["predicted_bytes"] else "–",
            "error": percent(m["relative_error"], sign=True),
            "fitted": {True: "yes", False: "no"}.get(m["fits_measured"], "–"),
            "predicted to fit": {True: "yes", False: "no"}.get(m["fits_predicted"], "–"),
            "assumed": m["assumptions"],
            "skipped": m["skipped"],
        }
        for m in report.memory.to_dict("records")
    ]
    return Section("Your memory rows", f"{len(lines)} rows.", pd.DataFrame(lines))


def own_rows(report: Report) -> Section:
    """Return a user's rows, one by one."""
    lines = [
        {
            "row": r["id"],
            "measured": f"{r['measured_s']:.3g} s",
            "predicted": f"{r['predicted_s']:.3g} s",
            "error": percent(r["relative_error"], sign=True),
            "80 % interval": f"{r['low_s']:.3g} to {r['high_s']:.3g} s",
            "with the release's factor": percent(r["anchored_error"], sign=True),
            "assumed": r["assumptions"],
        }
        for r in report.rows.to_dict("records")
    ]
    overall = errors(report.rows["relative_error"], report.rows)
    words = (
        f"{overall['rows']} rows of {overall['groups']} (model × accelerator): mean {percent(overall['mean'])}, "
        f"median {percent(overall['median'])}, bias {percent(overall['bias'], sign=True)} cold."
    )
    return Section("Your rows", words, pd.DataFrame(lines))


def own_collectives(report: Report) -> Section:
    """Return a user's collectives, one by one."""
    lines = [
        {
            "collective": c["collective"],
            "accelerators": c["gpus"],
            "bytes": f"{c['bytes']:,.0f}",
            "measured": f"{c['measured_s']:.3g} s",
            "predicted": f"{c['predicted_s']:.3g} s",
            "error": percent(c["relative_error"], sign=True),
            "skipped": c["skipped"],
        }
        for c in report.collectives.to_dict("records")
    ]
    return Section("Your collectives", f"{len(lines)} rows.", pd.DataFrame(lines))


def schema_page() -> str:
    """Return docs/validation.md: how a user's own runs are scored, and the columns."""
    kinds = {"text": "text", "whole": "whole number > 0", "count": "whole number ≥ 0", "number": "number > 0"}
    needed, pages = {"always": "yes", "moe": "for MoE", "": ""}, [_SCHEMA.strip()]
    for kind, title in (("data", "Training runs"), ("memory", "Memory"), ("collectives", "Collectives")):
        rows = [
            {"column": f"`{c.name}`", "needed": needed[c.needed], "cell": kinds[c.kind], "meaning": c.meaning}
            for c in SCHEMAS[kind].columns
        ]
        measured = " or ".join(f"`{name}`" for name in SCHEMAS[kind].measured)
        pages += [f"## {title}: `--{kind}`", f"The measurement is in {measured}.", markdown_table(pd.DataFrame(rows))]
    return "\n\n".join(pages) + "\n"


_SCHEMA = """
# Score your own measurements

    myriad validate --data runs.csv [--data more.csv] [--memory peaks.csv] [--collectives nccl.csv] [--json]

A file is a table in UTF-8 with a header, one row per measurement, in the columns below: those of the published rows in
`simulator/validation/data`. Columns that are not needed may be left out; a blank cell means "not known", and what is
taken instead is told with the row, also for `vocab`, `kv_heads` and `head_dim` where the model's name tells them: a shipped
model, GPT, Llama and a few more; where it does not, write them. Numbers are written without units. A row that cannot be read
is told with its line, its column and the remedy, and the other rows are still scored. With rows of two models or more of one
`release`, the error after one factor for that release is told, too.
"""
