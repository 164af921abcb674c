"""The report as sections of words and tables: printed by ``myriad validate``, and written as docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from simulator.results.confidence import NEAR
from simulator.results.step import NOT_MODELLED
from simulator.validation.causes import cause
from simulator.validation.choosing import SWEEP
from simulator.validation.collectives import summarise_collectives
from simulator.validation.memory import memory_summary
from simulator.validation.own_page import own_collectives, own_peaks, own_rows
from simulator.validation.published import published_runs
from simulator.validation.report import Report, breakdown
from simulator.validation.section import Section, percent

#: what this project wants of complete rows: (arch, regime) -> words
_WANTED = {
    ("moe", "cold"): "mean 15 %, median 10 %, bias 5 %",
    ("moe", "anchored"): "mean 8 %, median 5 %",
    ("moe", "relative"): "median 4 %",
    ("dense", "cold"): "mean 12 %",
    ("dense", "anchored"): "mean 6 %",
    ("dense", "relative"): "",
}
_NAMES = {"moe": "MoE", "dense": "dense"}


def sections(report: Report, worst: int, own: Mapping[str, pd.DataFrame] | None = None) -> list[Section]:
    """Return the report section by section.

    Parameters
    ----------
    worst : int
        How many of the worst rows to show with where their step goes.
    own : mapping, optional
        A user's rows by kind, when the report is on those.
    """
    if own is not None:
        parts = [own_peaks(report)] if "memory" in own else []
        parts += [own_collectives(report)] if "collectives" in own else []
        if "data" in own:
            rows = {row["id"]: row for row in own["data"].to_dict("records")}
            parts = [own_rows(report), worst_rows(report, worst, rows), skipped(report), *parts]
        return parts
    return [
        _regimes(report),
        _peers(report),
        _plausible(report),
        _scaling(report),
        _choosing(report),
        memory_section(report),
        collectives_section(report),
        _intervals(report),
        _pairs(report),
        *_features(report),
        worst_rows(report, worst),
        _not_modelled(report),
        skipped(report),
    ]


def _regimes(report: Report) -> Section:
    lines = [
        {
            "rows": f"{_NAMES[r['arch']]}, {'complete' if r['complete'] == 'yes' else 'partial'}",
            "regime": r["regime"],
            "count": f"{r['rows']:,}",
            "groups": r["groups"],
            "mean": percent(r["mean"]),
            "median": percent(r["median"]),
            "bias": percent(r["bias"], sign=True),
            "constant MFU: mean": percent(r["baseline_mean"]),
            "constant MFU: median": percent(r["baseline_median"]),
            "repeated: median, 90 %": f"{percent(r['floor_median'])}, {percent(r['floor_p90'])}",
            "wanted": _WANTED[(r["arch"], r["regime"])] if r["complete"] == "yes" else "",
        }
        for r in report.regimes.to_dict("records")
    ]
    median, p90 = report.floor
    words = (
        "Absolute relative error of the predicted step, averaged over (model × accelerator), each group counting once however many "
        "rows it has. Cold: what a user gets who knows nothing of the software release. Anchored: times one factor per release and "
        "accelerator, the median over the other models of that release and 1, which is known without them; rows without another model of "
        "their release are left out. "
        "Relative: how far the predicted ratio of two rows of one release is from the measured one, |ln|, both predicted by parameters "
        "fitted without the group of either; a pair counts for both groups. Rows are complete when their "
        "source leaves nothing to assume. Constant MFU is the baseline: one FLOP rate per accelerator and precision, fitted on the other "
        "models. Repeated is how far measurements of one configuration are apart, over all software for the cold regime, with equal "
        f"options within a release for the others; over all rows {percent(median)} in the median, {percent(p90)} at the 90th percentile."
    )
    return Section("Step time", words, pd.DataFrame(lines))


def _pairs(report: Report) -> Section:
    lines = [
        {
            "rows": f"{_NAMES[k['arch']]}, complete",
            "the pair shares its release": "all pairs"
            if k["shared"] == "release"
            else f"and {k['shared']}".replace("neither", "nothing else"),
            "pairs": f"{k['pairs']:,}",
            "rows in them": f"{k['rows']:,}",
            "groups": k["groups"],
            "mean": percent(k["mean"]),
            "median": percent(k["median"]),
            "median of the pairs": percent(k["pooled_median"]),
        }
        for k in report.kinds.to_dict("records")
    ]
    words = (
        "The relative regime by what two rows of one release share beside it. Mean and median are taken within each (model × accelerator) "
        "over the pairs that its rows are in, then averaged; the last column counts every pair once."
    )
    return Section("Pairs of one release", words, pd.DataFrame(lines))


def _peers(report: Report) -> Section:
    lines = [
        {
            "rows": p["rows"],
            "count": f"{p['scored']} of {p['count']}",
            "regime": p["regime"],
            "mean": percent(p["mean"]),
            "worst": percent(p["worst"], sign=True),
            "the peer": p["said"],
            "wanted": p["target"],
        }
        for p in report.peers.to_dict("records")
    ]
    words = "Every row counts once, as the peers count; anchored ones are anchored on other models of their release, as above."
    return Section("On the rows of other simulators", words, pd.DataFrame(lines))


def _plausible(report: Report) -> Section:
    lines = [
        {"row": p["id"], "taken": p["taken"], "error": percent(p["relative_error"], sign=True)} for p in report.plausible.to_dict("records")
    ]
    words = (
        "Llama 3 405B and DeepSeek-V3 for every plausible value of what their sources leave out, cold; wanted within 10 %. Llama 3 prints "
        "TFLOP/s, turned into seconds by FLOP over all keys; DeepSeek-V3 prints seconds."
    )
    return Section("What sources leave out", words, pd.DataFrame(lines))


def _scaling(report: Report) -> Section:
    table = report.slopes
    named = ~table["series"].str.startswith("NVIDIA dgxc")
    lines = [
        {
            "series": s["series"],
            "rows": s["rows"],
            "accelerators": f"{s['from']:,} to {s['to']:,}",
            "slope per doubling": percent(s["slope"], sign=True),
            "standard error": percent(s["standard_error"]),
        }
        for s in table[named].to_dict("records")
    ]
    inside = int((table.loc[~named, "slope"].abs() <= 0.01).sum())
    words = (
        "Slope of ln(predicted / measured) over log2(accelerators): wanted within ±1 % per doubling. Of the "
        f"{int((~named).sum())} single series of dgxc-benchmarking, {inside} are. MegaScale's own rows change the model and are left out; "
        "its Megatron-LM rows take virtual stages from memory, and vocabulary, micro-batch, recompute and ZeRO as assumed."
    )
    return Section("Scaling", words, pd.DataFrame(lines))


def _choosing(report: Report) -> Section:
    lines = [
        {
            "source": c["source"],
            "sweeps": c["sweeps"],
            "layouts": c["layouts"],
            "Spearman, pooled": f"{c['spearman_pooled']:.2f}",
            "worst sweep": f"{c['spearman_worst']:.2f}",
            "regret, median": percent(c["regret_median"]),
            "worst": percent(c["regret_worst"]),
        }
        for c in report.choosing.to_dict("records")
    ]
    words = (
        f"A sweep is {SWEEP} or more layouts at equal release, model, accelerators, batch, sequence, precision and kernel. Regret is "
        "what the layout that is predicted best took over the fastest measured. Wanted: Spearman 0.9 pooled and 0.8 in each; regret 3 % in "
        "the median, 8 % at worst."
    )
    return Section("Choosing a layout", words, pd.DataFrame(lines))


def memory_section(report: Report) -> Section:
    """Return how far peaks are off, and whether what fits and what fails is told apart, per source."""
    lines = [
        {
            "source": m["source"],
            "peaks": m["peaks"],
            "median": percent(m["median_absolute_error"]),
            "mean": percent(m["mean_absolute_error"]),
            "bias": percent(m["bias"], sign=True),
            "worst": percent(m["worst"], sign=True),
            "fits, fails": f"{m['fits']}, {m['fails']}",
            "balanced accuracy": percent(m["balanced_accuracy"]),
            "outside ±10 %": f"{percent(m['balanced_accuracy_outside'])} of {m['fits_outside']}, {m['fails_outside']}",
        }
        for m in memory_summary(report.memory).to_dict("records")
    ]
    words = (
        "Predicted against measured peaks, as each source counts them, and fits or out of memory; timed runs count as runs that fit. "
        "Balanced accuracy is the mean of the shares of both that are told right, also outside ±10 % of the capacity. Wanted: median 5 %; "
        "balanced 90 % overall and 97 % outside; SimuMax reports 1.4 % at most on its B200 rows."
    )
    return Section("Memory", words, pd.DataFrame(lines))


def collectives_section(report: Report) -> Section:
    """Return how far collectives are off, per kind and source."""
    lines = [
        {
            "collective": c["collective"],
            "source": c["source"],
            "rows ≥ 1 MiB": f"{c['rows']:.0f}",
            "median": percent(c["median_error"]),
            "within 25 %": percent(c["within_25"]),
            "smaller rows": f"{c['small_rows']:.0f}",
            "within a factor of 2": percent(c["small_within_2x"]),
        }
        for c in summarise_collectives(report.collectives).to_dict("records")
    ]
    words = (
        "Predicted against measured collectives, the constants of every link generation fitted without the source that is judged. "
        "Groups of few rows show no percentile."
    )
    return Section("Collectives", words, pd.DataFrame(lines))


def _intervals(report: Report) -> Section:
    lines = [
        {
            "regime": i["regime"],
            "rows": f"{i['rows']:,}",
            "inside, of rows": percent(i["coverage"]),
            "inside, macro": percent(i["coverage_macro"]),
            "median half-width": percent(i["half_width"]),
            "interval score": f"{i['score']:.2f}",
            "best constant width": f"{i['constant_score']:.2f}",
        }
        for i in report.intervals.to_dict("records")
    ]
    words = (
        "80 % intervals from the residuals of comparable rows, for every row from rows of other (model × accelerator) alone. Rows weigh "
        "less the farther they are in model, machine, layout and precision; a prediction is inside the validated range when a row is "
        f"as near as {NEAR:g} units (`simulator.results.confidence`). Wanted: 75 to 85 % inside, half-width 12 % anchored and 25 % cold, "
        "and a lower score than any constant width."
    )
    return Section("Intervals", words, pd.DataFrame(lines))


def _features(report: Report) -> Iterable[Section]:
    table = report.by_feature
    for feature in ("source", "accelerator", "the rest"):
        some = table[table["feature"] == feature] if feature != "the rest" else table[~table["feature"].isin(("source", "accelerator"))]
        lines = [
            ({"feature": r["feature"]} if feature == "the rest" else {})
            | {
                "value": r["value"],
                "rows": f"{r['rows']:,}",
                "mean": percent(r["mean"]),
                "median": percent(r["median"]),
                "bias": percent(r["bias"], sign=True),
                "anchored mean": percent(r["anchored_mean"]),
                "worst": percent(r["worst"], sign=True),
                "its row": r["worst_row"],
            }
            for r in some.to_dict("records")
        ]
        title = "By precision, recompute and parallel axis" if feature == "the rest" else f"By {feature}"
        yield Section(title, "Complete rows, cold, averaged over (model × accelerator).", pd.DataFrame(lines))


def worst_rows(report: Report, count: int, rows: Mapping[str, dict] | None = None) -> Section:
    """Return the worst rows with where their predicted step goes and, where it is known, why they are off.

    Parameters
    ----------
    rows : mapping, optional
        The rows by id; the published ones when left out.
    """
    if rows is None:
        runs = published_runs()
        rows = dict(zip(runs["id"], runs.to_dict("records"), strict=True))
    lines = []
    for line in report.worst(count).to_dict("records"):
        parts = breakdown(rows[line["id"]]).sort_values("share", ascending=False)
        said = ", ".join(f"{p.part.removeprefix('compute: ')} {p.share:.0%}" for p in parts.itertuples() if p.share >= 0.03)
        lines.append(
            {
                "row": line["id"],
                "measured": f"{line['measured_s']:.3g} s",
                "predicted": f"{line['predicted_s']:.3g} s",
                "error": percent(line["relative_error"], sign=True),
                "anchored": percent(line["anchored_error"], sign=True),
                "where the predicted step goes": said,
                "cause": cause(line["id"]),
            }
        )
    words = "The complete rows that are farthest off, one of each (model × accelerator × source), cold."
    return Section("The worst rows", words, pd.DataFrame(lines))


def _not_modelled(report: Report) -> Section:
    rows = report.rows
    said = rows["assumptions"].str.split("; ").explode()
    counted = said[said.str.startswith("not modelled: ", na=False)].str.removeprefix("not modelled: ").value_counts()
    table = pd.DataFrame({"mechanism": counted.index, "rows that have it": counted.to_numpy()})
    words = (
        "Every prediction leaves out: "
        + "; ".join(NOT_MODELLED)
        + ". Of the published rows, these have a mechanism that their prediction lacks:"
    )
    return Section("What is not modelled", words, table)


def skipped(report: Report) -> Section:
    """Return why rows have no prediction."""
    found = report.skipped
    table = pd.DataFrame({"reason": found.index, "rows": found.to_numpy()})
    return Section("Rows without a prediction", f"{len(report.rows):,} rows are predicted, {int(found.sum())} are not:", table)


HEAD = """
# How accurate is it?

Written by `myriad validate --docs docs/accuracy.md`; every figure below is printed by `myriad validate`. The rows, with their
sources, are in `simulator/validation/data`; how a row becomes a scenario is in `simulator/validation`, and what its source leaves out
is an assumption by name in every result. [validation.md](validation.md) says how to score measurements of your own.
"""
#: what the pictures of the report show
CAPTIONS = {
    "accuracy": "Predicted over measured step time of every published run, and the line on which they are equal",
    "residuals": "Predicted over measured by accelerator, precision, size and parallel degrees: median and middle 80 % of the rows",
}
