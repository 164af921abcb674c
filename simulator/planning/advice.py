"""How many parameters and tokens a budget should buy: scaling laws, each with its constants and source.

The laws say what was fitted on other data and tokenizers; take their ratios and exponents, not the third digit of a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.errors import ProfileError
from simulator.units import Number


@dataclass(frozen=True, slots=True)
class ParametricLaw:
    """``loss = floor + a / parameters^alpha + b / tokens^beta``.

    Parameters
    ----------
    floor, a, b, alpha, beta : float
        Constants; the loss is in nats per token.
    source : str
    """

    floor: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, parameters: Number, tokens: Number) -> Number:
        """Return the loss of a dense model, nats per token."""
        return self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, flop: Number) -> tuple[Number, Number]:
        """Return the parameters and tokens of least loss for `flop`.

        Notes
        -----
        With ``flop = 6 parameters tokens``: ``N = G (C/6)^(beta/(alpha+beta))``, ``D = (C/6) / N`` and
        ``G = (alpha a / (beta b))^(1/(alpha+beta))``.
        """
        total = self.alpha + self.beta
        parameters = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total) * (flop / 6) ** (self.beta / total)
        return parameters, flop / 6 / parameters


#: the law to use
REPLICATION = ParametricLaw(
    1.8172, 482.01, 2085.43, 0.3478, 0.3658, "Besiroglu et al., Chinchilla Scaling: A Replication Attempt, arXiv 2404.10102, 2024"
)
#: the original fit, whose optimum depends on how its exponents were rounded; kept for comparison
HOFFMANN = ParametricLaw(
    1.6934, 406.4, 410.7, 0.3392, 0.2849, "Hoffmann et al., Training Compute-Optimal Large Language Models, arXiv 2203.15556, 2022"
)


def efficiency_leverage(flop: Number, activation: Number, granularity: Number) -> Number:
    """Return how many times the compute a dense model needs for the loss of a mixture of experts trained with `flop`.

    Parameters
    ----------
    flop : Number
        Training compute; the law was fitted up to about 1e22 and is extrapolated beyond.
    activation : Number
        Share of the parameters that a token uses, 0 to 1.
    granularity : Number
        How many of its experts make up one MLP of the usual width: ``2 hidden / expert width`` in the source's definition.

    Notes
    -----
    ``EL = A'^(a + d log10 C + gamma (log2 G)^2 + beta log2 G)``, ``1/A' = 1/(A + 1/(1/A_start - 1/A_max)) + 1/A_max``, with
    a 1.23, d -0.0761, gamma 0.0167, beta -0.117, A_start 0.0163, A_max 5.28e16. The bases of the logarithms are inferred: with
    these the source's own example comes out, 7.2 at A = 3.1 %, G = 12, C = 1e22.

    References
    ----------
    Ling Team, "Towards Greater Leverage: Scaling Laws for Efficient Mixture-of-Experts Language Models", arXiv 2507.17702, 2025.
    """
    start, most = 0.0163, 5.28e16
    saturated = 1 / (1 / (activation + 1 / (1 / start - 1 / most)) + 1 / most)
    log = np.log2(granularity)
    return saturated ** (1.23 - 0.0761 * np.log10(flop) + 0.0167 * log**2 - 0.117 * log)


def optimal_batch_tokens(tokens: Number) -> Number:
    """Return the batch of least loss for a run over `tokens`, in tokens.

    Notes
    -----
    ``B = 0.58 D^0.571`` (Li et al., "Predictable Scale: Part I, Step Law", arXiv 2503.04715, 2025), whatever the parameters.
    """
    return 0.58 * tokens**0.571


#: largest training that the laws were fitted on, FLOP: Hoffmann et al.'s budgets of equal compute are 6e18 to 3e21; the Ling Team's
#: runs reach about 1e22
LAW_FLOP, LEVERAGE_FLOP = 3e21, 1e22


@dataclass(frozen=True, slots=True)
class Advice:
    """What a compute budget should buy.

    Parameters
    ----------
    flop : float
    parameters, tokens : float
        Active parameters and tokens of least loss.
    loss : float
        By the law, nats per token.
    total_parameters : float
        With the experts that no token of a batch uses.
    leverage : float
        Compute that a dense model would need for this loss, over `flop`; 1 for a dense model.
    batch_tokens : float
        Tokens per optimizer step.
    sources : tuple of str
    extrapolated : tuple of str
        Which laws are used beyond the budgets that they were fitted on.
    """

    flop: float
    parameters: float
    tokens: float
    loss: float
    total_parameters: float
    leverage: float
    batch_tokens: float
    sources: tuple[str, ...]
    extrapolated: tuple[str, ...] = ()


def advise(flop: float, activation: float = 1.0, granularity: float = 12.0, law: ParametricLaw = REPLICATION) -> Advice:
    """Return the parameters and tokens that `flop` should be spent on.

    Parameters
    ----------
    flop : float
        Model FLOP: accelerators x seconds x peak x MFU.
    activation : float
        Share of the parameters that a token uses; 1 for a dense model.
    granularity : float
        See `efficiency_leverage`; only for experts.

    Raises
    ------
    ProfileError
        When a number is out of range.

    Notes
    -----
    A mixture of experts gets the active parameters and tokens of the dense optimum for the same compute, and the loss of the
    dense optimum for `leverage` times as much: the source fits the leverage, not the split, so the split is assumed.
    """
    if not flop > 0 or not 0 < activation <= 1 or not granularity > 0:
        raise ProfileError(
            f"flop = {flop}, activation = {activation}, granularity = {granularity}: write positive ones, activation up to 1"
        )
    leverage = 1.0 if activation == 1 else float(efficiency_leverage(flop, activation, granularity))
    parameters, tokens = map(float, law.optimum(flop))
    loss = float(law.loss(*law.optimum(flop * leverage)))
    sources = (law.source, "Li et al., Step Law, arXiv 2503.04715, 2025")
    sources += () if activation == 1 else ("Ling Team, Towards Greater Leverage, arXiv 2507.17702, 2025",)
    beyond = {"parameters and tokens": LAW_FLOP} | ({} if activation == 1 else {"the leverage of experts": LEVERAGE_FLOP})
    warnings = tuple(
        f"{what}: extrapolated from runs of at most {most:.0e} FLOP to {flop:.0e}" for what, most in beyond.items() if flop > most
    )
    batch = float(optimal_batch_tokens(tokens))
    return Advice(flop, parameters, tokens, loss, parameters / activation, leverage, batch, sources, warnings)
