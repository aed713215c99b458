"""Fair sharing of an engine: what requests cost, who has had how much, and who is next.

Pure Python without engine, clock, randomness or torch, because it runs inside schedulers.
"""

from mope.fairness.charges import Charge
from mope.fairness.config import FairnessConfig
from mope.fairness.costs import CostEstimator, RequestCost
from mope.fairness.engine_costs import IDLE, Load
from mope.fairness.ledger import Ledger
from mope.fairness.mapper import MetricsMapper, ServiceEstimate
from mope.fairness.policies import Policy
from mope.fairness.profiles import load_profile
from mope.fairness.tickets import Ticket

__all__ = [
    "IDLE",
    "Charge",
    "CostEstimator",
    "FairnessConfig",
    "Ledger",
    "Load",
    "MetricsMapper",
    "Policy",
    "RequestCost",
    "ServiceEstimate",
    "Ticket",
    "load_profile",
]
