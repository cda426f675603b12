"""Plans: from specs, a budget and a mapping to a frozen `Plan`, by pure arithmetic, with JSON in both directions."""

from dist_ssn.plan.make import make_plan
from dist_ssn.plan.mapping import MAPPINGS
from dist_ssn.plan.plan import Plan
from dist_ssn.plan.rules import Morph
from dist_ssn.plan.slots import Group, Slot

__all__ = ["MAPPINGS", "Group", "Morph", "Plan", "Slot", "make_plan"]
