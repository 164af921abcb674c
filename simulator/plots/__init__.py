"""Pictures of results: each function draws one table onto one Axes and returns it.

Nothing is computed here that a table of the result does not hold. With `ax` a function draws there and touches no global
state; without it, a figure of a fitting size is made with pyplot, so that a notebook shows it.
"""

from simulator.plots.accuracy import plot_accuracy, plot_residuals
from simulator.plots.measured import plot_measured
from simulator.plots.style import COLOURS, WORDS
from simulator.plots.tables import plot_breakdown, plot_comparison, plot_memory, plot_plans
from simulator.plots.timeline import ACTIONS, KINDS, bars, plot_schedule, plot_timeline

__all__ = [
    "ACTIONS",
    "COLOURS",
    "KINDS",
    "WORDS",
    "bars",
    "plot_accuracy",
    "plot_breakdown",
    "plot_comparison",
    "plot_measured",
    "plot_memory",
    "plot_plans",
    "plot_residuals",
    "plot_schedule",
    "plot_timeline",
]
