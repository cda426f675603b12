"""Workers whose change would spoil a round: not finite, or much larger than the others'."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def left_out(norms: Sequence[float], factor: float | None) -> dict[int, str]:
    """Workers that a round leaves out, with the reason.

    Args:
        norms: of the workers' changes.
        factor: a norm above this multiple of the median is left out; None leaves out only what is not finite.

    Returns:
        Place of the worker → reason, as a clause that follows its name.
    """
    found = {place: "sent a change that is not finite" for place, norm in enumerate(norms) if not math.isfinite(norm)}
    finite = [norm for norm in norms if math.isfinite(norm)]
    if factor is None or not finite or not (median := statistics.median_low(finite)):
        return found
    for place, norm in enumerate(norms):
        if place not in found and norm > factor * median:
            found[place] = f"sent a change of norm {norm:.3g}, more than {factor:g} × the median of {median:.3g}"
    return found
