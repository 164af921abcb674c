"""Read a Megatron-LM launch line, or the same flags as a YAML table, into a Plan.

Flags and defaults follow ``megatron/training/arguments.py`` of NVIDIA/Megatron-LM; the table form is that of
Megatron-MoE-ModelZoo (``MODEL_ARGS:``).
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Mapping
from typing import Any

from simulator.errors import PlanError, Problem, nearest
from simulator.formats.launch import Launch
from simulator.formats.megatron_flags import HARMLESS, HARMLESS_STARTS, MODEL, NOT_MODELLED, READ
from simulator.scenario.facts import choices
from simulator.scenario.placement import PIPELINE_INSIDE
from simulator.scenario.plan import EVERY_OTHER_PRODUCT, Module, Plan
from simulator.scenario.profiles import validated

_SHARDING = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
_DEEPEP = ("deepep", "hybridep", "ncclep")


#: choices of --recompute-modules that are modelled
_MODULES = tuple(name for name in choices(Module) if name not in (*EVERY_OTHER_PRODUCT[1:4],))


class _Flags:
    """Flags by name without dashes in front; collects problems, so that all are reported at once."""

    def __init__(self, values: dict[str, list[str]]):
        self.values = values
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def refuse(self, flag: str, text: str, remedy: str) -> None:
        problem = Problem(f"--{flag}", text, remedy)
        if problem not in self.problems:  # a flag may be read in several places
            self.problems.append(problem)

    def word(self, flag: str, allowed: tuple[str, ...] = ()) -> str | None:
        """Return the value of `flag`, None when it is not given or unusable."""
        found = self.values.get(flag)
        if found is None:
            return None
        value = found[0] if found else ""
        if not value:
            self.refuse(flag, f"--{flag} has no value", f"write --{flag} {allowed[0] if allowed else 'VALUE'}")
        elif "$" in value:
            self.refuse(flag, f"--{flag} {value} is a shell variable", "write its value; variables are not expanded here")
        elif allowed and value not in allowed:
            self.refuse(flag, f"--{flag} {value} is not a choice", nearest(value, allowed))
        else:
            return value
        return None

    def whole(self, flag: str, default: int | None = None, least: int = 1) -> int | None:
        """Return the whole number of `flag`, `default` when it is not given or unusable."""
        value = self.word(flag)
        if value is None:
            return default
        if not value.isdecimal() or int(value) < least:
            self.refuse(flag, f"--{flag} {value} is not a whole number from {least} up", f"write, for example, --{flag} {default or 1}")
            return default
        return int(value)

    def on(self, flag: str) -> bool:
        """Return whether the switch `flag` is set."""
        found = self.values.get(flag)
        if found and "$" in found[0]:
            self.word(flag)
        return found is not None and [v.lower() for v in found[:1]] != ["false"]

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def _from_text(text: str) -> dict[str, list[str]]:
    """Return flag -> values of a pasted command: torchrun prefix, shell arrays and comments may stand around the flags."""
    values: dict[str, list[str]] = {}
    current: list[str] = []
    text = re.sub(r"\\[ \t]*(\r?\n|$)", " ", text)
    text = re.sub(r"\w+\+?=\(", " ", text)  # NAME=( --flag ... ) of a shell script
    for line in text.splitlines():
        try:
            tokens = shlex.split(re.sub(r"(^|\s)#.*", "", line))
        except ValueError as error:
            raise PlanError([Problem("Megatron line", f"{line.strip()!r} cannot be split: {error}", "close the quote")]) from None
        for token in tokens:
            if re.fullmatch(r"\|\|?|&&?|;|\d?>>?.*", token):
                break  # the rest of the line is another command or a redirection
            token = token[:-1] if token.count(")") > token.count("(") else token
            if token.startswith("--") and len(token) > 2:
                flag, _, value = token[2:].partition("=")
                current = values[flag.replace("_", "-")] = [value] if value else []
            elif re.match(r"-[A-Za-z]", token):
                current = []  # a short flag of the launcher
            elif token and not re.fullmatch(r".*\.py|\$\{?\w+\[@\]\}?", token):
                current.append(token)
    return values


def _from_mapping(table: Mapping[str, Any]) -> dict[str, list[str]]:
    values = {}
    arguments = table.get("MODEL_ARGS", table)
    if not isinstance(arguments, Mapping):
        raise PlanError([Problem("MODEL_ARGS", f"MODEL_ARGS is {arguments!r}", "write one '--flag: value' per line")])
    for flag, value in arguments.items():
        if value is None or value is False:
            continue
        words = [] if value is True else value if isinstance(value, list) else str(value).split()
        values[str(flag).removeprefix("--").replace("_", "-")] = [str(word) for word in words]
    return values


def plan_from_megatron(source: str | Mapping[str, Any]) -> Launch:
    """Return the plan and the job fields of a Megatron-LM launch line.

    Parameters
    ----------
    source : str or mapping
        The pasted command, or a table of flags, with or without ``MODEL_ARGS`` around it.

    Raises
    ------
    PlanError
        With every flag whose value cannot be used.
    ProfileError
        When the values contradict each other in the Plan.

    Notes
    -----
    Where a flag is missing, Megatron's default holds, not Plan's: nothing overlaps, no sequence parallelism, optimizer state is
    not sharded, and experts are sliced over the tensor-parallel ranks (``--expert-tensor-parallel-size`` =
    ``--tensor-model-parallel-size``).
    """
    flags = _Flags(_from_mapping(source) if isinstance(source, Mapping) else _from_text(source))
    if not flags.values.keys() & {*READ, *MODEL}:
        raise PlanError([Problem("Megatron line", "no Megatron-LM flag found", "paste the command with --tensor-model-parallel-size ...")])
    fields = _degrees(flags) | _recompute(flags) | _sharding(flags) | _dispatcher(flags)
    fields |= _pipeline(flags, fields["pp"])
    fields["precision"] = _precision(flags)
    job = _job(flags)
    if flags.problems:
        raise PlanError(flags.problems)
    _note_the_rest(flags)
    hosts, each = (flags.values.get(flag, ["1"])[:1] for flag in ("nnodes", "nproc-per-node"))
    accelerators = None
    if "nproc-per-node" in flags.values and all(v and v[0].isdecimal() for v in (hosts, each)):
        accelerators = int(hosts[0]) * int(each[0])
    return Launch(validated(Plan, fields, "Megatron line"), job, accelerators, tuple(flags.warnings))


def _has_experts(flags: _Flags) -> bool:
    return (flags.whole("num-experts", least=0) or 1) > 1 or (flags.whole("expert-model-parallel-size") or 1) > 1


def _degrees(flags: _Flags) -> dict[str, Any]:
    tp = flags.whole("tensor-model-parallel-size", 1)
    etp = flags.whole("expert-tensor-parallel-size", tp if _has_experts(flags) else 1)
    if "micro-batch-size" not in flags.values:
        flags.warn("--micro-batch-size is missing; priced as 1")
    return {
        "tp": tp,
        "cp": flags.whole("context-parallel-size", 1),
        "pp": flags.whole("pipeline-model-parallel-size", 1),
        "ep": flags.whole("expert-model-parallel-size", 1),
        "etp": etp,
        "micro_batch": flags.whole("micro-batch-size", 1),
        "sequence_parallel": flags.on("sequence-parallel"),
        **({"placement": {"order": PIPELINE_INSIDE}} if flags.on("use-tp-pp-dp-mapping") else {}),
    }


def _recompute(flags: _Flags) -> dict[str, Any]:
    kind = flags.word("recompute-granularity", ("full", "selective"))
    if flags.on("recompute-activations"):
        kind = "selective"
    if kind == "full":
        method, count = flags.word("recompute-method", ("uniform", "block")), flags.whole("recompute-num-layers", 1)
        if method == "block" or count > 1:
            flags.warn(f"--recompute-method {method} --recompute-num-layers {count}: priced as full recompute of every layer, one by one")
    modules = []
    for name in (flags.values.get("recompute-modules") or ["core_attn"]) if kind == "selective" else []:
        if name == "shared_experts":
            flags.warn("--recompute-modules shared_experts is not modelled: its activations are kept")
        elif name not in _MODULES:
            flags.refuse("recompute-modules", f"--recompute-modules {name} is not a choice", nearest(name, _MODULES))
        else:
            modules.append(name)
    return {"recompute": kind or "none"} | ({"recompute_modules": modules} if kind == "selective" else {})


def _sharding(flags: _Flags) -> dict[str, Any]:
    zero = 1 if flags.on("use-distributed-optimizer") else 0
    strategy = flags.word("data-parallel-sharding-strategy", tuple(_SHARDING))
    if strategy and (flags.on("use-megatron-fsdp") or flags.on("use-custom-fsdp")):
        zero = _SHARDING[strategy]
    if flags.on("use-torch-fsdp2"):
        zero = 2 if flags.on("torch-fsdp2-no-reshard-after-forward") else 3
    overlap = {"grad_reduce": flags.on("overlap-grad-reduce"), "param_gather": flags.on("overlap-param-gather")}
    overlap["pp"] = not flags.on("no-overlap-p2p-communication")  # what Megatron never overlaps, 1F1B, is Plan's to say
    if flags.on("tp-comm-overlap"):
        overlap["tp"] = "pieces"
    return {"zero": zero, "overlap": overlap, "dp_replicate": flags.whole("num-distributed-optimizer-instances", 1)}


def _dispatcher(flags: _Flags) -> dict[str, Any]:
    kind = flags.word("moe-token-dispatcher-type", ("allgather", "alltoall", "flex", "alltoall_seq"))
    backend = flags.word("moe-flex-dispatcher-backend", _DEEPEP)
    if kind == "flex":
        if backend == "ncclep":
            flags.warn(f"--moe-flex-dispatcher-backend {backend}: priced as deepep")
        return {"dispatcher": "hybridep" if backend == "hybridep" else "deepep"}
    if _has_experts(flags) and kind in (None, "allgather"):
        what = "--moe-token-dispatcher-type allgather" if kind else "--moe-token-dispatcher-type is missing, which means allgather"
        flags.warn(f"{what}: priced as alltoall")
    return {"dispatcher": "alltoall"}


def _precision(flags: _Flags) -> dict[str, Any]:
    half = "fp16" if flags.on("fp16") else "bf16"
    if not flags.on("fp16") and not flags.on("bf16"):
        flags.warn("neither --bf16 nor --fp16, which means fp32: priced as bf16")
    gradients = "bf16" if half == "bf16" and flags.on("grad-reduce-in-bf16") else "fp32"
    if half == "fp16" and not flags.on("accumulate-allreduce-grads-in-fp32"):
        gradients = "fp16"
    gradients = flags.word("main-grads-dtype", ("fp32", "bf16")) or gradients
    moments = flags.word("exp-avg-dtype", ("fp32", "bf16", "fp16", "fp8")), flags.word("exp-avg-sq-dtype", ("fp32", "bf16", "fp16", "fp8"))
    if (moments[0] or "fp32") != (moments[1] or "fp32"):
        flags.warn("--exp-avg-dtype differs from --exp-avg-sq-dtype: both are priced as --exp-avg-sq-dtype")
    gemm = half
    if flags.word("fp8-format", ("e4m3", "hybrid")):
        gemm = "fp8"
    if flags.word("fp4-format", ("e2m1",)):
        gemm = "fp4"
    return {
        "parameters": half,
        "gradients": gradients,
        "gradient_reduce": gradients,
        "master": flags.word("main-params-dtype", ("fp32", "fp16")) or "fp32",
        "moments": moments[1] or "fp32",
        "gemm": gemm,
        "dispatch": half,
        "combine": half,
    }


def _job(flags: _Flags) -> dict[str, Any]:
    batch, length = flags.whole("global-batch-size"), flags.whole("seq-length")
    steps, samples = flags.whole("train-iters"), flags.whole("train-samples")
    job: dict[str, Any] = {"global_batch": batch, "sequence_length": length}
    if samples is None and steps and batch:
        samples = steps * batch
    if samples and length:
        job["tokens"] = samples * length
    optimizer = (flags.word("optimizer") or "").removeprefix("dist_")
    if optimizer in ("adam", "sgd", "muon"):
        job["optimizer"] = optimizer
    elif optimizer:
        flags.warn(f"--optimizer {optimizer} is not modelled: the job keeps its own")
    if _has_experts(flags):
        job["routing"] = "balanced" if flags.on("moe-router-force-load-balancing") else "natural"
    return {key: value for key, value in job.items() if value is not None}


def _pipeline(flags: _Flags, pp: int) -> dict[str, Any]:
    """Return vpp, schedule and layout from whichever of Megatron's three ways the line uses."""
    ways = ("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank", "pipeline-model-parallel-layout")
    given = [way for way in ways if way in flags.values]
    if len(given) > 1:
        flags.refuse(given[0], f"{' and '.join('--' + way for way in given)} are given together", "keep one of them")
        return {}
    text, vpp, layout = flags.word(ways[2]), flags.whole(ways[1], 1), None
    if text is not None:
        layout, vpp = _layout(flags, text, pp)
    else:
        chunk = flags.whole(ways[0])
        if chunk is not None:
            vpp = _chunks(flags, chunk, pp)
        layout = _uneven(flags, pp, vpp)
    if vpp > 1 and pp == 1:
        flags.refuse(given[0], f"{vpp} virtual stages with --pipeline-model-parallel-size 1", "use 2 or more, or drop the virtual stages")
    return {"vpp": vpp, "schedule": _schedule(flags, vpp), "layout": layout}


