"""Take the measurements on the ranks: probes, collectives, single kernels; robust, resumable, a row per figure."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial, reduce

import torch
import torch.distributed as dist

from simulator.calibration import kernels
from simulator.calibration.cases import COLLECTIVES, SCANS, Case, Row, counts, launches, ops_of, tiny
from simulator.calibration.clock import STILL, batch, quartiles, timed, wait
from simulator.calibration.launch import Tell, device_of
from simulator.calibration.moe_model import Options
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.recorder import LEAD_CYCLES, Spent
from simulator.calibration.together import together
from simulator.workload.attention import ATTENTION_BACKWARD_FLOP

#: a kernel is repeated until its repeats took this long, at least the given times
KERNEL_S, COLLECTIVE_S, LEAST = 0.1, 0.15, 7


def _over_ranks(value: float) -> float:
    mean = torch.tensor(value, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        mean = mean.cuda()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _by_the_clock(run: Callable[[], object], device: torch.device) -> float:
    first = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - first


def _by_the_device(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the kernels of `run` alone: its host, which launches them, is ahead."""
    if device.type != "cuda":
        return _by_the_clock(run, device)
    torch.cuda._sleep(LEAD_CYCLES)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def repeated(
    run: Callable[[], object], device: torch.device, at_least_s: float, once: Callable[..., float] = _by_the_clock
) -> tuple[float, float, float, int]:
    """Return median seconds, spread, processor seconds and repeats of `run`, all ranks together; `once` times a single run.

    Notes
    -----
    Twice to warm up; then all ranks decide together when it has been enough.
    """
    for _ in range(2):
        run()
    wait(device)
    dist.barrier()
    begin, taken, cpu = time.perf_counter(), [], time.process_time()
    while True:
        taken += [once(run, device) for _ in range(LEAST)]
        if _over_ranks(float(time.perf_counter() - begin)) >= at_least_s:
            break
    middle, spread = quartiles(taken)
    return _over_ranks(middle), spread, (time.process_time() - cpu) / len(taken), len(taken)


# --- probes ---


def probe(case: Case, world: int, device: torch.device, repeats: int, turn: int) -> Iterator[Row]:
    """Yield a row for every kind of kernel in the probe, and one for the whole step.

    On a GPU the whole step is timed without recording, whose events cost the host a tenth of its launches, and its kernels in
    another run, in which the host is ahead.
    """
    step = MoEStep(case.model, case.plan, case.job, 0, Options(seed=dist.get_rank(), lr=STILL), device)
    tokens = batch(case, device)
    for _ in range(2):
        step.run(tokens)
    gpu = device.type == "cuda"
    step.recorder.ahead = gpu
    taken: dict[str, list[Spent]] = defaultdict(list)
    for _ in range(repeats):
        step.recorder.on = not gpu
        whole = timed(step, tokens, device)
        if gpu:
            step.recorder.on = True
            timed(step, tokens, device)
        found = step.recorder.take()
        for name, spent in found.items():
            taken[name].append(spent)
        taken["between"].append(whole.less(reduce(Spent.plus, found.values())))
        taken["step"].append(whole)
    counted = counts(ops_of(case))
    for name in ("step", "between", *counted):
        if name not in taken:
            continue
        middle, spread = quartiles([spent.wall_s for spent in taken[name]])
        cpu, _ = quartiles([spent.cpu_s for spent in taken[name]])
        calls, flop, size = counted.get(name, (sum(c for c, _, _ in counted.values()), 0.0, 0.0))
        yield Row("kernel", case.name, name, world, calls, flop, size, _over_ranks(middle), spread, _over_ranks(cpu), repeats, turn)


