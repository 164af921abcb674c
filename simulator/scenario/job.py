"""What to train on: tokens, batch, sequence, optimizer, routing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulator.scenario.facts import Frozen
from simulator.units import Count


class Job(Frozen):
    """One training job.

    Parameters
    ----------
    tokens : int
        Tokens to train on.
    global_batch : int
        Sequences per optimizer step.
    sequence_length : int
        Tokens per sequence.
    optimizer : str
        ``adam``, ``sgd`` or ``muon``.
    routing : str
        ``balanced`` (forced: every expert gets the same) or ``natural``.
    expert_load : float
        Under natural routing, tokens on the heaviest rank of an expert group over the mean. The default 1.25 is assumed:
        published pairs of forced and natural routing differ by 8 to 20 % of the step. Published loads lie on both sides: the heaviest
        expert over a whole validation set 1.04 times the mean without an auxiliary loss, 1.52 and 1.72 with one (Wang et al., arXiv
        2408.15664, table 2); the heaviest rank in training and prefill of models of 106 to 671 billion parameters 1.30 to 4.01 (UltraEP,
        arXiv 2606.04101).
    """

    tokens: Count = Field(gt=0)
    global_batch: Count = Field(gt=0)
    sequence_length: Count = Field(gt=0)
    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    routing: Literal["balanced", "natural"] = "balanced"
    expert_load: float = Field(default=1.25, ge=1)

    @model_validator(mode="after")
    def _at_least_one_step(self) -> Job:
        if self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens = {self.tokens} is less than one step of {self.global_batch} x {self.sequence_length} = "
                f"{self.tokens_per_step}; give more tokens or a smaller global_batch"
            )
        return self

    @model_validator(mode="after")
    def _batch_counts_sequences(self) -> Job:
        if self.tokens_per_step > 1e9:
            raise ValueError(
                f"global_batch = {self.global_batch} sequences of {self.sequence_length} = {self.tokens_per_step:.3g} tokens per step is "
                f"beyond every published run; global_batch counts sequences: for {self.global_batch} tokens "
                f"write {max(1, self.global_batch // self.sequence_length)}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step."""
        return self.global_batch * self.sequence_length

    @property
    def steps(self) -> float:
        """Optimizer steps in the job."""
        return self.tokens / self.tokens_per_step
