"""Parts that a network is bought from: switches and optics."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from simulator.scenario.facts import Facts
from simulator.units import BytesPerS, Count, Usd, Watts


class Part(Facts):
    """A switch or a transceiver.

    Parameters
    ----------
    kind : str
        ``switch``, or ``optic``: what sits at one end of a cable.
    ports : int, optional
        Of a switch.
    port_bytes_per_s : float
        Rate of one port, one direction.
    power_w, price_usd : float, optional
        Typical power and price of one; None where no figure was read. A price has a date in its source.
    """

    kind: Literal["switch", "optic"]
    ports: Count | None = Field(default=None, gt=0)
    port_bytes_per_s: BytesPerS
    power_w: Watts | None = None
    price_usd: Usd | None = None

    @model_validator(mode="after")
    def _price_has_a_date(self) -> Part:
        if any("price_usd" in s.facts and not s.date for s in self.sources):
            raise ValueError("the source of price_usd needs a date")
        return self
