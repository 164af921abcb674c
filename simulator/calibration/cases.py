"""What is measured: probes of the real step, collectives by size, single kernels; and the steps that prove the fit. No torch.

A probe is a small step that each rank runs by itself while the others run the same. Its kernels are timed where they run, and set
against the FLOP, bytes and calls that the simulator counts for the same model: so a fitted cost is per unit of the simulator's count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from simulator.pricing.operations import kernel_name
from simulator.scenario.job import Job
from simulator.scenario.model import Experts, Model
from simulator.scenario.plan import Plan, Reserve
from simulator.workload.ops import COMPUTE, Op, host_wait
from simulator.workload.stages import blocks, sequence
from simulator.workload.step import optimizer_ops

#: no memory is set aside: peak memory is compared with what tensors take
NO_RESERVE = Reserve(context="0 B", communicator="0 B", workspace="0 B", fragmentation=0.0)
#: nothing runs beside anything else: a rank's core does one thing at a time
IN_TURN = {"grad_reduce": False, "param_gather": False, "tp": False}


def model(
    hidden: int, layers: int, heads: int, kv_heads: int, experts: int, ffn: int, top_k: int = 2, vocab: int = 4096, dense: int = 1
) -> Model:  # fmt: skip
    """Return a model with `dense` leading dense layers and mixtures of experts after them, one shared expert in each."""
    mixture = Experts(count=experts, top_k=top_k, ffn=ffn, shared_ffn=ffn) if dense < layers else None
    return Model(
        name=f"h{hidden}-l{layers}-e{experts}x{ffn}-top{top_k}", source="made for calibration", layers=layers, hidden=hidden, vocab=vocab,
        heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, ffn=2 * ffn, experts=mixture,
        moe_layers=tuple(i >= dense for i in range(layers)) if mixture else (),
    )  # fmt: skip


def plan(**degrees: int) -> Plan:
    """Return a plan of the executable step."""
    return Plan.model_validate({"dp_shard": 1, "reserve": NO_RESERVE, "overlap": IN_TURN, "kernels": {"glue": False}} | degrees)


@dataclass(frozen=True)
class Case:
    """One step to run.

    Parameters
    ----------
    name : str
    model, plan, job
        As the simulator takes them.
    """

    name: str
    model: Model
    plan: Plan
    job: Job


@dataclass(frozen=True)
class Row:
    """One figure of the raw table.

    Parameters
    ----------
    part : str
        ``kernel`` (in a probe), ``together`` (in a probe of several ranks), ``attention``, ``collective`` or ``single`` (by themselves).
    case, name : str
        The probe or shape, and the kind of kernel or collective.
    ranks : int
        Ranks of the collective, or that ran the same kernel.
    calls, flop, bytes : float
        As the simulator counts them.
    seconds : float
        Median over repeats, mean over ranks, by the clock.
    spread : float
        Interquartile range over the median.
    cpu_s : float
        Processor time beside it: of the thread for a kernel, on a GPU of the one that launches it; of the process for a collective.
    repeats, turn : int
        How many, and in which turn through all cases.
    """

    part: str
    case: str
    name: str
    ranks: int
    calls: float
    flop: float
    bytes: float
    seconds: float
    spread: float
    cpu_s: float
    repeats: int
    turn: int


def _case(name: str, shape: Model, sequences: int, length: int, **degrees: int) -> Case:
    return Case(name, shape, plan(**degrees), Job(tokens=10**9, global_batch=sequences, sequence_length=length))


def probes(device: str = "cpu", small: bool = False) -> list[Case]:
    """Return the probes: widths, experts, sequence lengths and vocabularies apart from one another, and from those of `held_out`."""
    if device == "cuda":
        shapes = ((2048, 16, 4, 8, 1024), (4096, 32, 8, 8, 2048), (4096, 32, 8, 32, 1024), (6144, 48, 8, 8, 2560), (3072, 24, 8, 64, 768))
        return [
            _case(f"probe{i}-s{length}", model(h, 2, a, kv, e, f, vocab=32768), 2, length)
            for i, (h, a, kv, e, f) in enumerate(shapes)
            for length in (2048, 4096)
        ]
    rows = [  # hidden, heads, kv heads, experts, expert width, sequences, length, vocabulary
        (256, 4, 2, 4, 512, 2, 256, 8192),
        (512, 8, 4, 8, 256, 1, 512, 2048),
        (384, 6, 2, 8, 768, 1, 768, 4096),
        (640, 10, 5, 4, 896, 2, 256, 1024),
        (896, 14, 7, 4, 512, 1, 384, 4096),
        (512, 8, 8, 4, 1024, 1, 1024, 4096),
        (1152, 18, 6, 4, 640, 1, 512, 2048),
        (320, 5, 1, 16, 384, 4, 192, 6144),
    ]
    rows = rows[:4] if small else rows
    return [
        _case(f"probe{i}", model(h, 2, a, kv, e, f, vocab=v), b, length, micro_batch=b)
        for i, (h, a, kv, e, f, b, length, v) in enumerate(rows)
    ]


def joint(world: int, device: str = "cpu", small: bool = False) -> list[Case]:
    """Return the probes that communicate: layouts of `world` ranks, on shapes apart from those of `held_out`."""
    if world == 1:
        return []
    length = 3584 if device == "cuda" else 448
    rows = [  # hidden, heads, kv heads, experts, expert width, sequences per micro-batch, vocabulary; layouts
        (512, 8, 8, 8, 384, 1, 2048, ("dp", "ep", "tp")),
        (896, 16, 8, 8, 640, 1, 4096, ("dp", "tp")),
        (1152, 16, 8, 8, 704, 2, 2048, ("ep", "tp")),
    ][: 1 if small else 3]
    layouts = {"dp": {"dp_shard": world}, "ep": {"dp_shard": world, "ep": world}, "tp": {"tp": world}}
    return [
        _case(
            f"{name}-h{h}", model(h, 2, a, kv, e, f, vocab=v), b * layouts[name].get("dp_shard", 1), length, micro_batch=b, **layouts[name]
        )
        for h, a, kv, e, f, b, v, names in rows
        for name in names
        if not (e % world or kv % world)
    ]


def held_out(device: str = "cpu", small: bool = False) -> list[Case]:
    """Return the steps that prove a fit: other widths, expert counts and sequence lengths, and the layouts that two ranks have."""
    if device == "cuda":
        shapes = ((2560, 20, 4, 16, 1280), (5120, 40, 8, 16, 1536), (7168, 56, 8, 8, 2048), (3584, 28, 4, 32, 1024))
        return [
            _case(f"h{h}-s{length}", model(h, 3, a, kv, e, f, vocab=32768), 2, length)
            for h, a, kv, e, f in shapes
            for length in (3072, 6144)
        ]
    if small:
        shape = model(448, 2, 7, 7, 4, 448)
        return [_case("DP2", shape, 2, 256, dp_shard=2), _case("EP2", shape, 2, 256, dp_shard=2, ep=2)]
    one, two = model(768, 4, 12, 4, 8, 768, dense=1), model(576, 4, 9, 3, 6, 1152, dense=2)
    three, four = model(1024, 3, 16, 4, 4, 1024, vocab=3072), model(448, 6, 8, 4, 12, 640, top_k=3)
    return [
        _case("DP2 a", one, 2, 512, dp_shard=2),
        _case("EP2 a", one, 2, 512, dp_shard=2, ep=2),
        _case("TP2 a", one, 2, 512, tp=2),
        _case("PP2 a", one, 2, 512, pp=2),
        _case("DP2 b", two, 2, 640, dp_shard=2),
        _case("EP2 b", four, 4, 448, dp_shard=2, ep=2, micro_batch=2),
        _case("TP2 EP2 c", three, 2, 640, tp=2, ep=2, micro_batch=2),
        _case("TP2 d", four, 2, 640, tp=2, micro_batch=2),
        _case("PP2 d", four, 2, 640, pp=2),
        _case("EP2 c", three, 2, 768, dp_shard=2, ep=2),
    ]


def tiny() -> Case:
    """Return a step so small that a GPU waits for its host to launch every kernel."""
    return _case("tiny", model(256, 4, 4, 4, 8, 256, vocab=1024), 2, 64)


def _micro_batches(case: Case) -> int:
    return case.job.global_batch // (case.plan.dp * case.plan.micro_batch)


def launches(case: Case) -> float:
    """Return the kernels of forward and backward that the host launches for one rank's step, as the simulator counts them."""
    made = blocks(case.model, case.plan, case.job)
    ways = [way for name in sequence(case.model) for way in (made[name].forward, made[name].backward)]
    return _micro_batches(case) * sum(float(host_wait(way, case.plan.kernels).launches) for way in ways)


