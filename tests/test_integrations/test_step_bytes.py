from __future__ import annotations

from dist_ssn.comm.meter import book
from dist_ssn.integrations.step_bytes import StepBytes


def test_the_mean_of_the_steps_since_the_last_call() -> None:
    """A loop may ask twice within a step (accumulation), begin late (resume), and train again."""
    counted = StepBytes()
    for first in (0, 10):
        counted.start(first)
        assert set(counted.figures(first).values()) == {0}
        for step in (1, 2):
            book("all_reduce", "gradients", 100 * step, 4)
            book("all_reduce", "metrics", 8, 4)
        wanted = {"bytes_per_step_logical": 150, "bytes_per_step_ring": 225, "ring_bytes": 450 + 24}
        assert counted.figures(first + 2) == counted.figures(first + 2) == wanted
        book("all_reduce", "gradients", 1000, 4)
        assert counted.figures(first + 2) == wanted | {"ring_bytes": 474 + 1500}
        assert counted.figures(first + 3)["bytes_per_step_logical"] == 1000
        counted.stop()
        counted.stop()
        book("all_reduce", "gradients", 1000, 4)
        assert counted.figures(first + 4)["bytes_per_step_logical"] == 0


def test_starting_again_without_an_end() -> None:
    """A training that failed has not ended; its meter does not count on."""
    counted = StepBytes()
    counted.start(0)
    former = counted.meter
    counted.start(0)
    book("all_reduce", "gradients", 100, 2)
    counted.stop()
    assert former.totals().operations == 0 and counted.meter.totals().operations == 1
