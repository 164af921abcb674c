"""Pictures of results: each function draws one table onto one Axes and returns it.

Nothing is computed here that a table of the result does not hold. With `ax` a function draws there and touches no global
state; without it, a figure of a fitting size is made with pyplot, so that a notebook shows it.
"""

from simulator.plots.accuracy import plot_accuracy, plot_residuals
from simulator.plots.calibration import plot_collectives, plot_fits, plot_parts, plot_proof, plot_roofline
from simulator.plots.measured import plot_measured
from simulator.plots.networks import plot_fabric_costs, plot_fabrics, plot_shares
from simulator.plots.plans import plot_differences, plot_front, plot_heat, plot_intervals, plot_scaling, plot_tornado
from simulator.plots.style import COLOURS, WORDS
from simulator.plots.tables import plot_activations, plot_breakdown, plot_comparison, plot_memory, plot_plans
from simulator.plots.timeline import ACTIONS, KINDS, bars, plot_schedule, plot_timeline

__all__ = [
    "ACTIONS",
    "COLOURS",
    "KINDS",
    "WORDS",
    "bars",
    "plot_accuracy",
    "plot_activations",
    "plot_breakdown",
    "plot_collectives",
    "plot_comparison",
    "plot_differences",
    "plot_fabric_costs",
    "plot_fabrics",
    "plot_fits",
    "plot_front",
    "plot_heat",
    "plot_intervals",
    "plot_measured",
    "plot_memory",
    "plot_parts",
    "plot_plans",
    "plot_proof",
    "plot_residuals",
    "plot_roofline",
    "plot_scaling",
    "plot_schedule",
    "plot_shares",
    "plot_timeline",
    "plot_tornado",
]