# --- collectives ---

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _collective(kind: str, dtype: torch.dtype, size: int, ranks: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], None]:
    """Return a call of the collective whose buffer, as the simulator counts it, has `size` bytes."""
    elements = max(size // dtype.itemsize // ranks, 1) * ranks
    whole, part = (torch.zeros(n, dtype=dtype, device=device) for n in (elements, elements // ranks))
    if kind == "all_gather":
        return lambda: dist.all_gather_single(whole, part, group=group)
    if kind == "reduce_scatter":
        return lambda: dist.reduce_scatter_single(part, whole, group=group)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if kind == "all_to_all":  # `size` leaves the rank
        rows = torch.zeros(max(size // dtype.itemsize // (ranks - 1), 1) * ranks, dtype=dtype, device=device)
        other = torch.empty_like(rows)
        return lambda: dist.all_to_all_single(other, rows, group=group)
    here, there = dist.get_group_rank(group, dist.get_rank()), dist.get_process_group_ranks(group)

    def message() -> None:
        if here == 0:
            dist.send(whole, there[1], group=group)
            dist.recv(whole, there[1], group=group)
        elif here == 1:
            dist.recv(whole, there[0], group=group)
            dist.send(whole, there[0], group=group)

    return message


def collective(kind: str, dtype: str, size: int, group: dist.ProcessGroup, ranks: int, device: torch.device, turn: int) -> Row:
    """Return the row of one collective and size; a message is half of a round trip."""
    run = _collective(kind, _DTYPES[dtype], size, ranks, group, device)
    middle, spread, cpu, repeats = repeated(run, device, COLLECTIVE_S)
    share = 0.5 if kind == "send" else 1.0
    return Row("collective", str(size), f"{kind}.{dtype}", ranks, 1, 0, size, middle * share, spread, cpu * share, repeats, turn)


# --- single kernels: the roofline, the floor, copies, and what communication takes from compute ---


def attentions(device: torch.device, world: int, turn: int) -> Iterator[Row]:
    """Yield the rows of attention by itself, forward and backward, by sequence length."""
    scan = SCANS[device.type]
    heads, kv, width = scan.heads, scan.kv_heads, scan.width
    for length in scan.lengths:
        batches = max(1, scan.tokens // length)
        tokens = batches * length
        qkv = torch.randn(tokens, (heads + 2 * kv) * width, device=device).bfloat16().requires_grad_()
        run = partial(kernels.grouped_query, qkv, (batches, length, heads + 2 * kv, width), heads)
        gradient = torch.randn(tokens, heads * width, device=device).bfloat16()
        flop, size = 4.0 * tokens * (length + 1) / 2 * heads * width, 4.0 * tokens * (heads + kv) * width
        out = run()
        back = partial(torch.autograd.grad, out, qkv, gradient, retain_graph=True)
        for name, call, passes in (("attention.forward", run, 1.0), ("attention.backward", back, ATTENTION_BACKWARD_FLOP)):
            middle, spread, cpu, repeats = repeated(call, device, KERNEL_S, _by_the_device)
            yield Row(
                "attention", str((length + 1) / 2), name, world, heads, passes * flop, passes * size, middle, spread, cpu, repeats, turn
            )


def singles(device: torch.device, world: int, turn: int) -> Iterator[Row]:
    """Yield the rows of products, grouped products, a copy in memory, copies to and from the host, and an empty kernel."""

    def row(case: str, name: str, run: Callable[[], object], calls: float, flop: float, size: float) -> Row:
        middle, spread, cpu, repeats = repeated(run, device, KERNEL_S, _by_the_device)
        return Row("single", case, name, world, calls, flop, size, middle, spread, cpu, repeats, turn)

    scan = SCANS[device.type]
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for m, n, k in scan.products if label == "bf16" else scan.products[-1:]:
            x, w = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
            run = partial(kernels.linear, x, w)
            yield row(f"{m}x{n}x{k}", f"product.{label}", run, 1, 2.0 * m * n * k, (m * k + n * k + m * n) * dtype.itemsize)
    for m, n, k in scan.grouped:
        x, w = torch.randn(8 * m, k, dtype=torch.bfloat16, device=device), torch.randn(8, n, k, dtype=torch.bfloat16, device=device)
        run, size = partial(kernels.grouped, x, w, [m] * 8, kernels.ends([m] * 8, device)), 16.0 * (m * k + n * k + m * n)
        yield row(f"8x{m}x{n}x{k}", "grouped.bf16", run, 8, 16.0 * m * n * k, size)
    large, other = (torch.zeros(scan.copied, dtype=torch.bfloat16, device=device) for _ in range(2))
    yield row(f"{large.nbytes >> 20} MiB", "copy", partial(other.copy_, large), 1, 0, 2.0 * large.nbytes)
    small = torch.zeros(1, device=device)
    yield row("1 element", "launch", partial(small.add_, 1.0), 1, 0, 8)
    if device.type == "cuda":
        pinned = torch.zeros(2**24, dtype=torch.bfloat16).pin_memory()
        there = large[: len(pinned)]
        yield row("32 MiB", "to device", partial(there.copy_, pinned, non_blocking=True), 1, 0, there.nbytes)
        yield row("32 MiB", "to host", partial(pinned.copy_, there, non_blocking=True), 1, 0, there.nbytes)


def dispatch(device: torch.device, world: int, turn: int) -> Row:
    """Return the row of forwards and backwards whose kernels a GPU ends sooner than its host launches the next.

    Their time over their launches is what a launch takes of the host: through Python and autograd, as in every step.
    """
    case = tiny()
    step = MoEStep(case.model, case.plan, case.job, 0, Options(lr=STILL), device)
    middle, spread, cpu, repeats = repeated(partial(step.backward, batch(case, device)), device, KERNEL_S)
    return Row("single", case.name, "dispatch", world, launches(case), 0, 0, middle, spread, cpu, repeats, turn)


def beside(device: torch.device, world: int, turn: int) -> Iterator[Row]:
    """Yield the time of a product alone, and of the same product while an all-reduce runs beside it."""
    x, w = (torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device) for _ in range(2))
    load = torch.zeros(2**23, device=device)
    for name in ("product alone", "product beside an all-reduce"):
        taken = []
        for _ in range(5):
            dist.barrier()
            work = dist.all_reduce(load, async_op=True) if name != "product alone" else None
            first = time.perf_counter()
            for _ in range(4):
                kernels.linear(x, w)
            wait(device)
            taken.append((time.perf_counter() - first) / 4)
            if work:
                work.wait()
        middle, spread = quartiles(taken)
        yield Row("single", "1024x1024x1024", name, world, 1, 2.0 * 1024**3, 6.0 * 1024**2, _over_ranks(middle), spread, 0.0, 5, turn)


# --- all of it, on one rank ---


@dataclass(frozen=True)
class Todo:
    """One piece of the measurement, by its key: what a resumed run does not do again."""

    key: str
    turn: int
    probe: Case | None = None
    joint: Case | None = None
    collective: tuple[str, str, int, int] | None = None


def _groups(rank: int, world: int, sizes: list[int]) -> Iterator[tuple[int, dist.ProcessGroup]]:
    """Yield this rank's group of each size; all groups of a size work at the same time."""
    for size in sizes:
        for first in range(0, world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if rank in ranks:
                yield size, group


def run(rank: int, world: int, tell: Tell, todo: list[Todo], kind: str, repeats: int) -> None:
    """Take the measurements of `todo` in order and tell each one's rows with its key."""
    device = device_of(kind, rank)
    groups = dict(_groups(rank, world, sorted({t.collective[3] for t in todo if t.collective})))
    for item in todo:
        rows: list[Row] = []
        if item.probe:
            rows = list(probe(item.probe, world, device, repeats, item.turn))
        elif item.joint:
            rows = list(together(item.joint, rank, device, max(2, repeats - 1), item.turn))
        elif item.collective:
            name, dtype, size, ranks = item.collective
            rows = [collective(name, dtype, size, groups[ranks], ranks, device, item.turn)]
        elif item.key.startswith("single"):
            rows = [*attentions(device, world, item.turn), *singles(device, world, item.turn)]
            if kind == "cuda":  # a core launches nothing: its kernels run where they are called
                rows.append(dispatch(device, world, item.turn))
        elif world > 1:
            rows = list(beside(device, world, item.turn))
        tell(item.key, [asdict(row) for row in rows])


def everything(probes: list[Case], joint: list[Case], sizes: list[int], groups: list[int], turns: int) -> list[Todo]:
    """Return the whole measurement: every case once per turn, turn after turn, so that a disturbance meets all of them."""
    todo = []
    for turn in range(turns):
        todo += [Todo(f"probe {case.name} {turn}", turn, probe=case) for case in probes]
        todo += [Todo(f"joint {case.name} {turn}", turn, joint=case) for case in joint]
        todo += [
            Todo(f"{kind}.{dtype}.{ranks} {size} {turn}", turn, collective=(kind, dtype, size, ranks))
            for kind, dtype in COLLECTIVES
            for ranks in groups
            for size in sizes
            if turn == 0 or turns > 2  # a quick run measures them again in the steps of several ranks only
        ]
        todo += [Todo(f"single {turn}", turn), Todo(f"beside {turn}", turn)]
    return todo