def ops_of(case: Case) -> Iterator[Op]:
    """Yield every kernel of one rank's step, without pipeline stages."""
    made, micro_batches = blocks(case.model, case.plan, case.job), _micro_batches(case)
    names = sequence(case.model)
    for name in names:
        for segment in (made[name].forward + made[name].backward) * micro_batches:
            yield from (op for op in segment if op.kind in COMPUTE)
    dense, expert = (sum(float(getattr(made[n], f)) for n in names) for f in ("dense_parameters", "expert_parameters"))
    yield from optimizer_ops(dense, expert, case.model, case.plan, case.job)


def counts(ops: Iterable[Op]) -> dict[str, tuple[float, float, float]]:
    """Return calls, FLOP and bytes by kind of kernel."""
    found: dict[str, tuple[float, float, float]] = {}
    for op in ops:
        if op.flop or op.bytes:
            calls, flop, size = found.get(kernel_name(op), (0.0, 0.0, 0.0))
            found[kernel_name(op)] = (calls + float(op.groups), flop + float(op.flop), size + float(op.bytes))
    return found


#: collectives of a step: kind and datatype
COLLECTIVES = (
    ("all_gather", "bf16"),
    ("reduce_scatter", "bf16"),
    ("reduce_scatter", "fp32"),
    ("all_reduce", "fp32"),
    ("all_to_all", "bf16"),
    ("send", "bf16"),
)


