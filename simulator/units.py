"""Quantities at the edge: text with a unit in, SI floats inside, text with a unit out.

A bit is ``b`` or ``bit``, a byte is ``B``; ``k M G T P`` are powers of 1000 and ``Ki Mi Gi Ti`` powers of 1024.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

#: a scalar for one plan, or a numpy array with one entry per plan
Number = Any

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _scaled(symbol: str, scale: float = 1.0, binary: bool = False) -> dict[str, float]:
    prefixes = _DECIMAL | (_BINARY if binary else {})
    return {prefix + symbol: factor * scale for prefix, factor in prefixes.items()}


_BYTES = _scaled("B", binary=True)
_BITS = _scaled("b", 1 / 8) | _scaled("bit", 1 / 8)
_FLOP = _scaled("FLOP")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0, "d": 86400.0}

#: dimension -> unit text -> factor to SI
UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "bytes_per_s": {f"{u}/s": f for u, f in (_BYTES | _BITS).items()},
    "flop_per_s": {f"{u}/s": f for u, f in _FLOP.items()} | _scaled("FLOPS"),
    "s": _SECONDS,
    "w": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "usd": {"$": 1.0, "USD": 1.0},
    "usd_per_hour": {"$/h": 1.0, "USD/h": 1.0},
}

#: dimension -> how to write it, in the order tried by `format_quantity`
_WRITTEN = {
    "bytes": ["TB", "GB", "MB", "kB", "B"],
    "bytes_per_s": ["TB/s", "GB/s", "MB/s", "kB/s", "B/s"],
    "flop_per_s": ["PFLOP/s", "TFLOP/s", "GFLOP/s", "FLOP/s"],
    "s": ["d", "h", "min", "s", "ms", "us", "ns"],
    "w": ["MW", "kW", "W"],
    "usd": ["$"],
    "usd_per_hour": ["$/h"],
}
_EXAMPLE = {
    "bytes": "80 GB",
    "bytes_per_s": "3.35 TB/s or 400 Gb/s",
    "flop_per_s": "989 TFLOP/s",
    "s": "3.5 us",
    "w": "700 W",
    "usd": "25000 $",
    "usd_per_hour": "2.95 $/h",
}
#: a latency, a price or a reserve may be nothing; a rate or a size may not
MAY_BE_ZERO = {"s", "usd", "usd_per_hour", "bytes", "w"}
_BARE = re.compile(r"\s*[-+]?[0-9._]+(?:[eE][-+]?[0-9]+)?\s*")
_QUANTITY = re.compile(r"^\s*([-+]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*(\S.*?)\s*$")


def parse_quantity(text: object, dimension: str) -> float:
    """Return the SI value of a text such as ``"400 Gb/s"``.

    Parameters
    ----------
    text : str
        A number followed by a unit of `dimension`.
    dimension : str
        A key of `UNITS`.

    Returns
    -------
    float
        Value in bytes, bytes/s, FLOP/s, seconds, watts, USD or USD/h.

    Raises
    ------
    ValueError
        On a bare number, an unknown unit or a unit of another dimension.
    """
    expected = f"write a number with a unit, such as {_EXAMPLE[dimension]}"
    if not isinstance(text, str) or _BARE.fullmatch(text):
        raise ValueError(f"{text!r} has no unit; {expected}")  # noqa: TRY004 - pydantic reports only ValueError
    match = _QUANTITY.match(text)
    if not match:
        raise ValueError(f"{text!r} is not a quantity; {expected}")
    number, unit = match.groups()
    unit = unit.replace(" ", "")
    factor = UNITS[dimension].get(unit)
    if factor is None:
        other = [d for d, units in UNITS.items() if unit in units]
        kind = f"a unit of {' or '.join(other)}, not of {dimension}" if other else "not a unit known here"
        raise ValueError(f"{text!r}: {unit!r} is {kind}; {expected}")
    value = float(number.replace("_", "")) * factor
    if not math.isfinite(value) or value < 0 or (value == 0 and dimension not in MAY_BE_ZERO):
        raise ValueError(f"{text!r} must be finite and {'not negative' if dimension in MAY_BE_ZERO else 'above zero'}")
    return value


def format_quantity(value: float, dimension: str) -> str:
    """Return `value` (SI) as text that `parse_quantity` reads back to the same float."""
    units, value = _WRITTEN[dimension], float(value)  # numpy's floats print their type
    for unit in units:
        scaled = value / UNITS[dimension][unit]
        if abs(scaled) >= 1 or unit == units[-1]:
            for number in (f"{scaled:.12g}", repr(scaled)):
                if float(number) * UNITS[dimension][unit] == value:
                    return f"{number} {unit}"
    base = next(unit for unit, factor in UNITS[dimension].items() if factor == 1.0)
    return f"{value!r} {base}"


def readable(value: float, dimension: str) -> str:
    """Return `value` (SI) rounded to three digits with a fitting unit, for people."""
    units = _WRITTEN[dimension]
    unit = next((u for u in units if abs(value) >= UNITS[dimension][u]), units[-1])
    return f"{value / UNITS[dimension][unit]:.3g} {unit}"


def parse_count(value: object) -> int:
    """Return an integer from ``15.5e12``, ``"15.5e12"`` (YAML 1.1 reads that as text) or ``20480``."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a count")  # noqa: TRY004 - pydantic reports only ValueError
    if isinstance(value, int) and abs(value) < 10**40:
        return value  # exact beyond 2**53
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a count; write a whole number such as 20480 or 15.5e12") from None
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    if abs(number) >= 10**40:
        raise ValueError(f"{value!r} is beyond every count")
    return int(number)


def _quantity(dimension: str):
    return Annotated[
        float,
        BeforeValidator(lambda v: parse_quantity(v, dimension)),
        PlainSerializer(lambda v: format_quantity(v, dimension)),
    ]


Bytes = _quantity("bytes")
BytesPerS = _quantity("bytes_per_s")
FlopPerS = _quantity("flop_per_s")
Seconds = _quantity("s")
Watts = _quantity("w")
Usd = _quantity("usd")
UsdPerHour = _quantity("usd_per_hour")
Count = Annotated[int, BeforeValidator(parse_count)]
