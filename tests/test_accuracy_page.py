"""docs/accuracy.md says what the shipped residuals say, and those are what the code predicts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from simulator.results.confidence import residuals
from simulator.validation.page import HEAD
from simulator.validation.published import published_runs, validate
from simulator.validation.section import Section, markdown

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    """The shipped residuals with what the published rows say of them."""
    table, _ = residuals()
    return table.merge(published_runs()[["id", "complete"]], on="id")


@pytest.mark.parametrize("regime", ["cold", "anchored"])
@pytest.mark.parametrize("arch", ["moe", "dense"])
def test_the_page_prints_the_shipped_errors(shipped, arch, regime):
    some = shipped[(shipped["complete"] == "yes") & (shipped["arch"] == arch) & shipped[regime].notna()]
    error = np.expm1(-some[regime])
    groups = error.groupby(some["group"])
    expected = [error.abs().groupby(some["group"]).mean().mean(), error.abs().groupby(some["group"]).median().mean(), groups.mean().mean()]
    name = {"moe": "MoE", "dense": "dense"}[arch]
    line = next(text for text in PAGE.read_text(encoding="utf-8").splitlines() if text.startswith(f"| {name}, complete | {regime} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert int(cells[2].replace(",", "")) == len(some)
    assert int(cells[3]) == groups.ngroups
    assert [float(cell.removesuffix(" %")) for cell in cells[4:7]] == pytest.approx([100 * e for e in expected], abs=0.06)


def test_the_page_has_every_section_and_opens_with_its_head():
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD.strip())
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[:8] == [
        "Step time", "On the rows of other simulators", "What sources leave out", "Scaling", "Choosing a layout", "Memory", "Collectives",
        "Intervals",
    ]  # fmt: skip
    assert {"By source", "By accelerator", "The worst rows", "What is not modelled", "Rows without a prediction"} <= set(titles)


def test_a_section_becomes_markdown():
    part = Section("Title", "Words.", pd.DataFrame({"a|b": ["x|y"], "c": ["1"]}))
    assert markdown([part], "# Head") == "# Head\n\n## Title\n\nWords.\n\n| a|b | c |\n| --- | --- |\n| x\\|y | 1 |\n"


@pytest.mark.long
def test_the_shipped_residuals_are_what_the_code_predicts(shipped):
    some = shipped[shipped["complete"] == "yes"].iloc[::40]
    runs = published_runs().set_index("id", drop=False).loc[some["id"]]
    table = validate(rows=runs)
    found = np.log(table["measured_s"] / table["predicted_s"])
    np.testing.assert_allclose(found, some["cold"], atol=2e-3)  # make accuracy writes them anew
