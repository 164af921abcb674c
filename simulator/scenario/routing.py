"""How the router spreads tokens over experts, and what is done about it: the question, without numbers drawn from it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from simulator.errors import ProfileError
from simulator.scenario.facts import Frozen
from simulator.scenario.profiles import read_text


class Routing(Frozen):
    """How popular experts are, and the remedies in force.

    Parameters
    ----------
    distribution : str
        ``balanced``: every expert gets the same, exactly (forced routing). ``zipf``: popularity ``1 / rank^exponent``.
        ``dirichlet``: popularity drawn from a symmetric Dirichlet. ``measured``: the table `counts`. Which experts are popular
        differs from layer to layer; it stays for the whole step.
    exponent : float or None
        Of Zipf's law; 0 makes all experts equally likely.
    concentration : float or None
        Of the Dirichlet distribution, per expert: popularity varies by ``1 / sqrt(concentration)``.
    counts : tuple of tuple of int, or None
        Tokens of each expert, one row per MoE layer; see `read_counts`.
    sampled : bool
        Draw each micro-batch's tokens from the popularity; False gives every micro-batch the expected ones.
    bias_balance : float
        Share of the imbalance that a balancing bias on the router takes away, 0 to 1: popularity is mixed with that much
        of the uniform one.
    capacity_factor : float or None
        An expert takes at most this many times the mean and drops the rest; None drops nothing.
    hosts_per_token : int or None
        Node-limited routing: a token's experts lie in at most so many scale-up domains, which the router picks by the sum of
        their best scores. Fewer copies cross the network where the dispatcher sends one per domain (``deepep``); how popular
        experts are is left as it is. None leaves the groups of the model's own router.
    redundant_experts : int
        Copies of the most popular experts, packed onto the ranks so that these are even; 0 leaves every expert at home.

    References
    ----------
    Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024 (bias).
    Fedus, Zoph, Shazeer, "Switch Transformers", 2022, equation 3 (capacity factor).
    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 2.1.2 (node-limited routing: 4 of 8 hosts).
    DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB, 2025 (redundant experts).
    """

    distribution: Literal["balanced", "zipf", "dirichlet", "measured"] = "balanced"
    exponent: float | None = Field(default=None, ge=0)
    concentration: float | None = Field(default=None, gt=0)
    counts: tuple[tuple[int, ...], ...] | None = Field(default=None, repr=False)
    sampled: bool = True
    bias_balance: float = Field(default=0.0, ge=0, le=1)
    capacity_factor: float | None = Field(default=None, gt=0)
    hosts_per_token: int | None = Field(default=None, gt=0)
    redundant_experts: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parameter_of_its_own(self) -> Routing:
        owns = {"zipf": "exponent", "dirichlet": "concentration", "measured": "counts"}
        for distribution, name in owns.items():
            given = getattr(self, name) is not None
            if given != (self.distribution == distribution):
                said = f"distribution = {self.distribution} {'with' if given else 'without'} {name}"
                raise ValueError(f"{said}; {f'write distribution: {distribution}' if given else f'give {name}'}")
        return self

    @model_validator(mode="after")
    def _counts_add_up(self) -> Routing:
        if self.counts is None:
            return self
        if not self.counts or not self.counts[0]:
            raise ValueError("counts is empty; give one row per MoE layer and one number per expert")
        for layer, row in enumerate(self.counts):
            if len(row) != len(self.counts[0]):
                raise ValueError(f"counts: layer {layer} has {len(row)} experts, layer 0 has {len(self.counts[0])}; give all of them")
            negative = [e for e, n in enumerate(row) if n < 0]
            if negative:
                raise ValueError(f"counts: layer {layer} gives expert {negative[0]} {row[negative[0]]} tokens; a count is 0 or more")
            if sum(row) != sum(self.counts[0]) or not sum(row):
                raise ValueError(
                    f"counts: layer {layer} adds up to {sum(row)}, layer 0 to {sum(self.counts[0])}; every layer routes the same tokens, "
                    "so count all experts over the same micro-batches, dropped tokens included"
                )
        return self


def read_counts(path: str | Path) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each expert of each MoE layer from a CSV file.

    Parameters
    ----------
    path : str or Path
        Header ``layer,expert_0,expert_1,...``, then one line per MoE layer, from the first to the last.

    Raises
    ------
    ProfileError
        When the file cannot be read, or names the line that does not fit.
    """
    lines = [line for line in csv.reader(io.StringIO(read_text(path))) if line]
    header, *rows = lines
    if header[0].strip() != "layer" or len(header) < 2 or not rows:
        raise ProfileError(f"{path}: expected a header layer,expert_0,expert_1,... and a line per MoE layer; found {','.join(header[:4])}")
    table = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ProfileError(f"{path}, line {number}: {len(row)} columns, the header has {len(header)}; give one count per expert")
        try:
            table.append(tuple(int(cell) for cell in row[1:]))
        except ValueError:
            wrong = next(cell for cell in row[1:] if not cell.strip().lstrip("-").isdigit())
            raise ProfileError(f"{path}, line {number}: {wrong!r} is not a count; write a whole number of tokens") from None
    return tuple(table)
