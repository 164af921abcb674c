"""Quantities at the edge: what is read, what is refused, and that written text reads back to the same float."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.units import MAY_BE_ZERO, UNITS, format_quantity, parse_count, parse_quantity, readable


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("80 GB", "bytes", 80e9),
        ("80GiB", "bytes", 80 * 2**30),
        ("1 KiB", "bytes", 1024.0),
        ("16 kB", "bytes", 16000.0),
        ("16 KB", "bytes", 16000.0),
        ("3.35 TB/s", "bytes_per_s", 3.35e12),
        ("400 Gb/s", "bytes_per_s", 50e9),  # b is a bit, B a byte
        ("400Gb/s", "bytes_per_s", 50e9),
        ("400Gbit/s", "bytes_per_s", 50e9),
        ("400 GB/s", "bytes_per_s", 400e9),
        ("50GB/s", "bytes_per_s", 50e9),
        ("2 GiB/s", "bytes_per_s", 2.0**31),
        ("989 TFLOP/s", "flop_per_s", 989e12),
        ("989TFLOPS", "flop_per_s", 989e12),
        ("4.5 PFLOP/s", "flop_per_s", 4.5e15),
        ("2us", "s", 2e-6),
        ("2 µs", "s", 2e-6),
        ("150 ns", "s", 150 * 1e-9),
        ("3 ms", "s", 3e-3),
        ("1.5 h", "s", 5400.0),
        ("2 d", "s", 172800.0),
        ("700 W", "w", 700.0),
        ("10.2 kW", "w", 10200.0),
        ("2.5$/h", "usd_per_hour", 2.5),
        ("2.95 USD/h", "usd_per_hour", 2.95),
        ("25_000 $", "usd", 25000.0),
        ("  1e3   MB ", "bytes", 1e9),
        ("1.5e-6 s", "s", 1.5e-6),
        ("0 s", "s", 0.0),
    ],
)
def test_reads(text, dimension, value):
    assert parse_quantity(text, dimension) == value


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (400e9, "bytes_per_s", "400000000000.0 has no unit; write a number with a unit, such as 3.35 TB/s or 400 Gb/s"),
        (80, "bytes", "80 has no unit; write a number with a unit, such as 80 GB"),
        (None, "s", "None has no unit; write a number with a unit, such as 3.5 us"),
        ("400e9", "bytes_per_s", "'400e9' has no unit; write a number with a unit, such as 3.35 TB/s or 400 Gb/s"),
        ("400", "w", "'400' has no unit; write a number with a unit, such as 700 W"),
        ("fast", "bytes_per_s", "'fast' is not a quantity; write a number with a unit, such as 3.35 TB/s or 400 Gb/s"),
        ("80 GB", "s", "'80 GB': 'GB' is a unit of bytes, not of s; write a number with a unit, such as 3.5 us"),
        ("1 s", "w", "'1 s': 's' is a unit of s, not of w; write a number with a unit, such as 700 W"),
        ("400 Gb", "bytes", "'400 Gb': 'Gb' is not a unit known here; write a number with a unit, such as 80 GB"),
        ("989 TFLOP", "flop_per_s", "'989 TFLOP': 'TFLOP' is not a unit known here; write a number with a unit, such as 989 TFLOP/s"),
        ("700 w", "w", "'700 w': 'w' is not a unit known here; write a number with a unit, such as 700 W"),
        ("1,000 GB", "bytes", "'1,000 GB': ',000GB' is not a unit known here; write a number with a unit, such as 80 GB"),
        ("-3 s", "s", "'-3 s' must be finite and not negative"),
        ("1e400 s", "s", "'1e400 s' must be finite and not negative"),
        ("0 GB/s", "bytes_per_s", "'0 GB/s' must be finite and above zero"),
        ("-1 FLOP/s", "flop_per_s", "'-1 FLOP/s' must be finite and above zero"),
        ("nan s", "s", "'nan s' is not a quantity; write a number with a unit, such as 3.5 us"),
        ("", "s", "'' is not a quantity; write a number with a unit, such as 3.5 us"),
    ],
)
def test_refuses(value, dimension, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        parse_quantity(value, dimension)


@given(st.sampled_from(sorted(UNITS)), st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False))
def test_written_text_reads_back_to_the_same_float(dimension, value):
    assert parse_quantity(format_quantity(value, dimension), dimension) == value


@given(st.sampled_from([(d, u) for d in sorted(UNITS) for u in sorted(UNITS[d])]), st.integers(1, 10**6), st.sampled_from(["", " ", "  "]))
def test_every_unit_scales_by_its_factor_with_or_without_a_space(unit, number, space):
    dimension, symbol = unit
    assert parse_quantity(f"{number}{space}{symbol}", dimension) == number * UNITS[dimension][symbol]


@pytest.mark.parametrize("dimension", sorted(MAY_BE_ZERO))
def test_what_may_be_nothing_is_written_and_read_as_nothing(dimension):
    assert parse_quantity(format_quantity(0.0, dimension), dimension) == 0.0


@given(st.floats(min_value=1e-3, max_value=1e3))
def test_bits_are_an_eighth_of_bytes(rate):
    bits, byte = parse_quantity(f"{rate!r} Gb/s", "bytes_per_s"), parse_quantity(f"{rate!r} GB/s", "bytes_per_s")
    assert math.isclose(8 * bits, byte, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (80e9, "bytes", "80 GB"),
        (3.35e12, "bytes_per_s", "3.35 TB/s"),
        (50e9, "bytes_per_s", "50 GB/s"),
        (989e12, "flop_per_s", "989 TFLOP/s"),
        (2e-6, "s", "2 us"),
        (0.0, "s", "0 ns"),
        (86400.0, "s", "1 d"),
        (2.95, "usd_per_hour", "2.95 $/h"),
        (np.float64(700), "w", "700 W"),
        (1 / 3, "s", "333.3333333333333 ms"),
    ],
)
def test_writes_with_a_fitting_unit(value, dimension, text):
    assert format_quantity(value, dimension) == text


def test_readable_rounds_to_three_digits():
    assert readable(123456.0, "bytes") == "123 kB"
    assert readable(0.0, "s") == "0 ns"
    assert readable(3.3512e12, "bytes_per_s") == "3.35 TB/s"


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (20480, 20480),
        ("20480", 20480),
        (15.5e12, 15_500_000_000_000),
        ("15.5e12", 15_500_000_000_000),
        ("400e9", 400_000_000_000),
        (8.0, 8),
    ],
)
def test_counts(value, count):
    parsed = parse_count(value)
    assert parsed == count
    assert type(parsed) is int


@given(st.integers())
def test_whole_numbers_stay_exact_beyond_floats(number):
    assert parse_count(number) == number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True is not a count"),
        (0.5, "0.5 is not a whole number"),
        ("1.5", "'1.5' is not a whole number"),
        (float("nan"), "nan is not a whole number"),
        ("inf", "'inf' is not a whole number"),
        ("many", "'many' is not a count; write a whole number such as 20480 or 15.5e12"),
        ("8 GB", "'8 GB' is not a count; write a whole number such as 20480 or 15.5e12"),
        (None, "None is not a count; write a whole number such as 20480 or 15.5e12"),
        ([8], "[8] is not a count; write a whole number such as 20480 or 15.5e12"),
    ],
)
def test_what_is_not_a_count(value, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        parse_count(value)