def _schedule(flags: _Flags, vpp: int) -> str:
    overlapped = flags.on("overlap-moe-expert-parallel-comm")
    if overlapped and vpp == 1:
        flags.warn("--overlap-moe-expert-parallel-comm without virtual stages: expert all-to-all is priced in line with compute")
    return "1f1b" if vpp == 1 else "interleaved-overlapped" if overlapped else "interleaved"


def _layout(flags: _Flags, text: str, pp: int) -> tuple[str | None, int]:
    """Return the layout without its ``*n`` and ``( )*n``, and the model chunks per pipeline rank."""
    flag = "pipeline-model-parallel-layout"
    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d{1,3})", r"(.)\*(\d{1,3})"):  # Megatron's order: groups first, then single letters
        plain = re.sub(pattern, lambda m: m.group(1) * int(m.group(2)), plain)
    stages = plain.split("|")
    strange = sorted(set(plain) - set("EtmL|"))
    if strange:
        flags.refuse(flag, f"--{flag} {text} has {' '.join(strange)}", "use E, t, m, L, |, ( ) and *n, e.g. 'Et*3|(tt|)*29,m|L'")
    elif len(stages) % pp:
        flags.refuse(flag, f"--{flag} {text} has {len(stages)} stages for {pp} pipeline ranks", f"give a multiple of {pp} stages")
    else:
        return plain, len(stages) // pp
    return None, 1


