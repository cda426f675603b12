"""The exceptions of `dist_ssn`.

Everything that a user can get wrong is a `UserError` with one sentence that names what was wrong, where, and what would be
right. The command line prints that sentence and nothing else.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable


class DistSSNError(Exception):
    """Base of all exceptions of this library."""


class UserError(DistSSNError, ValueError):
    """A mistake in what the caller gave; the message is one sentence that says what would be right."""


class BudgetError(UserError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(UserError):
    """A plan that is malformed, or that belongs to another model."""


class ShareError(UserError):
    """A model that cannot be shared, or a shared model that is used wrongly."""


class RecipeError(UserError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class ClusterError(UserError):
    """A cluster file with an unknown key, a wrong type or an impossible value, or a cluster that cannot be started so."""


class DataError(UserError):
    """Training data that is missing, malformed or too small."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, altered, or that belongs to another plan or model."""


class RanksLost(DistSSNError):
    """A collective failed, because some of the processes are gone, stopped, or cannot be reached; nobody's mistake."""


class Preempted(DistSSNError):
    """A signal asked the run to make room: it is saved, and goes on from there when it is started again."""


def told(error: BaseException) -> str:
    """An exception of code that is not ours, as half a sentence: what it is, and the last line of a user's own that it passed."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({os.path.basename(lines[-1].filename)}, line {lines[-1].lineno})" if lines else ""
    first = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"{type(error).__name__}: {first}{where}"


def unknown_choice(what: str, got: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not in a registry: what was given, what is known, and the nearest name."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}: known are {', '.join(names)}{hint}"
