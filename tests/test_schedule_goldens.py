"""Golden: the schedules that torch does not have, as text, and every printed table reads back as itself.

Rewrite them, and look at the difference, with ``MYRIAD_REWRITE=1 pytest tests/test_schedule_goldens.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simulator.schedules import SCHEDULES, read_table, schedule

GOLDEN = Path(__file__).parent / "golden"
#: name -> (pp, vpp, micro-batches)
SIZES = {
    "zb-h1": (4, 1, 8),
    "zb-h2": (4, 1, 8),
    "zb-1p": (4, 1, 8),
    "zb-2p": (4, 1, 8),
    "v-half": (4, 2, 8),
    "v-min": (4, 2, 8),
    "dualpipe": (4, 2, 10),
    "interleaved-overlapped": (4, 2, 8),
}
TWO = ("interleaved", "interleaved-overlapped", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe", "dualpipev")


@pytest.mark.parametrize("name", SIZES)
def test_golden(name):
    path, found = GOLDEN / f"schedule_{name}.txt", schedule(name, *SIZES[name])
    text = "# {} with pp = {}, vpp = {}, {} micro-batches: a line per rank\n{}".format(name, *SIZES[name], found)
    if os.environ.get("MYRIAD_REWRITE"):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name", SCHEDULES)
def test_printed_table_reads_back(name):
    found = schedule(name, 4, 2 if name in TWO else 1, 12).check()
    assert read_table(str(found)) == found.table
    assert str(found).count("\n") == 4


def test_commas_blanks_and_comments_read_alike():
    table = read_table("0F0 0F1+0B0 0B1\n0F0 0B0 0F1 0B1")
    assert read_table("# a comment\n\n0F0, 0F1+0B0,0B1\n  0F0;0B0\t0F1  0B1,\n") == table