def _edges(flags: _Flags) -> tuple[int, int]:
    """Return how many layers embedding and loss count as in the split of the pipeline: 0 or 1 each."""
    return int(flags.on("account-for-embedding-in-pipeline-split")), int(flags.on("account-for-loss-in-pipeline-split"))


def _chunks(flags: _Flags, chunk: int, pp: int) -> int:
    """Return the model chunks per rank when one chunk has `chunk` layers."""
    flag, layers = "num-layers-per-virtual-pipeline-stage", flags.whole("num-layers")
    if layers is None:
        flags.refuse(flag, f"--{flag} {chunk} without --num-layers", "add --num-layers, or use --num-virtual-stages-per-pipeline-rank")
        return 1
    total = layers + sum(_edges(flags))
    if total % (pp * chunk):
        flags.refuse(
            flag,
            f"--{flag} {chunk}: {total} layers do not divide into {pp} ranks of whole chunks of {chunk}",
            "use --num-virtual-stages-per-pipeline-rank or --pipeline-model-parallel-layout",
        )
        return 1
    return total // (pp * chunk)


def _uneven(flags: _Flags, pp: int, vpp: int) -> str | None:
    """Return the layout that --decoder-first/last-pipeline-num-layers or --account-for-* ask for, None for an even split."""
    first, last = flags.whole("decoder-first-pipeline-num-layers"), flags.whole("decoder-last-pipeline-num-layers")
    edges = _edges(flags)
    if first is None and last is None and not any(edges):
        return None
    flag = "decoder-first-pipeline-num-layers" if first else "decoder-last-pipeline-num-layers" if last else "num-layers"
    layers, middle = flags.whole("num-layers"), pp - (first is not None) - (last is not None)
    if layers is None:
        flags.refuse(flag, f"--{flag} without --num-layers", "add --num-layers")
        return None
    rest = layers + sum(edges) - (first or 0) - (last or 0)
    each = rest // middle if middle > 0 else 0
    counts = [first or each, *[each] * (pp - 2), last or each] if pp > 1 else [first or last or each]
    if sum(counts) != layers + sum(edges) or min(counts) < 1 or any(count % vpp for count in counts):
        what = f"{first or 'even'} layers first, {last or 'even'} last"
        flags.refuse(
            flag,
            f"{layers} layers with {what}: {rest} left for {middle} ranks of {vpp} chunks",
            "change them so that it divides, or use --pipeline-model-parallel-layout",
        )
        return None
    sizes = [counts[rank] // vpp for _ in range(vpp) for rank in range(pp)]
    sizes[0] -= edges[0]
    sizes[-1] -= edges[1]
    stages = ["t" * size for size in sizes]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * flags.whole("mtp-num-layers", 0, least=0) + "L"
    return "|".join(stages)


def _note_the_rest(flags: _Flags) -> None:
    """Warn of what the line says and the plan does not."""
    dimensions = [f"--{flag}" for flag in flags.values if flag in MODEL]
    if dimensions:
        some = ", ".join(dimensions[:3]) + (f" and {len(dimensions) - 3} more" if len(dimensions) > 3 else "")
        flags.warn(f"model dimensions are not taken from the line ({some}); name the model")
    for flag, values in flags.values.items():
        if flag in NOT_MODELLED:
            if values[:1] not in (["none"], ["p2p"]):
                flags.warn(f"--{flag} is not modelled: {NOT_MODELLED[flag]}")
        elif flag not in READ + MODEL + HARMLESS and not flag.startswith(HARMLESS_STARTS):
            close = difflib.get_close_matches(flag, READ, n=1, cutoff=0.8)
            flags.warn(f"--{flag} is unknown and was not read" + (f"; did you mean --{close[0]}?" if close else ""))
