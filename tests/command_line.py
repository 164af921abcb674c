"""What the command line wrote, read for a test."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest


def data(ran: SimpleNamespace):
    """Return the JSON that a verb printed; it ended well and every number in it is one."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
