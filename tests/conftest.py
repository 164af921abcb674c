"""Lets every test import what tests share wherever it stands, runs the command line, and keeps timing out of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import settings

from simulator.cli import main

sys.path.insert(0, str(Path(__file__).parent))
# How long an example takes says something about the machine, not about the code. Examples are new in every run on a developer's
# machine; CI judges a change by the same ones each time.
settings.register_profile("myriad", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("myriad")


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return the file of the scenario that the test's module calls ``QUESTION``."""
    path = tmp_path / "question.yaml"
    path.write_text(yaml.safe_dump(request.module.QUESTION, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def myriad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Return a function that runs the command line and returns its exit code and what it wrote."""

    def run(*words: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["myriad", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=out, err=err)

    return run
