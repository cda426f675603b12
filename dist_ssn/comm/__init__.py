"""Communication between processes: counted, and attributed to purposes."""

from __future__ import annotations

from dist_ssn.comm.ledger import PURPOSES, Ledger, Totals
from dist_ssn.comm.meter import CommMeter, purpose

__all__ = ["PURPOSES", "CommMeter", "Ledger", "Totals", "purpose"]
