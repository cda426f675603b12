"""`StepBytes`: what a rank sends in training, as figures for the logs of somebody else's loop."""

from __future__ import annotations

from dist_ssn.comm.meter import CommMeter

_OF_STEPS = ("gradients", "synchronization", "parameters", "buffers")


class StepBytes:
    """Counts between `start` and `stop`, and answers with figures per step.

    Attributes:
        meter: the `CommMeter` that counts, and afterwards has the ledger of the whole training.
    """

    def __init__(self) -> None:
        self.meter = CommMeter()
        self._running = False
        self._last = (0, 0, 0.0)  # step, logical and ring bytes when `figures` last saw a new step
        self._per_step: dict[str, float] = {}

    def start(self, step: int) -> None:
        """Begins to count, from zero.

        Args:
            step: number of steps that were made before.
        """
        self.stop()  # a training that ended in an error did not
        self.meter = CommMeter()
        self.meter.__enter__()
        self._running, self._last = True, (step, 0, 0.0)
        self._per_step = {"bytes_per_step_logical": 0, "bytes_per_step_ring": 0}

    def stop(self) -> None:
        """Ends counting; without effect if it has ended."""
        if self._running:
            self._running = False
            self.meter.__exit__(None, None, None)

    def figures(self, step: int) -> dict[str, float]:
        """Bytes that this rank has sent.

        Args:
            step: number of steps that were made.

        Returns:
            "bytes_per_step_logical" and "bytes_per_step_ring", the mean over the steps since the last call, as in dist_ssn's own
            runs; "ring_bytes", all that was sent since `start`. Without a new step, the former mean.
        """
        steps = step - self._last[0]
        if steps > 0:
            totals = [self.meter.totals(purpose) for purpose in _OF_STEPS]
            logical, ring = sum(part.logical_bytes for part in totals), sum(part.ring_bytes for part in totals)
            self._per_step = {
                "bytes_per_step_logical": round((logical - self._last[1]) / steps),
                "bytes_per_step_ring": round((ring - self._last[2]) / steps),
            }
            self._last = (step, logical, ring)
        return {**self._per_step, "ring_bytes": round(self.meter.totals().ring_bytes)}
