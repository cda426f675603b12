"""Former place of `Bank`, for scripts and pickled models of version 0.1.0: it is in `dist_ssn.sharing.bank` now."""

from dist_ssn.sharing.bank import Bank

__all__ = ["Bank"]
