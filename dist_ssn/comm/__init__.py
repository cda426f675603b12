"""What is sent between processes: counted, and kept apart by purpose."""

from __future__ import annotations

from dist_ssn.comm.ledger import PURPOSES, Ledger, Totals
from dist_ssn.comm.meter import CommMeter, purpose

__all__ = ["PURPOSES", "CommMeter", "Ledger", "Totals", "purpose"]
