"""Predictions against published training runs: an error table, without fitting."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from simulator.closed_forms import continued, estimate, rounds
from simulator.errors import ProfileError, SimulatorError
from simulator.pricing.compute import peak_flop_per_s
from simulator.results.confidence import SCALES, WORDS, features
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step
from simulator.validation.keys import configuration_of, family_of, layout_of, release_of, sweep_of
from simulator.validation.row import Row
from simulator.validation.row_cluster import cluster_of
from simulator.validation.row_model import model_of
from simulator.validation.row_names import named
from simulator.validation.row_plan import job_of, plan_of
from simulator.validation.row_scripts import with_scripts
from simulator.workload.flop import count

_DATA = Path(__file__).parent / "data"
_FILES = ("training_runs.csv", "training_runs_vtrain_single.csv")
_PRINTED = ("id", "source", "model", "arch", "complete")
_NUMBERS = ("measured_s", "predicted_s", "relative_error", "flop", "peak_flop_per_s", *SCALES)
_KEYS = ("family", "release", "configuration", "options", "layout", "sweep")
_COLUMNS = list(dict.fromkeys([*_PRINTED, *WORDS, *_KEYS, *_NUMBERS, "assumptions", "skipped"]))
#: sources that print only a FLOP rate -> how they count: found by comparing rows of theirs, or their code, that print both
_CONVENTIONS = {
    "ModelZoo|GB200 DeepSeek-V3 optimisation history": "causal",  # Megatron-LM since 2025
    # by its own rows of 4,096 to 131,072 tokens: with all keys, attention would fall to a fifth of the peak, while runs of its authors
    # that count the causal half keep two fifths (Megatron-MoE-ModelZoo, Qwen3-235B at 131,072)
    "Parallel Folding": "causal",
    "Llama 3 Herd|README H100 scaling|MegaScale": "noncausal",  # Megatron-LM until 2025, PaLM's MFU
}


def published_runs() -> pd.DataFrame:
    """Return every published training run as the source prints it.

    Returns
    -------
    DataFrame
        One row per measurement. Cells are text, blank where the source prints nothing; `file` says which file holds the
        row. The columns are described in the README beside the files.
    """
    tables = [pd.read_csv(_DATA / name, dtype=str, keep_default_na=False).assign(file=name) for name in _FILES]
    return pd.concat(tables, ignore_index=True)


def scenario_from_row(row: Mapping[str, Any]) -> tuple[Scenario, tuple[str, ...]]:
    """Return the scenario of one published run and what had to be assumed for it.

    Parameters
    ----------
    row : mapping
        A row of `published_runs`: a dict or a Series.

    Returns
    -------
    scenario : Scenario
        One optimizer step of the run. Its price is 0 $/h: money plays no part here.
    assumptions : tuple of str
        What the source does not print, with the value taken, and ``not modelled: ...`` for what it prints and the
        simulator has no operation for.

    Raises
    ------
    ProfileError
        When the run is out of reach, with a short reason that rows can be counted by.
    """
    cells = with_scripts(named(Row(row)))
    cluster = cluster_of(cells)
    model = model_of(cells)
    scenario = Scenario(model=model, cluster=cluster, plan=plan_of(cells, model), job=job_of(cells))
    return scenario, tuple(cells.assumptions)


def measured_step_s(row: Mapping[str, Any], scenario: Scenario | None = None) -> float:
    """Return the measured time of one optimizer step, seconds.

    Parameters
    ----------
    row : mapping
    scenario : Scenario, optional
        The row's; with it, a printed FLOP rate or utilisation is a step time, too.

    Notes
    -----
    The derived column when it is filled, the printed step time, or from tokens/s per accelerator::

        step = global batch * sequence length / (tokens/s/accelerator * accelerators)

    or from TFLOP/s per accelerator, which is ``utilisation * peak`` where that is printed, by the source's count of FLOP::

        step = model FLOP per token * global batch * sequence length / (FLOP/s per accelerator * accelerators)

    Raises
    ------
    ProfileError
        When none of them is printed.
    """
    cells = Row(row)
    value, metric = cells.text("value"), cells.text("metric")
    try:
        if cells.text("step_time_s_derived"):
            found = float(cells.text("step_time_s_derived"))
        elif metric == "step_time_s":
            found = float(value)
        elif metric == "tokens_per_s_per_gpu":
            found = cells.need("gbs") * cells.need("seq_len") / (float(value) * cells.need("gpus"))
        elif flop_convention(row) and scenario is not None:
            found = _model_flop(scenario, flop_convention(row)) / _flop_per_s(metric, float(value), scenario)
        else:
            raise ProfileError(f"no step time follows from {metric or 'an empty metric'}")
    except (ValueError, ZeroDivisionError):
        raise ProfileError(f"{metric} = {value!r} is not a number") from None
    if not 0 < found < float("inf"):
        raise ProfileError(f"step time {found} s is not positive")
    return found


def flop_convention(row: Mapping[str, Any]) -> str:
    """Return how a row without a step time counts FLOP: ``causal``, ``noncausal``, or nothing when it cannot be told."""
    cells = Row(row)
    if cells.text("step_time_s_derived") or cells.text("metric") not in ("tflops_per_gpu", "mfu"):
        return ""
    return next((how for pattern, how in _CONVENTIONS.items() if cells.has(pattern, "source")), "")


def _model_flop(scenario: Scenario, convention: str) -> float:
    """Return the model FLOP of one step per accelerator."""
    job = scenario.job
    counted = count(scenario.model, job.sequence_length)
    per_token = counted.flop_per_token_causal if convention == "causal" else counted.flop_per_token_noncausal
    return per_token * job.tokens_per_step / scenario.cluster.accelerators


def _flop_per_s(metric: str, value: float, scenario: Scenario) -> float:
    return value * 1e12 if metric == "tflops_per_gpu" else value * peak_flop_per_s(scenario.cluster.accelerator, "bf16")


def step_s(scenario: Scenario) -> float:
    """Return the predicted seconds of one step: the closed form, or where experts are loaded unevenly the simulation.

    Notes
    -----
    A run that was measured did fit; what the memory model says of it is judged elsewhere. Long steps of the
    classic schedules are simulated for `simulator.closed_forms.rounds` and continued at that pace.
    """
    if scenario.job.routing == "balanced":
        return estimate(scenario)
    scenario = roomy(scenario)
    plan, job = scenario.plan, scenario.job
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    few, more = rounds(plan.pp)
    if plan.schedule not in ("1f1b", "interleaved") or micro_batches <= more or micro_batches % plan.pp:
        return simulate_step(scenario).step_time_s
    shorter = (job.model_copy(update={"global_batch": count * plan.dp * plan.micro_batch}) for count in (few, more))
    early, late = (simulate_step(scenario.model_copy(update={"job": short})).step_time_s for short in shorter)
    return continued(early, late, micro_batches, plan.pp)


def roomy(scenario: Scenario) -> Scenario:
    """Return `scenario` on accelerators with memory for any plan."""
    accelerator = scenario.cluster.accelerator
    accelerator = accelerator.model_copy(update={"hbm_bytes": 1e3 * accelerator.hbm_bytes})
    return scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"accelerator": accelerator})})


def validate(
    predict: Callable[[Scenario], float | Mapping[str, Any]] = step_s,
    rows: pd.DataFrame | None = None,
    complete_only: bool = True,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
) -> pd.DataFrame:
    """Return predicted against measured step times of published runs, one line per run.

    Parameters
    ----------
    predict : callable
        Returns the seconds of one step of a scenario, or ``predicted_s`` and more columns by name; `step_s` by default. With more
        than one process it must be a function of a module.
    rows : DataFrame, optional
        Rows in the columns of `published_runs`; all of them when left out.
    complete_only : bool
        Keep only rows whose source prints every field (``complete = yes``).
    progress : callable, optional
        Called with rows done and rows in all.
    processes : int
        How many processes share the rows.

    Returns
    -------
    DataFrame
        ``measured_s``, ``predicted_s``, ``relative_error = predicted / measured - 1``, the assumptions joined by ``"; "``,
        and in ``skipped`` the reason why a row has no prediction, else an empty text. A row that cannot be read or
        predicted is skipped, never raised. What makes rows comparable: ``family`` (the model, proxies with it),
        ``release``, ``configuration`` and ``options``, ``sweep`` (all but the layout) and ``layout``, and the features that
        `simulator.results.confidence` compares by; for a baseline the model ``flop`` per accelerator (causal) and its
        ``peak_flop_per_s`` in the precision of the GEMMs.
    """
    rows = published_runs() if rows is None else rows
    if complete_only:
        rows = rows[rows["complete"] == "yes"]
    records, lines = rows.to_dict("records"), []

    def gather(found) -> None:
        for done, line in enumerate(found, start=1):
            lines.append(line)
            if progress is not None:
                progress(done, len(records))

    if processes > 1 and len(records) > 1:
        # fresh interpreters: a fork would copy the threads of whoever calls
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            gather(pool.map(partial(_line, predict), records, chunksize=16))
    else:
        gather(_line(predict, row) for row in records)
    return pd.DataFrame(lines, columns=list(dict.fromkeys([*_COLUMNS, *(name for line in lines for name in line)])))


def _line(predict: Callable[[Scenario], float | Mapping[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    cells = Row(row)
    line: dict[str, Any] = {c: cells.text(c) for c in (*_PRINTED, "recompute", "precision")}
    line |= dict.fromkeys(_NUMBERS, float("nan")) | {"accelerator": cells.text("gpu"), "assumptions": "", "skipped": ""}
    line |= {"family": family_of(line["model"]), "release": release_of(row), "layout": layout_of(row), "sweep": sweep_of(row)}
    line |= {"configuration": configuration_of(row), "options": cells.text("overlap_notes")}
    try:
        scenario, assumptions = scenario_from_row(row)
        line["measured_s"] = measured_step_s(row, scenario)
        convention = flop_convention(row)
        if convention:
            assumptions = (*assumptions, f"step time from the printed rate by {convention} model FLOP")
        accelerator, dtype = scenario.cluster.accelerator, scenario.plan.precision.gemm
        line |= {"assumptions": "; ".join(assumptions)} | features(scenario)
        line |= {"flop": _model_flop(scenario, "causal"), "peak_flop_per_s": peak_flop_per_s(accelerator, dtype)}
        found = predict(scenario)
        more = found if isinstance(found, Mapping) else {"predicted_s": found}
        predicted = float(more["predicted_s"])
        if not 0 < predicted < float("inf"):
            raise ProfileError(f"predicted {predicted} s")
        line |= {**more, "predicted_s": predicted, "relative_error": predicted / line["measured_s"] - 1}
    except SimulatorError as error:
        line["skipped"] = " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001 - one bad row among two thousand must not cost the table
        line["skipped"] = f"{type(error).__name__}: {error}"
    return line
