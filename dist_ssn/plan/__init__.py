"""Specs + budget + mapping → `Plan`: pure arithmetic, frozen, JSON both ways."""

from .make import make_plan
from .mapping import MAPPINGS
from .rules import Morph
from .types import Group, Plan, Slot

__all__ = ["MAPPINGS", "Group", "Morph", "Plan", "Slot", "make_plan"]
