"""One optimizer step of a real mixture-of-experts transformer, parallel over real processes, by the simulator's own schedule.

The order of forwards and backwards is the table of `simulator.schedules`; the groups are those of `simulator.scenario.mesh`;
the blocks stand on the stages where `simulator.workload.stages` puts them. So a plan means the same when it runs and when it is
simulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from simulator.calibration.comm import Ranks
from simulator.calibration.moe_model import Block, Context, Embedding, Head, Layer, Options
from simulator.calibration.recorder import Recorder
from simulator.calibration.weights import Bucket
from simulator.errors import PlanError, Problem
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.schedules import Action, schedule
from simulator.workload.stages import stage_blocks

#: what the executable step has; anything else of a model or plan is refused
_ONLY = {
    "cp": 1,
    "etp": 1,
    "vpp": 1,
    "dp_replicate": 1,
    "zero": 1,
    "recompute": "none",
    "sequence_parallel": True,
    "dispatcher": "alltoall",
}
_PLAIN = ("mtp_layers", "tied_embeddings", "attention_bias", "output_bias", "mlp_bias", "qk_norm", "sinks", "layer_norm", "positions")


def refused(model: Model, plan: Plan) -> list[Problem]:
    """Return what of `model` and `plan` the executable step does not have."""
    found = [
        Problem("the executable step has this degree", f"{name} = {getattr(plan, name)}", f"use {name}: {value}")
        for name, value in _ONLY.items()
        if getattr(plan, name) != value
    ]
    if plan.schedule not in ("1f1b", "gpipe"):
        found.append(Problem("the executable step has this schedule", f"schedule = {plan.schedule}", "use 1f1b or gpipe"))
    found += [
        Problem("the executable step has this layer", f"{name} = {getattr(model, name)}", f"use {name}: 0 or false")
        for name in _PLAIN
        if getattr(model, name)
    ]
    if not model.gated or any(model.windows):
        found.append(Problem("the executable step has this layer", "plain MLP or sliding windows", "use gated: true and no windows"))
    if model.experts and (model.experts.groups > 1 or model.experts.shared_gate):
        found.append(Problem("the executable step has this router", "groups or a shared gate", "use groups: 1 and shared_gate: false"))
    widths = [model.heads, model.kv_heads, model.vocab, *([model.experts.shared_ffn] if model.experts else [])]
    if any(width % plan.tp for width in widths):
        found.append(Problem("tp divides heads and vocabulary", f"tp = {plan.tp}, widths {widths}", "use a tp that divides them"))
    return found


@dataclass(frozen=True)
class StepOutput:
    """What one step gave.

    Parameters
    ----------
    loss : float
        Mean cross-entropy over the tokens of the global batch.
    gradient_norm : float
        Norm of the whole gradient, before clipping.
    """

    loss: float
    gradient_norm: float


class MoEStep:
    """The parameters of one rank, and the step that trains them.

    Parameters
    ----------
    model, plan, job
        As the simulator takes them; `plan` must cover the processes of the job.
    rank : int
    options : Options
    device : torch.device

    Raises
    ------
    PlanError
        When the executable step does not have what they ask for.
    """

    def __init__(self, model: Model, plan: Plan, job: Job, rank: int, options: Options, device: torch.device):
        problems = refused(model, plan)
        if problems:
            raise PlanError(problems)
        self.plan, self.job, self.options, self.device = plan, job, options, device
        self.recorder = Recorder(device)
        self.ranks = Ranks(plan, rank, device, self.recorder)
        self.context = Context(model, options, self.ranks, self.recorder, plan.micro_batch, job.sequence_length, float(job.tokens_per_step))
        self.micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
        self.schedule = schedule(plan.schedule, plan.pp, 1, self.micro_batches)
        stage = self.ranks.index("pp")
        self.first, self.last = stage == 0, stage == plan.pp - 1
        before = sum(name.startswith("layer") for names in stage_blocks(model, plan, job)[:stage] for name in names)
        self.blocks = list(self._make(stage_blocks(model, plan, job)[stage], before))
        self.buckets = list(self._buckets())
        self.count = 0

    def _make(self, names: Iterable[str], number: int) -> Iterable[Block]:
        for name in names:
            if name == "embedding":
                yield Embedding("embedding", self.context)
            elif name == "head":
                yield Head("head", self.context)
            else:
                yield Layer(f"layers.{number}", self.context, self.context.model.kinds[int(name[5:])].moe)
                number += 1

    def _buckets(self) -> Iterable[Bucket]:
        """Make the flat buffers: one per block and kind, so that each is reduced and gathered by itself, as the simulator has it."""
        for block in self.blocks:
            for kind, axis in (("dense", "dp"), ("replicated", "dp"), ("expert", "edp")):
                weights = [w for w in block.weights.values() if w.kind == kind]
                if weights:
                    yield Bucket(weights, axis, self.ranks, self.options.dtype, self.device, self.options.seed)

    @property
    def layers(self) -> list[Layer]:
        """The mixture-of-experts layers of this rank."""
        return [block for block in self.blocks if isinstance(block, Layer) and block.moe]

    def close(self) -> None:
        """Give back the process groups; the step cannot run after that."""
        self.ranks.close()

    def mine(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return this rank's micro-batches (micro-batches, sequences, length + 1) of the global batch (sequences, length + 1)."""
        share = tokens.chunk(self.plan.dp)[self.ranks.index("dp")]
        return share.view(self.micro_batches, self.plan.micro_batch, -1)

    def backward(self, tokens: torch.Tensor) -> float:
        """Run all forwards and backwards on the global batch (sequences, length + 1); return the mean loss.

        Gradients are those of this rank alone afterwards, as `reduce` takes them.
        """
        batches = self.mine(tokens)
        held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        posted: list[tuple[dist.Work, torch.Tensor]] = []
        total = torch.zeros((), device=self.device)
        for action in self.schedule.table[self.ranks.index("pp")]:
            assert isinstance(action, Action)
            if action.kind == "F":
                given, out = self._forward(batches[action.micro_batch])
                held[action.micro_batch] = given, out
                if self.last:
                    total += out.detach()
                else:
                    posted.append((self.ranks.send(out.detach(), forward=True), out))
            else:
                into = self._backward(*held.pop(action.micro_batch))
                if into is not None:
                    posted.append((self.ranks.send(into, forward=False), into))
        with self.recorder.region("pp.send"):
            for work, _ in posted:
                work.wait()
        return self._mean(total)

    def _forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = batch[:, :-1].reshape(-1), batch[:, 1:].reshape(-1)
        if self.first:
            x = given = tokens
        else:
            rows = len(tokens) // self.plan.tp
            like = torch.empty((rows, self.context.model.hidden), dtype=self.options.dtype, device=self.device)
            x = given = self.ranks.receive(like, forward=True).requires_grad_()
        for block in self.blocks:
            x = block.forward(x, targets) if isinstance(block, Head) else block.forward(x)
        return given, x

    def _backward(self, given: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        if self.last:
            out.backward(torch.full_like(out, 1.0 / self.context.tokens))
        else:
            out.backward(self.ranks.receive(torch.empty_like(out), forward=False))
        return None if self.first else given.grad

    def _mean(self, total: torch.Tensor) -> float:
        """Return the mean loss over the global batch, known to every rank."""
        self.ranks.all_reduce("dp", total)
        self.ranks.all_reduce("pp", total)
        return float(total) / self.context.tokens

    def reduce(self) -> None:
        """Sum the gradients over replicas, block by block from the last to the first; every rank keeps its shards.

        Those of norms and routers, which tensor-parallel ranks computed from rows of their own, are summed before, all at once.
        """
        copies = [bucket.gradients for bucket in self.buckets if bucket.weights[0].kind == "replicated"]
        if copies:
            summed = self.ranks.all_reduce("tp", torch.cat(copies))
            for own, whole in zip(copies, summed.split([copy.numel() for copy in copies]), strict=True):
                own.copy_(whole)
        for bucket in reversed(self.buckets):
            bucket.reduce()

    def norm(self) -> float:
        """Return the norm of the whole gradient from the reduced shards."""
        with self.recorder.region("optimizer.norm"):
            square = torch.zeros((), device=self.device)
            for bucket in self.buckets:
                assert bucket.reduced is not None
                copies = self.plan.tp if bucket.weights[0].kind == "replicated" else 1
                square += torch.linalg.vector_norm(bucket.reduced).square() / copies
        return float(self.ranks.all_reduce("world", square).sqrt())

    def run(self, tokens: torch.Tensor) -> StepOutput:
        """Train on the global batch (sequences, length + 1) for one step."""
        loss = self.backward(tokens)
        self.reduce()
        norm = self.norm()
        self.count += 1
        with self.recorder.region("optimizer"):
            for bucket in self.buckets:
                bucket.update(self.count, self.options.lr, min(1.0, self.options.clip / (norm + 1e-6)))
        for bucket in self.buckets:
            bucket.gather()
        if self.options.bias_rate:
            for layer, counts in zip(self.layers, self.routed(), strict=True):
                layer.balance(counts)
        return StepOutput(loss, norm)

    def routed(self) -> list[torch.Tensor]:
        """Return the tokens of every expert of this rank's layers, over all ranks, since the last call; dropped ones included."""
        found = []
        for layer in self.layers:
            counts = layer.routed.to(self.device, copy=True)
            layer.routed.zero_()
            for axis in ("dp", "tp"):
                self.ranks.all_reduce(axis, counts)
            found.append(counts.cpu())
        return found
