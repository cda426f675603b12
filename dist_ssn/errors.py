"""The exceptions of `dist_ssn`.

Each mistake that a user can make is a `UserError` with one sentence that names the mistake, its place, and the remedy. The command
line prints that sentence and nothing else.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable


class DistSSNError(Exception):
    """Base of all exceptions of this library."""


class UserError(DistSSNError, ValueError):
    """A mistake in the caller's input; the message is one sentence with the remedy."""


class BudgetError(UserError):
    """A budget that cannot be read, or that no plan can meet."""


class PlanError(UserError):
    """A plan that is malformed, or that belongs to another model."""


class ShareError(UserError):
    """A model that cannot be shared, or a shared model that is used wrongly."""


class RecipeError(UserError):
    """A recipe with an unknown key, a wrong type or an impossible value."""


class ClusterError(UserError):
    """A cluster file with an unknown key, a wrong type or an impossible value, or a cluster that cannot be started."""


class DataError(UserError):
    """Training data that is missing, malformed or too small."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, altered, or that belongs to another plan or model."""


class RanksLost(DistSSNError):
    """A collective failed because some processes are gone, stopped, or cannot be reached; not a user's mistake."""


class Preempted(DistSSNError):
    """A signal preempted the run: a checkpoint is written, from which the run resumes when it is started again."""


def describe(error: BaseException) -> str:
    """An exception of other code, as a clause of a message: its class, its text, and the last line of the user's code."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({os.path.basename(lines[-1].filename)}, line {lines[-1].lineno})" if lines else ""
    first = (str(error).strip().splitlines() or ["without a message"])[0]
    return f"{type(error).__name__}: {first}{where}"


def unknown_choice(what: str, got: str, known: Iterable[str]) -> str:
    """The message for a name that is not in a registry, with the known names and the nearest one.

    Args:
        what: kind of the name, such as "morph".
        got: the given name.
        known: the registry's names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {got!r}: known are {', '.join(names)}{hint}"