def collective_sizes(small: bool = False) -> list[int]:
    """Return the sizes of a collective's buffer, bytes."""
    return [2**14, 2**18, 2**21] if small else [2**12, 2**16, 2**18, 2**20, 2**22, 2**23, 2**25]


def group_sizes(world: int) -> list[int]:
    """Return the sizes of groups that are measured: those that divide the ranks."""
    return [n for n in range(2, world + 1) if world % n == 0]


@dataclass(frozen=True)
class Scan:
    """What is measured by itself on a kind of device: large enough that work and not its launch takes the time.

    Parameters
    ----------
    lengths : tuple of int
        Sequence lengths of attention.
    tokens : int
        Tokens that shorter sequences are batched to.
    heads, kv_heads, width : int
        Of attention.
    products, grouped : tuple of (int, int, int)
        m, n, k of a linear layer, and rows per expert, n, k of eight experts, for the roofline.
    copied : int
        Elements of 16 bits that are copied in memory: beyond what caches hold.
    """

    lengths: tuple[int, ...]
    tokens: int
    heads: int
    kv_heads: int
    width: int
    products: tuple[tuple[int, int, int], ...]
    grouped: tuple[tuple[int, int, int], ...]
    copied: int


SCANS = {
    "cpu": Scan(
        lengths=(128, 192, 256, 384, 512, 640, 760, 768, 1024, 1536), tokens=768, heads=8, kv_heads=4, width=64,
        products=((32, 512, 512), (256, 1024, 512), (512, 1024, 1024), (1024, 1024, 256), (1024, 2048, 1024)),
        grouped=((32, 512, 512), (256, 1024, 512)), copied=2**24,
    ),
    "cuda": Scan(
        lengths=(512, 1024, 2048, 2560, 4096, 5120, 8192), tokens=2048, heads=32, kv_heads=8, width=128,
        products=((256, 4096, 4096), (2048, 4096, 4096), (4096, 8192, 4096), (8192, 8192, 2048), (8192, 8192, 8192)),
        grouped=((256, 4096, 2048), (2048, 4096, 4096)), copied=2**27,
    ),
}  # fmt: skip
