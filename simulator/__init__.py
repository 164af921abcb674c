"""Myriad: plan a ten-thousand-GPU training cluster before it exists.

>>> import simulator as sim
>>> scenario = sim.Scenario.load("examples/deepseek-v3-2048-h800.yaml")
>>> sim.simulate_step(scenario).step_time_s  # doctest: +SKIP
"""

from simulator.closed_forms import estimate
from simulator.errors import DeadlockError, PlanError, Problem, ProfileError, SimulatorError
from simulator.feasibility import check
from simulator.formats.deepspeed import plan_from_deepspeed
from simulator.formats.megatron import plan_from_megatron
from simulator.formats.torchtitan import plan_from_torchtitan
from simulator.lower_bound import bound
from simulator.network.bill import bill_of_materials
from simulator.network.build import topology
from simulator.network.topology import Topology
from simulator.placing import fewest_bytes, tier_bytes
from simulator.planning.fabrics import fabrics
from simulator.planning.remedies import remedies
from simulator.planning.search import Search, search
from simulator.planning.space import Space
from simulator.planning.sweep import grid, stored_scenario, stored_sweep, sweep
from simulator.results.outcome import sources
from simulator.results.ranks import RanksResult
from simulator.results.step import StepResult
from simulator.scenario.catalogue import clusters, models
from simulator.scenario.cluster import Accelerator, Cluster, Fabric, Host
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.shared_fabric import share_fabric
from simulator.simulate import simulate_ranks, simulate_step, simulate_steps
from simulator.validation.published import validate

#: the command's word for `search`
plan = search

__all__ = [
    "Model",
    "Accelerator",
    "Host",
    "Fabric",
    "Cluster",
    "Plan",
    "Job",
    "Scenario",
    "models",
    "clusters",
    "plan_from_megatron",
    "plan_from_torchtitan",
    "plan_from_deepspeed",
    "topology",
    "Topology",
    "bill_of_materials",
    "fabrics",
    "fewest_bytes",
    "tier_bytes",
    "share_fabric",
    "check",
    "bound",
    "estimate",
    "simulate_step",
    "StepResult",
    "simulate_ranks",
    "simulate_steps",
    "RanksResult",
    "Variation",
    "Routing",
    "remedies",
    "search",
    "plan",
    "Search",
    "Space",
    "grid",
    "sweep",
    "stored_sweep",
    "stored_scenario",
    "validate",
    "sources",
    "SimulatorError",
    "ProfileError",
    "PlanError",
    "Problem",
    "DeadlockError",
]
